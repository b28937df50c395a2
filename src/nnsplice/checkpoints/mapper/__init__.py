"""Mappers: declared changes of names, shapes and numbers, from input tensors to output tensors.

abc             the base class: groups of inputs and outputs, and a function for each
leaf            the base class of mappers with one group
names           Identity, Rename, Copy, SelectChildModules, Drop
shapes          Transpose, Permute, Reshape, Squeeze, Unsqueeze, Slice
numbers         Cast, Scale, Shift, Zeros
splitting       UnstackTensors, ChunkTensors, Split, Deal
joining         StackTensors, ConcatenateTensors, Collect
distributed     Distribute, GatherFullTensor
compose         Parallel, Sequential, Shard, PrefixScope
chain           the groups of a Sequential, computed with a union-find
adapters        identity mappers of a module, and of the outputs of another mapper
fingerprint     texts that identify a mapper
"""
