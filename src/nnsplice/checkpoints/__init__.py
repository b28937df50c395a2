"""Checkpoints whose names and shapes are not the model's: declare what each output needs, check it all, then stream.

>>> from nnsplice.checkpoints import Parallel, Rename, Split
>>> qkv = Split("attn.qkv", ["attn.q", "attn.k", "attn.v"], [8, 4, 4], dim=0)
>>> Parallel([qkv, Rename("wte", "embed")]).explain()
2 groups, 2 inputs, 4 outputs
attn.qkv  ->  attn.{k,q,v}
wte       ->  embed

    mapper      what becomes of what; each is there by its long name and by a short one: Copy, Copy
    io          reading and writing
    convert     a folder into another one
    cutting     the config of a model with fewer layers
    between     one family's names and shapes into another's, derived
    places      tensors of a folder by address
"""

from nnsplice.checkpoints.between.derive import Between, mapper_between
from nnsplice.checkpoints.convert import convert, renaming
from nnsplice.checkpoints.cutting import adapted_config, layer_of
from nnsplice.checkpoints.io.distributed import (
    save_model_state_pipeline_parallel,
    write_model_state_distributed,
    write_model_state_pipeline_parallel,
)
from nnsplice.checkpoints.io.explain import Explanation
from nnsplice.checkpoints.io.folder import Checkpoint
from nnsplice.checkpoints.io.reader import load_model_state, read_model_state
from nnsplice.checkpoints.io.writer import save_model_state, write_model_state_local
from nnsplice.checkpoints.mapper.abc import ModelStateMapper, StateGroup
from nnsplice.checkpoints.mapper.adapters import identity_mapper_from_mapper_outputs, identity_mapper_from_module
from nnsplice.checkpoints.mapper.compose import Parallel, PrefixScope, Sequential, Shard, filter_empty_mappers
from nnsplice.checkpoints.mapper.distributed import Distribute, GatherFullTensor
from nnsplice.checkpoints.mapper.joining import Collect, ConcatenateTensors, StackTensors
from nnsplice.checkpoints.mapper.long_names import *  # noqa: F403 - importable, and not listed in __all__
from nnsplice.checkpoints.mapper.names import Copy, Drop, Identity, Rename, SelectChildModules
from nnsplice.checkpoints.mapper.numbers import Cast, Scale, Shift, Zeros
from nnsplice.checkpoints.mapper.shapes import Permute, Reshape, Slice, Squeeze, Transpose, Unsqueeze
from nnsplice.checkpoints.mapper.splitting import ChunkTensors, Deal, Split, UnstackTensors
from nnsplice.checkpoints.places import read
from nnsplice.errors import MapperError

__all__ = [
    "Between",
    "Cast",
    "Checkpoint",
    "ChunkTensors",
    "Collect",
    "ConcatenateTensors",
    "Copy",
    "Deal",
    "Distribute",
    "Drop",
    "Explanation",
    "GatherFullTensor",
    "Identity",
    "MapperError",
    "ModelStateMapper",
    "Parallel",
    "Permute",
    "PrefixScope",
    "Rename",
    "Reshape",
    "Scale",
    "SelectChildModules",
    "Sequential",
    "Shard",
    "Shift",
    "Slice",
    "Split",
    "Squeeze",
    "StackTensors",
    "StateGroup",
    "Transpose",
    "Unsqueeze",
    "UnstackTensors",
    "Zeros",
    "adapted_config",
    "convert",
    "filter_empty_mappers",
    "identity_mapper_from_mapper_outputs",
    "identity_mapper_from_module",
    "layer_of",
    "load_model_state",
    "mapper_between",
    "read",
    "read_model_state",
    "renaming",
    "save_model_state",
    "save_model_state_pipeline_parallel",
    "write_model_state_distributed",
    "write_model_state_local",
    "write_model_state_pipeline_parallel",
]


def __dir__() -> list[str]:  # what <TAB> shows
    return __all__
