"""`read`: checkpoint tensors by address, such as `layers[10:20].heads[0]`; only their bytes are read."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from torch import Tensor

from nnsplice.atlas import Atlas
from nnsplice.checkpoints.between.derive import meta_model
from nnsplice.checkpoints.between.huggingface import expert_of, own_name
from nnsplice.checkpoints.io.folder import Checkpoint
from nnsplice.errors import UnknownPath, circumstances, closest
from nnsplice.paths import Path as Address
from nnsplice.paths import parse_path

#: The whole of a tensor, or an axis and ranges along it.
Part = tuple[int, tuple[tuple[int, int], ...]] | None


def read(src_dir: str | os.PathLike[str], path: str | Address) -> dict[str, Tensor]:
    """Read the tensors of an address from a checkpoint folder; only their bytes are read.

    The tensors of a head are its rows and columns of the projections, concatenated where there are several ranges.

    >>> from nnsplice.checkpoints import read
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     _ = model.save_pretrained(folder)
    ...     print({name: list(tensor.shape) for name, tensor in read(folder, "layers[0].heads[1]").items()})
    {'transformer.h.0.attn.c_attn.bias': [12], 'transformer.h.0.attn.c_attn.weight': [16, 12],
     'transformer.h.0.attn.c_proj.weight': [4, 16]}

    Args:
        src_dir: a folder with safetensors and config.json.
        path: a portable or native address.

    Returns:
        The tensors by name.

    Raises:
        UnknownPath: the checkpoint has no tensor at the address.
        MissingCheckpoint: the folder has no weights or no config.json.
        FileError: a file is damaged, or a pickle.
    """
    with circumstances(f"reading {path} of {os.fspath(src_dir)}"):
        checkpoint = Checkpoint.open(src_dir)
        atlas = Atlas.of(meta_model(checkpoint.folder))
        found = dict(_parts(checkpoint, atlas, parse_path(path)))
        if not found:
            raise UnknownPath(f"{path} has no tensor in this checkpoint", expected=closest(str(path), checkpoint))
        order = {name: number for number, name in enumerate(checkpoint.sizes(found))}
        return {name: _read(checkpoint, name, found[name]) for name in sorted(found, key=order.__getitem__)}


def _parts(checkpoint: Checkpoint, atlas: Atlas, address: Address) -> Iterator[tuple[str, Part]]:
    """The stored tensors of an address, and the part of each."""
    parts = atlas.resolve(address).parts
    own_names = {name: own_name(atlas, name) for name in checkpoint}
    own: dict[str, str] = {}
    for name, parameter in own_names.items():
        if parameter is not None and (parameter not in own or name == parameter):
            own[parameter] = name
    for parameter, part in parts.items():
        name = own.get(parameter)
        if name is not None:
            yield name, part
    # Files may store the experts of one parameter as separate tensors.
    for name in checkpoint:
        expert = None if own_names[name] is not None else expert_of(atlas, name)
        if expert is None:
            continue
        fused, number = expert
        for parameter in fused:
            if parameter in parts and _holds(parts[parameter], number):
                yield name, None
                break


def _holds(part: Part, number: int) -> bool:
    return part is None or (part[0] == 0 and any(start <= number < stop for start, stop in part[1]))


def _read(checkpoint: Checkpoint, name: str, part: Part) -> Tensor:
    shape = checkpoint.entry(name).shape
    whole = [(0, length) for length in shape]
    if part is None:
        return checkpoint.block(name, whole)
    axis, ranges = part
    blocks = [checkpoint.block(name, [*whole[:axis], ends, *whole[axis + 1 :]]) for ends in ranges]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, axis)
