"""`convert` and `renaming`: a checkpoint folder converted into another one, as a stream."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nnsplice.checkpoints.between.derive import Between
from nnsplice.checkpoints.config import layer_of
from nnsplice.checkpoints.io.folder import Checkpoint
from nnsplice.checkpoints.io.reader import read_model_state
from nnsplice.checkpoints.io.staging import other_files
from nnsplice.checkpoints.io.workers import write_with_workers
from nnsplice.checkpoints.io.writer import write_model_state_local
from nnsplice.checkpoints.mapper.abc import ModelStateMapper, as_mapper, inputs_of, listing
from nnsplice.checkpoints.mapper.adapters import identity_mapper_from_mapper_outputs
from nnsplice.checkpoints.mapper.compose import Parallel, Sequential
from nnsplice.checkpoints.mapper.fingerprint import fingerprint
from nnsplice.checkpoints.mapper.names import Copy, Rename
from nnsplice.checkpoints.mapper.numbers import Cast
from nnsplice.errors import BadArgument, MapperError, OutOfRange, circumstances
from nnsplice.files import local_path

#: Types that are cast. Packed and 8-bit weights are not, as they belong to scales.
_CASTABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def convert(
    src_dir: str | os.PathLike[str],
    dest_dir: str | os.PathLike[str],
    mapper: ModelStateMapper,
    *,
    shard_size_gb: float = 4.0,
    show_progress: bool = True,
    resume: bool = False,
    carry: Mapping[str, Path | str] | None = None,
    workers: int = 1,
) -> None:
    """Convert a checkpoint with a mapper; config, tokenizer and other files are copied.

    Both folders may be the same: the old weights stay until the new ones are complete.

    >>> from nnsplice.checkpoints import Checkpoint, convert, renaming
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     _ = model.save_pretrained(folder)
    ...     convert(folder, f"{folder}/new", renaming(folder, ["transformer.h=layers"]), show_progress=False)
    ...     print(sorted(Checkpoint.open(f"{folder}/new"))[:2])
    ['layers.0.attn.c_attn.bias', 'layers.0.attn.c_attn.weight']

    Args:
        src_dir: the checkpoint to read.
        dest_dir: the folder to write, made or replaced.
        mapper: from the names in `src_dir` to those in `dest_dir`. A result of `mapper_between` has to be complete; its
            `mapper` attribute leaves out what could not be derived.
        shard_size_gb: the largest size of a file, in units of 1024**3 bytes.
        show_progress: show a progress bar.
        resume: continue an interrupted call, and keep finished files if this one is interrupted.
        carry: other files for the new folder, instead of those of `src_dir`: name -> a file to copy, or a text.
        workers: the number of processes, worth it from tens of gigabytes on. In a script, call it behind
            `if __name__ == "__main__":`.

    Raises:
        MissingCheckpoint: `src_dir` has no weights, or a file of them is missing.
        FileError: a damaged file, or `resume` with another job.
        MapperError: a mapper that does not fit the checkpoint, or is not complete.
        WriteFailed: a file could not be written.
    """
    if workers < 1:
        raise BadArgument(f"workers={workers}", expected="at least 1")
    if isinstance(mapper, Between):
        between = mapper.complete()
        check_unused(src_dir, between)
        mapper = between
    mapper = as_mapper(mapper)
    source = local_path(src_dir)
    Checkpoint.open(source)  # raises if the folder is no checkpoint
    along = {**other_files(source), **(carry or {})}
    like = [source, *_read_files(source, mapper)]
    if workers > 1:
        write_with_workers(
            src_dir, dest_dir, mapper, workers, shard_size_gb=shard_size_gb, show_progress=show_progress,
            resume=resume, source=_job_text(source, mapper), carry=along, like=like,
        )  # fmt: skip
        return
    states = read_model_state(src_dir, mapper, "cpu", show_progress)
    write_model_state_local(
        dest_dir,
        # The mapper already ran; the writer finds tied tensors by their memory.
        identity_mapper_from_mapper_outputs(mapper),
        states,
        shard_size_gb,
        show_progress=False,
        resume=resume,
        source=_job_text(source, mapper),
        carry=along,
        like=like,
    )


def check_unused(src_dir: str | os.PathLike[str], between: Between) -> None:
    """Raise if an unused tensor would be lost; zeros and a second copy of the embedding may be left out."""
    checkpoint = Checkpoint.open(src_dir)
    lost = [name for name in between.unused if name in checkpoint and checkpoint.tensor(name).any()]
    if "unembed.W_U" in lost and "embed.W_E" in checkpoint:
        shapes = checkpoint.entry("unembed.W_U").shape, checkpoint.entry("embed.W_E").shape[::-1]
        if shapes[0] == shapes[1] and _is_multiple(checkpoint.tensor("unembed.W_U").T, checkpoint.tensor("embed.W_E")):
            lost.remove("unembed.W_U")
    for name, kept in between.same.items():
        if name in lost and kept in checkpoint:
            if not torch.equal(checkpoint.tensor(name), checkpoint.tensor(kept)):
                raise MapperError(
                    f"{name} and {kept} are two different tensors, and the target ties them into one",
                    expected="a target whose config has tie_word_embeddings=False",
                )
            lost.remove(name)
    if lost:
        raise MapperError(
            f"there is no site for {', '.join(lost[:5])}{', ...' if len(lost) > 5 else ''}",
            expected="a family whose parts are all known there",
            write="ns.checkpoints.mapper_between(source, target).mapper   (leaves them out)",
        )


def _is_multiple(a: Tensor, b: Tensor) -> bool:
    """Whether one matrix is a multiple of the other, as in families that scale the embedding."""
    times = (b.double().square().sum() / a.double().square().sum()).sqrt()
    return torch.allclose(a.double() * times, b.double(), rtol=1e-2, atol=1e-6)


def _read_files(source: Path, mapper: ModelStateMapper) -> list[Path]:
    """The files that a mapper reads."""
    checkpoint = Checkpoint.open(source)
    return sorted({checkpoint.entry(name).path for name in inputs_of(mapper) if name in checkpoint})


def _job_text(source: Path, mapper: ModelStateMapper) -> str:
    """A text that identifies a checkpoint and a mapper, for `resume`."""
    stamps: list[str] = []
    for path in _read_files(source, mapper):
        found = path.stat()
        stamps.append(f"{path.relative_to(source)} {found.st_size} {found.st_mtime_ns}")
    return "\n".join((str(source.resolve()), *stamps, *fingerprint(mapper)))


def renaming(
    src_dir: str | os.PathLike[str],
    renames: str | Sequence[str] = (),
    *,
    dtype: torch.dtype | None = None,
    layers: slice | Sequence[int] | None = None,
) -> Parallel:
    """The mapper of a conversion that changes names, the number type, or the choice of layers.

    >>> from nnsplice.checkpoints import renaming
    >>> toy = ns.models.embedded("toy-llama")
    >>> renames = ["model.layers.*.mlp=blocks.*.ff", "model="]   # the second takes a word out
    >>> mapper = renaming(toy, renames, dtype=torch.bfloat16, layers=[0, 1])
    >>> names = sorted(name for group in mapper.state_dependency_groups() for name in group.outputs)
    >>> names[0], names[-1], len(names)
    ('blocks.0.ff.down_proj.weight', 'norm.weight', 20)
    >>> mapper.explain(toy).read_bytes, mapper.explain(toy).made_bytes
    (421120, 210560)

    Args:
        src_dir: the checkpoint.
        renames: `OLD=NEW`, or several, applied one after the other. OLD is a sequence of whole names between dots,
            replaced at its first occurrence; a `*` in it matches one name, which a `*` in NEW repeats. An empty NEW
            removes the sequence.
        dtype: the new type of floating point tensors of 16 to 64 bits; others are not changed.
        layers: the layers to keep; everything outside the layers stays, and layers keep their numbers.

    Returns:
        The mapper, for `convert`.

    Raises:
        MapperError: two tensors would have one name.
        BadArgument: a rename that matches no tensor.
        OutOfRange: a layer that does not exist.
    """
    with circumstances(f"converting {os.fspath(src_dir)}"):
        checkpoint = Checkpoint.open(src_dir)
        names = _chosen(checkpoint, layers)
        new = dict(zip(names, names, strict=True))
        for rename in [renames] if isinstance(renames, str) else renames:
            changed = {name: _renamed(now, rename) for name, now in new.items()}
            if changed == new:
                raise BadArgument(
                    f"--rename {rename} concerns no tensor", expected=f"names such as {listing(names, 3)}"
                )
            if bare := next((name for name, now in changed.items() if not now), None):
                raise BadArgument(f"--rename {rename} leaves nothing of the name {bare}", expected="a name")
            new = changed
        tied: dict[str, list[str]] = {}
        for name in names:
            tied.setdefault(checkpoint.tied.get(name, name), []).append(name)
        return Parallel([_one(checkpoint, every, new, dtype) for every in tied.values()])


def _one(
    checkpoint: Checkpoint, names: Sequence[str], new: Mapping[str, str], dtype: torch.dtype | None
) -> ModelStateMapper:
    """The mapper of one stored tensor with all of its names."""
    stored = checkpoint.tied.get(names[0], names[0])
    stages: list[ModelStateMapper] = []
    if dtype is not None and checkpoint.entry(stored).dtype in _CASTABLE:
        stages.append(Cast(stored, dtype))
    if len(names) == 1:
        stages.append(Rename(stored, new[names[0]]))
    else:
        stages.append(Copy(stored, [new[name] for name in names]))
    return Sequential(stages) if len(stages) > 1 else stages[0]


def _renamed(name: str, rename: str) -> str:
    old, equals, new = rename.partition("=")
    if not equals or not old or new.count("*") > old.count("*"):
        raise BadArgument(f"{rename!r} is no rename", expected="OLD=NEW, with no more * in NEW than in OLD")
    pattern = re.escape(old).replace(r"\*", r"([^.]+)")
    found = re.search(rf"(?:^|(?<=\.)){pattern}(?=\.|$)", name)
    if found is None:
        return name
    filled = iter(found.groups())
    middle = re.sub(r"\*", lambda _: next(filled), new)
    return ".".join(
        part for part in (name[: found.start()].rstrip("."), middle, name[found.end() :].strip(".")) if part
    )


# -- layers ------------------------------------------------------------------------------------------------------------


def _chosen(checkpoint: Checkpoint, layers: slice | Sequence[int] | None) -> list[str]:
    """The tensors of some layers and of no layer, in the order of the files."""
    names = list(checkpoint.sizes())
    if layers is None:
        return names
    count = 1 + max((layer for name in names if (layer := layer_of(name)) is not None), default=-1)
    wanted = set(range(*layers.indices(count))) if isinstance(layers, slice) else _numbers(layers, count)
    if not wanted:
        raise OutOfRange(f"no layer of {count} is chosen", expected=f"some of 0 to {count - 1}")
    return [name for name in names if (layer := layer_of(name)) is None or layer in wanted]


def _numbers(layers: Iterable[int], count: int) -> set[int]:
    for layer in layers:
        if not -count <= layer < count:
            raise OutOfRange(f"layer {layer} is not there", expected=f"0 to {count - 1}")
    return {layer % count for layer in layers}
