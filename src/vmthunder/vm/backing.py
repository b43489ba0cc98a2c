"""What machines want of this node's agent: the file under an overlay, and what it brought in. Blocking; no state."""

from dataclasses import dataclass
from pathlib import Path

from vmthunder.errors import VMThunderError
from vmthunder.node.control import AgentClient


@dataclass(frozen=True, slots=True)
class BackingImage:
    """The image file under a machine's overlay."""

    name: str
    image_id: str
    path: Path | str
    """Or the URI of an NBD export. Of one image id: its bytes stay the same when the name is published again."""
    virtual_bytes: int

    @classmethod
    def resolve(cls, agent: AgentClient, image: str) -> "BackingImage":
        """The image of that id, or the one that a name means now.

        Raises what the agent does: AgentUnavailable, NotFound, ….
        """
        found = agent.resolve(image)
        # This node may know an id that it never heard a name of.
        name = found["name"] or found["image_id"]
        return cls(name, found["image_id"], Path(found["path"]), found["virtual_bytes"])


@dataclass(frozen=True, slots=True)
class NodeCounters:
    """What this node's agent has brought in so far, for all guests together."""

    agent_pid: int
    bytes_fetched: int
    bytes_from_cache: int

    @classmethod
    def now(cls, agent: AgentClient) -> "NodeCounters | None":
        """None while no agent answers: a guest that runs does not need it to."""
        try:
            status = agent.status()
        except VMThunderError:
            return None
        return cls(status["pid"], status["fetch"]["bytes_fetched"], status["fetch"]["bytes_from_cache"])
