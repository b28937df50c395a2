"""Adapters on a live model. The only file that imports peft, and only when a model has an adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nnsplice.adapters.keys import read_key
from nnsplice.atlas import Atlas, unwrap
from nnsplice.deprecated import renamed
from nnsplice.errors import BadArgument, MissingPackage, RefusedPlace, UnknownPath, named
from nnsplice.paths import Path, Paths


@renamed(paths="sites")
@contextmanager
def disabled(model: Any, sites: Paths = "full") -> Iterator[None]:
    """Disable a PEFT adapter in a `with` block, everywhere or at some addresses.

    Every address stays valid, so captures inside and outside the block can be subtracted:

    >>> from copy import deepcopy
    >>> from peft import LoraConfig, get_peft_model
    >>> config = LoraConfig(
    ...     task_type="CAUSAL_LM", target_modules=["c_fc"], init_lora_weights=False, fan_in_fan_out=True
    ... )
    >>> adapted = ns.load(get_peft_model(deepcopy(ns.models.unwrap(model)), config), tokenizer=model.tokenizer)
    >>> with ns.adapters.disabled(adapted, "layers[1:]"):
    ...     partly = ns.capture(adapted, "w3 w4", "layers[:].output[-1]")
    >>> difference = ns.capture(adapted, "w3 w4", "layers[:].output[-1]") - partly
    >>> {key: bool(norm > 0) for key, norm in difference.norm().items()}
    {'layers[0].output[-1]': False, 'layers[1].output[-1]': True, 'layers[2].output[-1]': True}

    Args:
        model: a model with a PEFT adapter, loaded by `ns.load(base, peft=folder)` or wrapped by PEFT.
        sites: where to disable it: `"layers[0:3]"`, `"layers[:].mlp"`, ... At least one address has to have factors.

    Raises:
        BadArgument: a model without an adapter, or with one that is merged into the weights.
        UnknownPath: no factors at any of the addresses.
        RefusedPlace: the adapter trained biases of the model itself, which stay changed.
    """
    layers = _layers(model)
    if not layers:
        raise BadArgument(
            "this model has no adapter that could be disabled",
            write='model = ns.load(base, peft="folder of the adapter")',
        )
    chosen = _chosen(model, layers, sites)
    before = [(layer, layer._disable_adapters) for _, layer in chosen]
    for name, layer in chosen:
        if getattr(layer, "merged", False):
            raise BadArgument(f"the adapter is merged into the weights of {name}", write="model.unmerge_adapter()")
    kept = [config for config in _configs(model) if getattr(config, "bias", "none") != "none"]
    if kept:
        raise RefusedPlace(
            f"this adapter was trained with bias={kept[0].bias!r}: the model's own biases were changed and stay so",
            expected="the base model, loaded without the adapter, as what to compare with",
        )
    try:
        for _, layer in chosen:
            layer._disable_adapters = True
        yield
    finally:
        for layer, was in before:
            layer._disable_adapters = was


def _layers(model: Any) -> list[tuple[str, Any]]:
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper
    except ImportError:
        raise MissingPackage("adapters on a model need peft", write='pip install "nnsplice[peft]"') from None
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return [(name, module) for name, module in unwrap(model).named_modules() if isinstance(module, kinds)]


def _configs(model: Any) -> list[Any]:
    root = unwrap(model)
    holders = [model, root, *(getattr(model, "_modules", {}) or {}).values()]
    found = next(
        (holder.peft_config for holder in holders if isinstance(getattr(holder, "peft_config", None), dict)), {}
    )
    return list(found.values())


def _chosen(model: Any, layers: list[tuple[str, Any]], paths: Paths) -> list[tuple[str, Any]]:
    atlas = Atlas.of(model)
    if isinstance(paths, (str, Path)):
        paths = [paths]
    paths = list(paths)
    if paths == ["full"]:
        return layers
    held = {name for path in paths for name in atlas.resolve(path).names}
    chosen = [
        (name, layer)
        for name, layer in layers
        if any(f"{name}.{inner}" in held for inner, _ in layer.named_parameters() if _is_own(inner))
    ]
    if not chosen:
        raise UnknownPath(
            f"the adapter has no factors at {', '.join(map(str, paths))}",
            expected=f"a site of one of {len(layers)} adapted layers, such as {atlas.locate(layers[0][0])}",
        )
    return chosen


def _is_own(inner: str) -> bool:
    return not inner.startswith(("base_layer.", "original_module."))


# -- changes of adapted weights -------------------------------------------------------------------------------------


def merged_steps(
    root: nn.Module, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], frozenset[str]]:
    """The changes of adapted weights between two snapshots, by the weight's name; and the names of their factors.

    A layer whose factors are new is left out.
    """
    from peft.tuners.lora import LoraLayer

    steps: dict[str, Tensor] = {}
    used: set[str] = set()
    for name, layer in root.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        for adapter in layer.active_adapters:
            factors = _factors(name, layer, adapter)
            present = [factor for factor in factors.values() if factor in after or factor in before]
            if not present:
                continue
            used.update(factors.values())
            if any(factor not in before for factor in factors.values()):
                continue
            old, new = (
                _product(layer, adapter, _values_of(root, factors, seen)) for seen in (before, {**before, **after})
            )
            weight = _weight_name(name, layer)
            steps[weight] = steps[weight] + (new - old) if weight in steps else new - old
    return steps, frozenset(used)


def _factors(name: str, layer: Any, adapter: str) -> dict[str, str]:
    """Role -> the name of the parameter, of one adapter's factors in one layer."""
    found: dict[str, str] = {}
    for inner, _ in layer.named_parameters():
        words = inner.split(".")
        if words[0].startswith("lora_") and len(words) > 1 and words[1] == adapter and words[-1] != "bias":
            found[words[0]] = f"{name}.{inner}" if name else inner
    return found


def _values_of(root: nn.Module, factors: Mapping[str, str], seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # Frozen factors (LoRA-FA trains only B) are in no snapshot.
    return {role: seen[name] if name in seen else root.get_parameter(name).detach() for role, name in factors.items()}


def _weight_name(name: str, layer: Any) -> str:
    attribute = getattr(layer, "parameter_name", None) or "weight"
    return f"{read_key(f'{name}.weight').module}.{attribute}"


def _product(layer: Any, adapter: str, factors: Mapping[str, Tensor]) -> Tensor:
    """The change of the weight as it is stored."""
    scale = layer.scaling[adapter]
    embedding = "lora_embedding_A" in factors
    a, b = (factors[f"lora_{'embedding_' if embedding else ''}{side}"] for side in "AB")
    transposed = embedding or getattr(layer, "fan_in_fan_out", False)
    if a.ndim != 2:
        raise BadArgument(f"{named(layer)} changes no matrix", expected="track_step(model) without merged=True")
    count = getattr(layer, "num_experts", 1)
    if count > 1:
        stacked = a.reshape(count, -1, a.shape[1]), b.reshape(b.shape[0], -1, count)
        expert_turned = getattr(layer.get_base_layer(), "is_transposed", False)
        return torch.einsum("eri,ore->eio" if expert_turned else "eri,ore->eoi", *stacked) * scale
    product = (b @ a) * scale
    if "lora_magnitude_vector" in factors:
        weight = layer.get_base_layer().weight.detach()
        weight = weight.mT if transposed else weight
        changed = weight + product
        product = factors["lora_magnitude_vector"].view(-1, 1) * changed / changed.norm(dim=1, keepdim=True) - weight
    return product.mT if transposed else product
