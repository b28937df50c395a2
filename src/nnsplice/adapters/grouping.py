"""Ids of an optimizer's parameters -> layers of the model."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn, optim

from nnsplice.adapters.header import AdapterTensor, read_header, side_of_layers
from nnsplice.adapters.keys import read_key
from nnsplice.adapters.orders import Layers, fitting_orders
from nnsplice.adapters.states import OptimizerState, as_optimizer_state
from nnsplice.atlas import Atlas, unwrap
from nnsplice.atlas.families import NOT_TEXT
from nnsplice.atlas.names import NamedLayer, layer_of
from nnsplice.errors import ParamMappingError, UnknownPath, circumstances

#: Arguments to write where the order of the ids is not known. The names are in the optimizer's order, which is not the
#: model's where parameters are given in groups, as trainers do.
NAMES = (
    'names=[of[id(p)] for group in optimizer.param_groups for p in group["params"]]'
    "   (with of = {id(p): name for name, p in model.named_parameters()})"
)
LIVE = "map_optimizer_to_layers(optimizer, model)   (while both are at hand)"


@dataclass(frozen=True, slots=True)
class LayerGrouping:
    """The layer of each parameter of an optimizer.

    >>> optimizer = torch.optim.AdamW(ns.models.unwrap(model).parameters())
    >>> grouping = ns.adapters.map_optimizer_to_layers(optimizer, model)
    >>> grouping.num_layers, grouping.params_per_layer
    (3, 12)
    >>> [grouping.layer_of.get(number) for number in range(4)]   # the embeddings come first, and are in no layer
    [None, None, 0, 0]

    Attributes:
        layer_indices: the layers, in numeric order.
        params_per_layer: the number of parameters of each layer; 0 where it differs.
        layer_of: the layer of each id in the optimizer's state; parameters outside the layers are absent.
        how: how it was found: `order`, `names`, `identity` or `shapes`.
        header: the adapter's tensors, for `how="order"`.
    """

    layer_indices: tuple[int, ...]
    params_per_layer: int
    layer_of: dict[int, int]
    how: str = field(default="order", compare=False)
    header: tuple[AdapterTensor, ...] = field(default=(), compare=False, repr=False)

    @property
    def num_layers(self) -> int:
        """The number of layers with parameters."""
        return len(self.layer_indices)


def map_param_ids_to_layers(
    adapter_dir: str | os.PathLike[str],
    num_params: int,
    *,
    names: Mapping[int, str] | Sequence[Any] | None = None,
    state: Mapping[Any, Any] | None = None,
    tower: str | None = None,
) -> LayerGrouping:
    """Map the parameter ids of an optimizer's state to layers, from an adapter's folder; no model is loaded.

    An id is the position of a parameter in the order in which the optimizer got them. With `names`, nothing is
    inferred. With `state`, the known orders are compared with its shapes, and exactly one has to fit; shapes cannot
    show a custom order that exchanges layers of equal shapes. With neither, the order is PEFT's own, layer after layer,
    which is right for an optimizer that got the trainable parameters of a model in one list.

    >>> from copy import deepcopy
    >>> from tempfile import mkdtemp
    >>> from peft import LoraConfig, get_peft_model
    >>> folder = mkdtemp()
    >>> config = LoraConfig(target_modules=["c_fc"], layers_to_transform=[0, 2], fan_in_fan_out=True)
    >>> get_peft_model(deepcopy(ns.models.unwrap(model)), config).save_pretrained(folder)
    >>> ns.adapters.map_param_ids_to_layers(folder, num_params=4).layer_of
    {0: 0, 1: 0, 2: 2, 3: 2}
    >>> ns.adapters.map_param_ids_to_layers(folder, num_params=3)
    Traceback (most recent call last):
    nnsplice.errors.ParamMappingError: the optimizer has 3 parameters, fewer than the 4 of this adapter's layers
      expected: the optimizer that trained this adapter
      write: names=...
      in: the adapter in ...

    Args:
        adapter_dir: the folder that `save_pretrained` wrote; only names and shapes are read.
        num_params: the number of parameters of the optimizer; any beyond the adapter's come after them.
        names: id -> parameter name, or the names in the order of the ids, or the `param_groups` of a `state_dict` whose
            optimizer had named parameters.
        state: an optimizer's `state_dict()`, or its `"state"` alone.
        tower: `"encoder"` or `"decoder"`, where both have factors; ids of the other are left out.

    Returns:
        The layer of each id.

    Raises:
        ParamMappingError: no adapter in the folder, or ids that cannot be mapped with certainty.
    """
    entries = read_header(adapter_dir)
    with circumstances(f"the adapter in {Path(adapter_dir)}"):
        layered = _check_header(entries)
        optimizer = None if state is None else as_optimizer_state(state)
        known = _names(names) if names is not None else optimizer.names if optimizer else None
        if known is None:
            _check_uniform(layered, state is not None)
        if num_params < len(layered) and known is None:
            raise ParamMappingError(
                f"the optimizer has {num_params} parameters, fewer than the {len(layered)} of this adapter's layers",
                expected="the optimizer that trained this adapter",
                write=NAMES,
            )
        if known is not None:
            return _by_names(entries, known, num_params, tower)
        if optimizer is not None:
            return _by_shapes(entries, optimizer, num_params, tower)
        return _by_order(entries, layered, num_params, tower)


def map_optimizer_to_layers(optimizer: optim.Optimizer, model: Any, *, tower: str | None = None) -> LayerGrouping:
    """Map the parameter ids of a live optimizer to the layers of its model, by identity of the parameters.

    It works with and without an adapter. Frozen parameters in the optimizer are left out.

    >>> blocks = ns.models.unwrap(model).transformer.h
    >>> optimizer = torch.optim.AdamW([*blocks[2].mlp.parameters(), *blocks[0].mlp.parameters()])
    >>> ns.adapters.map_optimizer_to_layers(optimizer, model).layer_of
    {0: 2, 1: 2, 2: 2, 3: 2, 4: 0, 5: 0, 6: 0, 7: 0}

    Args:
        optimizer: the optimizer.
        model: the model whose parameters it has.
        tower: `"encoder"` or `"decoder"`, where both are trained; ids of the other are left out.

    Returns:
        The layer of each id.

    Raises:
        ParamMappingError: a parameter that is not in the model, or none in a layer.
    """
    root = model if isinstance(model, nn.Module) else unwrap(model)
    atlas = Atlas.of(model)
    called = {id(p): name for name, p in root.named_parameters(remove_duplicate=False)}
    found: dict[int, NamedLayer] = {}
    numbers: dict[int, int] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            number = numbers.setdefault(id(parameter), len(numbers))
            if not parameter.requires_grad and parameter not in optimizer.state:
                continue
            name = called.get(id(parameter))
            if name is None:
                raise ParamMappingError(
                    f"parameter {number} of the optimizer, of shape {list(parameter.shape)}, is none of this model",
                    expected="the model that the optimizer was made for, not a copy or one that was wrapped later",
                )
            layer = _located(atlas, name)
            if layer is not None:
                found[number] = layer
    if not found:
        raise ParamMappingError("no parameter that this optimizer trains lies in a layer of this model")
    return _grouping(found, "identity", tower)


def _located(atlas: Atlas, name: str) -> NamedLayer | None:
    """The layer of a parameter of this model, from the atlas, or from its name where the atlas does not have it."""
    if not atlas.towers:
        return layer_of(name)
    try:
        place = atlas.locate(name)
    except UnknownPath:
        return layer_of(name)
    if place.native:
        return layer_of(name)
    step = place.steps[0]
    if step.name != "layers" or not isinstance(step.index, int):
        return None
    return NamedLayer(atlas.tower(place).stack, step.index)


# -- three ways to map -------------------------------------------------------------------------------------------------


def _check_header(entries: tuple[AdapterTensor, ...]) -> list[AdapterTensor]:
    if not entries:
        raise ParamMappingError("no keys found in the adapter's file", expected="the tensors of an adapter")
    layered = [entry for entry in entries if entry.layer is not None]
    if not layered:
        raise ParamMappingError(
            f"no keys carry a layer index: {', '.join(entry.name for entry in entries[:3])}",
            expected="names such as model.layers.7.self_attn.q_proj.lora_A.weight",
        )
    return layered


def _check_uniform(layered: list[AdapterTensor], has_state: bool) -> None:
    counts = Counter(entry.layer for entry in layered if entry.layer)
    if len(set(counts.values())) > 1 and not has_state:
        some = sorted(counts, key=lambda layer: layer.number)[:4]
        shown = ", ".join(f"{layer.stack}.{layer.number}: {counts[layer]}" for layer in some)
        raise ParamMappingError(
            f"the layers are heterogeneous: they have different numbers of parameters ({shown}, ...)", write=NAMES
        )


def _by_order(
    entries: tuple[AdapterTensor, ...], layered: list[AdapterTensor], num_params: int, tower: str | None
) -> LayerGrouping:
    """PEFT's own order: modules registered before the layers, the layers by number, the rest."""
    stacks = sorted({entry.layer.stack for entry in layered if entry.layer})
    if len(stacks) > 1:
        raise ParamMappingError(
            f"layers of {' and '.join(stacks)} have factors, and their numbers repeat; which come first is not known",
            expected="the names of the optimizer's parameters, or the optimizer itself",
            write=f"{NAMES}\n     or: {LIVE}",
        )
    outside = [entry for entry in entries if entry.layer is None]
    places = {entry: side_of_layers(entry, stacks[0]) for entry in outside}
    unknown = [entry.name for entry, place in places.items() if place == "unknown"]
    before = [entry for entry, place in places.items() if place == "before"]
    if unknown:
        raise ParamMappingError(
            f"{unknown[0]} lies outside the layers, and whether it comes before or after them is not known",
            expected="the optimizer's state, or the names of its parameters",
            write=f"state=optimizer.state_dict()\n     or: {NAMES}",
        )
    if before and num_params != len(layered) + len(outside):
        raise ParamMappingError(
            f"{before[0].name} is registered before the layers, and the optimizer has {num_params} parameters where "
            f"the adapter has {len(layered) + len(outside)}, so where the layers begin is not known",
            expected="the optimizer's state, or the names of its parameters",
            write=f"state=optimizer.state_dict()\n     or: {NAMES}",
        )
    layers = sorted({entry.layer.number for entry in layered if entry.layer})
    each = len(layered) // len(layers)
    found = {len(before) + i: NamedLayer(stacks[0], layers[i // each]) for i in range(len(layered))}
    return replace(_grouping(found, "order", tower), header=entries)


def _by_names(
    entries: tuple[AdapterTensor, ...], names: Mapping[int, str], num_params: int, tower: str | None
) -> LayerGrouping:
    strange = [number for number in names if not 0 <= number < num_params]
    if strange:
        raise ParamMappingError(
            f"there is a name for parameter {strange[0]}, and the optimizer has {num_params}",
            expected=f"ids from 0 to {num_params - 1}",
        )
    held = {entry.key.text: entry for entry in entries}
    found: dict[int, NamedLayer] = {}
    seen: dict[str, int] = {}
    for number, name in names.items():
        # The copy that `modules_to_save` keeps of what it replaces is frozen.
        entry = None if "original_module" in name.split(".") else held.get(read_key(name).text)
        if entry is None:
            continue  # a frozen parameter, or one that was trained and not saved
        if entry.name in seen:
            raise ParamMappingError(
                f"parameters {seen[entry.name]} and {number} are both called {name}",
                expected="the names of one adapter, each once",
            )
        seen[entry.name] = number
        if entry.layer is not None:
            found[number] = entry.layer
    if not found:
        given = next(iter(names.values()), "no name")
        raise ParamMappingError(
            f"none of the {len(names)} names is a key of this adapter with a layer: {given}, ...",
            expected=f"names such as {next(entry.name for entry in entries if entry.layer)}",
        )
    return _grouping(found, "names", tower)


def _by_shapes(
    entries: tuple[AdapterTensor, ...], optimizer: OptimizerState, num_params: int, tower: str | None
) -> LayerGrouping:
    total = sum(map(len, optimizer.groups))
    if optimizer.has_groups and total != num_params:
        raise ParamMappingError(
            f"num_params is {num_params}, but the parameter groups of this state have {total}",
            write=f"map_param_ids_to_layers(adapter_dir, {total}, state=...)",
        )
    orders = fitting_orders(entries, optimizer)
    if len(orders) != 1:
        raise ParamMappingError(
            f"{len(orders)} orders of the parameters fit the shapes of this state, so which id is which is not known"
            if orders
            else "no known order of the parameters fits the shapes of this state: "
            f"{len(optimizer.trained)} with a state in groups of {', '.join(str(len(g)) for g in optimizer.groups)}, "
            f"for {len(entries)} tensors in the adapter's file",
            expected="the names of the optimizer's parameters, or the optimizer itself",
            write=f"{NAMES}\n     or: {LIVE}",
        )
    (layers,) = orders
    return _grouping(layers, "shapes", tower)


def _grouping(found: Layers, how: str, tower: str | None) -> LayerGrouping:
    stacks = sorted({layer.stack for layer in found.values()})
    if tower is not None:
        chosen = [stack for stack in stacks if tower in (_short(stack), stack)]
        if len(chosen) != 1:
            raise ParamMappingError(f"{tower!r} is none of the towers with factors: {', '.join(stacks)}")
        found = {number: layer for number, layer in found.items() if layer.stack == chosen[0]}
    elif len(stacks) > 1:
        short = sorted({_short(stack) for stack in stacks})
        raise ParamMappingError(
            f"layers of {' and '.join(stacks)} have parameters, and their numbers repeat",
            write=" or ".join(f'tower="{name}"' for name in (short if len(short) == len(stacks) else stacks)),
        )
    of = {number: found[number].number for number in sorted(found)}
    layers = sorted(set(of.values()))
    counts = set(Counter(of.values()).values())
    return LayerGrouping(tuple(layers), counts.pop() if len(counts) == 1 else 0, of, how)


def _short(stack: str) -> str:
    """The name of the tower of a list of layers; a single tower is the decoder."""
    if any(word in NOT_TEXT for word in stack.split(".")):
        return stack
    return next((word for word in stack.split(".") if word in ("encoder", "decoder")), "decoder")


def _names(given: Mapping[int, str] | Sequence[Any]) -> dict[int, str]:
    """Names by id, however they were given."""
    if isinstance(given, Mapping):
        return {int(number): str(name) for number, name in given.items()}
    if all(isinstance(one, str) for one in given):
        return dict(enumerate(given))
    names = as_optimizer_state({"state": {}, "param_groups": list(given)}).names
    if names is None:
        raise ParamMappingError(
            "these parameter groups hold no names",
            expected="groups with param_names, which torch writes for torch.optim.AdamW(model.named_parameters())",
            write=NAMES,
        )
    return dict(names)
