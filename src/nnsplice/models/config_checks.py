"""Checks of a checkpoint's config and tokenizer files before transformers reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from nnsplice.errors import FileError
from nnsplice.files import from_json, text_of
from nnsplice.shown import shown

#: Files with a JSON object -> its keys that must be text.
_OBJECTS = {
    "config.json": ("model_type",),
    "generation_config.json": (),
    "tokenizer_config.json": ("tokenizer_class",),
    "tokenizer.json": (),
}


def check_config_files(folder: Path) -> None:
    """Refuse a folder with a broken config or tokenizer file.

    Raises:
        FileError: names the file and what was found.
    """
    for name, texts in _OBJECTS.items():
        path = folder / name
        if not path.is_file():
            continue
        found: Any = from_json(text_of(path), path)
        if not isinstance(found, dict):
            raise FileError(f"{path} holds a {type(found).__name__}", expected="an object in JSON")
        content = cast("dict[str, Any]", found)
        for key in texts:
            if not isinstance(content.get(key), str | None):
                raise FileError(f"{path} says that {key} is {shown(content[key])}", expected="a text")
        if name == "config.json" and "auto_map" not in content:
            _check_config(folder, content)


def _check_config(folder: Path, config: dict[str, Any]) -> None:
    from transformers import CONFIG_MAPPING, AutoConfig

    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in cast("list[Any]", names)):
        raise FileError(
            f"{folder / 'config.json'} says that architectures is {shown(names)}", expected="a list of names"
        )
    if config.get("model_type") not in CONFIG_MAPPING:
        return  # transformers has a good error for this
    try:
        cast("Any", AutoConfig).from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds of error for wrong types
        raise FileError(
            f"transformers does not take {folder / 'config.json'}: {str(error).strip()[:300]}",
            expected="a config that save_pretrained wrote",
        ) from None
