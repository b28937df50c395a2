"""Steering: vectors as values.

fit, fit_from_prompts      from two groups of states, or of prompts, to a SteeringVector
steer                      a block in which every run of the model is steered; a value that can be shown and added up
from_token, span, mask     which tokens; similar: under which condition
generate                   continuations of prompts

vector        SteeringVector                    directions, quality    how it is found, and how good it is
operators     what is done to a state           where, rules           to which tokens, at which place
session       rules at work in a model          block, show            the block, and what it touches
"""

from nnsplice.steering.block import Steering, steer
from nnsplice.steering.fit import fit, fit_from_prompts
from nnsplice.steering.generate import generate
from nnsplice.steering.rules import similar
from nnsplice.steering.vector import SteeringVector
from nnsplice.steering.where import from_token, mask, span

__all__ = [
    "Steering",
    "SteeringVector",
    "fit",
    "fit_from_prompts",
    "from_token",
    "generate",
    "mask",
    "similar",
    "span",
    "steer",
]
