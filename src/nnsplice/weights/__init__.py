"""Weights by address: select, swap, ablate, freeze, compare.

selecting       select: addresses and names of parameters -> Selection
masks           create_param_masks: addresses -> {parameter name: bool mask, or None for all of it}
preview         preview_weight_restriction: masks as a tree with bars
patching        swap, interpolate, ablate: other weights at an address, in a `with` block
freezing        freeze_except: training of an address only
changes         diff: the norm of the change from one model to another, by address
regions         the selected parts of parameters, read and written in place
shared_heads    a head's own weights, without keys and values that its group shares
"""

from nnsplice.atlas import Selection
from nnsplice.weights.changes import diff
from nnsplice.weights.freezing import freeze_except
from nnsplice.weights.masks import ParamMasks, create_param_masks
from nnsplice.weights.patching import ablate, interpolate, swap
from nnsplice.weights.preview import preview_weight_restriction
from nnsplice.weights.selecting import select

__all__ = [
    "ParamMasks",
    "Selection",
    "ablate",
    "create_param_masks",
    "diff",
    "freeze_except",
    "interpolate",
    "preview_weight_restriction",
    "select",
    "swap",
]


def __dir__() -> list[str]:  # what <TAB> shows
    return __all__
