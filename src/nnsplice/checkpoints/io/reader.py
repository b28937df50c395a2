"""Reading: group by group in the order of the files, so that only one group is in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from nnsplice.checkpoints.io.explain import dry_run
from nnsplice.checkpoints.io.folder import Checkpoint
from nnsplice.checkpoints.mapper.abc import ModelStateMapper, StateGroup, applied, listing, outputs_of
from nnsplice.checkpoints.mapper.distributed import is_distributed, local_piece
from nnsplice.errors import MapperError, circumstances, closest
from nnsplice.progress import bar

Device = str | torch.device


def read_model_state(
    src_dir: str | os.PathLike[str],
    mapper: ModelStateMapper,
    device: Device = "cpu",
    show_progress: bool = True,
    position: int | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Read a checkpoint through a mapper, one tensor at a time.

    The mapper's inputs and the headers of all files are checked at the call; tensors are read during iteration. On the
    CPU a large tensor that the mapper does not change is a view of its file.

    >>> from nnsplice.checkpoints import Cast, Rename, Sequential, read_model_state
    >>> toy = ns.models.embedded("toy")
    >>> mapper = Sequential([Rename("transformer.wpe.weight", "positions"), Cast("positions", torch.bfloat16)])
    >>> for name, tensor in read_model_state(toy, mapper, show_progress=False):
    ...     print(name, tensor.dtype, list(tensor.shape))
    positions torch.bfloat16 [40, 64]
    >>> read_model_state(toy, Rename("transformer.wpe", "positions"))
    Traceback (most recent call last):
    nnsplice.errors.MapperError: missing inputs: transformer.wpe
        ...
      expected: tensors of the checkpoint; like transformer.wpe are transformer.wpe.weight, ...

    Args:
        src_dir: the checkpoint.
        mapper: from the names in the files to new names.
        device: where the mapper runs, and where the tensors are.
        show_progress: show a progress bar in bytes.
        position: the line of the bar, where several processes show one.

    Returns:
        An iterator of names and tensors.

    Raises:
        MissingCheckpoint: the folder has no weights, or a file of them is missing.
        FileError: a file is damaged, or a pickle.
        MapperError: an input is not there.
    """
    with circumstances(f"reading {os.fspath(src_dir)}"):
        checkpoint = Checkpoint.open(src_dir)
        groups = checkpoint.plan(mapper)
    return stream(checkpoint, mapper, groups, device, show_progress, position)


def stream(
    checkpoint: Checkpoint,
    mapper: ModelStateMapper,
    groups: Sequence[StateGroup],
    device: Device,
    show_progress: bool,
    position: int | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The outputs of groups, one group after the other."""
    sizes = [sum(checkpoint.entry(name).nbytes for name in group.inputs) for group in groups]
    with bar("reading", sum(sizes), "B", show_progress, position=position) as shown:
        for group, size in zip(groups, sizes, strict=True):
            made = _apply(checkpoint, mapper, group, device)
            for name in list(made):
                yield name, made.pop(name)
            shown.update(size)


def _apply(checkpoint: Checkpoint, mapper: ModelStateMapper, group: StateGroup, device: Device) -> dict[str, Tensor]:
    with circumstances(f"reading {checkpoint.folder}"):
        return applied(mapper, group, {name: checkpoint.tensor(name).to(device) for name in sorted(group.inputs)})


def load_model_state(
    src_dir: str | os.PathLike[str],
    mapper: ModelStateMapper,
    device: Device,
    model: nn.Module,
    show_progress: bool = True,
    position: int | None = None,
) -> None:
    """Load a checkpoint through a mapper into a model; other states are not changed.

    Names and shapes are checked before anything is changed. A state on the meta device gets a tensor on `device`.

    >>> from nnsplice.checkpoints import Rename, Sequential, Slice, load_model_state
    >>> short = torch.nn.Embedding(8, 64)   # the first 8 positions of the toy model
    >>> name = "transformer.wpe.weight"
    >>> mapper = Sequential([Slice(name, dim=0, stop=8), Rename(name, "weight")])
    >>> load_model_state(ns.models.embedded("toy"), mapper, "cpu", short, show_progress=False)
    >>> torch.equal(short.weight, ns.models.unwrap(ns.load("toy")).transformer.wpe.weight[:8])
    True

    Args:
        src_dir: the checkpoint.
        mapper: from the names in the files to those of the model's states.
        device: where the mapper runs.
        model: the module to load into.
        show_progress: show a progress bar in bytes.
        position: the line of the bar, where several processes show one.

    Raises:
        MissingCheckpoint: the folder has no weights, or a file of them is missing.
        FileError: a file is damaged, or a pickle.
        MapperError: an input that is not there, a state that the model does not have or has in another shape, or two
            different states for tied ones.
    """
    with circumstances(f"loading {os.fspath(src_dir)}"):
        states = {name: state for name, state in model.state_dict(keep_vars=True).items() if isinstance(state, Tensor)}
        unknown = sorted(outputs_of(mapper) - states.keys())
        if unknown:
            raise MapperError(
                f"the model has no state {listing(unknown)}", expected=f"such as {closest(unknown[0], states)}"
            )
        checkpoint = Checkpoint.open(src_dir)
        groups: list[StateGroup] = []
        for group in checkpoint.plan(mapper):
            blanks, made = dry_run(mapper, group, checkpoint)
            for name, blank in made.items():
                _check(name, blank, states[name])
            if not _load_shards(checkpoint, states, blanks, made):
                groups.append(group)
        _check_ties(checkpoint, mapper, groups, states)
    for name, tensor in stream(checkpoint, mapper, groups, device, show_progress, position):
        _assign(model, states, name, tensor)


def _load_shards(
    checkpoint: Checkpoint, states: dict[str, Tensor], blanks: dict[str, Tensor], made: dict[str, Tensor]
) -> bool:
    """Load a group that only renames into DTensors, reading the shards of this process only; False for other groups."""
    sources = {id(blank): name for name, blank in blanks.items()}
    if not all(id(blank) in sources and is_distributed(states[name]) for name, blank in made.items()):
        return False
    if any(states[name].is_meta for name in made):
        return False
    for name, blank in made.items():
        piece = local_piece(states[name])
        with torch.no_grad():
            cast("Any", states[name]).to_local().copy_(checkpoint.block(sources[id(blank)], piece))
    return True


def _check(name: str, found: Tensor, target: Tensor) -> None:
    if found.shape != target.shape:
        raise MapperError(f"{name} is {list(found.shape)} in the checkpoint and {list(target.shape)} in the model")
    if found.dtype != target.dtype and not (found.is_floating_point() and target.is_floating_point()):
        raise MapperError(
            f"{name} is {found.dtype} in the checkpoint and {target.dtype} in the model",
            write=f'Cast("{name}", {target.dtype})   (where that is meant)',
        )


def _check_ties(
    checkpoint: Checkpoint, mapper: ModelStateMapper, groups: Sequence[StateGroup], states: dict[str, Tensor]
) -> None:
    """Raise where two names of one tensor of the model would get two different tensors."""
    makers = {name: group for group in groups for name in group.outputs}
    names: dict[int, list[str]] = {}
    for name in sorted(makers):
        names.setdefault(id(states[name]), []).append(name)
    for one, *others in names.values():
        for other in others:
            made = {k: v for n in (one, other) for k, v in _apply(checkpoint, mapper, makers[n], "cpu").items()}
            a, b = made[one], made[other]
            if not (is_distributed(a) or is_distributed(b) or torch.equal(_as_bytes(a), _as_bytes(b))):
                raise MapperError(
                    f"{one} and {other} are one tensor in the model, and two different ones in the checkpoint",
                    expected="a model that does not tie them, or a mapper that makes one of the two",
                )


def _as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, in which NaN equals NaN."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _assign(model: nn.Module, states: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    target = states[name]
    if is_distributed(target):
        # Every process has the whole tensor here and copies its own shard, without communication.
        piece = tensor[tuple(slice(*ends) for ends in local_piece(target))]
        if target.is_meta:
            raise MapperError(f"{name} is a DTensor on the meta device", write="model.to_empty(device=...)")
        with torch.no_grad():
            cast("Any", target).to_local().copy_(piece)
        return
    if not target.is_meta:
        with torch.no_grad():
            target.copy_(tensor)
        return
    fresh = tensor.to(target.dtype, copy=True)
    if isinstance(target, nn.Parameter):
        fresh = nn.Parameter(fresh, requires_grad=target.requires_grad)
    # All names of a tied weight get the same new tensor.
    for other in [other for other, state in states.items() if state is target]:
        owner, _, attribute = other.rpartition(".")
        setattr(model.get_submodule(owner), attribute, fresh)
        states[other] = fresh
