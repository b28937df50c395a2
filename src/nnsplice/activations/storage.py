"""Captures on disk: a safetensors file, its keys and provenance as JSON in the header.

Each tensor has the name of its site, so single sites are read without the rest. Nothing is unpickled. A file is written
under another name and renamed when it is complete. The header repeats the shape, the dtype and a checksum of every
tensor, and has one of its own texts, as a damaged file may still be valid safetensors.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from nnsplice import engine
from nnsplice.activations import lookup
from nnsplice.activations.packs import Pack, Provenance, check_key, common_length
from nnsplice.digests import checksum
from nnsplice.errors import BadType, FileError, PathError
from nnsplice.files import from_json, is_pickle
from nnsplice.headers import Header, read_header
from nnsplice.paths import Path, Paths, parse_path
from nnsplice.shown import shown
from nnsplice.stores import Opened, opened, whole

HEADER = "nnsplice"
KIND = "SavedActivation"
FORMAT = 1


def write(
    path: str | os.PathLike[str], packs: Sequence[Pack], provenance: Provenance, notes: Mapping[str, str] | None = None
) -> None:
    """Write packs to a file, completely or not at all.

    Args:
        notes: further texts for the header, by name.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    keys: dict[str, list[str]] = {}
    for pack in packs:
        name = str(pack.keys[0].place)
        # safetensors takes neither shared nor strided memory; a view of a larger tensor would be both.
        tensors[name] = pack.tensor.detach().clone(memory_format=torch.contiguous_format)
        keys[name] = [str(key) for key in pack.keys]
    header = {"kind": KIND, "format": FORMAT, "version": version("nnsplice"), "keys": keys, **_plain(provenance)}
    header["tensors"] = {name: [_kind(t), list(t.shape), f"{checksum(t):x}"] for name, t in tensors.items()}
    header["sum"] = _sum(header)
    with whole(path) as temporary:
        save_file(tensors, temporary, metadata={HEADER: json.dumps(header), **(notes or {})})


def read(path: str | os.PathLike[str], paths: Paths | None = None) -> tuple[list[Pack], Provenance]:
    """The packs of a file, or only these sites and positions, and their provenance."""
    with opened(path, header=True) as file:
        return _read(path, paths, file)


def _read(path: str | os.PathLike[str], paths: Paths | None, at: Opened) -> tuple[list[Pack], Provenance]:
    from safetensors import SafetensorError, safe_open

    local = at.local
    if is_pickle(local):
        raise FileError(
            f"{path} looks like a pickle (torch.save), which can run any code when it is opened",
            expected="a safetensors file that SavedActivation.to_file wrote",
            write="load it with torch.load(..., weights_only=True) yourself, then SavedActivation.from_pairs(...)",
        )
    problem = None
    packs, provenance = [], Provenance()
    try:
        tensors = read_header(path, local=local)
        header = _header(path, tensors.metadata)
        keys, rows = _keys(path, header, tensors)
        provenance = _provenance(path, header, rows)
        chosen = _everything(keys) if paths is None else _chosen(keys, engine.listed(paths), provenance)
        for name in chosen:
            at.fetch(tensors.entries[name].start, tensors.entries[name].nbytes)
        with safe_open(os.fspath(local), framework="pt") as file:
            packs = [_pack(path, header, file, name, keys[name], numbers) for name, numbers in chosen.items()]
    except FileError as error:
        problem = error
    except (SafetensorError, RuntimeError) as error:
        problem = FileError(
            f"{path} is damaged or no safetensors file: {error}", expected="a file that SavedActivation.to_file wrote"
        )
    # The file is opened twice, and may have been replaced in between.
    if not at.is_same():
        raise FileError(f"{path} was replaced while it was read", expected="a file that nobody writes meanwhile")
    if problem is not None:
        raise problem
    return packs, provenance


def note(path: str | os.PathLike[str], name: str) -> str | None:
    """A further text of the header."""
    with opened(path, header=True) as file:
        return read_header(path, local=file.local).metadata.get(name)


def _header(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> dict[str, Any]:
    text = metadata.get(HEADER)
    if text is None:
        raise FileError(f"{path} is a safetensors file without nnsplice's header, so no capture")
    try:
        header = from_json(text, f"the header of {path}")
        known = header["kind"] == KIND and isinstance(header["keys"], dict) and isinstance(header["format"], int)
    except (ValueError, TypeError, KeyError):
        known = False
    if not known:
        raise FileError(f"the header of {path} is damaged, or of another kind", expected=f'"kind": "{KIND}"')
    if header["format"] > FORMAT:
        raise FileError(f"{path} has format {header['format']}; this nnsplice reads up to {FORMAT}")
    written = header.pop("sum", None)  # files of older versions have none
    if written not in (None, _sum(header)):
        raise FileError(
            f"{path} is damaged: its header is not what was written",
            expected="a file that SavedActivation.to_file wrote",
        )
    return header


def _sum(header: Mapping[str, Any]) -> str:
    """A checksum of the texts of a header: keys, prompts, tokens, spans."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(header)), sort_keys=True).encode()).hexdigest()[:16]


def _keys(
    path: str | os.PathLike[str], header: dict[str, Any], file: Header
) -> tuple[dict[str, tuple[Path, ...]], int]:
    """The keys of every tensor, checked against its shape, and the number of rows; reads no tensor."""
    names = set(file.entries)
    if names != set(header["keys"]):
        different = ", ".join(map(shown, sorted(names.symmetric_difference(header["keys"]))[:5]))
        raise FileError(f"the header of {path} and the tensors in it do not agree on {different}")
    keys: dict[str, tuple[Path, ...]] = {}
    counts: set[int] = set()
    for name, texts in header["keys"].items():
        shape = list(file.entries[name].shape)
        if not isinstance(texts, list) or len(shape) != 3 or len(texts) != shape[1] or not texts:
            listed = len(texts) if isinstance(texts, list) else "no"
            raise FileError(
                f"{name} in {path} has shape {shape}, and the header lists {listed} positions",
                expected="[prompt, position, width]",
            )
        keys[name] = tuple(_parsed(path, text) for text in texts)
        counts.add(shape[0])
    if len({key for of in keys.values() for key in of}) < sum(map(len, keys.values())):
        raise FileError(f"the header of {path} names a key twice")
    if len(counts) > 1:
        raise FileError(
            f"the tensors in {path} have {' and '.join(map(str, sorted(counts)))} rows", expected="one number"
        )
    for name in keys:
        _check(path, name, "shape", list(file.entries[name].shape), _written(header, name, 1))
    return keys, counts.pop() if counts else 0


def _everything(keys: Mapping[str, Sequence[Path]]) -> dict[str, list[int]]:
    return {name: list(range(len(of))) for name, of in keys.items()}


def _chosen(
    keys: Mapping[str, tuple[Path, ...]], paths: Iterable[str | Path], provenance: Provenance
) -> dict[str, list[int]]:
    """Name of a tensor -> the numbers of the wanted positions."""
    # Lookup needs keys and no values, so empty tensors will do.
    empty = [Pack(of, torch.empty(0, len(of), 0)) for of in keys.values()]
    index, length = lookup.KeyIndex(empty), common_length(empty, provenance)
    entries = sorted({entry for path in paths for entry in lookup.find(index, path, None, length)})
    chosen: dict[str, list[int]] = {}
    for number, position in entries:
        chosen.setdefault(list(keys)[number], []).append(position)
    return chosen


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _written(header: Mapping[str, Any], name: str, which: int) -> Any:
    """The dtype, shape or checksum of a tensor in the header; None in files of older versions."""
    found = header.get("tensors")
    one = found.get(name) if isinstance(found, Mapping) else None
    return one[which] if isinstance(one, list) and len(one) == 3 else None


def _check(path: str | os.PathLike[str], name: str, what: str, found: object, written: object) -> None:
    if written is not None and found != written:
        raise FileError(
            f"{path} is damaged: {name} has {what} {found}, and was written with {written}",
            expected="a file that SavedActivation.to_file wrote",
        )


def _pack(
    path: str | os.PathLike[str],
    header: Mapping[str, Any],
    file: Any,
    name: str,
    keys: Sequence[Path],
    numbers: Sequence[int],
) -> Pack:
    first = numbers[0]
    tensor = file.get_slice(name)[:, first : numbers[-1] + 1]
    _check(path, name, "numbers of the kind", _kind(tensor), _written(header, name, 0))
    if len(keys) == tensor.shape[1]:  # there is no checksum of a part
        _check(path, name, "the checksum", f"{checksum(tensor):x}", _written(header, name, 2))
    if len(numbers) < tensor.shape[1]:
        tensor = tensor[:, [number - first for number in numbers]]
    return Pack(tuple(keys[number] for number in numbers), tensor)


def _parsed(path: str | os.PathLike[str], text: object) -> Path:
    try:
        key = parse_path(text)  # type: ignore[arg-type]  # of any type in a damaged file
        check_key(key)
    except (PathError, BadType) as error:
        raise FileError(f"a key in {path} is no path of one token: {error}") from None
    return key


def _plain(provenance: Provenance) -> dict[str, Any]:
    return {
        "model": provenance.model,
        "revision": provenance.revision,
        "prompts": provenance.prompts,
        "tokens": provenance.tokens,
        "spans": None if provenance.spans is None else dict(provenance.spans),
        **({"saes": dict(provenance.saes)} if provenance.saes else {}),
        **({"images": provenance.images} if provenance.images is not None else {}),
    }


def _provenance(path: str | os.PathLike[str], header: dict[str, Any], rows: int) -> Provenance:
    try:
        prompts, tokens, spans = header["prompts"], header["tokens"], header["spans"]
        saes, images = header.get("saes"), header.get("images")
        found = Provenance(
            header["model"],
            header["revision"],
            None if prompts is None else tuple(prompts),
            None if tokens is None else tuple(tuple(row) for row in tokens),
            None if spans is None else {name: tuple((a, b) for a, b in of) for name, of in spans.items()},
            None if saes is None else {str(name): dict(one) for name, one in saes.items()},
            None if images is None else tuple(None if one is None else str(one) for one in images),
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise FileError(f"the header of {path} is damaged: its provenance cannot be read") from None
    all_of = (found.prompts, found.tokens, found.images, *(found.spans or {}).values())
    per_row = [of for of in all_of if of is not None]
    if rows and any(len(of) != rows for of in per_row):
        raise FileError(f"{path} holds {rows} rows, and its header tells of another number of prompts")
    return found
