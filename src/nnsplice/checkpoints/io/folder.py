"""A checkpoint folder: its tensors, and the file and offset of each."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from nnsplice.checkpoints.io.mapping import block_of, bytes_of
from nnsplice.checkpoints.mapper.abc import ModelStateMapper, StateGroup, inputs_of, listing, ordered
from nnsplice.errors import FileError, MapperError, MissingCheckpoint, closest
from nnsplice.files import from_json, local_path
from nnsplice.headers import Header, TensorEntry, read_header
from nnsplice.shown import shown

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
#: Endings of pickled weights.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The tensors of a checkpoint folder; files are opened when they are needed.

    >>> from nnsplice.checkpoints import Checkpoint
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     _ = model.save_pretrained(folder)
    ...     checkpoint = Checkpoint.open(folder)
    ...     print(len(checkpoint), checkpoint.entry("transformer.wpe.weight").shape)
    40 (64, 16)

    Attributes:
        folder: the folder.
        files: the file of each stored tensor, relative to the folder.
        tied: the other names of tied tensors, with the name under which each is stored.
    """

    folder: Path
    files: Mapping[str, str]
    tied: Mapping[str, str]
    _headers: dict[str, Header] = field(default_factory=dict[str, Header], repr=False)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Checkpoint:
        """Read the names of a folder's tensors.

        Args:
            folder: the folder.

        Returns:
            The checkpoint.

        Raises:
            MissingCheckpoint: the folder has no weights.
            FileError: pickles, or a damaged index.
            BadArgument: the address of an object store.
        """
        where = local_path(folder)
        index, single = where / INDEX, where / SINGLE
        if index.is_file():
            files, tied = _read_index(index)
            if single.is_file() and SINGLE not in files.values():
                raise FileError(
                    f"{where} has an {INDEX} and a {SINGLE} that is not in it; one of them is left from another save",
                    expected="one of them",
                )
            return cls(where, files, tied)
        if single.is_file():
            header = read_header(single)
            # `safetensors.torch.save_model` writes the other names of a tensor into the metadata.
            tied = {name: kept for name, kept in header.metadata.items() if kept in header.entries}
            return cls(
                where,
                dict.fromkeys(header.entries, SINGLE),
                {name: kept for name, kept in tied.items() if name not in header.entries},
                {SINGLE: header},
            )
        raise _no_weights(where)

    def __len__(self) -> int:
        return len(self.files) + len(self.tied)

    def __iter__(self) -> Iterator[str]:
        yield from self.files
        yield from self.tied

    def __contains__(self, name: object) -> bool:
        return name in self.files or name in self.tied

    def entry(self, name: str) -> TensorEntry:
        """File, shape and type of a tensor.

        Args:
            name: the name of the tensor.

        Returns:
            The entry.

        Raises:
            MapperError: no such tensor.
            MissingCheckpoint: its file is missing.
            FileError: its file is damaged, or does not have it.
        """
        stored = self.tied.get(name, name)
        file = self.files.get(stored)
        if file is None:
            raise MapperError(f"{self.folder} has no tensor {shown(name)}", expected=closest(name, self))
        header = self._headers.get(file)
        if header is None:
            path = self.folder / file
            try:
                there = path.is_file()
            except OSError as error:  # a name that no file can have
                raise FileError(
                    f"{INDEX} says that {shown(name)} is in {shown(file)}: {error.strerror}", path=self.folder
                ) from None
            if not there:
                raise MissingCheckpoint(
                    f"{self.folder / shown(file)} is missing; {INDEX} says that it holds {shown(name)}"
                )
            header = self._headers[file] = read_header(path)
        if stored not in header.entries:
            raise FileError(
                f"{INDEX} says that {shown(stored)} is in {shown(file)}, but it is not",
                path=self.folder,
                expected=f"one of {closest(stored, header.entries)}",
            )
        return header.entries[stored]

    def sizes(self, names: Iterable[str] | None = None) -> dict[str, int]:
        """The bytes of each tensor, in the order of the files.

        Args:
            names: the tensors; all if left out.

        Returns:
            The bytes by name.
        """
        entries = [(name, self.entry(name)) for name in (self if names is None else sorted(names))]
        entries.sort(key=lambda pair: (str(pair[1].path), pair[1].start))
        return {name: entry.nbytes for name, entry in entries}

    def blank(self, name: str) -> Tensor:
        """A meta tensor with the shape and type of a tensor.

        Args:
            name: the name of the tensor.

        Returns:
            The tensor.
        """
        entry = self.entry(name)
        return torch.empty(entry.shape, dtype=entry.dtype, device="meta")

    def tensor(self, name: str) -> Tensor:
        """A tensor as a view of its file; changes do not reach the file.

        >>> checkpoint = ns.checkpoints.Checkpoint.open(ns.models.embedded("toy"))
        >>> checkpoint.tensor("transformer.ln_f.weight").shape
        torch.Size([64])

        Args:
            name: the name of the tensor.

        Returns:
            The tensor.
        """
        entry = self.entry(name)
        return _typed(bytes_of(entry.path, entry.start, entry.nbytes), entry, entry.shape)

    def block(self, name: str, ranges: Sequence[tuple[int, int]]) -> Tensor:
        """A block of a tensor; only its bytes are read.

        >>> checkpoint = ns.checkpoints.Checkpoint.open(ns.models.embedded("toy"))
        >>> checkpoint.block("transformer.wte.weight", [(10, 12), (0, 64)]).shape   # the embeddings of two tokens
        torch.Size([2, 64])

        Args:
            name: the name of the tensor.
            ranges: (start, stop) for each dimension.

        Returns:
            The block.

        Raises:
            MapperError: ranges that do not fit the shape.
        """
        entry = self.entry(name)
        shape = tuple(stop - start for start, stop in ranges)
        if len(ranges) != len(entry.shape) or any(
            not 0 <= start <= stop <= length for (start, stop), length in zip(ranges, entry.shape, strict=True)
        ):
            raise MapperError(f"{shown(name)} is {list(entry.shape)}, which has no block {list(ranges)}")
        return _typed(block_of(entry.path, entry.start, entry.shape, entry.dtype.itemsize, ranges), entry, shape)

    def plan(self, mapper: ModelStateMapper) -> list[StateGroup]:
        """The groups of a mapper in the order of the files.

        >>> from nnsplice.checkpoints import Checkpoint, Identity, Parallel
        >>> checkpoint = Checkpoint.open(ns.models.embedded("toy"))
        >>> mapper = Parallel([Identity("transformer.wte.weight"), Identity("transformer.h.0.ln_1.bias")])
        >>> [sorted(group.inputs) for group in checkpoint.plan(mapper)]
        [['transformer.h.0.ln_1.bias'], ['transformer.wte.weight']]

        Args:
            mapper: the mapper.

        Returns:
            The groups.

        Raises:
            MapperError: an input is not there.
        """
        needed = inputs_of(mapper)
        missing = sorted(name for name in needed if name not in self)
        if missing:
            raise MapperError(
                f"missing inputs: {listing(missing)}",
                path=self.folder,
                expected=f"tensors of the checkpoint; like {missing[0]} are {closest(missing[0], self)}",
            )
        order = {name: number for number, name in enumerate(self.sizes(needed))}
        groups = ordered(mapper.state_dependency_groups())
        return sorted(groups, key=lambda group: min((order[name] for name in group.inputs), default=-1))


def _typed(found: Tensor, entry: TensorEntry, shape: tuple[int, ...]) -> Tensor:
    if found.data_ptr() % entry.dtype.itemsize:
        found = found.clone()  # the header of the file has an odd length, so the tensor is not aligned
    return found.view(entry.dtype).reshape(shape)


def _read_index(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    form = '{"weight_map": {"name": "file", ...}}'
    try:
        found: Any = from_json(path.read_text(encoding="utf-8"), path)
        files: dict[str, Any] = dict(found["weight_map"].items())
        metadata: Any = found.get("metadata") or {}
        other_names: Any = metadata.get("tied") or {}
        tied: dict[str, Any] = dict(other_names.items())
    except FileError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(f"{path} is damaged: {error!r}", expected=form) from None
    for name, other in (*files.items(), *tied.items()):
        if not isinstance(other, str):
            raise FileError(f"{path} says {shown(other)} of {shown(name)}", expected=form)
    for name, file in files.items():
        inside = PurePosixPath(file)
        if inside.is_absolute() or ".." in inside.parts or "\0" in file:
            raise FileError(f"{path} says that {shown(name)} is in {shown(file)}", expected="a file inside the folder")
        if not file.endswith(".safetensors"):
            raise _pickle(path.parent, file)
    for name, kept in tied.items():
        if kept not in files:
            raise FileError(
                f"{path} says that {shown(name)} is {shown(kept)}, which it does not have",
                expected="a name of weight_map",
            )
    return files, {name: kept for name, kept in tied.items() if name not in files}


def _no_weights(where: Path) -> FileError | MissingCheckpoint:
    if not where.is_dir():
        what = "a file, and a checkpoint is a folder" if where.exists() else "not there"
        return MissingCheckpoint(f"{where} is {what}", expected=f"a folder with {SINGLE} or {INDEX}")
    held = sorted(entry.name for entry in where.iterdir() if not entry.name.startswith("."))
    for name in held:
        if name.endswith(PICKLES) or name.endswith(".bin.index.json"):
            return _pickle(where, name)
    inside = sorted(str(path.parent) for name in (INDEX, SINGLE) for path in where.glob(f"*/{name}"))
    return MissingCheckpoint(
        f"{where} has neither {SINGLE} nor {INDEX}, but {listing(held)}",
        expected="a folder with weights",
        write=f'"{inside[0]}"' if inside else None,
    )


def _pickle(where: Path, name: str) -> FileError:
    return FileError(
        f"{where / shown(name)} is a pickle, which can run any code when it is opened, so it is not read",
        expected=f"{SINGLE} or {INDEX}",
        write=f'AutoModel.from_pretrained("{where}", weights_only=True).save_pretrained("{where}-safe")'
        "   (where you trust it; it writes safetensors)",
    )
