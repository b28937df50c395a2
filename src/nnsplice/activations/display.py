"""A capture as text and as an HTML table: sites, positions, rows, dtype, size."""

from __future__ import annotations

import html as escape
from collections.abc import Sequence

from nnsplice.activations.packs import Pack
from nnsplice.paths import Path, Position

SHOWN = 12

Line = tuple[str, str, str]


def text(packs: Sequence[Pack], rows: int) -> str:
    """A summary line, then one for each kind of site."""
    lines = _lines(packs)
    shown = [f"  {'  '.join(line)}" for line in lines[:SHOWN]]
    more = [f"  ... and {len(lines) - SHOWN} more kinds of site"] if len(lines) > SHOWN else []
    return "\n".join([f"SavedActivation: {_summary(packs, rows)}", *shown, *more])


def html(packs: Sequence[Pack], rows: int) -> str:
    """The same as a table."""
    lines = _lines(packs)
    body = "".join(
        "<tr>" + "".join(f"<td style='text-align:left'>{escape.escape(cell)}</td>" for cell in line) + "</tr>"
        for line in lines[:SHOWN]
    )
    more = f"<tr><td colspan=3>... and {len(lines) - SHOWN} more</td></tr>" if len(lines) > SHOWN else ""
    head = "".join(f"<th style='text-align:left'>{name}</th>" for name in ("site", "positions", "width"))
    return (
        f"<div><b>SavedActivation</b>: {escape.escape(_summary(packs, rows))}"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}{more}</tbody></table></div>"
    )


def size(count: int) -> str:
    """A number of bytes with a unit."""
    amount = float(count)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.4g} {unit}"
        amount /= 1000
    return f"{amount:.4g} GB"


def _summary(packs: Sequence[Pack], rows: int) -> str:
    if not packs:
        return "empty"
    counts = sorted({len(pack.keys) for pack in packs})
    positions = f"{counts[0]} position{'s' * (counts[0] > 1)} each" if len(counts) == 1 else "positions by site"
    dtypes = ", ".join(sorted({str(pack.tensor.dtype).removeprefix("torch.") for pack in packs}))
    nbytes = sum(pack.tensor.numel() * pack.tensor.element_size() for pack in packs)
    devices = {str(pack.tensor.device) for pack in packs} - {"cpu"}
    parts = [f"{len(packs)} site{'s' * (len(packs) > 1)}", positions, f"{rows} row{'s' * (rows != 1)}", dtypes]
    return ", ".join([*parts, size(nbytes), *sorted(devices)])


def _lines(packs: Sequence[Pack]) -> list[Line]:
    """One line for all sites that differ only in their numbers and hold the same positions."""
    groups: dict[tuple, list[Path]] = {}
    for pack in packs:
        place = pack.keys[0].place
        names = tuple((step.name, step.index is None) for step in place.steps)
        positions = tuple(key.position for key in pack.keys)
        kind = (place.native, place.tower, names, place.value, place.item, positions, pack.tensor.shape[-1])
        groups.setdefault(kind, []).append(place)
    return [(_span(places), _positions(kind[-2]), f"width {kind[-1]}") for kind, places in groups.items()]


def _positions(positions: Sequence[Position]) -> str:
    if len(positions) <= 4:
        return "".join(f"[{position}]" for position in positions)
    return f"[{positions[0]}] ... [{positions[-1]}] ({len(positions)} positions)"


def _span(places: Sequence[Path]) -> str:
    """The sites as one text, with ranges of numbers: `layers[0..11].output`."""
    first = places[0]
    count = 1
    names = ["model"] if first.native else [first.tower] if first.tower else []
    for depth, step in enumerate(first.steps):
        numbers = sorted({index for place in places if isinstance(index := place.steps[depth].index, int)})
        names.append(step.name + (f"[{_numbers(numbers)}]" if numbers else ""))
        count *= max(1, len(numbers))
    item = "" if first.item is None else f"[{first.item}]"
    # Head 0 of layer 0 and head 3 of layer 1 are two sites, but would read as four.
    some = "" if count == len(places) else f" ({len(places)} of these sites)"
    return ".".join([*names, first.value or "output"]) + item + some


def _numbers(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    if numbers[0] >= 0 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}..{numbers[-1]}"
    return ",".join(map(str, numbers[:6])) + (",..." if len(numbers) > 6 else "")
