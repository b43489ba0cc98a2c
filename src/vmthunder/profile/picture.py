"""Pictures of a profile: where on the disk boots read, over time. PNG, SVG and PDF need the extra `plot` (matplotlib)."""

import html
import json
from pathlib import Path
from typing import Final

from vmthunder.errors import MissingTool, Usage
from vmthunder.profile.profile import Profile

PICTURES: Final = (".png", ".svg", ".pdf")
PAGE: Final = ".html"

_TEMPLATE: Final = Path(__file__).with_name("picture.html")


def check_suffix(path: Path) -> None:
    """Whether we can draw into that file. Raises Usage, MissingTool."""
    if path.suffix not in (PAGE, *PICTURES):
        raise Usage(f"cannot draw {path.name}: its suffix must be {PAGE} or one of {', '.join(PICTURES)}")
    if path.suffix in PICTURES:
        try:
            import matplotlib as _  # noqa: F401, ICN001 - the question is whether it is there
        except ImportError:
            raise MissingTool(
                f"{path.suffix} needs matplotlib: pip install 'vmthunder[plot]'; {PAGE} needs nothing"
            ) from None


def draw(profile: Profile, name: str, virtual_bytes: int, path: Path) -> None:
    """Draw the profile of image `name` into a file whose suffix says how. Raises OSError."""
    if path.suffix == PAGE:
        path.write_text(_page(profile, name, virtual_bytes))
    else:
        _picture(profile, name, virtual_bytes, path)


def _page(profile: Profile, name: str, virtual_bytes: int) -> str:
    """A page that needs no other file and no network; points tell of themselves under the pointer."""
    data = {
        "chunkBytes": profile.chunk_bytes,
        "virtualBytes": virtual_bytes,
        "entries": [[entry.at_ms, entry.index, entry.share, int(entry.demand)] for entry in profile.expected()],
    }
    title = html.escape(f"{name}, {profile.boots} boots")
    return _TEMPLATE.read_text().replace("%TITLE%", title).replace("%DATA%", json.dumps(data, separators=(",", ":")))


def _picture(profile: Profile, name: str, virtual_bytes: int, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for demand, color, label in ((False, "#9ab8d3", "read ahead"), (True, "#1f4e79", "a guest waited")):
        entries = [entry for entry in profile.expected() if entry.demand is demand]
        if entries:
            times_s = [entry.at_ms / 1000 for entry in entries]
            offsets_mib = [entry.index * profile.chunk_bytes / (1 << 20) for entry in entries]
            axes.plot(times_s, offsets_mib, ".", color=color, markersize=3, label=f"{label} ({len(entries)})")
    axes.set(
        title=f"{name}, {profile.boots} boots", xlabel="seconds from the first read", ylabel="offset on the disk, MiB"
    )
    axes.set_ylim(0, virtual_bytes / (1 << 20))
    axes.set_xlim(left=0)
    if profile.expected():
        axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
