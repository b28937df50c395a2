"""Results of several metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from nnsplice.errors import BadArgument
from nnsplice.results.table import Table

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr


def one(table: Table, name: str) -> Table:
    """The table of one of the metrics, as if no other had been asked for."""
    at = table.metrics.index(name)
    told = table.asked.get("metric")
    if isinstance(told, Mapping) and "metrics" in told:
        told = {key: value for key, value in told["metrics"][at].items() if key != "called"}
    return replace(
        table, metrics=(), values=table.values[..., at], clean=table.clean[:, at], corrupted=table.corrupted[:, at],
        asked={**table.asked, "metric": told},
    )  # fmt: skip


def check_one(table: Table, what: str) -> None:
    """Raise where several metrics were measured, and only one can be shown."""
    if table.metrics:
        raise BadArgument(
            f"{len(table.metrics)} metrics were measured, and {what} shows one",
            expected=f"one of {', '.join(table.metrics)}",
            write=f"result.only({table.metrics[0]!r}).{what}()",
        )


def arrays(table: Table, of: Callable[[Table], xr.DataArray]) -> xr.DataArray:
    """What is made of each metric along an axis `metric`, behind the prompts, in the order in which they were asked."""
    import pandas as pd
    import xarray as xr

    found = [of(one(table, name)) for name in table.metrics]
    for array in found:
        for each in (array, *array.coords.values()):
            each.attrs = {}
    whole = xr.concat(found, pd.Index(list(table.metrics), name="metric", dtype=object), combine_attrs="drop")
    return whole.transpose("prompt", "metric", ...)


def frames(table: Table, of: Callable[[Table], pd.DataFrame]) -> pd.DataFrame:
    """The rows of each metric under those of the one before, with its name beside the prompt's number."""
    import pandas as pd

    found = [of(one(table, name)) for name in table.metrics]
    for name, rows in zip(table.metrics, found, strict=True):
        rows.insert(1, "metric", name)
    return pd.concat(found, ignore_index=True)


def frames_of_prompts(table: Table, of: Callable[[Table], Iterator[pd.DataFrame]]) -> Iterator[pd.DataFrame]:
    """Of each prompt the rows of each metric under those of the one before."""
    import pandas as pd

    for each in zip(*(of(one(table, name)) for name in table.metrics), strict=True):
        for name, rows in zip(table.metrics, each, strict=True):
            rows.insert(1, "metric", name)
        yield pd.concat(each, ignore_index=True)
