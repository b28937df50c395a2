"""Parameters as a tree of their modules, with a bar for the selected share of each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from nnsplice.shown import shown

#: Cells of a bar.
CELLS = 24
_FULL, _EMPTY = "█", "░"
#: Terminal colours: all of a parameter, a part of it, the rest; and the end of a colour.
_ALL, _SOME, _REST, _OFF = "\x1b[32m", "\x1b[33m", "\x1b[2m", "\x1b[0m"


@dataclass(frozen=True, slots=True)
class ParameterShare:
    """One parameter."""

    name: str
    selected: int
    total: int


def by_number(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts names with their numbers as numbers.

    >>> from nnsplice.atlas.drawing import by_number
    >>> sorted(["h.10.w", "h.2.w"], key=by_number)
    ['h.2.w', 'h.10.w']
    """
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in re.split(r"\.", name)]


def draw(rows: Iterable[ParameterShare], *, colour: bool = False) -> str:
    """The tree, with a line for the sum; names keep their order, layers are sorted by their numbers.

    >>> from nnsplice.atlas.drawing import ParameterShare, draw
    >>> print(draw([ParameterShare("h.0.attn.q", 512, 2048), ParameterShare("h.0.attn.o", 2048, 2048)]))
    h.0.attn
    ├── q  ██████░░░░░░░░░░░░░░░░░░   25.0%  (512 of 2,048)
    └── o  ████████████████████████  100.0%  (2,048 of 2,048)
    2 parameters  (2,560 of 4,096)
    """
    rows = list(rows)
    root = _Branch("")
    for row in rows:
        root.add(shown(row.name).split("."), row)  # a name may hold what a terminal obeys
    lines = list(_lines(root))
    width = max((len(text) for text, row in lines if row is not None), default=0)
    drawn = [text if row is None else f"{text:{width}}  {_bar(row, colour)}" for text, row in lines]
    selected, total = sum(row.selected for row in rows), sum(row.total for row in rows)
    count = f"{len(rows)} parameter{'s' * (len(rows) != 1)}"
    return "\n".join([*drawn, f"{count}  ({selected:,} of {total:,})"])


class _Branch:
    """A module of the tree while it is drawn."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.row: ParameterShare | None = None
        self.children: dict[str, _Branch] = {}

    def add(self, names: list[str], row: ParameterShare) -> None:
        branch = self
        for name in names:
            branch = branch.children.setdefault(name, _Branch(name))
        branch.row = row

    def sorted(self) -> list[_Branch]:
        """The children in their order, numbers by size."""
        children = list(self.children.values())
        if all(child.name.isdigit() for child in children):
            children.sort(key=lambda child: int(child.name))
        return children


def _lines(root: _Branch) -> Iterator[tuple[str, ParameterShare | None]]:
    for child in root.sorted():
        yield from _branch(child, "", "", "")


def _branch(branch: _Branch, prefix: str, joint: str, below: str) -> Iterator[tuple[str, ParameterShare | None]]:
    name = branch.name
    # A module that leads to one thing only needs no line of its own.
    while branch.row is None and len(branch.children) == 1:
        (branch,) = branch.children.values()
        name = f"{name}.{branch.name}"
    yield f"{prefix}{joint}{name}", branch.row
    children = branch.sorted()
    for number, child in enumerate(children):
        last = number == len(children) - 1
        yield from _branch(child, prefix + below, "└── " if last else "├── ", "    " if last else "│   ")


def _bar(row: ParameterShare, colour: bool) -> str:
    share = row.selected / row.total if row.total else 0.0
    # A part never looks like all or like nothing.
    cells = (
        0 if not row.selected else CELLS if row.selected == row.total else min(max(round(share * CELLS), 1), CELLS - 1)
    )
    full, empty = _FULL * cells, _EMPTY * (CELLS - cells)
    if colour:
        full = f"{_ALL if cells == CELLS else _SOME}{full}{_OFF}" if full else ""
        empty = f"{_REST}{empty}{_OFF}" if empty else ""
    return f"{full}{empty}  {share:6.1%}  ({row.selected:,} of {row.total:,})"
