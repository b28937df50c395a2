"""Files of a record and some arrays: safetensors, with the record as JSON in the header, and a digest of both.

A damaged file may still be valid safetensors, with other numbers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, TypeVar

import numpy as np

from nnsplice.digests import arrays_digest
from nnsplice.errors import FileError
from nnsplice.files import from_json
from nnsplice.headers import read_header
from nnsplice.results.files import HEADER, canonical, plain
from nnsplice.stores import opened, whole

FORMAT = 1
Made = TypeVar("Made")


def write(path: str | os.PathLike[str], kind: str, record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write a record and arrays, atomically.

    Args:
        kind: the name of the class that reads them with `from_file`.
    """
    from safetensors.numpy import save_file

    about = plain({"kind": kind, "format": FORMAT, "version": version("nnsplice"), **record})
    kept = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    digest = arrays_digest(kept, canonical(about))
    with whole(path) as temporary:
        save_file(kept, temporary, metadata={HEADER: canonical({**about, "digest": digest})})


def read(
    path: str | os.PathLike[str],
    kind: str,
    names: Sequence[str],
    make: Callable[[Mapping[str, Any], Mapping[str, np.ndarray]], Made],
) -> Made:
    """Read what `write` wrote, made of its record and its arrays.

    Raises:
        FileError: the file is of another kind, or damaged.
    """
    from safetensors import SafetensorError, safe_open

    expected = f"a file of {kind}.to_file"
    try:
        with opened(path) as found:
            about = from_json(read_header(path, local=found.local).metadata.get(HEADER, "{}"), f"the header of {path}")
            if about.get("kind") != kind or about["format"] > FORMAT:
                raise FileError(f"{path} holds no {kind}", expected=expected)
            with safe_open(os.fspath(found.local), framework="np") as file:
                arrays = {name: file.get_tensor(name) for name in names}
        written = about.pop("digest", None)  # older files have none
        if written is not None and written != arrays_digest(arrays, canonical(about)):
            raise FileError(f"{path} is damaged: what it holds is not what was written", expected=expected)
        return make(about, arrays)
    except FileError:
        raise
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(f"{path} is damaged or no safetensors file: {error}", expected=expected) from None
