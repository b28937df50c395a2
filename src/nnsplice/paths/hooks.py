"""Hook names of TransformerLens, and the portable site that each one means.

    HOOKS       hook name -> portable text
    REFUSED     hook name -> why it has no portable site, and what to write instead
    portable    one hook name, with its layer -> portable text

`{n}` is the index of the layer. A name in neither table raises an error with the closest names.
"""

from __future__ import annotations

import re
from types import MappingProxyType
from typing import NamedTuple

from nnsplice.errors import PathError, RefusedPlace, closest

#: The site of each hook. TransformerLens has an axis for heads within a hook; here heads are sites of their own.
HOOKS = MappingProxyType(
    {
        "blocks.{n}.hook_resid_pre": "layers[{n}].input",
        "blocks.{n}.hook_resid_mid": "layers[{n}].mid",
        "blocks.{n}.hook_resid_post": "layers[{n}].output",
        "blocks.{n}.hook_attn_out": "layers[{n}].attn.output",
        "blocks.{n}.hook_mlp_out": "layers[{n}].mlp.output",
        "blocks.{n}.attn.hook_z": "layers[{n}].heads[:].output",
        "blocks.{n}.attn.hook_q": "layers[{n}].heads[:].q",
        "blocks.{n}.attn.hook_k": "layers[{n}].groups[:].k",
        "blocks.{n}.attn.hook_v": "layers[{n}].groups[:].v",
        "blocks.{n}.attn.hook_pattern": "layers[{n}].heads[:].pattern",
        "blocks.{n}.mlp.hook_post": "layers[{n}].neurons[:].output",
        "ln_final.hook_normalized": "final_norm.output",
    }
)


class Refusal(NamedTuple):
    """Why a hook has no portable site, and the closest site (None if there is none)."""

    reason: str
    write: str | None = None


_NO_NORM = Refusal(
    "the inside of a block's norm has no name here, because families put it in different sites",
    "layers[{n}].input or layers[{n}].mid",
)
_AFTER_ROTARY = Refusal("q and k are read before the rotary embedding here, and this hook stands after it")

#: Hooks of TransformerLens whose value no portable site has.
REFUSED = MappingProxyType(
    {
        "hook_embed": Refusal(
            "hook_embed is the token embedding without positions; the stream entering the first layer is another value",
            "embed.output",
        ),
        "hook_pos_embed": Refusal(
            "hook_pos_embed is the positions' share alone; the stream that enters the first layer holds both",
            "embed.output",
        ),
        "blocks.{n}.attn.hook_result": Refusal(
            "hook_result is each head after the output projection, which models compute for all heads at once; "
            "a head is read before the projection",
            "layers[{n}].heads[:].output",
        ),
        "blocks.{n}.attn.hook_attn_scores": Refusal(
            "hook_attn_scores is attention before its softmax, which models do not hand out; the pattern is after it",
            "layers[{n}].heads[:].pattern",
        ),
        "blocks.{n}.attn.hook_rot_q": _AFTER_ROTARY._replace(write="layers[{n}].heads[:].q"),
        "blocks.{n}.attn.hook_rot_k": _AFTER_ROTARY._replace(write="layers[{n}].groups[:].k"),
        "blocks.{n}.mlp.hook_pre": Refusal(
            "hook_pre is the gate's projection in some families and the only one in others; say which is meant",
            "layers[{n}].mlp.up.output or layers[{n}].mlp.gate.output",
        ),
        "blocks.{n}.ln1.hook_scale": _NO_NORM,
        "blocks.{n}.ln1.hook_normalized": _NO_NORM,
        "blocks.{n}.ln2.hook_scale": _NO_NORM,
        "blocks.{n}.ln2.hook_normalized": _NO_NORM,
        "ln_final.hook_scale": Refusal("the scale inside the final norm has no name here", "final_norm.output"),
    }
)

_LAYER = re.compile(r"^blocks\.([0-9]{1,18})\.")


def portable(hook: str) -> str:
    """The portable text that a hook name means.

    >>> from nnsplice.paths.hooks import portable
    >>> portable("blocks.5.attn.hook_z")
    'layers[5].heads[:].output'

    Raises `RefusedPlace` for a hook that has no portable site, `PathError` for a name that is no hook.
    """
    found = _LAYER.match(hook)
    layer = found.group(1) if found else "0"
    name = _LAYER.sub("blocks.{n}.", hook)
    if name in HOOKS:
        return HOOKS[name].format(n=layer)
    if name in REFUSED:
        reason, write = REFUSED[name]
        raise RefusedPlace(reason, path=hook, column=0, write=write and write.format(n=layer))
    near = closest(name, [*HOOKS, *REFUSED])
    raise PathError("TransformerLens has no such hook", path=hook, column=0, expected=near.replace("{n}", layer))
