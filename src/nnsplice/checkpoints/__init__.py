"""Checkpoints whose names and shapes are not the model's: declare what each output needs, check it all, then stream.

>>> from nnsplice.checkpoints import Parallel, Rename, Split
>>> qkv = Split("attn.qkv", ["attn.q", "attn.k", "attn.v"], [8, 4, 4], dim=0)
>>> Parallel([qkv, Rename("wte", "embed")]).explain()
2 groups, 2 inputs, 4 outputs
attn.qkv  ->  attn.{k,q,v}
wte       ->  embed

    mapper      what becomes of what; each is there by its long name and by a short one: ModelStateMapperCopy, Copy
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
from nnsplice.checkpoints.mapper.adapters import (
    filter_empty_mappers,
    identity_mapper_from_mapper_outputs,
    identity_mapper_from_module,
)
from nnsplice.checkpoints.mapper.arrange import (
    ModelStateMapperCollect,
    ModelStateMapperDeal,
    ModelStateMapperDrop,
    ModelStateMapperReshape,
    ModelStateMapperScale,
    ModelStateMapperShift,
    ModelStateMapperZeros,
)
from nnsplice.checkpoints.mapper.compose import (
    ModelStateMapperParallel,
    ModelStateMapperPrefixScope,
    ModelStateMapperSequential,
    ModelStateMapperShard,
)
from nnsplice.checkpoints.mapper.distributed import ModelStateMapperDistribute, ModelStateMapperGatherFullTensor
from nnsplice.checkpoints.mapper.leaf import (
    ModelStateMapperCast,
    ModelStateMapperChunkTensors,
    ModelStateMapperConcatenateTensors,
    ModelStateMapperCopy,
    ModelStateMapperIdentity,
    ModelStateMapperPermute,
    ModelStateMapperRename,
    ModelStateMapperSelectChildModules,
    ModelStateMapperSlice,
    ModelStateMapperSplit,
    ModelStateMapperSqueeze,
    ModelStateMapperStackTensors,
    ModelStateMapperTranspose,
    ModelStateMapperUnsqueeze,
    ModelStateMapperUnstackTensors,
)
from nnsplice.checkpoints.places import read
from nnsplice.errors import MapperError

Cast = ModelStateMapperCast
ChunkTensors = ModelStateMapperChunkTensors
Collect = ModelStateMapperCollect
ConcatenateTensors = ModelStateMapperConcatenateTensors
Copy = ModelStateMapperCopy
Deal = ModelStateMapperDeal
Distribute = ModelStateMapperDistribute
Drop = ModelStateMapperDrop
GatherFullTensor = ModelStateMapperGatherFullTensor
Identity = ModelStateMapperIdentity
Parallel = ModelStateMapperParallel
Permute = ModelStateMapperPermute
PrefixScope = ModelStateMapperPrefixScope
Rename = ModelStateMapperRename
Reshape = ModelStateMapperReshape
Scale = ModelStateMapperScale
SelectChildModules = ModelStateMapperSelectChildModules
Sequential = ModelStateMapperSequential
Shard = ModelStateMapperShard
Shift = ModelStateMapperShift
Slice = ModelStateMapperSlice
Split = ModelStateMapperSplit
Squeeze = ModelStateMapperSqueeze
StackTensors = ModelStateMapperStackTensors
Transpose = ModelStateMapperTranspose
Unsqueeze = ModelStateMapperUnsqueeze
UnstackTensors = ModelStateMapperUnstackTensors
Zeros = ModelStateMapperZeros

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
    "ModelStateMapperCast",
    "ModelStateMapperChunkTensors",
    "ModelStateMapperCollect",
    "ModelStateMapperConcatenateTensors",
    "ModelStateMapperCopy",
    "ModelStateMapperDeal",
    "ModelStateMapperDistribute",
    "ModelStateMapperDrop",
    "ModelStateMapperGatherFullTensor",
    "ModelStateMapperIdentity",
    "ModelStateMapperParallel",
    "ModelStateMapperPermute",
    "ModelStateMapperPrefixScope",
    "ModelStateMapperRename",
    "ModelStateMapperReshape",
    "ModelStateMapperScale",
    "ModelStateMapperSelectChildModules",
    "ModelStateMapperSequential",
    "ModelStateMapperShard",
    "ModelStateMapperShift",
    "ModelStateMapperSlice",
    "ModelStateMapperSplit",
    "ModelStateMapperSqueeze",
    "ModelStateMapperStackTensors",
    "ModelStateMapperTranspose",
    "ModelStateMapperUnsqueeze",
    "ModelStateMapperUnstackTensors",
    "ModelStateMapperZeros",
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
