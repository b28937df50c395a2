"""Attribution: estimated effects of sites and edges from gradients, and exact path patching.

attribute       from a request to a result
methods         the table of methods, and how one scores prompts
gradients       one run whose values are tied to its logits
nodes           atp and ig: scores of sites
atp_star        atp*: its two corrections
attention       attention that keeps its queries, keys and probabilities
branches        what reads the stream and what adds to it
edges           eap and eap-ig: scores between sites
relevance       relp: eap with the gradients of other rules
information_flow  ifr: shares of what receivers read, without gradients
exact           every edge, measured
path_patching   what a site does through chosen others, exactly
selecting       auto: which method is the best on a slice
verifying       estimates checked against exact values
units           attribute and path_patch in units of prompt pairs
"""

from nnsplice.attribution.attribute import asked_of, attribute
from nnsplice.attribution.path_patching import path_patch

__all__ = ["asked_of", "attribute", "path_patch"]
