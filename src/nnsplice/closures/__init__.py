"""The promises of portable sites, measured on the model before their first use.

promises    the kinds of sites, what each promises, and how a promise is measured against rounding
seen        one forward pass with the values kept that promises are made of
streams     the branches add up; the stream between them
heads       one head, one slice; patterns
parts       neurons and experts
shared      norms over all heads, which carry a write to others
gate        measure once, keep it, refuse what does not hold
"""

from nnsplice.closures.gate import measure, require, spent
from nnsplice.closures.promises import CROSS, PROMISES, Closure, Kind, kind_of
from nnsplice.closures.shared import tell_joint_norms

__all__ = ["CROSS", "PROMISES", "Closure", "Kind", "kind_of", "measure", "require", "spent", "tell_joint_norms"]
