"""Steering vectors: fit, apply, sweep, save.

fit, fit_from_prompts      from two groups of states, or of prompts, to a SteeringVector
steer                      a block in which every run of the model is steered; a value that can be shown and added
from_token, span, mask     the tokens to steer
similar                    a condition for each row
generate                   continuations of prompts
sweep                      layers times coefficients, with the KL as a guard: SteeringSweep
to_gguf, from_gguf         control vectors of llama.cpp; SteeringVector.to_file and from_file for safetensors
read_evals, read_suffixes, read_pairs    public contrastive sets as a Contrast of prompts

vector          SteeringVector                          about            method, quality and unit of a vector
sites           layers and directions of a vector       vector_display   a vector as text, HTML and figure
directions      the methods of fit                      quality          the held-out AUC
operators       add, project_out, clamp, ...            where            the tokens to steer
rules           operator, site, tokens, condition       session          the hooks of an open block
block           steer                                   steered_tokens   the tokens that a rule changes: Steering.show
sweep, result   layers times coefficients               sweep_figures    figures of SteeringSweep
cells           many cells in one pass                  padding          prompts of different lengths as one batch
datasets        public contrastive sets                 units            the sweep in units of prompts
gguf            control vectors of llama.cpp
"""

from nnsplice.steering.block import Steering, steer
from nnsplice.steering.datasets import Contrast, read_evals, read_pairs, read_suffixes
from nnsplice.steering.fit import fit, fit_from_prompts
from nnsplice.steering.generate import generate
from nnsplice.steering.gguf import from_gguf, to_gguf
from nnsplice.steering.result import SteeringSweep
from nnsplice.steering.rules import similar
from nnsplice.steering.sweep import sweep
from nnsplice.steering.vector import SteeringVector
from nnsplice.steering.where import from_token, mask, span

__all__ = [
    "Contrast",
    "Steering",
    "SteeringSweep",
    "SteeringVector",
    "fit",
    "fit_from_prompts",
    "from_gguf",
    "from_token",
    "generate",
    "mask",
    "read_evals",
    "read_pairs",
    "read_suffixes",
    "similar",
    "span",
    "steer",
    "sweep",
    "to_gguf",
]


def __dir__() -> list[str]:  # what <TAB> shows
    return __all__
