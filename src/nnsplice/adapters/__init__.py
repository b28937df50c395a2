"""Adapters: what a LoRA did, layer by layer, seen through the addresses of the model.

grouping    which parameter of an optimizer belongs to which layer
readings    ... told by the shapes of its state, where no names are known
states      an optimizer's state as plain data; files are read without unpickling
health      Adam's moments, layer by layer
factors     ExpertAdapter: an adapter as pairs of low-rank factors
folder      ... from a PEFT folder
matrices    LoRAMatrices: one such pair, and how the weight that it changes is stored
alignment   an update against a pair of factors: cosine, share of the subspace
aligner     ExpertManifoldAligner: steps of a run, compared with adapters
profile     where an adapter acts: kind, depth, energy
domains     what that is taken to be good for, as data
live        adapters on a live model: run without them; the only file that imports peft
keys        names of tensors, weights and addresses, translated into each other
header      what a folder says without a tensor being read
"""

from nnsplice.adapters.aligner import ExpertManifoldAligner
from nnsplice.adapters.domains import DOMAINS, DomainTable
from nnsplice.adapters.factors import ExpertAdapter
from nnsplice.adapters.grouping import LayerGrouping, map_optimizer_to_layers, map_param_ids_to_layers
from nnsplice.adapters.health import Health, LayerHealth, layer_health
from nnsplice.adapters.keys import address, base_name, factor_keys
from nnsplice.adapters.live import disabled
from nnsplice.adapters.matrices import LoRAMatrices
from nnsplice.adapters.profile import AdapterProfile, profile
from nnsplice.adapters.states import read_optimizer
from nnsplice.errors import ParamMappingError

__all__ = [
    "DOMAINS",
    "AdapterProfile",
    "DomainTable",
    "ExpertAdapter",
    "ExpertManifoldAligner",
    "Health",
    "LayerGrouping",
    "LayerHealth",
    "LoRAMatrices",
    "ParamMappingError",
    "address",
    "base_name",
    "disabled",
    "factor_keys",
    "layer_health",
    "map_optimizer_to_layers",
    "map_param_ids_to_layers",
    "profile",
    "read_optimizer",
]


def __dir__() -> list[str]:  # what <TAB> shows
    return __all__
