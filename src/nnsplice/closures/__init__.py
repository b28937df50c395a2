"""The promises of portable sites, measured on the model before their first use.

promises     the kinds of sites, their promises, and the tolerance for rounding
pass_values  one forward pass with all values that promises are measured on
streams      the branches add up to the stream
heads        one slice for each head; patterns
mlp_parts    neurons and experts
logit_head   the head reads the last layer only
joint_norms  norms over all heads, which spread a write to other heads
gate         measure once, keep the results, refuse sites that break their promise
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
