"""Results as arrays with named axes and as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from nnsplice.errors import BadArgument
from nnsplice.paths import Path
from nnsplice.results import measures, several
from nnsplice.results.kinds import kind_named
from nnsplice.results.parts import PART
from nnsplice.results.roles import Roles, by_role
from nnsplice.results.table import AXES, NAMED, Cell, Table

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

#: The roles of tokens to average over: "role", or roles of your own; None for single positions.
By = str | Roles | None
#: A label of an axis: a number, or the name of a span; None for all tokens at once.
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
    labels, points = grid_points([table.cells[n] for n in numbers])
    whole = np.full((len(table.clean), *map(len, labels.values())), np.nan)
    # A site without numbers, such as an embedding's weights, is one cell on no axis.
    whole[(slice(None), *points.T)] = values[:, numbers] if labels else values[:, numbers[0]]
    coordinates: dict[str, Any] = {"prompt": table.prompts}
    for axis, names in labels.items():
        are_numbers = all(isinstance(name, int) for name in names)
        coordinates[axis] = np.array(names if are_numbers else [label_text(name) for name in names])
    positions = labels.get("position", [])
    if table.tokens and positions:
        texts = [[token(table, prompt, position) for position in positions] for prompt in range(len(table.clean))]
        # By position alone if all prompts have the same tokens: such a coordinate is kept by a mean over prompts.
        same = all(row == texts[0] for row in texts)
        coordinates["token"] = ("position", texts[0]) if same else (("prompt", "position"), texts)
    return xr.DataArray(whole, dims=("prompt", *labels), coords=coordinates, name=name, attrs={"component": kind})


def grid(table: Table, of: str, component: str | Path | None, by: By = None) -> xr.DataArray:
    """One quantity of one kind of site on named axes: `"value"`, `"change"`, `"effect"` or `"share"` (per prompt)."""
    table = averaged(table, by)
    kind = kind_named(table.cells, component)
    if table.metrics:
        whole = several.arrays(table, lambda part: grid(part, of, kind))
        return whole.assign_attrs(component=kind).rename("effect" if of == "share" else of)
    if of == "value":
        return array(table, table.values, kind, metric_name(table))
    if of == "change":
        return array(table, measures.change(table), kind, f"change of {metric_name(table)}")
    return array(table, measures.effect(table) if of == "effect" else measures.share(table), kind, "effect")


def averaged(table: Table, by: By) -> Table:
    """The table averaged over the roles of tokens; as it is without roles."""
    if by is None:
        return table
    if isinstance(by, str) and by != "role":
        raise BadArgument(f"by={by!r}", expected='"role", or roles: {"last": -1}')
    return by_role(table, None if isinstance(by, str) else by)


def by_cell(table: Table, numbers: np.ndarray, component: str | Path | None) -> xr.DataArray:
    """One number per cell, on the axes of a grid without prompts."""
    whole = np.broadcast_to(numbers, table.values.shape)
    found = array(table, whole, kind_named(table.cells, component), "")
    if "token" in found.coords and "prompt" in found.coords["token"].dims:
        found = found.drop_vars("token")  # prompts have different tokens
    return found.isel(prompt=0, drop=True)


def intervals(table: Table, ends: np.ndarray, component: str | Path | None) -> xr.DataArray:
    """The ends `[cell, 2]` of intervals, on the axes of a grid without prompts and an axis `end`."""
    import xarray as xr

    both = [by_cell(table, ends[:, n], component) for n in (0, 1)]
    return xr.concat(both, "end").assign_coords(end=["low", "high"]).transpose(..., "end").rename("ci")


def metric_name(table: Table) -> str:
    """The name of the metric; of several, all names."""
    if table.metrics:
        return ", ".join(table.metrics)
    metric = table.asked.get("metric")
    return str((metric.get("name") if isinstance(metric, Mapping) else metric) or "value")


def rest(table: Table) -> np.ndarray:
    """The part of the metric that belongs to no cell, per prompt.

    Raises:
        BadArgument: the cells are not parts of a sum.
    """
    if table.rest is None:
        raise BadArgument(
            "the cells of this result are runs, each with a metric of its own, and no parts of one sum",
            expected="a result of ns.lens.direct",
        )
    return table.rest


def frame(table: Table) -> pd.DataFrame:
    """A row for each prompt and cell that was measured."""
    prompts, numbers = np.nonzero(table.done)
    return _rows(table, prompts, numbers, measures.effect(table))


def frames(table: Table) -> Iterator[pd.DataFrame]:
    """The rows of one prompt at a time; effects are those of `frame`, normalized by the mean of all prompts."""
    effects = measures.effect(table)
    for prompt in range(len(table.clean)):
        numbers = np.flatnonzero(table.done[prompt])
        yield _rows(table, np.full(len(numbers), prompt), numbers, effects)


def _rows(table: Table, prompts: np.ndarray, numbers: np.ndarray, effects: np.ndarray) -> pd.DataFrame:
    import pandas as pd

    cells = [table.cells[n] for n in numbers]
    columns: dict[str, Any] = {
        "prompt": table.prompts[prompts],
        "component": pd.array([cell.component for cell in cells], dtype="str"),  # texts also where there are none
        **_columns(table, cells),
    }
    tokens = [token(table, p, cell.position) for p, cell in zip(prompts.tolist(), cells, strict=True)]
    columns["token"] = pd.array(tokens, dtype="str")
    for name in ("key", "role", "set"):
        if any(getattr(cell, name) is not None for cell in table.cells):
            columns[name] = _labels_column(table, cells, name)
    if table.counts is not None:
        columns["n"] = table.counts[prompts, numbers].astype(int)
    columns["value"] = table.values[prompts, numbers]
    if table.exact is not None and table.edges is None:
        columns["exact"] = table.exact[prompts, numbers]
    columns["effect"] = effects[prompts, numbers]
    columns["clean"], columns["corrupted"] = table.clean[prompts], table.corrupted[prompts]
    columns["path"] = pd.array([cell.path for cell in cells], dtype="str")
    return pd.DataFrame(columns)


def best(table: Table, n: int, prompt: int | None) -> pd.DataFrame:
    """The cells with the largest changes, of one prompt or pooled over all."""
    import pandas as pd

    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise BadArgument(f"best({n!r})", expected="how many cells to show, at least 1")
    check_prompt(table, prompt)
    check_mean(table, prompt, "best")
    if prompt is not None:
        table = only(table, prompt)
    changes = measures.change(table)
    found = {"value": table.values, "change": changes, "effect": measures.pooled(table, changes)}
    if table.exact is not None and table.edges is None:
        found["exact"] = table.exact
    size = measures.size(table, changes)
    order = np.argsort(-size, kind="stable")[:n]  # NaN comes last
    order = order[~np.isnan(size[order])]
    cells = [table.cells[number] for number in order]
    columns: dict[str, Any] = {"component": [cell.component for cell in cells]}
    used = {axis for axis in (*AXES, *NAMED) if any(getattr(cell, axis) is not None for cell in table.cells)}
    columns |= {axis: column for axis, column in _columns(table, cells).items() if axis in used}
    columns |= {name: _labels_column(table, cells, name) for name in ("key", "role", "set") if name in used}
    if len(table.clean) == 1:
        columns["token"] = [token(table, 0, cell.position) for cell in cells]
    columns |= {name: measures.mean(values)[order] for name, values in found.items()}
    return pd.DataFrame({**columns, "path": [cell.path for cell in cells]})


def row_of(table: Table, prompt: int | None) -> int | None:
    """The row of a prompt in the table, by its number; parts of a plan keep the numbers of the whole.

    Raises:
        BadArgument: there is no such prompt.
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
    """Raise for a number that no prompt has."""
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
    question = {key: value for key, value in table.asked.items() if key != PART}
    return replace(table, tokens=tuple(table.tokens[n] for n in row) if table.tokens else (), asked=question, **kept)


def check_mean(table: Table, prompt: int | None, what: str, kind: str | None = None) -> None:
    """Raise if no prompt is chosen and positions cannot be averaged over prompts."""
    if prompt is None and (problem := no_mean(table, kind)):
        raise BadArgument(
            problem, expected="one prompt, or roles of tokens", write=f"{what}(prompt=0), or by_role().{what}()"
        )


def no_mean(table: Table, kind: str | None = None) -> str | None:
    """Why positions cannot be averaged over prompts; None if they can."""
    # A role has the same meaning in every prompt, even if some prompts lack it.
    of_kind = [n for n, cell in enumerate(table.cells) if kind in (None, cell.component) and cell.role is None]
    exists = table.exists[:, of_kind]
    if (exists == exists[:1]).all():
        return None
    lengths = sorted({len(row) for row in table.tokens}) or ["different numbers of"]
    counts = " and ".join(map(str, lengths)) if len(lengths) < 5 else f"{lengths[0]} to {lengths[-1]}"
    return f"the prompts have {counts} tokens, so one position is another thing in each of them and in some is missing"


def _columns(table: Table, cells: Sequence[Cell]) -> dict[str, Any]:
    """The axes of some cells of a table as columns."""
    names = [name for name in AXES if name != "feature" or any(cell.feature is not None for cell in table.cells)]
    return {name: _labels_column(table, cells, name) for name in (*names, "position")}


def _labels_column(table: Table, cells: Sequence[Cell], name: str) -> Any:
    """One field of some cells: integers, also where some have none, unless a cell of the table has a text."""
    import pandas as pd

    texts = any(isinstance(getattr(cell, name), str) for cell in table.cells)
    return pd.array([getattr(cell, name) for cell in cells], dtype="object" if texts else "Int64")


def grid_points(cells: Sequence[Cell]) -> tuple[dict[str, list[Label]], np.ndarray]:
    """The axes of cells of one kind with their labels, and each cell's index on them, `[cell, axis]`.

    Raises:
        BadArgument: two cells have the same indices.
    """
    axes = (*AXES, *NAMED)
    labels = {axis: found for axis in axes if (found := _labels([getattr(c, axis) for c in cells]))}
    numbers = {axis: {label: n for n, label in enumerate(of)} for axis, of in labels.items()}
    points: dict[tuple[int, ...], Cell] = {}
    for cell in cells:
        point = tuple(numbers[axis][getattr(cell, axis)] for axis in labels)
        other = points.setdefault(point, cell)
        if other is not cell:
            raise BadArgument(
                f"{other.path} and {cell.path} have the same numbers, so a grid has one site for both",
                expected="sites that differ in " + (", ".join(labels) or "layer, head or position"),
                write="result.frame()   (a row for each)",
            )
    return labels, np.array(list(points), dtype=int).reshape(len(cells), len(labels))


def label_text(label: Label) -> str:
    """The text of a label: a number, the name of a span, or `:` for all tokens."""
    return ":" if label is None else str(label)


def _labels(found: Sequence[Label]) -> list[Label]:
    """The labels of an axis in order: numbers, numbers from the end, spans; empty if no cell has the axis."""
    unique = dict.fromkeys(found)
    if set(unique) <= {None}:
        return []
    numbers = sorted((n for n in unique if isinstance(n, int)), key=lambda n: (n < 0, n))
    return [*numbers, *(text for text in unique if not isinstance(text, int))]
