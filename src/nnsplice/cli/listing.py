"""The sites of a model as rows: site, values, width, and why a value is refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from nnsplice.checks import Outline, OutlinePart, OutlineValue
from nnsplice.cli.table import TableRow

HEAD: TableRow = ("site", "values", "width", "")


def rows(outlines: Sequence[Outline], *, attention: str | None, inner: str | None = None) -> list[TableRow]:
    """The list of addresses.

    Args:
        attention: which attention the model runs with; only eager attention makes patterns.
        inner: the index of heads, groups, neurons or experts; None for all.
    """
    several = len(outlines) > 1 or any(tower.name == "encoder" for tower in outlines)
    found: list[TableRow] = []
    for tower in outlines:
        depth = int(several)
        if several:
            found.append((tower.name, "", "", ""))
        for part in tower.before:
            found += _part(part, depth, part.names[-1], attention)
        for layers in tower.layers:
            found += _layers(f"layers[{ranges(layers.numbers)}]", layers.parts, depth, attention, inner)
        for part in tower.after:
            found += _part(part, depth, part.names[-1], attention)
    return found


def _layers(
    name: str, parts: Iterable[OutlinePart], depth: int, attention: str | None, inner: str | None
) -> Iterator[TableRow]:
    # A part without its whole in the list is named with it.
    shown: list[tuple[str, ...]] = []
    for part in parts:
        above = next((len(names) for names in reversed(shown) if part.names[: len(names)] == names), None)
        label = ".".join(part.names if above is None else part.names[above:])
        if part.count is not None:
            label += f"[{inner if inner is not None else ranges(range(part.count))}]"
        if above is None:
            label = f"{name}.{label}" if label else name
        shown.append(part.names)
        yield from _part(part, depth + (0 if above is None else 1 + above), label, attention)


def _part(part: OutlinePart, depth: int, label: str, attention: str | None) -> Iterator[TableRow]:
    """A row for each width and each reason, the first with the site's name."""
    groups: dict[tuple[str, str], list[str]] = {}
    for value in part.values:
        groups.setdefault(_width(value, attention), []).append(f".{value.name}")
    for number, ((width, note), names) in enumerate(groups.items()):
        yield ("  " * depth + label if number == 0 else "", " ".join(names), width, note)


def _width(value: OutlineValue, attention: str | None) -> tuple[str, str]:
    if value.refused:
        return "refused", value.refused
    if value.name == "pattern":
        note = "" if attention in (None, "eager") else f"with eager attention; now it is {attention}"
        return "tokens", note
    return "?" if value.width is None else str(value.width), ""


def ranges(numbers: Iterable[int]) -> str:
    """Numbers in order, as few stretches as there are.

    >>> from nnsplice.cli.listing import ranges
    >>> ranges([0, 1, 2, 5])
    '0..2,5'
    """
    stretches: list[list[int]] = []
    for number in numbers:
        if stretches and number == stretches[-1][1] + 1:
            stretches[-1][1] = number
        else:
            stretches.append([number, number])
    return ",".join(str(first) if first == last else f"{first}..{last}" for first, last in stretches)
