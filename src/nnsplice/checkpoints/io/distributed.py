"""Writing one checkpoint from many processes that see one file system.

Each process writes files of its own; the one with the lowest rank makes the folder, and publishes it when all are done.
All processes make the same collective calls, also when one fails, so that none waits forever.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from nnsplice.checkpoints.io.shards import ShardFile
from nnsplice.checkpoints.io.staging import Staging
from nnsplice.checkpoints.io.team import Stopped, Team
from nnsplice.checkpoints.io.writer import (
    States,
    gathering,
    groups_of,
    job_digest,
    shard_bytes,
    states_of,
    write_shards,
)
from nnsplice.checkpoints.mapper.abc import ModelStateMapper, StateGroup, applied, ordered
from nnsplice.checkpoints.mapper.distributed import is_distributed
from nnsplice.errors import BadArgument, MapperError, TeamError, circumstances
from nnsplice.files import local_path

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


def write_model_state_distributed(
    dest_dir: str | os.PathLike[str],
    mapper: ModelStateMapper,
    state_generator: States,
    process_group: ProcessGroup,
    shard_size_gb: float = 4.0,
    show_progress: bool = True,
    position: int | None = None,
    *,
    resume: bool = False,
) -> None:
    """Write the tensors of all processes of a group as one checkpoint; every process calls this with its own mapper.

    `Shard` divides a mapper between processes. Here the group has one process:

    >>> from tempfile import TemporaryDirectory
    >>> from torch import distributed
    >>> from nnsplice.checkpoints import Checkpoint, Identity, Parallel, Shard, write_model_state_distributed
    >>> states = {"a": torch.ones(2), "b": torch.zeros(3)}
    >>> with TemporaryDirectory() as folder:
    ...     distributed.init_process_group("gloo", init_method=f"file://{folder}/team", rank=0, world_size=1)
    ...     rank, count = distributed.get_rank(), distributed.get_world_size()
    ...     share = Shard(Parallel([Identity(name) for name in states]), count, rank)
    ...     write_model_state_distributed(
    ...         f"{folder}/new", share, states.items(), distributed.group.WORLD, show_progress=False
    ...     )
    ...     distributed.destroy_process_group()
    ...     Checkpoint.open(f"{folder}/new").sizes()
    {'a': 8, 'b': 12}

    Args:
        dest_dir: the folder to write, made or replaced.
        mapper: from this process's names to the names in the files.
        state_generator: names and tensors of this process, in any order.
        process_group: the processes that write.
        shard_size_gb: the largest size of a file, in units of 1024**3 bytes.
        show_progress: show a progress bar in bytes.
        position: the line of this process's bar.
        resume: continue an interrupted call, and keep finished files if this one is interrupted.

    Raises:
        TeamError: another process failed, with an error of its own. The old checkpoint is not changed.
        MapperError: two processes write the same name, an input is missing, or is offered twice.
        WriteFailed: a file could not be written.
    """
    team = Team([process_group])
    with circumstances(f"writing {os.fspath(dest_dir)} from process {team.rank}"):
        limit = shard_bytes(shard_size_gb)

        def work(folder: Path, prefix: str) -> list[ShardFile]:
            groups = groups_of(mapper, state_generator)
            return write_shards(folder, prefix, mapper, groups, limit, show_progress, position)

        _write(team, local_path(dest_dir), job_digest(mapper, limit, ""), work, resume)


def write_model_state_pipeline_parallel(
    dest_dir: str | os.PathLike[str],
    mapper: ModelStateMapper,
    state_generator: States,
    device_mesh: DeviceMesh,
    pipeline_dim_name: str,
    shard_size_gb: float = 4.0,
    show_progress: bool = True,
    position: int | None = None,
    *,
    resume: bool = False,
) -> None:
    """Write the tensors of all pipeline stages as one checkpoint; every process of the mesh calls this.

    The processes of one stage map the same groups in the same order, as their tensors may have to be gathered; the
    first of them writes.

    Here one process has all stages:

    >>> from tempfile import TemporaryDirectory
    >>> from torch import distributed
    >>> from nnsplice.checkpoints import Checkpoint, Rename, write_model_state_pipeline_parallel
    >>> with TemporaryDirectory() as folder:
    ...     distributed.init_process_group("gloo", init_method=f"file://{folder}/team", rank=0, world_size=1)
    ...     mesh = distributed.device_mesh.init_device_mesh("cpu", (1, 1), mesh_dim_names=("pipeline", "tensor"))
    ...     write_model_state_pipeline_parallel(
    ...         f"{folder}/new", Rename("a", "b"), [("a", torch.ones(2))], mesh, "pipeline", show_progress=False
    ...     )
    ...     distributed.destroy_process_group()
    ...     list(Checkpoint.open(f"{folder}/new"))
    ['b']

    Args:
        dest_dir: the folder to write, made or replaced.
        mapper: from this stage's names to the names in the files.
        state_generator: names and tensors of this stage, in any order.
        device_mesh: the mesh, with names for its dimensions.
        pipeline_dim_name: the dimension of the stages.
        shard_size_gb: the largest size of a file, in units of 1024**3 bytes.
        show_progress: show a progress bar in bytes.
        position: the line of this process's bar.
        resume: continue an interrupted call, and keep finished files if this one is interrupted.

    Raises:
        TeamError: another process failed, with an error of its own. The old checkpoint is not changed.
        MapperError: two stages write the same name, an input is missing, or is offered twice.
        BadArgument: a mesh without this dimension, or without this process.
        WriteFailed: a file could not be written.
    """
    names, coordinate = device_mesh.mesh_dim_names, device_mesh.get_coordinate()
    if names is None or pipeline_dim_name not in names:
        raise BadArgument(f"the mesh has no dimension {pipeline_dim_name}", expected=f"one of {names}")
    if coordinate is None:
        raise BadArgument("this process is not in the mesh", expected="a call by the processes of the mesh only")
    others = [name for name in names if name != pipeline_dim_name]
    writes = all(at == 0 for name, at in zip(names, coordinate, strict=True) if name != pipeline_dim_name)
    team = Team([_group(device_mesh, name) for name in names])
    stage = Team([_group(device_mesh, name) for name in others])
    with circumstances(f"writing {os.fspath(dest_dir)} from process {team.rank}"):
        limit = shard_bytes(shard_size_gb)

        def work(folder: Path, prefix: str) -> list[ShardFile]:
            try:
                groups = _in_order(stage, mapper, state_generator)
                if writes:
                    made = write_shards(folder, prefix, mapper, groups, limit, show_progress, position)
                else:
                    made = _gather_only(mapper, groups)
            except Stopped:
                raise
            except BaseException as error:
                stage.agree(error)  # otherwise the others wait in a gather that this process never joins
                raise
            stage.agree()
            return made

        _write(team, local_path(dest_dir), job_digest(mapper, limit, ""), work, resume)


def save_model_state_pipeline_parallel(
    dest_dir: str | os.PathLike[str],
    mapper: ModelStateMapper,
    device_mesh: DeviceMesh,
    pipeline_dim_name: str,
    models: Sequence[nn.Module],
    shard_size_gb: float = 4.0,
    show_progress: bool = True,
    position: int | None = None,
) -> None:
    """Write the states of all pipeline stages as one checkpoint; every process calls this with its own stages.

    It is `write_model_state_pipeline_parallel` for modules. Here one process has all stages:

    >>> from tempfile import TemporaryDirectory
    >>> from torch import distributed
    >>> from nnsplice.checkpoints import Checkpoint, identity_mapper_from_module, save_model_state_pipeline_parallel
    >>> stage = torch.nn.LayerNorm(4)
    >>> with TemporaryDirectory() as folder:
    ...     distributed.init_process_group("gloo", init_method=f"file://{folder}/team", rank=0, world_size=1)
    ...     mesh = distributed.device_mesh.init_device_mesh("cpu", (1, 1), mesh_dim_names=("pipeline", "tensor"))
    ...     mapper = identity_mapper_from_module(stage)
    ...     save_model_state_pipeline_parallel(f"{folder}/new", mapper, mesh, "pipeline", [stage], show_progress=False)
    ...     distributed.destroy_process_group()
    ...     list(Checkpoint.open(f"{folder}/new"))
    ['bias', 'weight']

    Args:
        dest_dir: the folder to write, made or replaced.
        mapper: from the names of these models' states to the names in the files.
        device_mesh: the mesh, with names for its dimensions.
        pipeline_dim_name: the dimension of the stages.
        models: the stages, or parts of stages, of this process.
        shard_size_gb: the largest size of a file, in units of 1024**3 bytes.
        show_progress: show a progress bar in bytes.
        position: the line of this process's bar.

    Raises:
        TeamError: another process failed, with an error of its own. The old checkpoint is not changed.
        MapperError: the mapper needs a state that the models do not have, or two stages write the same name.
        BadArgument: a mesh without this dimension, or without this process.
    """
    states = states_of(mapper, models)
    full = gathering(mapper, models)
    write_model_state_pipeline_parallel(
        dest_dir, full, states, device_mesh, pipeline_dim_name, shard_size_gb, show_progress, position
    )


def _group(mesh: DeviceMesh, name: str) -> ProcessGroup:
    return cast("Any", mesh).get_group(name)


def _write(team: Team, dest: Path, asked: str, work: Any, resume: bool) -> None:
    """The three collective steps: make the folder, write files, publish it."""
    jobs = team.share(asked)
    leader = min(jobs)
    staging: Staging | None = None

    def begin() -> tuple[str, bool]:
        nonlocal staging
        if team.rank != leader:
            return "", False
        staging = Staging(dest, "\n".join(jobs.values()), resume=resume)
        return str(staging.folder), staging.published

    failed = True
    try:
        folder, published = team.together(begin)[leader]
        if not published:
            shards = team.together(lambda: work(Path(folder), f"{team.rank:04d}"))
            team.together(lambda: _publish(staging, shards))
        failed = False
    finally:
        if staging is not None:
            staging.close(failed=failed)
        # No process continues before the clean-up. If one is gone, the error was raised already.
        with suppress(TeamError) if failed else nullcontext():
            team.share(None)


def _publish(staging: Staging | None, shards: dict[int, list[ShardFile]]) -> None:
    owners: dict[str, int] = {}
    for rank, every in shards.items():
        for name in (name for shard in every for name in (*shard.names, *shard.tied)):
            if name in owners:
                raise MapperError(
                    f"colliding output key {name}: processes {owners[name]} and {rank} write it",
                    expected="each name from one process",
                    write="Shard(mapper, total_shards, current_shard)",
                )
            owners[name] = rank
    if staging is not None:
        staging.publish([shard for every in shards.values() for shard in every], {})


def _in_order(stage: Team, mapper: ModelStateMapper, states: States) -> Iterator[tuple[StateGroup, dict[str, Tensor]]]:
    """Groups in the same order in every process of a stage, which agree before each group that is gathered."""
    found = dict(groups_of(mapper, states))
    for group in ordered(found):
        tensors = found.pop(group)
        if any(is_distributed(tensor) for tensor in tensors.values()):
            stage.agree()
        yield group, tensors


def _gather_only(mapper: ModelStateMapper, groups: Iterable[tuple[StateGroup, dict[str, Tensor]]]) -> list[ShardFile]:
    """Take part in the gathers of the process that writes, and write nothing."""
    for group, tensors in groups:
        applied(mapper, group, tensors)
    return []
