"""Workers as the tasks of a Ray cluster; the only file that imports Ray.

A task is the process of a worker. Ray places tasks and adds machines; the driver submits a task again if its machine is
lost. Units and outcomes go through the run folder, which all machines have to see.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from nnsplice.errors import MissingPackage
from nnsplice.work.driving import command, drive, environment
from nnsplice.work.run_folder import RunFolder

#: The environment variables that a worker gets from the driver; Ray sets its GPUs.
_ENVIRONMENT = (
    "PYTHONPATH", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "HF_HOME", "HF_HUB_OFFLINE", "NNSPLICE_CACHE",
    # Of the object store, without credentials, which the machines of a cluster have.
    "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ALLOW_HTTP",
)  # fmt: skip


@dataclass(frozen=True)
class Ray:
    """The engine of `ns.on.ray`."""

    address: str | None = None
    workers: int = 8
    gpus_per_worker: float = 0
    cpus_per_worker: float = 1

    def run(self, folder: RunFolder, progress: bool) -> None:
        """Run all units."""
        try:
            import ray  # pyright: ignore[reportMissingImports]  (an extra)
        except ImportError as error:
            raise MissingPackage("Ray is not installed", write='pip install "nnsplice[ray]"') from error
        began = not ray.is_initialized()
        if began:
            ray.init(address=self.address, log_to_driver=False)
        task = ray.remote(num_gpus=self.gpus_per_worker, num_cpus=self.cpus_per_worker, max_retries=0)(_run_worker)
        own = environment()
        variables = {name: own[name] for name in _ENVIRONMENT if name in own}
        try:
            drive(folder, lambda _: RayTask(task.remote(command(folder)[1:], variables)), self.workers, progress)
        finally:
            if began:
                ray.shutdown()


@dataclass(frozen=True)
class RayTask:
    """A submitted task, waiting or running."""

    ref: Any

    def poll(self) -> int | None:
        """The exit code; 1 if its machine is lost, None while it waits or runs."""
        import ray  # pyright: ignore[reportMissingImports]  (an extra)

        ready, _ = ray.wait([self.ref], timeout=0)
        if not ready:
            return None
        try:
            return ray.get(self.ref)
        except ray.exceptions.RayError:
            return 1

    def stop(self) -> None:
        """Cancel it; its worker stops after its unit."""
        import ray  # pyright: ignore[reportMissingImports]  (an extra)

        ray.cancel(self.ref)


def _run_worker(arguments: list[str], variables: dict[str, str]) -> int:
    """Run a worker on a machine of the cluster, with that machine's own Python."""
    import os

    own = {**os.environ, **variables, "NNSPLICE_PARENT": str(os.getpid())}
    return subprocess.run([sys.executable, *arguments], env=own, check=False).returncode
