"""A BitTorrent client, as a program: `python -m vmthunder.bench.methods.torrent_peer make|seed|fetch …`.

    make FILE TORRENT              describe a file
    seed ADDRESS FOLDER TORRENT    give what is in FOLDER
    fetch ADDRESS FOLDER PEER…     fetch what FOLDER/disk.torrent describes once that is there, then go on to give

Says `listening` and `complete` on lines of their own. libtorrent's defaults, but for what its tuning guide says about a fast
local network: TCP instead of µTP, no limit on those that are served at once. No tracker and no DHT: all peers are told.
"""

import sys
import time
from pathlib import Path
from typing import Final

import libtorrent

PORT: Final = 6881
TORRENT: Final = "disk.torrent"
_POLL_S = 0.02


def main() -> None:
    task, *rest = sys.argv[1:]
    if task == "make":
        file, torrent = map(Path, rest)
        made = libtorrent.create_torrent(libtorrent.list_files(str(file)))
        libtorrent.set_piece_hashes(made, str(file.parent))
        torrent.write_bytes(libtorrent.bencode(made.generate()))
        return
    address, folder, *others = rest
    session = libtorrent.session(
        {
            "listen_interfaces": f"{address}:{PORT}",
            "enable_dht": False,
            "enable_lsd": False,
            "enable_upnp": False,
            "enable_natpmp": False,
            "enable_outgoing_utp": False,
            "enable_incoming_utp": False,
            "unchoke_slots_limit": -1,
            "allow_multiple_connections_per_ip": True,
        }
    )
    say("listening")
    torrent = Path(others[0]) if task == "seed" else Path(folder, TORRENT)
    while not torrent.exists():
        time.sleep(_POLL_S)
    parameters = libtorrent.add_torrent_params()
    parameters.ti = libtorrent.torrent_info(str(torrent))
    parameters.save_path = folder
    if task == "seed":
        parameters.flags |= libtorrent.torrent_flags.seed_mode
    handle = session.add_torrent(parameters)
    if task == "fetch":
        for other in others:
            handle.connect_peer((other, PORT))
    while not handle.status().is_seeding:
        time.sleep(_POLL_S)
    say("complete")
    while True:
        time.sleep(3600)


def say(word: str) -> None:
    sys.stdout.write(word + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
