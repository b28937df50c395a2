"""The status of a run: units done, workers, rate, failures; and its result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nnsplice.locks import is_gone
from nnsplice.work.importing import imported
from nnsplice.work.run_folder import RunFolder


@dataclass(frozen=True)
class Status:
    """The status of a run folder."""

    units: int
    done: int
    #: Failed units, with the reason.
    failures: dict[int, str]
    #: The last status of each worker, with `"alive"`.
    workers: list[dict[str, Any]]

    @property
    def rate(self) -> float:
        """Units per second of the workers that are alive."""
        return sum(one["units"] / one["seconds"] for one in self.workers if one["alive"] and one["seconds"] > 0)


def status_of(folder: RunFolder) -> Status:
    """The status of a run."""
    workers: list[dict[str, Any]] = []
    for name, record in folder.workers():
        gone = is_gone(record)
        silent = gone is None and folder.store.age(name) > folder.header["lease"]
        workers.append({**record, "alive": not gone and not silent and record["state"] in ("loading", "running")})
    return Status(folder.units, len(folder.done()), folder.failures(), workers)


def merged(folder: RunFolder, *, partial: bool = False) -> Any:
    """The result of a run, from the function `merged` of the module that opens it for workers.

    Args:
        partial: allow missing units.
    """
    module = str(folder.header["opener"]).partition(":")[0]
    return imported(f"{module}:merged")(folder.address, partial=partial)
