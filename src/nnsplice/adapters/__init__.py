"""LoRA adapters, layer by layer, by the addresses of the model.

grouping    LayerGrouping: the layer of each parameter of an optimizer, by names, order or shapes
orders      the orders of parameters that fit the shapes of an optimizer's state
states      an optimizer's state as plain data, read without unpickling
health      LayerHealth: Adam's moments, layer by layer
factors     ExpertAdapter: an adapter as pairs of low-rank factors
folder      the factors of a PEFT folder
matrices    LoRAMatrices: one pair of factors
alignment   an update compared with a pair of factors: cosine, share of the subspace
aligner     ExpertManifoldAligner: the steps of a run, compared with adapters
profile     AdapterProfile: the kind, depth and energy of every change
domains     DomainTable: the weight of each kind and depth for each domain
live        adapters on a live model: run without them; the only file that imports peft
keys        names of an adapter's tensors, names of weights, addresses
header      the names and shapes of an adapter's tensors, and its config
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
