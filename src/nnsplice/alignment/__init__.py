"""Alignment: distributed alignment search (DAS), which trains the subspace of a site that holds a variable.

aligning     align: from pairs and sites to an Alignment
alignment    Alignment: held-out accuracy by site beside its controls, and the subspaces that were found
pairs        the training and held-out pairs, the sites, and one model's runs of them
parametrisations  what is trained: a rotation, a rotation with a boundary, a mask
training     the training of the sites of one layer
measuring    the accuracy of subspaces on held-out pairs
untrained    the same model with random weights
journal      finished layers, in a folder, so that a run goes on after a stop
"""

from nnsplice.alignment.aligning import align
from nnsplice.alignment.alignment import Alignment

__all__ = ["Alignment", "align"]


def __dir__() -> list[str]:  # what <TAB> shows
    return __all__
