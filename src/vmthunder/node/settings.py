"""What an operator chose for one agent, and the paths that follow from it. No I/O.

The launcher makes the settings, the keeper carries them as one argument and every worker reads them from there: a
respawned worker works for the same origin, mount and directories as the one before it.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from vmthunder.errors import Usage

DEFAULT_STATE_DIR = Path("/var/lib/vmthunder")
DEFAULT_RUN_DIR = Path("/run/vmthunder")
DEFAULT_PEER_LISTEN = "0.0.0.0:8931"
DEFAULT_CONTROL_LISTEN = "0.0.0.0:8932"
MAX_SOCKET_CHARS = 100
"""Of 107 that Linux allows (sun_path in unix(7)), with room for a temporary name."""


def control_socket(run_dir: Path) -> Path:
    """Where the agent that owns `run_dir` answers."""
    return run_dir / "agent.sock"


def parse_address(text: str, option: str) -> tuple[str, int]:
    """Address and port. Raises Usage."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise Usage(f"{option} {text!r} is not ADDRESS:PORT, such as 127.0.0.1:8930 or 0.0.0.0:8930")
    return host.strip("[]") or "0.0.0.0", int(port)


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """Settings of one agent. Paths are absolute."""

    origin: str
    mount: Path
    state_dir: Path
    run_dir: Path
    cache_bytes: int = 10 << 30
    """Quota of the chunk cache on disk."""
    decoded_bytes: int = 256 << 20
    """Budget of decoded chunks in memory."""
    lookup_timeout_s: float = 30.0
    """How long opening an image that this node never saw may wait for the origin; 0: for ever."""
    cluster_key: Path | None = None
    """File with the cluster key. Without it this node neither listens for peers nor asks any."""
    tracker: str | None = None
    """URL of the tracker; without it this node is in no swarm."""
    peer_listen: str = DEFAULT_PEER_LISTEN
    """ADDRESS:PORT where peers may connect."""
    control_listen: str | None = None
    """ADDRESS:PORT where other machines that have the cluster key may boot virtual machines; None: nowhere."""
    advertise: str | None = None
    """Host that peers connect to; None: the address from which this node reaches the tracker."""
    rack: str = ""
    upload_limit_bytes_s: int = 0
    """To all peers together; 0: none."""
    download_limit_bytes_s: int = 0
    """From peers and origin together; 0: none."""
    prefetch: bool = True
    """Whether to learn what boots read, and to bring it here before a guest asks."""
    prefetch_memory_bytes: int = 256 << 20
    """Of prefetched chunks in the page cache."""
    policy: Path | None = None
    """File of images that are to be kept here."""
    hydrate_bytes_s: int | None = None
    """Rate at which the rest of an image is brought here after a boot; 0: as fast as disturbs nobody; None: not at all."""

    nova: bool = False
    """Whether the mount is Nova's `_base`, whose real files show through."""
    base_fd: int | None = None
    """The directory beneath, opened before the mount hides it; inherited by keeper and workers."""
    complete_after_s: float = 30.0
    """How long after Nova wants an image it is brought here whole: a boot shall come first."""

    def __post_init__(self) -> None:
        for path in (self.mount, self.state_dir, self.run_dir, *filter(None, (self.cluster_key, self.policy))):
            if not path.is_absolute():
                raise Usage(f"{path} is not an absolute path")
        if len(os.fsencode(self.socket)) > MAX_SOCKET_CHARS:
            raise Usage(f"run directory {self.run_dir} is too long for a unix socket; choose a shorter --run-dir")
        if (
            min(self.cache_bytes, self.decoded_bytes, self.prefetch_memory_bytes) < 0
            or not 0 <= self.lookup_timeout_s < 1e9
        ):
            raise Usage("sizes and time-outs of an agent must not be negative")
        if self.tracker is not None and self.cluster_key is None:
            raise Usage(
                "peers talk only to those who have the cluster key; give it with --cluster-key, or use --no-p2p"
            )
        parse_address(self.peer_listen, "--peer-listen")
        if self.control_listen is not None:
            parse_address(self.control_listen, "--control-listen")

    @property
    def socket(self) -> Path:
        return control_socket(self.run_dir)

    @property
    def log_file(self) -> Path:
        """Where a detached agent writes its log."""
        return self.run_dir / "agent.log"

    @property
    def mount_state_file(self) -> Path:
        return self.run_dir / "mount.json"

    @property
    def real_state_file(self) -> Path:
        return self.run_dir / "real.json"

    @property
    def nova_dir(self) -> Path:
        return self.state_dir / "nova"

    @property
    def node_id_file(self) -> Path:
        return self.state_dir / "node-id"

    @property
    def materialized_dir(self) -> Path:
        return self.state_dir / "materialized"

    def to_json(self) -> str:
        return json.dumps({key: str(v) if isinstance(v, Path) else v for key, v in asdict(self).items()})

    @classmethod
    def from_json(cls, text: str) -> "AgentSettings":
        """Raises Usage."""
        try:
            fields = json.loads(text)
            paths = ("mount", "state_dir", "run_dir", "cluster_key", "policy")
            fields.update((key, Path(fields[key])) for key in paths if fields.get(key) is not None)
            return cls(**fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise Usage(f"these are not the settings of an agent: {error!r}") from None
