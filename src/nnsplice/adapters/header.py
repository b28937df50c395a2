"""The names and shapes of an adapter's tensors, and its config; no tensor is read."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from nnsplice import headers
from nnsplice.adapters.keys import AdapterKey, read_key
from nnsplice.atlas import families
from nnsplice.atlas.names import NamedLayer, layer_of
from nnsplice.errors import FileError, ParamMappingError
from nnsplice.files import from_json, local_path
from nnsplice.shown import shown

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model."

#: Modules that every family registers before its layers ...
BEFORE = frozenset(
    {name.rpartition(".")[2] for name in families.EMBED}
    | {"wpe", "embed_positions", "position_embeddings", "token_type_embeddings", "positions_embed"}
)
#: ... and after them. A final norm counts by names that no family registers before its layers, as OPT registers
#: `final_layer_norm`.
AFTER = frozenset(
    {name.partition(".")[0] for name in families.UNEMBED}
    | {"score", "classifier", "qa_outputs", "v_head", "value_head", "summary", "proj_out", "pred_layer", "pooler"}
)
AFTER_INSIDE = frozenset({"norm", "ln_f", "norm_f", "final_norm"})


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _is_patterns(value: Any, fits: Callable[[Any], bool]) -> bool:
    if not isinstance(value, dict):
        return False
    try:
        return all(re.compile(name) and fits(one) for name, one in value.items())
    except (re.error, RecursionError):
        return False


#: Field of an adapter's config -> a check of its value, and the expected value.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, "a whole number above 0"),
    "lora_alpha": (_is_number, "a finite number"),
    "rank_pattern": (lambda value: _is_patterns(value, _is_rank), "an object: pattern of a name -> rank"),
    "alpha_pattern": (lambda value: _is_patterns(value, _is_number), "an object: pattern of a name -> number"),
    "target_parameters": (_is_names, "a list of names"),
    "modules_to_save": (_is_names, "a list of names"),
    "use_rslora": (lambda value: isinstance(value, bool), "true or false"),
    "fan_in_fan_out": (lambda value: isinstance(value, bool), "true or false"),
}


@dataclass(frozen=True, slots=True)
class AdapterTensor:
    """One tensor of an adapter's file."""

    name: str
    key: AdapterKey
    shape: tuple[int, ...]
    layer: NamedLayer | None


def read_header(adapter_dir: str | os.PathLike[str]) -> tuple[AdapterTensor, ...]:
    """The tensors that were trained; copies of frozen weights in the file are left out.

    Raises:
        ParamMappingError: no file, or a damaged one.
    """
    path = local_path(adapter_dir) / WEIGHTS
    if not path.is_file():
        raise ParamMappingError(
            f"there is no {WEIGHTS}: {_folder_contents(Path(adapter_dir))}",
            path=adapter_dir,
            expected="a folder that PEFT's save_pretrained wrote",
            # PEFT writes an adapter with a name of its own into a folder of that name.
            write=next((f'"{inside.parent}"' for inside in sorted(Path(adapter_dir).glob(f"*/{WEIGHTS}"))), None),
        )
    try:
        import safetensors  # noqa: F401
    except ImportError:
        raise ParamMappingError(
            "the names in an adapter's file cannot be read: safetensors is not importable",
            write="pip install safetensors",
        ) from None
    try:
        shapes = {name: entry.shape for name, entry in headers.read_header(path).entries.items()}
    except (FileError, OSError) as error:
        raise ParamMappingError(str(error)) from None
    entries = tuple(AdapterTensor(name, read_key(name), shape, layer_of(name)) for name, shape in shapes.items())
    config = read_config(adapter_dir)
    # If PEFT's names have its prefix, names without it are no parameters of the model.
    layered = [entry.name.startswith(PREFIX) for entry in entries if entry.layer]
    prefix = PREFIX if layered and all(layered) else ""
    return tuple(entry for entry in entries if entry.name.startswith(prefix) and _trained(entry, config))


def read_config(adapter_dir: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The adapter's config, or None where the folder has none."""
    try:
        found = from_json((Path(adapter_dir) / CONFIG).read_text(encoding="utf-8"), CONFIG)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ParamMappingError(f"{CONFIG} cannot be read: {error}", path=adapter_dir) from None
    if not isinstance(found, dict):
        raise ParamMappingError(f"{CONFIG} is {shown(found)}", path=adapter_dir, expected="an object in JSON")
    config = cast("dict[str, Any]", found)
    for name, (fits, expected) in _FIELDS.items():
        if config.get(name) is not None and not fits(config[name]):
            raise ParamMappingError(
                f"{CONFIG} says that {name} is {shown(config[name])}", path=adapter_dir, expected=expected
            )
    return config


def _folder_contents(folder: Path) -> str:
    if not folder.exists():
        return "there is no such folder"
    if not folder.is_dir():
        return "this is a file, and an adapter is a folder"
    held = sorted(entry.name for entry in folder.iterdir())
    if "adapter_model.bin" in held:
        return "adapter_model.bin is a pickle, which is not opened; save with safe_serialization=True"
    return f"the folder holds {', '.join(held[:5]) or 'nothing'}"


def _trained(entry: AdapterTensor, config: dict[str, Any] | None) -> bool:
    """Whether a tensor was trained; files also hold the frozen embedding beside its factors."""
    key = entry.key
    if key.factor is not None:
        return True
    if key.attribute == "weight" and key.depth:
        return False
    if config is None or entry.layer is not None or key.attribute == "bias":
        return True
    # Resized embeddings are saved too; parameters that were trained as a whole are listed in the config.
    last = key.module.rpartition(".")[2]
    saved = config.get("modules_to_save") or ()
    return last not in BEFORE | AFTER or any(key.module == name or key.module.endswith(f".{name}") for name in saved)


def side_of_layers(entry: AdapterTensor, stack: str) -> str:
    """Where a tensor outside the layers is registered: `before` them, `after` them, or `unknown`."""
    words = entry.key.module.split(".")
    owner = stack.rpartition(".")[0]
    if words[0] in AFTER or words[-1] in AFTER:
        return "after"
    if words[-1] in AFTER_INSIDE and ".".join(words[:-1]) == owner:
        return "after"
    return "before" if words[-1] in BEFORE else "unknown"
