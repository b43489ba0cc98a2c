"""The page of `bench rivals`: one HTML file that needs nothing else, with the table, the plots and how it was measured."""

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from vmthunder.bench.plot import plot_rivals

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .2rem .7rem; text-align: right; }
th:nth-child(2), td:nth-child(2) { text-align: left; } thead { border-bottom: 2px solid #888; }
tr.begin td { border-top: 1px solid #ccc; } tr.ours { font-weight: 600; } svg { max-width: 100%; height: auto; }
dt { float: left; clear: left; min-width: 11rem; color: #666; } pre { overflow-x: auto; background: #f5f5f5; padding: .7rem; }
"""
_HEADINGS = (
    "nodes", "method", "first ready s", "median s", "last s", "last ÷ local", "origin sent MiB", "stored per node MiB", "CPU s",
)  # fmt: skip


def write_report(result: Mapping[str, Any], directory: Path) -> list[Path]:
    """Write `rivals.json`, `.png`, `.svg` and `.html` into a directory; returns them. Raises OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"rivals.{suffix}" for suffix in ("json", "png", "svg", "html")]
    paths[0].write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    plot_rivals(result, paths[1:3])
    paths[3].write_text(_page(result, paths[2].read_text()))
    return paths


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of the table, in the order of the page's headings."""
    over = row["last_over_local"]
    return (
        str(row["nodes"]),
        row["name"],
        *(f"{row[key]:.2f}" for key in ("min_s", "median_s", "max_s")),
        f"{over:.2f}" if over else "",
        *(f"{row[key] / 2**20:,.0f}" for key in ("origin_sent_bytes", "stored_bytes")),
        f"{row['cpu_s']:.1f}",
    )


def _page(result: Mapping[str, Any], svg: str) -> str:
    machine = result["machine"]
    lines = []
    before = None
    for row in result["rows"]:
        kinds = [*(["begin"] if row["nodes"] != before else []), *(["ours"] if row["name"] == "VMThunder" else [])]
        before = row["nodes"]
        columns = "".join(f"<td>{escape(cell)}</td>" for cell in cells(row))
        lines.append(f'<tr class="{" ".join(kinds)}">{columns}</tr>')
    lost = [f"{each['name']}: absent: {each['reason']}" for each in result["absent"]]
    lost += [f"{each['name']} on {each['nodes']} nodes: failed: {each['reason']}" for each in result["failed"]]
    facts = {"commit": result["commit"], "command": result["command"], **machine}
    if result["think_scale"] is not None:
        facts["guest"] = f"replayed boot, think times × {result['think_scale']:g}"
        facts["stored bytes touched"] = f"{result['touched_bytes'] / 2**20:.1f} MiB"
        facts["least stall Δ*"] = f"{result['delta_star_s']:.3f} s"
    raw = escape(json.dumps(result, indent=1, ensure_ascii=False))
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>VMThunder beside what people use today</title><style>{_STYLE}</style>
<h1>One image, booted on many nodes at once</h1>
<p>Every cell: new nodes with nothing on them, links of {escape(machine["rate"])}, all boots begin at the same moment.
Dashed lines are what no method can do better.</p>
{svg[svg.index("<svg") :]}
<table><thead><tr>{"".join(f"<th>{heading}</th>" for heading in _HEADINGS)}</tr></thead>
<tbody>{"".join(lines)}</tbody></table>
{"<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lost) + "</ul>" if lost else ""}
<h2>How it was measured</h2>
<dl>{"".join(f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items())}</dl>
<h2>Figures</h2><details><summary>as JSON</summary><pre>{raw}</pre></details>
</html>
"""
