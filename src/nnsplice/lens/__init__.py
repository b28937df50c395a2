"""Lenses: logit lens, direct attribution, fitted lenses, patchscopes.

logit       the model's own norm and head on any state of the stream
direct      direct logit attribution: the metric as a sum over heads, MLPs and embeddings
terms       the terms of that sum, from the requested sites
decomposition  the sum for one batch of prompts
linear      norms and unembeddings as linear maps in one run
lens        Lens: the result of `logit`, with the top tokens
fit         tuned and Jacobian lenses, fitted to a model
fitted      FittedLens: the result of `fit`, and its file
patchscope  states patched into another prompt, and the text generated from there
diff        DiffLens: the mean difference of two models, as tokens and as a steering vector
tail        the final norm and the head, checked against the logits of the run
runs        one forward pass, with the values of module inputs and outputs
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
