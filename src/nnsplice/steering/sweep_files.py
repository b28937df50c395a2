"""Files of steering sweeps: a safetensors file of the arrays, with the rest as JSON in its header."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, TypeVar

import numpy as np

from nnsplice.errors import FileError
from nnsplice.files import from_json
from nnsplice.headers import read_header
from nnsplice.results.files import HEADER, canonical
from nnsplice.stores import opened, whole

KIND, FORMAT = "SteeringSweep", 1
Sweep = TypeVar("Sweep")


def write(path: str | os.PathLike[str], header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write a sweep, atomically."""
    from safetensors.numpy import save_file

    about = {"kind": KIND, "format": FORMAT, "version": version("nnsplice"), **header}
    with whole(path) as temporary:
        kept = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        save_file(kept, temporary, metadata={HEADER: canonical(about)})


def read(
    path: str | os.PathLike[str],
    names: Sequence[str],
    make: Callable[[Mapping[str, Any], Mapping[str, np.ndarray]], Sweep],
) -> Sweep:
    """Read a sweep, made of its header and its arrays.

    Raises:
        FileError: the file is no sweep of steering, or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with opened(path) as found:
            header = from_json(read_header(path, local=found.local).metadata.get(HEADER, "{}"), f"the header of {path}")
            if header.get("kind") != KIND or header["format"] > FORMAT:
                raise FileError(f"{path} holds no sweep of steering", expected="a file of SteeringSweep.to_file")
            with safe_open(os.fspath(found.local), framework="np") as file:
                return make(header, {name: file.get_tensor(name) for name in names})
    except FileError:
        raise
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(f"{path} is damaged or no safetensors file: {error}") from None
