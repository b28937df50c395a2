"""A model's own modules as rows: attribute, class, shape, and portable site."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache

from nnsplice.atlas import Atlas
from nnsplice.cli.listing import ranges
from nnsplice.cli.table import TableRow
from nnsplice.paths import Path

HEAD: TableRow = ("module", "class", "weight", "portable site")


def rows(atlas: Atlas, under: Path | None = None, *, collapse: bool = True) -> list[TableRow]:
    """The module tree.

    Args:
        under: a native path to the modules to start from.
        collapse: put equal entries of a list together.
    """
    if under is None:
        return list(_Walk(atlas, collapse).module("", "model", 0, {}))
    places = atlas.expand(Path(under.steps, native=True))
    walk = _Walk(atlas, collapse)
    return [row for path in places for row in walk.module(path.site.module, str(Path(path.steps, native=True)), 0, {})]


class _Walk:
    def __init__(self, atlas: Atlas, collapse: bool) -> None:
        self.atlas, self.nodes, self.collapse = atlas, atlas.tree.nodes, collapse
        self.shape = cache(self._shape)

    def module(self, name: str, label: str, depth: int, spelled: Mapping[str, str]) -> Iterator[TableRow]:
        """A module and its submodules; `spelled` has the numbers of a portable site."""
        node = self.nodes[name]
        if node.indexed and node.container and node.children:
            yield from self._entries(name, label, depth, spelled)
            return
        weight = node.params.get("weight")
        place = self.atlas.places.get(name)
        yield (
            "  " * depth + label,
            node.kind,
            str(list(weight[1])) if weight else "",
            _text(place, spelled) if place else "",
        )
        if node.indexed:
            yield from self._entries(name, "", depth + 1, spelled)
            return
        for attribute, child in node.children.items():
            if child == (f"{name}.{attribute}" if name else attribute):
                yield from self.module(child, attribute, depth + 1, spelled)
            else:
                yield ("  " * (depth + 1) + attribute, f"is {child}", "", "")

    def _entries(self, name: str, label: str, depth: int, spelled: Mapping[str, str]) -> Iterator[TableRow]:
        """The entries of a list, neighbours of one shape together."""
        groups: list[tuple[str, list[int]]] = []
        for number, child in enumerate(self.nodes[name].children.values()):
            if self.collapse and groups and self.shape(groups[-1][0]) == self.shape(child):
                groups[-1][1].append(number)
            else:
                groups.append((child, [number]))
        for first, numbers in groups:
            text, place = ranges(numbers), self.atlas.places.get(first)
            inside = {**spelled, place.steps[-1].name: text} if place and len(numbers) > 1 else spelled
            yield from self.module(first, f"{label}[{text}]", depth, inside)

    def _shape(self, name: str) -> object:
        node = self.nodes[name]
        params = tuple((attribute, shape) for attribute, (_, shape) in node.params.items())
        children = tuple((attribute, self.shape(child)) for attribute, child in node.children.items())
        return node.kind, params, children


def _text(path: Path, spelled: Mapping[str, str]) -> str:
    steps: Iterable[str] = (
        step.name if step.index is None else f"{step.name}[{spelled.get(step.name, step.index)}]" for step in path.steps
    )
    return ".".join((*((path.tower,) if path.tower else ()), *steps))
