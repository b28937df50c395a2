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
    """The table of one metric, equal to that of a sweep of this metric only."""
    at = table.metrics.index(name)
    metric = table.asked.get("metric")
    if isinstance(metric, Mapping) and "metrics" in metric:
        metric = {key: value for key, value in metric["metrics"][at].items() if key != "called"}
    return replace(
        table, metrics=(), values=table.values[..., at], clean=table.clean[:, at], corrupted=table.corrupted[:, at],
        asked={**table.asked, "metric": metric},
    )  # fmt: skip


def check_one(table: Table, what: str) -> None:
    """Raise if several metrics were measured and only one can be shown."""
    if table.metrics:
        raise BadArgument(
            f"{len(table.metrics)} metrics were measured, and {what} shows one",
            expected=f"one of {', '.join(table.metrics)}",
            write=f"result.only({table.metrics[0]!r}).{what}()",
        )


def arrays(table: Table, of: Callable[[Table], xr.DataArray]) -> xr.DataArray:
    """The arrays of all metrics, stacked along an axis `metric` after the prompts."""
    import pandas as pd
    import xarray as xr

    found = [of(one(table, name)) for name in table.metrics]
    for array in found:
        for each in (array, *array.coords.values()):
            each.attrs = {}
    whole = xr.concat(found, pd.Index(list(table.metrics), name="metric", dtype=object), combine_attrs="drop")
    return whole.transpose("prompt", "metric", ...)


def frames(table: Table, of: Callable[[Table], pd.DataFrame]) -> pd.DataFrame:
    """The rows of all metrics, with a column `metric`."""
    import pandas as pd

    found = [of(one(table, name)) for name in table.metrics]
    for name, rows in zip(table.metrics, found, strict=True):
        rows.insert(1, "metric", name)
    return pd.concat(found, ignore_index=True)


def frames_of_prompts(table: Table, of: Callable[[Table], Iterator[pd.DataFrame]]) -> Iterator[pd.DataFrame]:
    """For each prompt, the rows of all metrics."""
    import pandas as pd

    for each in zip(*(of(one(table, name)) for name in table.metrics), strict=True):
        for name, rows in zip(table.metrics, each, strict=True):
            rows.insert(1, "metric", name)
        yield pd.concat(each, ignore_index=True)
