"""`create_param_masks`: boolean masks of the parameters of an address."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nnsplice.atlas import unwrap
from nnsplice.errors import circumstances
from nnsplice.weights.selecting import Restriction, names, selection_of

#: Parameter name -> bool mask of its shape, or None for all of it. Other parameters are not selected.
ParamMasks = dict[str, Tensor | None]


def create_param_masks(model: Any, restriction: Restriction) -> ParamMasks:
    """Boolean masks of the parameters that belong to an address.

    >>> masks = ns.weights.create_param_masks(model, "l1h2")
    >>> [(name, int(mask.sum())) for name, mask in masks.items()]   # of 16 columns each q, k, v and o have 4
    [('transformer.h.1.attn.c_attn.weight', 192), ('transformer.h.1.attn.c_attn.bias', 12),
     ('transformer.h.1.attn.c_proj.weight', 64)]

    The masks are on the device of their parameter and have its shape. They are expanded views of one axis, so write
    into a `.clone()`.

    Args:
        model: any model, in any wrapper; names are those of its `named_parameters()`.
        restriction: `"full"`, `"embed"`, `"unembed"`, `"l5"`, `"l5 attn"`, `"l5 mlp"`, `"l5h3"`, `"l5g1"` (a key/value
            head with its query heads), any portable address, the name of a parameter, or a list, which is their union.
            The mask of a head includes the key/value head that it reads, shared or not; `ns.weights.ablate` and the
            like leave a shared one to the group (`own` of `ns.weights.select`).

    Returns:
        The mask of each parameter by name; None for a whole parameter with `"full"`.

    Raises:
        BadType: neither a text nor a list.
        BadArgument: an address that does not exist in this model.
        OutOfRange: a layer, head or group that does not exist.
        UnrecognisedModel: the parts of the model are not recognised; `"full"` and names of parameters still work.
    """
    with circumstances("ns.weights.create_param_masks"):
        selection = selection_of(model, restriction)
    if isinstance(restriction, str) and restriction.strip().lower() == "full" and isinstance(model, nn.Module):
        return {name: None for name, _ in model.named_parameters()}  # including parameters that a wrapper adds
    root, outer = unwrap(model), names(model)
    masks: ParamMasks = {}
    for name in selection:
        device = root.get_parameter(name).device
        # Masks have values also for a model on the meta device.
        masks[outer[name]] = selection.mask(name, None if device.type == "meta" else device)
    return masks
