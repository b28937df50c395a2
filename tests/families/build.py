"""Every family of transformers' own table of causal language models, as a tiny random model made from its config."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import transformers as hf
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from families import images
from families.sizes import FLOAT32, LAYERS, NEEDS, NOT_BUILT, PART, SIZES, VARIANTS

#: Model type -> the class that AutoModelForCausalLM makes of it, or AutoModelForImageTextToText.
FAMILIES: dict[str, str] = {
    **{name: dict(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)[name] for name in images.INPUTS},
    **dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
}
#: Fields that say how many layers there are.
_DEPTH = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
#: Fields that get a small value also where the family's own default is None.
_OPTIONAL = ("head_dim", "num_key_value_heads", "n_inner", "sliding_window")
_LATENT = {"head_dim": "qk_rope_head_dim", "num_key_value_heads": "num_attention_heads"}


def aliases() -> dict[str, str]:
    """Model type -> the one that has its config class and its model class as its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kinds = {name: (kind, CONFIG_MAPPING[name].model_type) for name, kind in FAMILIES.items()}
    return {name: own for name, (kind, own) in kinds.items() if own != name and kinds.get(own) == (kind, own)}


def names() -> list[str]:
    """All that can be judged: every family that is built and is none of the aliases, and the variants."""
    known = aliases()
    built = [name for name in FAMILIES if name not in NOT_BUILT and name not in known]
    return [name for family in built for name in (family, *(v for v in VARIANTS if v.partition("/")[0] == family))]


def config_of(name: str, **overrides: Any) -> Any:
    """The config of a tiny model of one family, or of a variant of it (`falcon/groups`)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        family, _, variant = name.partition("/")
        given = {**(VARIANTS[name] if variant else NEEDS.get(family, {})), **images.NEEDS.get(family, {}), **overrides}
        return _small(CONFIG_MAPPING[family], given)


def _small(kind: Any, given: dict[str, Any]) -> Any:
    """A config of a class with small numbers in its fields."""
    start = {key: value for key, value in given.items() if key.startswith("+")}
    default = kind(**{key[1:]: value for key, value in start.items()})
    own = {key: value for key, value in given.items() if "." not in key and not key.startswith("+")}
    fields = vars(default)
    small: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, hf.PretrainedConfig):
            inside = {k.partition(".")[2]: v for k, v in given.items() if k.startswith(f"{key}.")}
            small[key] = _small(type(value), inside)
        elif key in SIZES and (value is not None or key in _OPTIONAL):
            small[key] = SIZES[key]
    if "qk_rope_head_dim" in small:  # latent attention: keys have no groups, and this is the part that is rotated
        small |= {key: small[other] for key, other in _LATENT.items() if key in small and other in small}
    small |= {key[1:]: value for key, value in start.items()}
    small |= _per_layer(fields, {**small, **own})
    small |= own
    return kind(**{key: value for key, value in small.items() if value is not ...})


def _per_layer(fields: dict[str, Any], small: dict[str, Any]) -> dict[str, Any]:
    """Lists with an entry for each layer, cut so that each kind of entry is kept, in the order of the whole list."""
    depth = next((fields[key] for key in _DEPTH if isinstance(fields.get(key), int)), None)
    wanted = next((small[key] for key in _DEPTH if isinstance(small.get(key), int)), LAYERS)
    lists = {k: v for k, v in fields.items() if isinstance(v, list) and len(v) == depth and k not in ("moe_layers",)}
    found = {key: _cut(value, wanted) for key, value in lists.items()}
    if set(found.get("layer_types", ())) == {"full_attention"} and "sliding_window" in small:
        found["layer_types"] = [("full_attention", "sliding_attention")[number % 2] for number in range(wanted)]
    return found


def _cut(entries: list[Any], wanted: int) -> list[Any]:
    kinds = [entry for number, entry in enumerate(entries) if entry not in entries[:number]]
    between = [kind for kind in kinds if kind not in (entries[0], entries[-1])] or kinds[::-1]
    middle = (between * wanted)[: max(wanted - 2, 0)]
    return [entries[0], *middle, entries[-1]][:wanted] if wanted > 1 else entries[:1]


def build(name: str, *, seed: int = 0, **overrides: Any) -> Any:
    """One family in float64 and eval mode, with eager attention and experts.

    Biases and norm weights are drawn at random too: at zero and one, a misplaced bias or norm would go unnoticed.
    """
    if name in NOT_BUILT:
        raise NotImplementedError(NOT_BUILT[name])
    config = config_of(name, **overrides)
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = getattr(config, PART[name]) if name in PART else config
            own = name in PART or name in images.INPUTS
            kind: Any = getattr(hf, FAMILIES[name]) if own else hf.AutoModelForCausalLM
            start = kind._from_config if own else kind.from_config
            model = start(made, attn_implementation="eager", experts_implementation="eager")
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    finally:
        torch.random.set_rng_state(state)
    return model.to(torch.float32 if name in FLOAT32 else torch.float64).eval()


def prompt(length: int, shift: int = 0) -> torch.Tensor:
    """Different tokens, none of them special: `[1, length]`."""
    return ((torch.arange(length) * 7 + 3 + shift) % 59 + 4)[None]
