"""Workers as the tasks of a Slurm array, through submitit; the only file that imports it."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nnsplice.errors import BadArgument, MissingPackage
from nnsplice.work.driving import command, drive, environment
from nnsplice.work.run_folder import RunFolder


@dataclass(frozen=True)
class Slurm:
    """The engine of `ns.on.slurm`."""

    workers: int = 8
    #: Parameters of submitit's executor.
    parameters: Mapping[str, Any] = field(default_factory=dict)
    #: `"local"`: submitit starts processes on this machine, for tests; None for Slurm.
    cluster: str | None = None

    def run(self, folder: RunFolder, progress: bool) -> None:
        """Run all units."""
        try:
            import submitit  # pyright: ignore[reportMissingImports]  (an extra)
        except ImportError as error:
            raise MissingPackage(
                "Slurm is reached through submitit, which is not installed", write='pip install "nnsplice[slurm]"'
            ) from error
        if folder.store.folder is None:
            raise BadArgument(
                f"submitit keeps its jobs in a folder that all machines see, and {folder.address} is none",
                expected='on="folder", and a job that calls srun',
                write=f"srun nnsplice work {folder.address}",
            )
        executor = submitit.AutoExecutor(folder.store.folder / "slurm", cluster=self.cluster)
        executor.update_parameters(**self.parameters)
        task = SlurmTask(command(folder), {**environment(), "NNSPLICE_PARENT": ""})
        count = min(self.workers, folder.units - len(folder.done()))
        with executor.batch():  # one sbatch --array
            jobs = [executor.submit(task) for _ in range(count)]
        waiting = dict(enumerate(jobs))

        def start(number: int) -> SlurmJob:
            return SlurmJob(waiting.pop(number) if number in waiting else executor.submit(task))

        drive(folder, start, count, progress)


@dataclass(frozen=True)
class SlurmTask:
    """One array task: the process of a worker, submitted again after a preemption."""

    command: list[str]
    environment: dict[str, str]

    def __call__(self) -> int:
        """Run a worker to its end; returns its exit code."""
        import os

        return subprocess.run(
            self.command, env={**self.environment, "NNSPLICE_PARENT": str(os.getpid())}, check=False
        ).returncode

    def checkpoint(self) -> Any:
        """Called by submitit at preemption or time-out: submits the same call again."""
        import submitit.helpers  # pyright: ignore[reportMissingImports]  (an extra)

        return submitit.helpers.DelayedSubmission(self)


@dataclass(frozen=True)
class SlurmJob:
    """A submitted task."""

    job: Any

    def poll(self) -> int | None:
        """The exit code; 1 if Slurm lost the task, None while it waits or runs."""
        if not self.job.done():
            return None
        return 1 if self.job.exception() is not None else self.job.result()

    def stop(self) -> None:
        """Cancel it."""
        self.job.cancel(check=False)
