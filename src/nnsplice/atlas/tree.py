"""A module tree as plain data: names, shapes and the attributes that recognition needs, without tensors."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from types import MappingProxyType
from typing import Any

from torch import nn

from nnsplice.atlas.families import FACTS, MATRICES, WRAPPED


@dataclass(frozen=True, slots=True)
class Node:
    """One module."""

    #: Dotted name under the root; the first one where several lead here.
    name: str
    #: Name of its class.
    kind: str
    #: Attribute -> dotted name of the child (a shared child has the name of its first site).
    children: Mapping[str, str]
    #: Parameter attribute -> (its first name in the whole model, its shape).
    params: Mapping[str, tuple[str, tuple[int, ...]]]
    buffers: tuple[str, ...]
    #: A list or dict of modules, never called itself.
    container: bool
    #: Whether the children are numbered.
    indexed: bool
    #: Numbers and flags that the module keeps about itself (see `families.FACTS`).
    facts: Mapping[str, Any]
    #: Names of the arguments of its forward.
    arguments: frozenset[str]


@dataclass(frozen=True)
class ModuleTree:
    """All modules of a root, in the order of `named_modules`."""

    nodes: Mapping[str, Node]
    #: First name of every parameter -> its shape, in the model's order.
    params: Mapping[str, tuple[int, ...]]
    #: Every other name a parameter has -> its first name.
    aliases: Mapping[str, str]
    buffers: frozenset[str]
    #: Those buffers that are saved with the parameters, in the model's order.
    saved: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    #: What the model itself says: `embed`, `unembed`, `decoder`, `encoder` -> the module (see `_ENDS`).
    ends: Mapping[str, str] = field(default_factory=dict)

    def child(self, name: str, *path: str) -> str | None:
        """The module at a relative path under `name`, or None."""
        for attribute in path:
            for part in attribute.split("."):
                found = self.nodes[name].children.get(part)
                if found is None:
                    return None
                name = found
        return name

    def under(self, name: str, depth: int = 99) -> Iterator[str]:
        """The modules below `name` in order, without `name` itself."""
        if depth > 0:
            for child in self.nodes[name].children.values():
                yield child
                yield from self.under(child, depth - 1)

    def own(self, name: str, depth: int = 99) -> Iterator[str]:
        """The modules below `name` that stand nowhere else: what several layers share is no part of one of them."""
        if depth > 0:
            for child in self.nodes[name].children.values():
                if child not in self.shared:
                    yield child
                    yield from self.own(child, depth - 1)

    @cached_property
    def shared(self) -> frozenset[str]:
        """Modules that stand in several others."""
        homes = Counter(child for node in self.nodes.values() for child in set(node.children.values()))
        return frozenset(name for name, count in homes.items() if count > 1)

    def owner(self, name: str) -> Node:
        """The module that holds the weights of a layer: itself, or what an adapter wrapped in it."""
        node = self.nodes[name]
        while "weight" not in node.params:
            inner = next((node.children[part] for part in WRAPPED if part in node.children), None)
            if inner is None:
                break
            node = self.nodes[inner]
        return node

    def weight(self, name: str) -> tuple[int, ...] | None:
        """Shape of a layer's weight as `(out, in)`, whichever way it is stored; None where it has no matrix."""
        node = self.owner(name)
        entry = node.params.get("weight")
        if entry is not None and len(entry[1]) != 2:
            return None
        # Quantised weights have other shapes than the layer or are no parameter at all; the layer still says its own.
        if "out_features" in node.facts and "in_features" in node.facts:
            return node.facts["out_features"], node.facts["in_features"]
        if entry is None:
            return None
        return entry[1][::-1] if self.transposed(name) else entry[1]

    def first_layer(self, home: str, names: Iterable[str]) -> str | None:
        """The first of the relative names under `home` that is a layer with a matrix."""
        found = (module for name in names if (module := self.child(home, name)) is not None)
        return next((module for module in found if self.weight(module) is not None), None)

    def table(self, name: str) -> str | None:
        """The first name of a module's matrix, whatever the module calls it; None where it has none."""
        params = self.owner(name).params
        return next((params[row][0] for row in MATRICES if row in params and len(params[row][1]) == 2), None)

    def transposed(self, name: str) -> bool:
        """Whether the layer stores `(in, out)`, as GPT-2's Conv1D does."""
        return self.owner(name).kind == "Conv1D"


#: Ends of class names of what has norms, where all classes of a family have the word in their names.
_HAS_NORMS = ("layer", "output", "intermediate", "embeddings", "encoder", "decoder", "model", "pooler", "head", "lm")


def is_norm(tree: ModuleTree, name: str) -> bool:
    """Whether a module normalises, by the name of its class or its own."""
    kind = tree.nodes[name].kind.lower()
    if "attention" in kind or kind.endswith(_HAS_NORMS):
        return False
    last = name.rpartition(".")[2]
    return "norm" in kind or "norm" in last.lower() or last.startswith("ln_")


@cache
def _arguments(forward: Any) -> frozenset[str]:
    try:
        return frozenset(inspect.signature(forward).parameters)
    except (TypeError, ValueError):
        return frozenset()


_EMPTY: Mapping[str, Any] = MappingProxyType({})


def read_tree(root: nn.Module) -> ModuleTree:
    """Read a module tree once; everything later works on the result."""
    names = {id(module): name for name, module in root.named_modules()}
    params: dict[str, tuple[int, ...]] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    nodes: dict[str, Node] = {}
    buffers: set[str] = set()
    saved: list[str] = []
    for name, module in root.named_modules():
        dot = f"{name}." if name else ""
        own: dict[str, tuple[str, tuple[int, ...]]] = {}
        for attribute, tensor in module._parameters.items():
            if tensor is None:
                continue
            full = first.setdefault(id(tensor), dot + attribute)
            if full == dot + attribute:
                params[full] = tuple(tensor.shape)
            else:
                aliases[dot + attribute] = full
            own[attribute] = (full, tuple(tensor.shape))
        held = tuple(attribute for attribute, tensor in module._buffers.items() if tensor is not None)
        buffers.update(dot + attribute for attribute in held)
        saved += [dot + attribute for attribute in held if attribute not in module._non_persistent_buffers_set]
        facts = {key: module.__dict__[key] for key in FACTS if isinstance(module.__dict__.get(key), (int, float, str))}
        nodes[name] = Node(
            name=name,
            kind=type(module).__name__,
            children={a: names[id(m)] for a, m in module._modules.items() if m is not None},
            params=own,
            buffers=held,
            container=isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)),
            indexed=isinstance(module, (nn.ModuleList, nn.Sequential)),
            facts=facts or _EMPTY,
            arguments=_arguments(type(module).forward),
        )
    ends = {end: name for end, ask in _ENDS.items() if (name := names.get(id(_said(root, ask))))}
    return ModuleTree(nodes, params, aliases, frozenset(buffers), tuple(saved), _config_facts(root), ends)


#: What transformers' models answer about themselves. A root that is its own decoder says nothing with it.
_ENDS = {
    "embed": "get_input_embeddings",
    "unembed": "get_output_embeddings",
    "decoder": "get_decoder",
    "encoder": "get_encoder",
}


def _said(root: nn.Module, ask: str) -> Any:
    try:
        return getattr(root, ask)()
    except Exception:  # not every model has an answer, and how it says so differs
        return None


def text_config(root: nn.Module) -> Any:
    """The config of the part that reads text and writes it: the model's own, or one inside it; None where it has none.

    >>> from nnsplice.atlas.tree import text_config
    >>> text_config(ns.models.unwrap(model)).vocab_size
    64
    """
    config: Any = getattr(root, "config", None)
    if not hasattr(config, "get_text_config"):
        return config
    try:
        # A flat config of two towers would answer for its decoder with a copy under other names.
        two = getattr(config, "is_encoder_decoder", False)
        return config.get_text_config() if two else config.get_text_config(decoder=True)
    except ValueError:  # several of them, of which none is the one
        return config


def _config_facts(root: nn.Module) -> dict[str, Any]:
    """The numbers that a transformers config keeps; those of the text part where there are several."""
    config: Any = getattr(root, "config", None)
    if config is None:
        return {}
    facts: dict[str, Any] = {}
    for source in (config, text_config(root)):
        for key in FACTS:
            try:
                value = getattr(source, key, None)
            except Exception:  # what differs from layer to layer, a config may refuse to say at all
                continue
            if isinstance(value, (int, float, str)):
                facts[key] = value
    if hasattr(config, "is_encoder_decoder"):  # of the whole; a tower's own config says no
        facts["is_encoder_decoder"] = bool(config.is_encoder_decoder)
    return facts
