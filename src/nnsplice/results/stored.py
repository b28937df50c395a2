"""`StoredResult`: a result in a store, read when it is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nnsplice.results.result import SweepResult
from nnsplice.results.table import Table, settled


class StoredResult(SweepResult):
    """A result whose table is read when it is first asked for."""

    def __init__(self, load: Callable[[], Table]) -> None:
        object.__setattr__(self, "_load", load)

    def __getattr__(self, name: str) -> Any:
        if name != "table":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        object.__setattr__(self, "table", settled(self.__dict__["_load"]()))
        return self.__dict__["table"]
