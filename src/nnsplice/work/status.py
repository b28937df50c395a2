"""The status of a run: units done, workers, rate, failures; and its result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nnsplice.locks import is_gone
from nnsplice.work.run_folder import RunFolder, imported


@dataclass(frozen=True)
class Status:
    """A look at a run folder."""

    units: int
    done: int
    #: Unit -> why it is left out.
    failures: dict[int, str]
    #: What every worker told last, with `"alive"`.
    workers: list[dict[str, Any]]

    @property
    def rate(self) -> float:
        """Units a second, of the workers that are alive."""
        return sum(one["units"] / one["seconds"] for one in self.workers if one["alive"] and one["seconds"] > 0)


def status_of(folder: RunFolder) -> Status:
    """Look at a run."""
    workers: list[dict[str, Any]] = []
    for name, told in folder.workers():
        gone = is_gone(told)
        silent = gone is None and folder.store.age(name) > folder.told["lease"]
        workers.append({**told, "alive": not gone and not silent and told["state"] in ("loading", "running")})
    return Status(folder.units, len(folder.done()), folder.failures(), workers)


def merged(folder: RunFolder, *, partial: bool = False) -> Any:
    """The result of a run: what `merged` of the module says that opens it for workers.

    Args:
        partial: also when units are missing.
    """
    module = str(folder.told["opener"]).partition(":")[0]
    return imported(f"{module}:merged")(folder.address, partial=partial)
