"""Texts that identify a mapper, for the digest of a job that may be resumed."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from nnsplice.checkpoints.mapper.abc import ModelStateMapper, ordered
from nnsplice.checkpoints.mapper.compose import Parallel, PrefixScope, Sequential, Shard
from nnsplice.checkpoints.mapper.leaf import Leaf

#: Values whose repr says all of them, in every process.
_PLAIN = (str, bytes, int, float, complex, torch.dtype, type(None))


def fingerprint(mapper: ModelStateMapper) -> Iterator[str]:
    """Texts that identify a mapper: equal in every process, and different for another mapper."""
    if isinstance(mapper, Parallel | Sequential):
        yield type(mapper).__name__
        for inner in mapper.mappers:
            yield from fingerprint(inner)
    elif isinstance(mapper, Shard | PrefixScope):
        inner = mapper.sub_mapper if isinstance(mapper, Shard) else mapper.mapper
        yield type(mapper).__name__
        yield from fingerprint(inner)
    elif isinstance(mapper, Leaf):
        yield repr(mapper)
    else:  # its repr may hold an address in memory
        yield f"{type(mapper).__module__}.{type(mapper).__qualname__}"
        for name, value in sorted(vars(mapper).items()):
            if isinstance(value, ModelStateMapper):
                yield from fingerprint(value)
            elif isinstance(value, _PLAIN):
                yield f"{name}={value!r}"
    if not isinstance(mapper, Leaf):
        for group in ordered(mapper.state_dependency_groups()):
            yield f"{sorted(group.inputs)} -> {sorted(group.outputs)}"
