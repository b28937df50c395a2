"""Changes of names and shapes, declared: which tensors are made of which, and how.

abc         what a mapper is
one_group   what a mapper of one group is
leaf        the words: rename, split, stack, cast, ...
arrange     more words, for conversions between families
distributed the words for tensors that are spread over a mesh
compose     side by side, one after the other, a share, a prefix
chain       how mappers one after the other are one mapper
adapters    mappers from a module and from another mapper
"""
