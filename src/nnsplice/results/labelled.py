"""Results as labelled arrays and tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from nnsplice.errors import BadArgument
from nnsplice.results import measures
from nnsplice.results.parts import PART
from nnsplice.results.table import AXES, NAMED, Cell, Table

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

#: What an axis counts: numbers, or names of spans; None is every token at once.
Label = int | str | None


def token(table: Table, prompt: int, position: Label) -> str:
    """The text of a prompt's token, or the name of a span; empty where a position is not one of its tokens."""
    if isinstance(position, str):
        return position
    row = table.tokens[prompt] if table.tokens else ()
    return row[position] if isinstance(position, int) and -len(row) <= position < len(row) else ""


def array(table: Table, values: np.ndarray, kind: str, name: str) -> xr.DataArray:
    """The values of one kind of site on named axes, NaN where a cell is missing."""
    import xarray as xr

    numbers = [n for n, cell in enumerate(table.cells) if cell.component == kind]
    labels, at = points([table.cells[n] for n in numbers])
    whole = np.full((len(table.clean), *map(len, labels.values())), np.nan)
    # A site without numbers, such as an embedding's weights, is one cell on no axis.
    whole[(slice(None), *at.T)] = values[:, numbers] if labels else values[:, numbers[0]]
    coordinates: dict[str, Any] = {"prompt": table.prompts}
    for axis, of in labels.items():
        numbered = all(isinstance(one, int) for one in of)
        coordinates[axis] = np.array(of if numbered else [label_text(one) for one in of])
    positions = labels.get("position", [])
    if table.tokens and positions:
        texts = [[token(table, prompt, position) for position in positions] for prompt in range(len(table.clean))]
        # Along the positions alone where that says it all: such a coordinate also outlives a mean over prompts.
        same = all(row == texts[0] for row in texts)
        coordinates["token"] = ("position", texts[0]) if same else (("prompt", "position"), texts)
    return xr.DataArray(whole, dims=("prompt", *labels), coords=coordinates, name=name, attrs={"component": kind})


def frame(table: Table) -> pd.DataFrame:
    """A row for each prompt and cell that was measured."""
    prompts, numbers = np.nonzero(table.done)
    return _rows(table, prompts, numbers, measures.effect(table))


def frames(table: Table) -> Iterator[pd.DataFrame]:
    """The same, a frame for each prompt; effects are still counted in the mean of all."""
    effects = measures.effect(table)
    for prompt in range(len(table.clean)):
        numbers = np.flatnonzero(table.done[prompt])
        yield _rows(table, np.full(len(numbers), prompt), numbers, effects)


def _rows(table: Table, prompts: np.ndarray, numbers: np.ndarray, effects: np.ndarray) -> pd.DataFrame:
    import pandas as pd

    cells = [table.cells[n] for n in numbers]
    columns: dict[str, Any] = {
        "prompt": table.prompts[prompts],
        "component": [cell.component for cell in cells],
        **_columns(cells),
    }
    columns["token"] = [token(table, p, cell.position) for p, cell in zip(prompts.tolist(), cells, strict=True)]
    for name in ("key", "role", "set"):
        if any(getattr(cell, name) is not None for cell in table.cells):
            columns[name] = [getattr(cell, name) for cell in cells]
    if table.counts is not None:
        columns["n"] = table.counts[prompts, numbers].astype(int)
    columns["value"] = table.values[prompts, numbers]
    if table.exact is not None and table.edges is None:
        columns["exact"] = table.exact[prompts, numbers]
    columns["effect"] = effects[prompts, numbers]
    columns["clean"], columns["corrupted"] = table.clean[prompts], table.corrupted[prompts]
    columns["path"] = [cell.path for cell in cells]
    return pd.DataFrame(columns)


def best(table: Table, n: int, prompt: int | None) -> pd.DataFrame:
    """The cells that move most: of one prompt, or in the pooled mean over all of them, with the signed means."""
    import pandas as pd

    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise BadArgument(f"best({n!r})", expected="how many cells to show, at least 1")
    check_prompt(table, prompt)
    check_mean(table, prompt, "best")
    if prompt is not None:
        table = only(table, prompt)
    moved = measures.change(table)
    found = {"value": table.values, "change": moved, "effect": measures.pooled(table, moved)}
    if table.exact is not None and table.edges is None:
        found["exact"] = table.exact
    size = measures.size(table, moved)
    order = np.argsort(-size, kind="stable")[:n]  # NaN comes last
    order = order[~np.isnan(size[order])]
    cells = [table.cells[number] for number in order]
    columns: dict[str, Any] = {"component": [cell.component for cell in cells]}
    used = {axis for axis in (*AXES, *NAMED) if any(getattr(cell, axis) is not None for cell in table.cells)}
    columns |= {axis: column for axis, column in _columns(cells).items() if axis in used}
    columns |= {name: [getattr(cell, name) for cell in cells] for name in ("key", "role", "set") if name in used}
    if len(table.clean) == 1:
        columns["token"] = [token(table, 0, cell.position) for cell in cells]
    columns |= {name: measures.mean(values)[order] for name, values in found.items()}
    return pd.DataFrame({**columns, "path": [cell.path for cell in cells]})


def place_of(table: Table, prompt: int | None) -> int | None:
    """Where a prompt stands in the table, by its number; in a part that is its number in the whole.

    Raises:
        BadArgument: it is not there.
    """
    if prompt is None:
        return None
    prompts, numbers = len(table.clean), table.prompts.tolist()
    if numbers != list(range(prompts)):
        if prompt not in numbers:
            raise BadArgument(f"prompt={prompt}", expected=f"one of the prompts of this part: {numbers[:8]}")
        return numbers.index(prompt)
    check_prompt(table, prompt)
    return range(prompts)[prompt]


def check_prompt(table: Table, prompt: int | None) -> None:
    """Raise for a prompt that is not there."""
    prompts = len(table.clean)
    if prompt is not None and (isinstance(prompt, bool) or not -prompts <= prompt < prompts):
        raise BadArgument(f"prompt={prompt}", expected=f"a number below {prompts}, or nothing for the mean over them")


def only(table: Table, prompt: int) -> Table:
    """The table of one prompt."""
    row = [range(len(table.clean))[prompt]]
    arrays = {
        name: getattr(table, name)
        for name in ("values", "done", "exists", "clean", "corrupted", "edges", "exact", "counts", "rest")
    }
    kept = {name: array[row] for name, array in arrays.items() if array is not None}
    asked = {key: value for key, value in table.asked.items() if key != PART}
    return replace(table, tokens=tuple(table.tokens[n] for n in row) if table.tokens else (), asked=asked, **kept)


def check_mean(table: Table, prompt: int | None, what: str, kind: str | None = None) -> None:
    """Raise where all prompts are meant, and a mean over them would mix unlike things."""
    if prompt is None and (problem := no_mean(table, kind)):
        raise BadArgument(
            problem, expected="one prompt, or roles of tokens", write=f"{what}(prompt=0), or by_role().{what}()"
        )


def no_mean(table: Table, kind: str | None = None) -> str | None:
    """Why a mean over prompts would mix unlike things, where it would."""
    # A role is the same thing in every prompt, also where some lack it.
    of_kind = [n for n, cell in enumerate(table.cells) if kind in (None, cell.component) and cell.role is None]
    exists = table.exists[:, of_kind]
    if (exists == exists[:1]).all():
        return None
    lengths = sorted({len(row) for row in table.tokens}) or ["different numbers of"]
    counts = " and ".join(map(str, lengths)) if len(lengths) < 5 else f"{lengths[0]} to {lengths[-1]}"
    return f"the prompts have {counts} tokens, so one position is another thing in each of them and in some is missing"


def _columns(cells: Sequence[Cell]) -> dict[str, Any]:
    """A cell's numbers as columns; head and the like are whole numbers also where some rows have none."""
    import pandas as pd

    columns: dict[str, Any] = {axis: pd.array([getattr(c, axis) for c in cells], dtype="Int64") for axis in AXES}
    if not any(cell.feature is not None for cell in cells):
        del columns["feature"]
    positions = [cell.position for cell in cells]
    spans = any(isinstance(position, str) for position in positions)
    columns["position"] = pd.array(positions, dtype="object" if spans else "Int64")
    return columns


def points(cells: Sequence[Cell]) -> tuple[dict[str, list[Label]], np.ndarray]:
    """The axes that cells of one kind have, with their labels, and `[cell, axis]`: where on them each cell stands.

    Raises:
        BadArgument: two cells stand at one point, where one of them would be lost.
    """
    axes = (*AXES, *NAMED)
    labels = {axis: found for axis in axes if (found := _labels([getattr(c, axis) for c in cells]))}
    places = {axis: {label: n for n, label in enumerate(of)} for axis, of in labels.items()}
    taken: dict[tuple[int, ...], Cell] = {}
    for cell in cells:
        at = tuple(places[axis][getattr(cell, axis)] for axis in labels)
        other = taken.setdefault(at, cell)
        if other is not cell:
            raise BadArgument(
                f"{other.path} and {cell.path} have the same numbers, so a grid has one site for both",
                expected="sites that differ in " + (", ".join(labels) or "layer, head or position"),
                write="result.frame()   (a row for each)",
            )
    return labels, np.array(list(taken), dtype=int).reshape(len(cells), len(labels))


def label_text(label: Label) -> str:
    """What a label is called where an axis has names: a number, a span, or all tokens at once."""
    return ":" if label is None else str(label)


def _labels(found: Sequence[Label]) -> list[Label]:
    """The labels of an axis, none where there is no such axis: numbers upwards, those from the end last, then spans."""
    unique = dict.fromkeys(found)
    if set(unique) <= {None}:
        return []
    numbers = sorted((n for n in unique if isinstance(n, int)), key=lambda n: (n < 0, n))
    return [*numbers, *(text for text in unique if not isinstance(text, int))]
