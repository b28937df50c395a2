"""Writing: groups are mapped as soon as their tensors have come, and written into files of about one size."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from nnsplice.checkpoints.io.shards import ShardFile
from nnsplice.checkpoints.io.staging import read_journal, staged, writer
from nnsplice.checkpoints.mapper.abc import (
    ModelStateMapper,
    StateGroup,
    applied,
    inputs_of,
    listing,
    ordered,
    outputs_of,
)
from nnsplice.checkpoints.mapper.compose import Parallel, Sequential
from nnsplice.checkpoints.mapper.distributed import GatherFullTensor, is_distributed
from nnsplice.checkpoints.mapper.fingerprint import fingerprint
from nnsplice.errors import BadArgument, MapperError, circumstances
from nnsplice.files import local_path
from nnsplice.progress import bar
from nnsplice.warn import warn_caller

#: Tensors by their names, one after the other.
States = Iterable[tuple[str, Tensor]]


def write_model_state_local(
    dest_dir: str | os.PathLike[str],
    mapper: ModelStateMapper,
    state_generator: States,
    shard_size_gb: float = 4.0,
    show_progress: bool = True,
    *,
    resume: bool = False,
    source: str = "",
    carry: Mapping[str, Path | str] | None = None,
    like: Sequence[Path] = (),
) -> None:
    """Write a checkpoint from an iterable of names and tensors.

    The old checkpoint is replaced in one step when the new one is complete; other files in the folder stay. A tensor
    with several names (`Copy`, tied weights) is stored once, and the index has its other names.

    >>> from nnsplice.checkpoints import Rename, read_model_state, write_model_state_local
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     write_model_state_local(f"{folder}/new", Rename("a", "b"), [("a", torch.ones(2))], show_progress=False)
    ...     print(dict(read_model_state(f"{folder}/new", Rename("b", "a"), "cpu", show_progress=False)))
    {'a': tensor([1., 1.])}

    Args:
        dest_dir: the folder to write, made or replaced.
        mapper: from the names of the tensors to the names in the files.
        state_generator: names and tensors, in any order; each is held until its group is complete.
        shard_size_gb: the largest size of a file, in units of 1024**3 bytes; a larger tensor has a file of its own.
        show_progress: show a progress bar in bytes.
        resume: continue an interrupted call, and keep finished files if this one is interrupted.
        source: a description of the tensors' origin; `resume` refuses to continue with another one.
        carry: other files for the folder: name -> a file to copy, or a text.
        like: files and folders that the tensors come from; the new files are readable for users who may read all of
            these.

    Raises:
        MapperError: an input is missing at the end, or is offered twice.
        WriteFailed: a file could not be written.
        FileError: another process is writing this checkpoint, or `resume` found another job.
    """
    with circumstances(f"writing {os.fspath(dest_dir)}"):
        limit = shard_bytes(shard_size_gb)
        with staged(local_path(dest_dir), job_digest(mapper, limit, source), resume=resume) as staging:
            if not staging.published:
                shards = write_shards(
                    staging.folder, "0000", mapper, groups_of(mapper, state_generator), limit, show_progress
                )
                staging.publish(shards, carry or {}, like)


def save_model_state(
    dest_dir: str | os.PathLike[str],
    mapper: ModelStateMapper,
    model: nn.Module,
    shard_size_gb: float = 4.0,
    show_progress: bool = True,
) -> None:
    """Write states of a model through a mapper; `identity_mapper_from_module(model)` writes all of them.

    >>> from tempfile import TemporaryDirectory
    >>> from nnsplice.checkpoints import Checkpoint, Parallel, Rename, save_model_state
    >>> mapper = Parallel([Rename("weight", "norm.scale"), Rename("bias", "norm.shift")])
    >>> with TemporaryDirectory() as folder:
    ...     save_model_state(f"{folder}/new", mapper, torch.nn.LayerNorm(4), show_progress=False)
    ...     Checkpoint.open(f"{folder}/new").sizes()
    {'norm.scale': 16, 'norm.shift': 16}

    Args:
        dest_dir: the folder to write, made or replaced.
        mapper: from the names of the model's states to the names in the files.
        model: the module.
        shard_size_gb: the largest size of a file, in units of 1024**3 bytes.
        show_progress: show a progress bar in bytes.

    Raises:
        MapperError: the mapper needs a state that the model does not have.
        BadArgument: a `shard_size_gb` that is not above 0.
        WriteFailed: a file could not be written.
    """
    write_model_state_local(
        dest_dir, gathering(mapper, [model]), states_of(mapper, [model]), shard_size_gb, show_progress
    )


def states_of(mapper: ModelStateMapper, models: Sequence[nn.Module]) -> States:
    """The states of models that are inputs of a mapper."""
    needed = inputs_of(mapper)
    for model in models:
        yield from ((name, state) for name, state in model.state_dict().items() if name in needed)


def gathering(mapper: ModelStateMapper, models: Sequence[nn.Module]) -> ModelStateMapper:
    """The mapper, after DTensors among the states are gathered."""
    distributed = [name for name, state in states_of(mapper, models) if is_distributed(state)]
    if not distributed:
        return mapper
    gather = Parallel([GatherFullTensor(name) for name in distributed])
    return Sequential([gather, mapper])


def shard_bytes(shard_size_gb: float) -> int:
    """The size of a file in bytes."""
    if not shard_size_gb > 0:
        raise BadArgument(f"shard_size_gb is {shard_size_gb}", expected="more than 0")
    return max(1, int(shard_size_gb * 1024**3))


def job_digest(mapper: ModelStateMapper, limit: int, source: str) -> str:
    """A digest of a job: of its source, its file size and its mapper."""
    summed = hashlib.sha256(f"{source}\n{limit}\n".encode())
    for part in fingerprint(mapper):
        summed.update(f"{part}\n".encode())
    return summed.hexdigest()


def write_shards(
    folder: Path,
    prefix: str,
    mapper: ModelStateMapper,
    groups: Iterable[tuple[StateGroup, dict[str, Tensor]]],
    limit: int,
    show_progress: bool,
    position: int | None = None,
) -> list[ShardFile]:
    """Write the outputs of a mapper's groups into files of a staging folder, but for those that its journal has."""
    before = read_journal(folder / f"{prefix}.jsonl", folder / "weights")
    number = 1 + max((int(shard.file.split("-")[-1].split(".")[0]) for shard in before if shard.file), default=0)
    written = {name for shard in before for name in (*shard.names, *shard.tied)}
    files = writer(folder, prefix, limit, outputs_of(mapper) - written, number)
    try:
        with bar("writing", None, "B", show_progress, position=position) as shown:
            for group, tensors in groups:
                if group.outputs <= written and not any(is_distributed(tensor) for tensor in tensors.values()):
                    continue
                made = applied(mapper, group, tensors)
                tensors.clear()
                for name in list(made):
                    tensor = made.pop(name)
                    (files.remember if name in written else files.add)(name, tensor)
                    shown.update(tensor.nbytes)
        files.close()
    except BaseException:
        files.abandon()
        raise
    return read_journal(folder / f"{prefix}.jsonl", folder / "weights")


def groups_of(mapper: ModelStateMapper, states: States) -> Iterable[tuple[StateGroup, dict[str, Tensor]]]:
    """Groups with their tensors, each as soon as all of its tensors have come.

    Raises:
        MapperError: a tensor comes twice, or is missing at the end.
    """
    of: dict[str, StateGroup] = {}
    for group in ordered(mapper.state_dependency_groups()):
        if not group.inputs:
            yield group, {}
        of |= dict.fromkeys(group.inputs, group)
    waiting: dict[StateGroup, dict[str, Tensor]] = {}
    seen: set[str] = set()
    unused: list[str] = []
    for name, tensor in states:
        group = of.get(name)
        if name in seen:
            raise MapperError(f"{name} is offered twice", expected="each tensor once")
        seen.add(name)
        if group is None:
            unused.append(name)
            continue
        held = waiting.setdefault(group, {})
        held[name] = tensor
        del tensor
        if len(held) == len(group.inputs):
            yield group, waiting.pop(group)
            del held
    missing = of.keys() - seen
    if missing:
        raise MapperError(f"missing inputs: {listing(missing)}", expected="every input of the mapper, offered once")
    if unused:
        warn_caller(f"offered, and used by no mapper: {listing(unused)}")
