"""Runtime checks that a portable site has the value that its address promises, before its first use on a model.

A closure is one measured promise of one layer, for example how far its branches are from adding up to its output.

promises     the kinds of sites, their promises, and the tolerance for rounding
pass_values  one forward pass with all values that the checks need
streams      the branches of a layer add up to its output
heads        each slice before the output projection is one head's; patterns
mlp_parts    neurons and experts add up to the MLP's output
logit_head   the head reads the last layer only
joint_norms  norms over all heads, through which a write changes other heads too
gate         measures once, remembers the results, and refuses sites that break their promise
"""

from nnsplice.closures.gate import measure, passes_spent, require
from nnsplice.closures.joint_norms import warn_of_joint_norms
from nnsplice.closures.promises import CROSS, PROMISES, Closure, PromiseKind, kind_of

__all__ = [
    "CROSS",
    "PROMISES",
    "Closure",
    "PromiseKind",
    "kind_of",
    "measure",
    "passes_spent",
    "require",
    "warn_of_joint_norms",
]
