"""The mappers by their long names: `ModelStateMapperRename` for `Rename`, as other libraries call them.

They can be imported from `nnsplice.checkpoints`; completion and the reference show the short names only.
"""

from nnsplice.checkpoints.mapper.compose import Parallel, PrefixScope, Sequential, Shard
from nnsplice.checkpoints.mapper.distributed import Distribute, GatherFullTensor
from nnsplice.checkpoints.mapper.joining import Collect, ConcatenateTensors, StackTensors
from nnsplice.checkpoints.mapper.names import Copy, Drop, Identity, Rename, SelectChildModules
from nnsplice.checkpoints.mapper.numbers import Cast, Scale, Shift, Zeros
from nnsplice.checkpoints.mapper.shapes import Permute, Reshape, Slice, Squeeze, Transpose, Unsqueeze
from nnsplice.checkpoints.mapper.splitting import ChunkTensors, Deal, Split, UnstackTensors

ModelStateMapperCast = Cast
ModelStateMapperChunkTensors = ChunkTensors
ModelStateMapperCollect = Collect
ModelStateMapperConcatenateTensors = ConcatenateTensors
ModelStateMapperCopy = Copy
ModelStateMapperDeal = Deal
ModelStateMapperDistribute = Distribute
ModelStateMapperDrop = Drop
ModelStateMapperGatherFullTensor = GatherFullTensor
ModelStateMapperIdentity = Identity
ModelStateMapperParallel = Parallel
ModelStateMapperPermute = Permute
ModelStateMapperPrefixScope = PrefixScope
ModelStateMapperRename = Rename
ModelStateMapperReshape = Reshape
ModelStateMapperScale = Scale
ModelStateMapperSelectChildModules = SelectChildModules
ModelStateMapperSequential = Sequential
ModelStateMapperShard = Shard
ModelStateMapperShift = Shift
ModelStateMapperSlice = Slice
ModelStateMapperSplit = Split
ModelStateMapperSqueeze = Squeeze
ModelStateMapperStackTensors = StackTensors
ModelStateMapperTranspose = Transpose
ModelStateMapperUnsqueeze = Unsqueeze
ModelStateMapperUnstackTensors = UnstackTensors
ModelStateMapperZeros = Zeros

__all__ = [
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
]
