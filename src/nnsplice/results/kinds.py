"""The kind of site that a grid shows: `layers[:].mlp.output`, by name or by a path to one site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from nnsplice.errors import BadArgument, PathError, UnknownPath
from nnsplice.paths import Path, Slice, parse_path
from nnsplice.results.table import Cell


def kinds_of(cells: Sequence[Cell]) -> tuple[str, ...]:
    """The kinds of site, in the order of their first cells."""
    return tuple(dict.fromkeys(cell.component for cell in cells))


def kind_named(cells: Sequence[Cell], name: str | Path | None) -> str:
    """The kind with this name, or of this site; None is the only kind.

    Raises:
        BadArgument: None where there are several kinds, or a name that fits several.
        UnknownPath: no kind has this name.
    """
    kinds = kinds_of(cells)
    if name is None:
        if len(kinds) == 1:
            return kinds[0]
        if not kinds:
            raise BadArgument("this result has no cells, so there is nothing to show")
        raise BadArgument(
            f"{len(kinds)} kinds of site were changed, and a grid shows one",
            expected=f"one of {', '.join(kinds)}",
            write=f"result.grid({kinds[0]!r}), or result.plot({kinds[0]!r})",
        )
    text = str(name)
    if text in kinds:
        return text
    place = _place(name)
    if place is not None:
        general = _general(place)
        for cell in cells:
            if cell.component == general or _place(cell.path) == place:
                return cell.component
    holding = [kind for kind in kinds if text and text in kind]
    if len(holding) == 1:
        return holding[0]
    if holding:
        raise BadArgument(f"{text!r} could be any of {', '.join(holding)}", expected="the name of one of them")
    raise UnknownPath("no such kind of site was changed", path=text, expected=f"one of {', '.join(kinds)}")


def _place(name: str | Path) -> Path | None:
    """The site of a path, without its identity in a model; None for a text that is no path."""
    try:
        return replace(parse_path(name).place, site=None)
    except PathError:
        return None


def _general(place: Path) -> str:
    """`layers[:].mlp.output` for `layers[3].mlp`."""
    steps = tuple(replace(step, index=None if step.index is None else Slice()) for step in place.steps)
    sae = place.sae
    if sae is not None and sae.features is not None:
        sae = replace(sae, features=Slice())
    return str(replace(place, steps=steps, value=place.value or "output", sae=sae))
