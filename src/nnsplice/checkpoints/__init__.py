"""Checkpoints whose names and shapes are not the model's: declare what each output needs, check it all, then stream.

>>> from nnsplice.checkpoints import Parallel, Rename, Split
>>> qkv = Split("attn.qkv", ["attn.q", "attn.k", "attn.v"], [8, 4, 4], dim=0)
>>> Parallel([qkv, Rename("wte", "embed")]).explain()
2 groups, 2 inputs, 4 outputs
attn.qkv  ->  attn.{k,q,v}
wte       ->  embed

    mapper      what becomes of what
    io          reading and writing
    convert     a folder into another one
    between     one family's names and shapes into another's, derived
    places      tensors of a folder by address
"""

from nnsplice.checkpoints.between.derive import Between as Between
from nnsplice.checkpoints.between.derive import mapper_between as mapper_between
from nnsplice.checkpoints.convert import adapted_config as adapted_config
from nnsplice.checkpoints.convert import convert as convert
from nnsplice.checkpoints.convert import layer_of as layer_of
from nnsplice.checkpoints.convert import renaming as renaming
from nnsplice.checkpoints.io.distributed import (
    save_model_state_pipeline_parallel as save_model_state_pipeline_parallel,
)
from nnsplice.checkpoints.io.distributed import write_model_state_distributed as write_model_state_distributed
from nnsplice.checkpoints.io.distributed import (
    write_model_state_pipeline_parallel as write_model_state_pipeline_parallel,
)
from nnsplice.checkpoints.io.explain import Explanation as Explanation
from nnsplice.checkpoints.io.folder import Checkpoint as Checkpoint
from nnsplice.checkpoints.io.reader import load_model_state as load_model_state
from nnsplice.checkpoints.io.reader import read_model_state as read_model_state
from nnsplice.checkpoints.io.writer import save_model_state as save_model_state
from nnsplice.checkpoints.io.writer import write_model_state_local as write_model_state_local
from nnsplice.checkpoints.mapper import arrange as _arrange
from nnsplice.checkpoints.mapper import leaf as _leaf
from nnsplice.checkpoints.mapper.abc import ModelStateMapper as ModelStateMapper
from nnsplice.checkpoints.mapper.abc import StateGroup as StateGroup
from nnsplice.checkpoints.mapper.adapters import filter_empty_mappers as filter_empty_mappers
from nnsplice.checkpoints.mapper.adapters import (
    identity_mapper_from_mapper_outputs as identity_mapper_from_mapper_outputs,
)
from nnsplice.checkpoints.mapper.adapters import identity_mapper_from_module as identity_mapper_from_module
from nnsplice.checkpoints.mapper.compose import ModelStateMapperParallel as ModelStateMapperParallel
from nnsplice.checkpoints.mapper.compose import ModelStateMapperPrefixScope as ModelStateMapperPrefixScope
from nnsplice.checkpoints.mapper.compose import ModelStateMapperSequential as ModelStateMapperSequential
from nnsplice.checkpoints.mapper.compose import ModelStateMapperShard as ModelStateMapperShard
from nnsplice.checkpoints.mapper.distributed import ModelStateMapperDistribute as ModelStateMapperDistribute
from nnsplice.checkpoints.mapper.distributed import (
    ModelStateMapperGatherFullTensor as ModelStateMapperGatherFullTensor,
)
from nnsplice.checkpoints.places import read as read
from nnsplice.errors import MapperError as MapperError

ModelStateMapperCast = Cast = _leaf.ModelStateMapperCast
ModelStateMapperChunkTensors = ChunkTensors = _leaf.ModelStateMapperChunkTensors
ModelStateMapperConcatenateTensors = ConcatenateTensors = _leaf.ModelStateMapperConcatenateTensors
ModelStateMapperCopy = Copy = _leaf.ModelStateMapperCopy
ModelStateMapperIdentity = Identity = _leaf.ModelStateMapperIdentity
ModelStateMapperPermute = Permute = _leaf.ModelStateMapperPermute
ModelStateMapperRename = Rename = _leaf.ModelStateMapperRename
ModelStateMapperSelectChildModules = SelectChildModules = _leaf.ModelStateMapperSelectChildModules
ModelStateMapperSlice = Slice = _leaf.ModelStateMapperSlice
ModelStateMapperSplit = Split = _leaf.ModelStateMapperSplit
ModelStateMapperSqueeze = Squeeze = _leaf.ModelStateMapperSqueeze
ModelStateMapperStackTensors = StackTensors = _leaf.ModelStateMapperStackTensors
ModelStateMapperTranspose = Transpose = _leaf.ModelStateMapperTranspose
ModelStateMapperUnsqueeze = Unsqueeze = _leaf.ModelStateMapperUnsqueeze
ModelStateMapperUnstackTensors = UnstackTensors = _leaf.ModelStateMapperUnstackTensors

ModelStateMapperCollect = Collect = _arrange.ModelStateMapperCollect
ModelStateMapperDeal = Deal = _arrange.ModelStateMapperDeal
ModelStateMapperDrop = Drop = _arrange.ModelStateMapperDrop
ModelStateMapperReshape = Reshape = _arrange.ModelStateMapperReshape
ModelStateMapperScale = Scale = _arrange.ModelStateMapperScale
ModelStateMapperShift = Shift = _arrange.ModelStateMapperShift
ModelStateMapperZeros = Zeros = _arrange.ModelStateMapperZeros

Distribute = ModelStateMapperDistribute
GatherFullTensor = ModelStateMapperGatherFullTensor
Parallel = ModelStateMapperParallel
PrefixScope = ModelStateMapperPrefixScope
Sequential = ModelStateMapperSequential
Shard = ModelStateMapperShard
