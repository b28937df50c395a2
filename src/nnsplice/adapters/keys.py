"""Names of adapter tensors: in a file, in a live model, and those of the weights that they change.

base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight            in an adapter's file
base_model.model.model.layers.7.self_attn.q_proj.lora_A.default.weight    in a live model
model.layers.7.self_attn.q_proj.weight                                    the weight that it changes
layers[7].attn.q                                                          its address
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from nnsplice.atlas import Atlas
from nnsplice.atlas.names import layer_of, unwrapped
from nnsplice.errors import UnknownPath
from nnsplice.paths import Path, parse_path

#: `....lora_A`, `....lora_A.weight`, `....lora_A.default.weight`, and the same for relatives of LoRA.
_FACTOR = re.compile(
    r"^(?P<module>.+)\.(?P<factor>(?:lora|vera|hada|lokr|oft|boft|ia3|randlora|ada|hra|miss|road|shira|c3a|fourierft)"
    r"_\w+?|trainable_tokens_\w+?)(?P<rest>(?:\.[^.]+)*)$"
)
_SAVED = re.compile(r"\.modules_to_save\.[^.]+(?=\.)")
_ATTRIBUTES = ("weight", "bias")
#: Names of wrapper modules that an adapter adds.
_WRAPPERS = frozenset({"base_layer", "original_module", "token_adapter"})
#: The factors that a file keeps without `.weight`.
_WITHOUT_WEIGHT = frozenset({"lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"})


@dataclass(frozen=True, slots=True)
class AdapterKey:
    """The parts of the name of an adapter's tensor.

    Attributes:
        module: the module that is changed, without wrappers: `model.layers.7.self_attn.q_proj`.
        factor: `lora_A`, `lora_B`, `lora_embedding_A`, ...; None for a parameter that is trained as a whole.
        attribute: `weight`, `bias`, or the name of a whole parameter.
        depth: the number of adapter layers around the module, if several of its parameters are adapted.
    """

    module: str
    factor: str | None
    attribute: str
    depth: int = 0

    @property
    def text(self) -> str:
        """The name in a file, without the prefix; the same for every spelling."""
        home = self.module + ".base_layer" * self.depth
        if self.factor is None:
            return f"{home}.{self.attribute}"
        alone = self.factor in _WITHOUT_WEIGHT or self.attribute == ""
        return f"{home}.{self.factor}" if alone else f"{home}.{self.factor}.{self.attribute}"

    @property
    def kind(self) -> str:
        """The name without the layer's number, which is the same in every layer."""
        layer = layer_of(self.module)
        return self.text if layer is None else self.text.replace(f"{layer.stack}.{layer.number}.", f"{layer.stack}.*.")


def read_key(name: str) -> AdapterKey:
    """Parse a name, of a file or of a live model.

    >>> from nnsplice.adapters.keys import read_key
    >>> read_key("base_model.model.model.layers.7.self_attn.q_proj.lora_A.default.weight")
    AdapterKey(module='model.layers.7.self_attn.q_proj', factor='lora_A', attribute='weight', depth=0)
    """
    plain = _SAVED.sub("", unwrapped(name))
    found = _FACTOR.match(plain)
    if found is None:
        module, _, attribute = plain.rpartition(".")
        home, depth = _without_wrappers(module)
        return AdapterKey(home, None, attribute, depth)
    # What is left is the adapter's own name (`default`), which a file leaves out, and the attribute.
    last = found["rest"].rpartition(".")[2]
    factor = found["factor"]
    attribute = last if last in _ATTRIBUTES else "weight" if factor in _WITHOUT_WEIGHT else ""
    home, depth = _without_wrappers(found["module"])
    return AdapterKey(home, factor, attribute, depth)


def _without_wrappers(module: str) -> tuple[str, int]:
    words = module.split(".")
    depth = words.count("base_layer")
    return ".".join(word for word in words if word not in _WRAPPERS), depth


def base_name(name: str) -> str:
    """The name of the base model's parameter that an adapter's tensor changes.

    >>> ns.adapters.base_name("base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight")
    'model.layers.7.self_attn.q_proj.weight'

    Args:
        name: the name of the tensor in the adapter's file.

    Returns:
        The name of the parameter.
    """
    key = read_key(name)
    return f"{key.module}.{key.attribute if key.factor is None else 'weight'}"


def address(name: str, model: Any) -> Path:
    """The address of an adapter's tensor, or of a parameter of the base model.

    >>> print(ns.adapters.address("base_model.model.transformer.h.2.mlp.c_fc.lora_B.weight", model))
    layers[2].mlp.up

    Args:
        name: the name of the tensor in the adapter's file or in the model.
        model: a model from `ns.load`, or a module.

    Returns:
        The smallest address that holds it, portable if there is one, else native.

    Raises:
        UnknownPath: nothing of this name is in the model.
    """
    return Atlas.of(model).locate(name)


def factor_keys(path: Path | str, model: Any) -> tuple[str, ...]:
    """The names of an address's LoRA factors in an adapter's file.

    >>> for key in ns.adapters.factor_keys("layers[2].mlp.up", model):
    ...     print(key)
    base_model.model.transformer.h.2.mlp.c_fc.lora_A.weight
    base_model.model.transformer.h.2.mlp.c_fc.lora_B.weight

    Args:
        path: the address.
        model: a model from `ns.load`, or a module.

    Returns:
        The names, A before B for each module.

    Raises:
        UnknownPath: nothing at this address can have factors.
    """
    atlas = Atlas.of(model)
    modules: dict[str, None] = {}
    for name in atlas.resolve(parse_path(path)).names:
        key = read_key(name)
        if len(atlas.tree.params[name]) >= 2 or key.factor is not None:
            modules.setdefault(key.module)
    if not modules:
        raise UnknownPath(f"{path} has no matrix, and only a matrix can carry LoRA factors", path=path)
    embedding = {tower.embed for tower in atlas.towers.values()}
    factors = {True: ("lora_embedding_A", "lora_embedding_B"), False: ("lora_A.weight", "lora_B.weight")}
    return tuple(f"base_model.model.{module}.{factor}" for module in modules for factor in factors[module in embedding])
