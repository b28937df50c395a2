"""Subspaces and SAE features: parts of a site's activation.

subspace         Subspace, the value: an orthonormal basis at one address
bases            vectors -> orthonormal bases, principal angles, intersections
storage          files
sae              SAE, the value: features of a site, and what each adds to it
sae_files        load_sae: the formats of SAELens and Gemma Scope
attaching        attach_sae: features as sites of a model
train_toy_sae    how the SAE of the toy model was made
"""

from nnsplice.subspaces.attaching import attach_sae, detach_sae
from nnsplice.subspaces.sae import SAE
from nnsplice.subspaces.sae_files import load_sae
from nnsplice.subspaces.subspace import Subspace

__all__ = ["SAE", "Subspace", "attach_sae", "detach_sae", "load_sae"]


def __dir__() -> list[str]:  # what <TAB> shows
    return __all__
