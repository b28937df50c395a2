"""Weights by address: which parameters belong to a place, and what happens when they are others.

chosen      select: addresses, names and masks -> Selection; which tensors of a model those are
masks       create_param_masks: addresses -> {parameter name: bool mask, or None for the whole}
preview     preview_weight_restriction: masks as a tree with bars
patching    swap, interpolate, ablate: other weights at a place, for the length of a `with` block
freezing    freeze_except: training that leaves everything else as it is, to the bit
changes     diff: how much two models differ, by address
"""

from nnsplice.atlas import Selection
from nnsplice.weights.changes import diff
from nnsplice.weights.chosen import select
from nnsplice.weights.freezing import freeze_except
from nnsplice.weights.masks import ParamMasks, create_param_masks
from nnsplice.weights.patching import ablate, interpolate, swap
from nnsplice.weights.preview import preview_weight_restriction

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
