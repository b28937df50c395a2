"""The layout and figure of a circuit: layers upwards, heads in columns, MLPs beside them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from nnsplice import plots
from nnsplice.circuits.shape import Shape
from nnsplice.paths import Path, parse_path

Edge = tuple[Path, Path]
#: The most edges that are drawn: the strongest.
MOST = 4000


@dataclass(frozen=True, slots=True)
class DrawnNode:
    """A node, or the keys or values of a group, at which edges may end too."""

    path: str
    kind: str
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class DrawnEdge:
    """An edge between two marks, by their numbers."""

    sender: str
    receiver: str
    start: int
    end: int
    score: float | None


@dataclass(frozen=True)
class Drawing:
    """All marks, and the edges with the strongest first."""

    marks: tuple[DrawnNode, ...]
    lines: tuple[DrawnEdge, ...]
    #: How many edges there are that are not drawn.
    left_out: int

    @classmethod
    def of(
        cls, nodes: Sequence[Path], edges: Sequence[Edge], scores: Sequence[float] | None, shape: Shape | None
    ) -> Drawing:
        """The drawing of a circuit's members."""
        order = range(len(edges)) if scores is None else sorted(range(len(edges)), key=lambda n: -abs(scores[n]))
        shown = list(order)[:MOST]
        paths = dict.fromkeys([*nodes, *(end for n in shown for end in map(_drawn_at, edges[n]))])
        width = _width(paths, shape)
        top = len(shape.layers) if shape is not None else 1 + max(map(_layer, paths), default=0)
        marks = tuple(_mark(path, width, top, shape) for path in paths)
        at = {path: number for number, path in enumerate(paths)}
        lines = tuple(
            DrawnEdge(
                str(edges[n][0]), str(edges[n][1]), at[_drawn_at(edges[n][0])], at[_drawn_at(edges[n][1])],
                None if scores is None else float(scores[n]),
            )
            for n in shown
        )  # fmt: skip
        return cls(marks, lines, len(edges) - len(shown))


def draw(drawing: Drawing, title: str, ax: plots.Axes | None) -> plots.Axes:
    """A figure of it, with edges as wide as their scores."""
    largest = max((abs(line.score or 0.0) for line in drawing.lines), default=0.0)
    sizes = [1.0 if not largest or line.score is None else line.score / largest for line in drawing.lines]
    return plots.network(
        [(mark.x, mark.y) for mark in drawing.marks],
        [_label(mark) for mark in drawing.marks],
        [(line.start, line.end) for line in drawing.lines],
        sizes=sizes,
        title=title,
        ax=ax,
    )


def _label(mark: DrawnNode) -> str:
    numbers = re.findall(r"\d+", mark.path)
    shown = {"head": "a{}.{}", "mlp": "m{}", "expert": "m{}.{}", "group": ""}.get(mark.kind, mark.kind)
    position = parse_path(mark.path).position if mark.kind != "group" else None
    return shown.format(*numbers) + ("" if position is None else mark.path[mark.path.rindex("[") :])


def _drawn_at(path: Path) -> Path:
    """The node that a site is drawn as: a head's queries are at the head."""
    return replace(path, value=None) if path.value == "q" else path


def _layer(path: Path) -> int:
    index = path.steps[0].index
    return index if isinstance(index, int) else 0


def _index(path: Path) -> int:
    index = path.steps[-1].index
    return index if isinstance(index, int) else 0


def _shifted(path: Path) -> float:
    """How far right of its mark some tokens of it are drawn, so that several do not lie on each other."""
    position = path.position
    if position is None:
        return 0.0
    return 0.1 + 0.7 * ((position if isinstance(position, int) else sum(str(position).encode())) % 8) / 8


def _width(paths: Sequence[Path] | dict[Path, None], shape: Shape | None) -> int:
    if shape is not None:
        return max(layer.heads for layer in shape.layers)
    return 1 + max((_index(path) for path in paths if path.steps[-1].name in ("heads", "groups")), default=0)


def _mark(path: Path, width: int, top: int, shape: Shape | None) -> DrawnNode:
    name = path.steps[-1].name
    middle = (width - 1) / 2
    if name in ("embed", "unembed"):
        return DrawnNode(str(path), name, middle + _shifted(path), 0.0 if name == "embed" else 2.0 * top + 1.0)
    row = 2.0 * _layer(path) + 1.0
    if path.sae is not None:
        number = path.sae.features if isinstance(path.sae.features, int) else -1
        return DrawnNode(
            str(path), "feature", float(width) + 1.5 + 0.9 * (number % 16) / 16 + _shifted(path), row + 1.0
        )
    if name == "mlp":
        return DrawnNode(str(path), "mlp", float(width) + 0.5 + _shifted(path), row + 1.0)
    if name == "experts":
        return DrawnNode(str(path), "expert", float(width) + 1.5 + _index(path), row + 1.0)
    if name == "heads":
        return DrawnNode(str(path), "head", float(_index(path)) + _shifted(path), row)
    size = 1.0
    if shape is not None:
        layer = shape.layers[_layer(path)]
        size = layer.heads / layer.groups
    return DrawnNode(
        str(path), "group", (_index(path) + 0.5) * size - 0.5 + (0.12 if path.value == "v" else -0.12), row - 0.35
    )
