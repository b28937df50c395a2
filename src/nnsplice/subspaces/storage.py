"""A subspace on disk: a safetensors file with one tensor, and its address and provenance as JSON in the header."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from torch import Tensor

from nnsplice.digests import digest_of
from nnsplice.errors import FileError, NnspliceError
from nnsplice.files import from_json, is_pickle, whole
from nnsplice.headers import read_header

HEADER = "nnsplice"
KIND = "Subspace"
FORMAT = 1


def write(path: str | os.PathLike[str], basis: Tensor, record: Mapping[str, Any]) -> None:
    """Write a basis with its record."""
    from safetensors.torch import save_file

    tensors = {"basis": basis.contiguous().clone()}
    header = {"kind": KIND, "format": FORMAT, "version": version("nnsplice"), "digest": digest_of(tensors), **record}
    with whole(path) as temporary:
        save_file(tensors, temporary, metadata={HEADER: json.dumps(header)})


def read(path: str | os.PathLike[str]) -> tuple[Tensor, dict[str, Any]]:
    """The basis, and its record.

    Raises:
        FileError: the file holds no subspace, or is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if is_pickle(path):
        raise FileError(f"{path} looks like a pickle, which can run any code when it is opened", expected=_EXPECTED)
    text = read_header(path).metadata.get(HEADER)
    record = None if text is None else from_json(text, f"the header of {path}")
    if not isinstance(record, dict) or record.get("kind") != KIND:
        raise FileError(f"{path} holds no subspace", expected=_EXPECTED)
    if record.get("format") != FORMAT:
        raise FileError(f"{path} has format {record.get('format')!r}; this nnsplice reads {FORMAT}")
    try:
        tensors = load_file(path)
    except (SafetensorError, RuntimeError) as error:
        raise FileError(f"{path} is damaged: {error}", expected=_EXPECTED) from None
    if (
        set(tensors) != {"basis"}
        or digest_of(tensors) != record.get("digest")
        or not isinstance(record.get("about"), dict)
    ):
        raise FileError(f"{path} is damaged: its numbers are not those that were written", expected=_EXPECTED)
    return tensors["basis"], record


_EXPECTED = "a file that Subspace.to_file wrote"


@contextmanager
def damaged(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn errors of a subspace from a file into the error of a damaged file."""
    try:
        yield
    except (NnspliceError, KeyError) as error:
        raise FileError(f"{path} is damaged: {error}", expected=_EXPECTED) from None
