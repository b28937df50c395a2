"""Checks of a checkpoint's small files before transformers reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from nnsplice.errors import FileError
from nnsplice.files import from_json, text_of
from nnsplice.shown import shown

#: Files that hold an object, and what of it has to be a text where it is there.
_OBJECTS = {
    "config.json": ("model_type",),
    "generation_config.json": (),
    "tokenizer_config.json": ("tokenizer_class",),
    "tokenizer.json": (),
}


def check_small_files(folder: Path) -> None:
    """Refuse a folder whose config or tokenizer is not what transformers takes it for.

    Raises:
        FileError: which file it is, and what was found.
    """
    for name, texts in _OBJECTS.items():
        path = folder / name
        if not path.is_file():
            continue
        found: Any = from_json(text_of(path), path)
        if not isinstance(found, dict):
            raise FileError(f"{path} holds a {type(found).__name__}", expected="an object in JSON")
        told = cast("dict[str, Any]", found)
        for key in texts:
            if not isinstance(told.get(key), str | None):
                raise FileError(f"{path} says that {key} is {shown(told[key])}", expected="a text")
        if name == "config.json" and "auto_map" not in told:
            _check_config(folder, told)


def _check_config(folder: Path, told: dict[str, Any]) -> None:
    from transformers import CONFIG_MAPPING, AutoConfig

    names = told.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in cast("list[Any]", names)):
        raise FileError(
            f"{folder / 'config.json'} says that architectures is {shown(names)}", expected="a list of names"
        )
    if told.get("model_type") not in CONFIG_MAPPING:
        return  # transformers says this well
    try:
        cast("Any", AutoConfig).from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever transformers says to an odd type
        raise FileError(
            f"transformers does not take {folder / 'config.json'}: {str(error).strip()[:300]}",
            expected="a config that save_pretrained wrote",
        ) from None
