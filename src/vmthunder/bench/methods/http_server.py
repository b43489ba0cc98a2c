"""Files over HTTP by nginx, and the disk as the file that is usually offered so: a qcow2, compressed with zstd."""

from pathlib import Path
from typing import Final

from vmthunder.bench.cell import Cell
from vmthunder.bench.processes import finish
from vmthunder.bench.reader import warm

COMPRESSED: Final = "disk.qcow2"
_CONVERT_S = 3600.0
# nginx's own beginner's guide and "Serving Static Content": sendfile, tcp_nopush, one worker per CPU.
_CONFIGURATION = """
daemon off; user root; worker_processes auto; pid {work}/nginx.pid; error_log stderr;
events {{ worker_connections 1024; }}
http {{
    access_log off; sendfile on; tcp_nopush on;
    client_body_temp_path {work}/body; proxy_temp_path {work}/proxy; fastcgi_temp_path {work}/fastcgi;
    uwsgi_temp_path {work}/uwsgi; scgi_temp_path {work}/scgi;
    server {{ listen {address}:80; root {folder}; }}
}}
"""


def compressed(disk: Path, work: Path) -> Path:
    """The disk as a compressed qcow2, in a folder of its own below `work`; made once. Raises Failure."""
    path = work / "files" / COMPRESSED
    if not path.exists():
        path.parent.mkdir()
        options = ["-O", "qcow2", "-c", "-o", "compression_type=zstd", "-W"]
        finish(
            "qemu-img",
            ["qemu-img", "convert", "-f", "raw", *options, str(disk), str(path)],
            work / "convert.log",
            _CONVERT_S,
        )
    warm(path)
    return path


def serve_files(cell: Cell, folder: Path) -> str:
    """Offer a folder from the origin until the cell ends; gives its URL. Raises Failure."""
    configuration = cell.work / "nginx.conf"
    address = cell.origin.address
    configuration.write_text(_CONFIGURATION.format(work=cell.work, address=address, folder=folder))
    pid = cell.work / "nginx.pid"
    argv = ["nginx", "-e", "stderr", "-c", str(configuration)]
    cell.start(cell.origin, argv, lambda _: pid.exists() and bool(pid.read_text()))
    return f"http://{address}"
