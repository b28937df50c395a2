"""The promises of portable sites, measured on the model before their first use.

promises    the kinds of sites, what each promises, and how a promise is measured against rounding
recorded        one forward pass with the values kept that promises are made of
streams     the branches add up; the stream between them
heads       one head, one slice; patterns
parts       neurons and experts
shared      norms over all heads, which carry a write to others
gate        measure once, keep it, refuse what does not hold
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
