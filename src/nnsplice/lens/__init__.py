"""Lenses: logit lens, direct attribution, fitted lenses, patchscopes.

logit       the model's own norm and head on any state of the stream
direct      the metric as a sum of what heads, MLPs and embeddings add
terms       which terms of the sum are requested
decomposition  the sum of one batch
linear      norms and heads as linear maps at one run
lens        what that gives: Lens, a result with the tokens that come first
fit         tuned and Jacobian lenses, fitted to a model
fitted      what that gives: FittedLens, a value and a file
patchscope  what a state says when it is written into another prompt
diff        what differs between two models, read and steered with
tail        the norm and the head, tried on the run
runs        one run, with values kept at the ends of modules
"""

from nnsplice.lens.diff import DiffLens, diff_lens
from nnsplice.lens.direct import direct
from nnsplice.lens.fit import fit
from nnsplice.lens.fitted import FittedLens
from nnsplice.lens.lens import Lens
from nnsplice.lens.logit import logit
from nnsplice.lens.patchscope import Patchscope, patchscope

__all__ = ["DiffLens", "FittedLens", "Lens", "Patchscope", "diff_lens", "direct", "fit", "logit", "patchscope"]


def __dir__() -> list[str]:  # what <TAB> shows
    return __all__
