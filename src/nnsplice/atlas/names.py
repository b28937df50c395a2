"""The layer of a parameter by its name alone: for adapter files, checkpoints and optimizer states.

With a model, `Atlas.locate` knows more: it looks a name up instead of reading it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

#: What families call their list of layers. In a name the first one with a number counts: T5's `block.3.layer.1` is
#: the fourth layer, and its `layer.1` a part of it.
STACKS = frozenset({"layers", "h", "blocks", "block", "layer"})
#: What wrappers put in front of or into a name.
WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_PEFT = ("base_model", "model")


@dataclass(frozen=True, slots=True)
class NamedLayer:
    """A layer, as a name spells it."""

    #: The list of layers, without wrappers: `model.layers`, `encoder.block`.
    stack: str
    number: int


def unwrapped(name: str) -> str:
    """A name without what `torch.compile`, FSDP, DDP and PEFT put in front of it.

    >>> from nnsplice.atlas.names import unwrapped
    >>> unwrapped("module._orig_mod.base_model.model.model.layers.7.mlp.up_proj.weight")
    'model.layers.7.mlp.up_proj.weight'
    """
    words = [word for word in name.split(".") if word not in WRAPPERS]
    while len(words) > 1:
        if words[0] == "module":
            words = words[1:]
        elif tuple(words[:2]) == _PEFT and len(words) > 2:
            words = words[2:]
        else:
            break
    return ".".join(words)


def layer_of(name: str) -> NamedLayer | None:
    """The layer that a name speaks of, or None.

    >>> from nnsplice.atlas.names import layer_of
    >>> layer_of("encoder.block.2.layer.1.DenseReluDense.wi.weight")
    NamedLayer(stack='encoder.block', number=2)
    >>> layer_of("lm_head.weight") is None
    True
    """
    words = unwrapped(name).split(".")
    for at, (word, after) in enumerate(pairwise(words)):
        if word in STACKS and after.isdigit():
            return NamedLayer(".".join(words[: at + 1]), int(after))
    return None
