"""Which checkpoint a name means: an embedded model, a package with GGUF weights, a GGUF file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnsplice.errors import BadArgument, named
from nnsplice.models.dequantise import Quantised, gguf_source
from nnsplice.models.published import PUBLISHED, weights_of

#: Models that are part of the package: name -> folder.
EMBEDDED: Mapping[str, Path] = {name: Path(__file__).parent / "data" / name for name in ("toy", "toy-llama")}
#: Options that say where to find a checkpoint, not only how to load it.
LOCATION_OPTIONS = ("revision", "subfolder", "cache_dir", "token", "trust_remote_code", "local_files_only")
SUGGEST_TOY = 'model = ns.load("toy")   (embedded, needs no network)'


def embedded(name: str) -> Path:
    """The checkpoint folder of an embedded model: config, tokenizer and safetensors.

    >>> folder = ns.models.embedded("toy-llama")
    >>> sorted(file.name for file in folder.iterdir())
    ['card.json', 'config.json', 'generation_config.json', 'model.safetensors', 'tokenizer.json',
     'tokenizer_config.json']
    >>> ns.models.embedded("llama")
    Traceback (most recent call last):
    nnsplice.errors.BadArgument: no model 'llama' is embedded
      expected: 'toy' or 'toy-llama'
      write: ns.load(name)   (for a model on the hub or in a folder)

    Args:
        name: `"toy"` or `"toy-llama"`.

    Returns:
        The folder.

    Raises:
        BadArgument: no model of this name is embedded.
    """
    if name not in EMBEDDED:
        raise BadArgument(
            f"no model {name!r} is embedded",
            expected=" or ".join(map(repr, EMBEDDED)),
            write="ns.load(name)   (for a model on the hub or in a folder)",
        )
    return EMBEDDED[name]


def quantised_of(name: object, gguf_file: str | None, kwargs: dict[str, Any]) -> Quantised | None:
    """The GGUF file that a name means; None for any other model."""
    if isinstance(name, str) and name in PUBLISHED and gguf_file is None:
        if "revision" in kwargs:
            raise BadArgument(f"{name!r} comes in a package and has no revisions", write=f"ns.load({name!r})")
        return weights_of(name)
    if isinstance(name, str | os.PathLike) and name not in EMBEDDED:
        where = {key: kwargs[key] for key in LOCATION_OPTIONS if key in kwargs}
        return gguf_source(name, gguf_file, where) if str(name) else None
    if gguf_file is not None:
        raise BadArgument(
            f"{named(name) if not isinstance(name, str) else repr(name)} is loaded already, or comes with nnsplice, so "
            "gguf_file would do nothing",
            write="ns.load(folder, gguf_file=name)",
        )
    return None
