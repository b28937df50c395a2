"""What an adapter's folder says of its tensors without reading one: names, shapes, the config."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnsplice.adapters.keys import AdapterKey, read_key
from nnsplice.atlas import families as rows
from nnsplice.atlas.names import NamedLayer, layer_of
from nnsplice.errors import ParamMappingError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model."

#: Modules that every family registers before its layers ...
BEFORE = frozenset(
    {name.rpartition(".")[2] for name in rows.EMBED}
    | {"wpe", "embed_positions", "position_embeddings", "token_type_embeddings", "positions_embed"}
)
#: ... and after them. A final norm counts only by the names that no family registers before its layers (OPT's
#: `final_layer_norm` stands there).
AFTER = frozenset(
    {name.partition(".")[0] for name in rows.UNEMBED}
    | {"score", "classifier", "qa_outputs", "v_head", "value_head", "summary", "proj_out", "pred_layer", "pooler"}
)
AFTER_INSIDE = frozenset({"norm", "ln_f", "norm_f", "final_norm"})


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of an adapter's file."""

    name: str
    key: AdapterKey
    shape: tuple[int, ...]
    layer: NamedLayer | None


def read_header(adapter_dir: str | os.PathLike[str]) -> tuple[Entry, ...]:
    """The tensors that were trained, by name; copies of frozen weights that a file may hold beside them are left out.

    Raises:
        ParamMappingError: no file, or none that can be read.
    """
    path = Path(adapter_dir) / WEIGHTS
    if not path.is_file():
        raise ParamMappingError(
            f"there is no {WEIGHTS}: {_instead(Path(adapter_dir))}",
            path=adapter_dir,
            expected="a folder that PEFT's save_pretrained wrote",
            # PEFT writes an adapter with a name of its own into a folder of that name.
            write=next((f'"{inside.parent}"' for inside in sorted(Path(adapter_dir).glob(f"*/{WEIGHTS}"))), None),
        )
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ParamMappingError(
            "the names in an adapter's file cannot be read: safetensors is not importable",
            write="pip install safetensors",
        ) from None
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise ParamMappingError(f"{path} is damaged or no safetensors file: {error}") from None
    entries = tuple(Entry(name, read_key(name), shape, layer_of(name)) for name, shape in shapes.items())
    config = read_config(adapter_dir)
    # Where PEFT's names have its prefix, a name without it is no parameter of the model.
    layered = [entry.name.startswith(PREFIX) for entry in entries if entry.layer]
    prefix = PREFIX if layered and all(layered) else ""
    return tuple(entry for entry in entries if entry.name.startswith(prefix) and _trained(entry, config))


def read_config(adapter_dir: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The adapter's config, or None where the folder has none."""
    try:
        found = json.loads((Path(adapter_dir) / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ParamMappingError(f"{CONFIG} cannot be read: {error}", path=adapter_dir) from None
    return found if isinstance(found, dict) else None


def _instead(folder: Path) -> str:
    if not folder.exists():
        return "there is no such folder"
    if not folder.is_dir():
        return "this is a file, and an adapter is a folder"
    held = sorted(entry.name for entry in folder.iterdir())
    if "adapter_model.bin" in held:
        return "adapter_model.bin is a pickle, which is not opened; save with safe_serialization=True"
    return f"the folder holds {', '.join(held[:5]) or 'nothing'}"


def _trained(entry: Entry, config: dict[str, Any] | None) -> bool:
    """Whether a tensor was trained. Beside the factors of an embedding a file holds the frozen embedding itself."""
    key = entry.key
    if key.factor is not None:
        return True
    if key.attribute == "weight" and key.depth:
        return False
    if config is None or entry.layer is not None or key.attribute == "bias":
        return True
    # Resized embeddings are written down too; what was trained as a whole stands in the config.
    last = key.module.rpartition(".")[2]
    saved = config.get("modules_to_save") or ()
    return last not in BEFORE | AFTER or any(key.module == name or key.module.endswith(f".{name}") for name in saved)


def stands(entry: Entry, stack: str) -> str:
    """Where a tensor outside the layers is registered: `before` them, `after` them, or `unknown`."""
    words = entry.key.module.split(".")
    owner = stack.rpartition(".")[0]
    if words[0] in AFTER or words[-1] in AFTER:
        return "after"
    if words[-1] in AFTER_INSIDE and ".".join(words[:-1]) == owner:
        return "after"
    return "before" if words[-1] in BEFORE else "unknown"
