"""Changes of names and shapes, declared: which tensors are made of which, and how.

abc         what a mapper is
leaf        the words: rename, split, stack, cast, ...
compose     side by side, one after the other, a share, a prefix
chain       how mappers one after the other are one mapper
adapters    mappers from a module and from another mapper
"""
