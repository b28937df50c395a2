"""Workers as processes on this machine."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

from nnsplice.work.driving import command, drive, environment
from nnsplice.work.run_folder import RunFolder


@dataclass(frozen=True)
class Local:
    """`on="local:8"`: worker processes on this machine, spread over its GPUs."""

    #: The number of workers; None for one per GPU, or without GPUs one per core.
    workers: int | None = None

    def run(self, folder: RunFolder, progress: bool) -> None:
        """Run all units."""
        devices = gpus()
        workers = self.workers or len(devices) or os.cpu_count() or 1
        with _output(folder) as log:
            drive(
                folder,
                lambda number: Process.start(folder, devices[number % len(devices)] if devices else None, log),
                workers,
                progress,
            )


@contextmanager
def _output(folder: RunFolder) -> Iterator[IO[bytes]]:
    """The log file for the output of workers, such as a crash."""
    name = "workers/output.log"
    if folder.store.folder is not None:
        with (folder.store.folder / name).open("ab") as log:
            yield log
        return
    with tempfile.TemporaryFile() as log:
        try:
            yield log
        finally:
            log.seek(0)
            folder.store.append(name, log.read().decode(errors="replace"))
            folder.store.flush()


@dataclass(frozen=True)
class Process:
    """A worker's process."""

    process: subprocess.Popen[bytes]

    @classmethod
    def start(cls, folder: RunFolder, device: str | None, log: IO[bytes]) -> Process:
        """Start a worker, on this GPU only if one is given."""
        own = environment() | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})
        # In a session of its own, so that Ctrl-C reaches only the driver, which then stops the worker.
        return cls(
            subprocess.Popen(
                command(folder), env=own, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        )

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self.process.poll()

    def stop(self) -> None:
        """Ask it to stop after its unit; kill it after 30 s."""
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def gpus() -> list[str]:
    """The GPUs of this machine, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip()]
    return [str(number) for number in range(torch.cuda.device_count())]
