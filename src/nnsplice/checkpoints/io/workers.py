"""One checkpoint read, mapped and written by several processes of this machine, each with a range of the files."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from nnsplice.checkpoints.io.folder import Checkpoint
from nnsplice.checkpoints.io.reader import read_model_state
from nnsplice.checkpoints.io.shards import ShardFile
from nnsplice.checkpoints.io.staging import staged
from nnsplice.checkpoints.io.writer import groups_of, job_digest, shard_bytes, write_shards
from nnsplice.checkpoints.mapper.abc import ModelStateMapper
from nnsplice.checkpoints.mapper.adapters import identity_mapper_from_mapper_outputs
from nnsplice.checkpoints.mapper.compose import Shard
from nnsplice.errors import TeamError, circumstances
from nnsplice.files import local_path


def write_with_workers(
    src_dir: str | os.PathLike[str],
    dest_dir: str | os.PathLike[str],
    mapper: ModelStateMapper,
    workers: int,
    *,
    shard_size_gb: float,
    show_progress: bool,
    resume: bool,
    source: str,
    carry: Mapping[str, Path | str],
    like: Sequence[Path] = (),
) -> None:
    """Read a checkpoint through a mapper and write the outputs, as one process would, with other file boundaries.

    Raises:
        TeamError: a worker died. An error that a worker raises is raised here.
    """
    limit = shard_bytes(shard_size_gb)
    asked = job_digest(mapper, limit, f"{source}\n{workers} workers")
    with (
        circumstances(f"writing {os.fspath(dest_dir)} with {workers} workers"),
        staged(local_path(dest_dir), asked, resume=resume) as staging,
    ):
        if not staging.published:
            staging.publish(_shards(src_dir, staging.folder, mapper, workers, limit, show_progress), carry, like)


def _shards(
    src_dir: str | os.PathLike[str],
    folder: Path,
    mapper: ModelStateMapper,
    workers: int,
    limit: int,
    show_progress: bool,
) -> list[ShardFile]:
    """The files of all workers, in the order of what they read."""
    context = multiprocessing.get_context("spawn")  # a forked process may hang in torch's threads
    with ProcessPoolExecutor(workers, context) as pool:
        shares = [
            pool.submit(_write_share, os.fspath(src_dir), folder, mapper, workers, number, limit, show_progress)
            for number in range(workers)
        ]
        try:
            done, _ = wait(shares, return_when=FIRST_EXCEPTION)
            for share in done:
                share.result()  # raises the error of the first worker that failed
            return [shard for share in shares for shard in share.result()]
        except BrokenProcessPool:
            raise TeamError(
                "a worker process died without an error",
                expected="enough memory for all of them; and, in a script, a call behind `if __name__ == '__main__':`",
                write="workers=1   (everything in this process)",
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _write_share(
    src_dir: str, folder: Path, mapper: ModelStateMapper, workers: int, number: int, limit: int, show_progress: bool
) -> list[ShardFile]:
    """Read and write one share, in a worker."""
    torch.set_num_threads(1)  # the processes run in parallel already
    share = Shard(mapper, workers, number, Checkpoint.open(src_dir).sizes())
    if not share.state_dependency_groups():
        return []
    states = read_model_state(src_dir, share, "cpu", show_progress, number)
    written = identity_mapper_from_mapper_outputs(share)
    return write_shards(folder, f"{number:04d}", written, groups_of(written, states), limit, show_progress=False)
