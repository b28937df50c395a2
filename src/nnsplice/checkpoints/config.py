"""`adapted_config`: the config of a model's first layers, checked on meta models."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import nn

from nnsplice.checkpoints.between.derive import empty_model
from nnsplice.errors import FileError, MapperError
from nnsplice.files import from_json
from nnsplice.shown import shown
from nnsplice.warn import warn_caller

#: Names of layer counts in configs.
_COUNT = re.compile(
    r"num_hidden_layers|num_layers|n_layers?|depth|(num_)?(encoder|decoder)_layers|(encoder|decoder)_num_hidden_layers"
)
#: Layer counts that are counted from the last layer: layers that reuse keys and values, and multi-token heads.
_FROM_THE_END = ("num_kv_shared_layers", "num_nextn_predict_layers")
#: Lists that may have as many entries as there are layers by chance.
_NOT_BY_LAYER = re.compile(r".*(tokens?|token_ids?|languages|langs|_multipliers|_section|_mean|_std|image_.*|conv_.*)")
#: Texts with a letter for each layer.
_LETTERS = re.compile(r".*pattern")


def layer_of(name: str) -> int | None:
    """The layer of a tensor: the first number in its name, in the checkpoints of every family.

    >>> from nnsplice.checkpoints import layer_of
    >>> layer_of("model.layers.12.mlp.experts.3.up_proj.weight"), layer_of("lm_head.weight")
    (12, None)

    Args:
        name: the name of the tensor.

    Returns:
        The number of the layer; None for a tensor outside the layers.
    """
    return next((int(word) for before, word in pairwise(name.split(".")) if word.isdigit() and before), None)


def adapted_config(text: str, *, layers: int | None = None, dtype: torch.dtype | None = None) -> str:
    """Edit a config.json for the first layers of a model, or for another number type.

    Every layer count and every list with an entry for each layer is cut. The shortened model is compared with the first
    layers of the old one: parameters, shapes, and the settings of each layer.

    >>> from nnsplice.checkpoints import adapted_config
    >>> print(adapted_config('{"model_type": "gpt2", "n_layer": 12}', layers=4, dtype=torch.bfloat16))
    {
      "model_type": "gpt2",
      "n_layer": 4,
      "dtype": "bfloat16"
    }

    Args:
        text: the text of the whole model's config.json.
        layers: how many layers are kept, from the first on; a stack with fewer layers keeps them all.
        dtype: the number type of the tensors.

    Returns:
        The text of the new config.json.

    Raises:
        FileError: the text is no config.
        MapperError: the config does not say how many layers it has, or describes another model when it is cut.
    """
    config: Any = from_json(text, "config.json")
    if not isinstance(config, dict):
        raise FileError("config.json is no object in JSON", expected='{"model_type": ..., ...}')
    config = cast("dict[str, Any]", config)
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        config.update(dict.fromkeys([key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"], name))
    if layers is not None:
        whole = config
        config = cut(whole, layers)
        if not _depths(whole) and config == whole:
            raise MapperError(
                "config.json does not say how many layers there are",
                expected="num_hidden_layers, n_layer, num_layers or the like",
            )
        if config != whole:
            _check(whole, config, layers)
    return json.dumps(config, indent=2) + "\n"


# -- counts and lists --------------------------------------------------------------------------------------------------


def cut(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """A config, and those inside it, with the first layers of every stack."""
    depths = _depths(config)
    return {key: _cut(key, value, layers, depths) for key, value in config.items()}


def _depths(config: Mapping[str, Any]) -> set[int]:
    """How many layers the stacks of a config have."""
    counts = {value for key, value in config.items() if _COUNT.fullmatch(key) and type(value) is int and value > 0}
    if not counts:  # some configs only have a list
        lists = [config.get(key) for key in ("layer_types", "layers_block_type")]
        counts = {len(cast("list[Any]", found)) for found in lists if isinstance(found, list)}
    return counts


def _cut(key: str, value: Any, layers: int, depths: set[int]) -> Any:
    if isinstance(value, dict):
        inner = cast("dict[str, Any]", value)
        if "layer" in key and inner and all(one.isdigit() for one in inner):  # {"0": {...}, "5": {...}}
            return {one: setting for one, setting in inner.items() if int(one) < layers}
        inside = key.endswith("_config") or "model_type" in inner or bool(_depths(inner))
        return cut(inner, layers) if inside else inner
    depth = max(depths, default=0)
    if type(value) is int:
        if _COUNT.fullmatch(key):
            return min(value, layers)
        if key in _FROM_THE_END and layers < depth:
            return max(0, value - (depth - layers))
    if isinstance(value, str) and _LETTERS.fullmatch(key) and len(value) in depths:
        return value[:layers]
    if isinstance(value, list):
        return _cut_list(key, cast("list[Any]", value), layers, depths)
    return value


def _cut_list(key: str, value: list[Any], layers: int, depths: set[int]) -> list[Any]:
    if key == "attention_types":  # GPT-Neo: [[["global", "local"], 12]]
        spelled = [kind for kinds, count in value for _ in range(count) for kind in kinds]
        return [[spelled[:layers], 1]] if len(spelled) in depths and layers < len(spelled) else value
    if len(value) in depths and not _NOT_BY_LAYER.fullmatch(key):
        return value[:layers]
    numbers = all(type(one) is int for one in value) and all(a < b for a, b in pairwise(value))
    if numbers and value and value[0] >= 0 and value[-1] < max(depths, default=0) and "layer" in key:
        return [one for one in value if one < layers]  # numbers of layers
    return value


# -- the check on meta models ----------------------------------------------------------------------------------------


#: The shape of a tensor, or the class and settings of a module.
_Facts = Mapping[str, object]


def _check(whole: Mapping[str, Any], config: Mapping[str, Any], layers: int) -> None:
    """Refuse a config that describes anything but the first layers of the whole one."""
    from transformers import CONFIG_MAPPING

    kind = whole.get("model_type")
    if kind is not None and not isinstance(kind, str):
        raise FileError(f"config.json says that model_type is {shown(kind)}", expected="the name of a family")
    if kind not in CONFIG_MAPPING:
        warn_caller(
            f"config.json was cut by the names of its fields, without a check: transformers has no model type {kind!r}"
        )
        return
    old = _described(whole, "as it is")
    depths = {depth for part in _parts(whole) for depth in _depths(part)}
    stored = 1 + max((layer for name in old if (layer := layer_of(name)) is not None), default=-1)
    if stored < max(depths):
        raise MapperError(
            f"the {max(depths)} layers of this {kind} share the tensors of {stored}, so none of them can be left out",
            expected="a family in which each layer has its own",
        )
    new = _described(config, f"cut to {layers} layers")
    kept = {name: facts for name, facts in old.items() if (layer := layer_of(name)) is None or layer < layers}
    for name in dict.fromkeys((*kept, *new)):
        before, after = kept.get(name), new.get(name)
        if before is not None and after is not None and _only_counts(before, after, depths, layers):
            continue
        raise MapperError(
            f"the first {layers} layers of a {kind} are no model of its own: {_why(name, before, after)}",
            expected="a family whose layers do not depend on how many there are",
            write="ns.checkpoints.renaming(folder, layers=...)   (the tensors without a config)",
        )


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    inside = [cast("dict[str, Any]", value) for value in config.values() if isinstance(value, dict)]
    return [config, *(part for one in inside for part in _parts(one))]


def _described(config: Mapping[str, Any], words: str) -> dict[str, _Facts]:
    """The shapes of the tensors, and the class and settings of the modules, of a config's model."""
    from transformers import AutoConfig

    try:
        # Read from a file, as a config made in memory treats some numbers differently.
        with TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
            model: nn.Module = empty_model(cast("Any", AutoConfig).from_pretrained(folder, trust_remote_code=False))
    except Exception as error:  # transformers raises many kinds
        raise MapperError(
            f"transformers makes no model of config.json {words}: {type(error).__name__}: {str(error).strip()[:200]}"
        ) from None
    states = cast("dict[str, torch.Tensor]", model.state_dict())
    found: dict[str, _Facts] = {name: {"shape": list(tensor.shape)} for name, tensor in states.items()}
    modules: dict[str, nn.Module] = dict(cast("Any", model).named_modules())
    return found | {f"{name}." if name else "the model": _settings(module) for name, module in modules.items()}


def _settings(module: nn.Module) -> _Facts:
    plain = bool | int | float | str | None
    settings = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, plain) and name[0] != "_" and name != "name_or_path"
    }
    return {"class": type(module).__name__, **settings}


def _only_counts(before: _Facts, after: _Facts, depths: set[int], layers: int) -> bool:
    """Whether modules differ only in their layer counts."""
    pairs = [(before.get(name), after.get(name)) for name in (*before, *after) if before.get(name) != after.get(name)]
    return all(type(a) is int and a in depths and b == min(a, layers) for a, b in pairs)


def _why(name: str, before: _Facts | None, after: _Facts | None) -> str:
    name = name.rstrip(".")
    if before is None or after is None:
        return f"they {'lack' if before is None else 'leave over'} {name}"
    key = next(key for key in (*before, *after) if before.get(key) != after.get(key))
    return f"{name} would have {key} {after.get(key)!r} instead of {before.get(key)!r}"
