"""Lenses: what a place would say, and what it says to the metric directly.

logit       the model's own norm and head on any state of the stream
lens        what that gives: Lens, a result with the tokens that come first
tail        the norm and the head, tried on the run
passes      one run, with values kept at ends of modules
"""

from nnsplice.lens.lens import Lens
from nnsplice.lens.logit import logit

__all__ = ["Lens", "logit"]


def __dir__() -> list[str]:  # what <TAB> shows
    return __all__
