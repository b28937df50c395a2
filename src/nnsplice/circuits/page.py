"""A circuit as a self-contained HTML page.

The page is `page.html`, which draws the JSON that is put into it. All texts reach the page as text, and the page's own
policy forbids it to load anything.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

from nnsplice.circuits.drawing import Drawing, DrawnNode
from nnsplice.files import whole

#: Digits of a score on the page; the file has all of them.
DIGITS = 6


def write(
    path: str | os.PathLike[str],
    drawing: Drawing,
    title: str,
    provenance: Mapping[str, Any],
    scores: Mapping[str, float] | None,
) -> None:
    """Write the page: the whole of it, or nothing.

    Args:
        scores: the scores of nodes, by address, for a circuit of nodes.
    """
    text = page(drawing, title, provenance, scores)
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="xmlcharrefreplace")


def page(drawing: Drawing, title: str, provenance: Mapping[str, Any], scores: Mapping[str, float] | None) -> str:
    """The page's text."""
    template = resources.files("nnsplice.circuits").joinpath("page.html").read_text(encoding="utf-8")
    before, between, after = template.split("@@")
    metric = provenance.get("metric")
    about = [
        provenance.get("model"),
        provenance.get("method"),
        metric.get("name") if isinstance(metric, Mapping) else metric,
    ]
    record = {
        "title": title,
        "about": ", ".join(str(part) for part in about if part is not None),
        "total": len(drawing.lines) + drawing.left_out,
        "marks": [
            {
                "path": mark.path, "kind": mark.kind, "x": mark.x, "y": mark.y, "layer": _layer(mark.path),
                "label": _label(mark),
                "score": None if scores is None or mark.path not in scores else _number(scores[mark.path]),
            }
            for mark in drawing.marks
        ],
        "lines": [
            {
                "sender": line.sender, "receiver": line.receiver, "start": line.start, "end": line.end,
                "score": None if line.score is None else _number(line.score),
            }
            for line in drawing.lines
        ],
    }  # fmt: skip
    # `<` could end the script that the data stands in; as an escape it is the same JSON.
    data = json.dumps(record, separators=(",", ":"), allow_nan=False)
    escaped = data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return before + html.escape(title) + between + escaped + after


def _label(mark: DrawnNode) -> str:
    """The text inside a mark: the number of a head; nothing fits into a group's dot."""
    if mark.kind == "head":
        return mark.path.rpartition("[")[2].removesuffix("]")
    return "" if mark.kind == "group" else mark.kind


def _layer(path: str) -> int | None:
    found = re.match(r"layers\[(\d+)\]", path)
    return None if found is None else int(found[1])


def _number(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
