"""The engines of `ns.run(..., on=)`: `ns.on.slurm`, `ns.on.ray`, and texts such as `"local:8"`."""

from __future__ import annotations

from typing import Any, Protocol

from nnsplice.errors import BadArgument
from nnsplice.work.folder import Folder
from nnsplice.work.local import Local
from nnsplice.work.ray import Ray
from nnsplice.work.run_folder import RunFolder
from nnsplice.work.slurm import Slurm


class Engine(Protocol):
    """Runs the units of a run folder."""

    def run(self, folder: RunFolder, progress: bool) -> None:
        """Run all units; failed units are in `folder.failures()`."""
        ...


def slurm(
    *, workers: int = 8, partition: str | None = None, gpus: int = 1, time: int = 240, **parameters: Any
) -> Slurm:
    """Run units in the tasks of a Slurm array, through submitit.

    >>> ns.on.slurm(partition="gpu", workers=16, time=120).parameters["timeout_min"]
    120

    Args:
        workers: the number of tasks; each runs units until none is left.
        partition: the partition of the cluster.
        gpus: GPUs per task.
        time: time limit of a task in minutes; after it, or after a preemption, the task is submitted again.
        parameters: further parameters of submitit, such as `slurm_account` or `mem_gb`.

    Returns:
        An engine for `ns.run(on=)`.
    """
    own = {"timeout_min": time, "gpus_per_node": gpus, "name": "nnsplice"}
    own |= {} if partition is None else {"slurm_partition": partition}
    return Slurm(workers, {**own, **parameters})


def ray(address: str | None = None, *, workers: int = 8, gpus_per_worker: float = 0, cpus_per_worker: float = 1) -> Ray:
    """Run units in the tasks of a Ray cluster; all its machines must see the run folder.

    >>> ns.on.ray("auto", workers=64, gpus_per_worker=1).workers
    64

    Args:
        address: the cluster; Ray on this machine if left out.
        workers: the largest number of workers; they need not all run at once.
        gpus_per_worker: GPUs per worker.
        cpus_per_worker: CPUs per worker.

    Returns:
        An engine for `ns.run(on=)`.
    """
    return Ray(address, workers, gpus_per_worker, cpus_per_worker)


def engine_of(on: str | Engine) -> Engine:
    """The engine of an `on=` argument.

    Raises:
        BadArgument: there is no such engine.
    """
    expected = '"local:8", "local", "folder", ns.on.slurm(...) or ns.on.ray(...)'
    if not isinstance(on, str):
        if not hasattr(on, "run"):
            raise BadArgument(f"on={on!r}", expected=expected)
        return on
    name, _, count = on.partition(":")
    if name == "local" and (not count or (count.isdigit() and int(count) > 0)):
        return Local(int(count) if count else None)
    if on in ("folder", "slurm", "ray"):
        return {"folder": Folder(), "slurm": slurm(), "ray": ray()}[on]
    raise BadArgument(f"on={on!r}", expected=expected)
