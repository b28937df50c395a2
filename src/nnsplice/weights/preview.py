"""`preview_weight_restriction`: masks as a printed tree with bars, or as plain names."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from nnsplice.atlas import Atlas, ParameterShare, by_number, draw, unwrap
from nnsplice.errors import BadType, ShapeError, UnknownParameter, closest, named
from nnsplice.shown import shown
from nnsplice.weights.masks import ParamMasks
from nnsplice.weights.selecting import exact
from nnsplice.weights.shared_heads import notes

#: The largest number of notes below a tree.
_NOTES = 3


def preview_weight_restriction(model: Any, masks: ParamMasks, *, plain: bool = False) -> None:
    """Print the parameters that masks select, and the share of each.

    >>> ns.weights.preview_weight_restriction(model, ns.weights.create_param_masks(model, ["l1h2", "l0 mlp"]))
    transformer.h
    ├── 0.mlp
    │   ├── c_fc
    │   │   ├── weight     ████████████████████████  100.0%  (1,024 of 1,024)
    │   │   └── bias       ████████████████████████  100.0%  (64 of 64)
    │   └── c_proj
    │       ├── weight     ████████████████████████  100.0%  (1,024 of 1,024)
    │       └── bias       ████████████████████████  100.0%  (16 of 16)
    └── 1.attn
        ├── c_attn
        │   ├── weight     ██████░░░░░░░░░░░░░░░░░░   25.0%  (192 of 768)
        │   └── bias       ██████░░░░░░░░░░░░░░░░░░   25.0%  (12 of 48)
        └── c_proj.weight  ██████░░░░░░░░░░░░░░░░░░   25.0%  (64 of 256)
    7 parameters  (2,396 of 3,200)

    A note says where masks of heads include keys and values that other heads read too.

    Args:
        model: the model that the masks were made for.
        masks: masks from `ns.weights.create_param_masks`.
        plain: print one name in each line, and nothing else.

    Raises:
        BadType: something other than masks.
        UnknownParameter: masks of a parameter that the model does not have.
        ShapeError: a mask of another shape than its parameter.
    """
    rows = rows_of(model, masks)
    if plain:
        text = "\n".join(shown(name) for name in sorted((row.name for row in rows), key=by_number))
    else:
        text = draw(rows, colour=sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
        text += _notes_of_shared_heads(model, masks)
    print(text)  # noqa: T201 - prints by design


def _notes_of_shared_heads(model: Any, masks: Mapping[str, Tensor | None]) -> str:
    """Notes about selected keys and values that other heads read too."""
    atlas = Atlas.of(model)
    known = {exact(model, atlas, name): mask for name, mask in masks.items()}
    found = list(notes(atlas, {name: mask for name, mask in known.items() if name is not None}))
    left = f"\nand {len(found) - _NOTES} more groups" if len(found) > _NOTES else ""
    return "".join(f"\nnote: {note}" for note in found[:_NOTES]) + left


def rows_of(model: Any, masks: Mapping[str, Tensor | None]) -> list[ParameterShare]:
    """For each mask: the parameter, and how many of its elements are selected."""
    if not isinstance(masks, Mapping):
        raise BadType(
            f"masks is {named(masks)}",
            expected="a mask for each parameter's name",
            write='ns.weights.create_param_masks(model, "l5h3")',
        )
    parameters = dict(unwrap(model).named_parameters(remove_duplicate=False))
    if isinstance(model, nn.Module):
        parameters |= dict(model.named_parameters(remove_duplicate=False))
    rows: list[ParameterShare] = []
    for name, mask in masks.items():
        if name not in parameters:
            raise UnknownParameter(f"this model has no parameter {shown(name)}", expected=closest(name, parameters))
        shape, total = parameters[name].shape, parameters[name].numel()
        if mask is not None and mask.shape != shape:
            raise ShapeError(
                f"the mask of {shown(name)} has shape {list(mask.shape)}", expected=f"{list(shape)}, as the parameter"
            )
        rows.append(ParameterShare(name, total if mask is None else count(mask), total))
    return rows


def count(mask: Tensor) -> int:
    """The number of True elements; of an expanded mask only the underlying memory is read."""
    times = 1
    for axis, stride in enumerate(mask.stride()):
        if stride == 0 and mask.shape[axis] > 1:
            times *= mask.shape[axis]
            mask = mask.narrow(axis, 0, 1)
    return int(mask.sum()) * times
