"""Identity mappers of a module, and of the outputs of another mapper."""

from __future__ import annotations

from torch import Tensor, nn

from nnsplice.checkpoints.mapper.abc import ModelStateMapper, outputs_of
from nnsplice.checkpoints.mapper.compose import Parallel
from nnsplice.checkpoints.mapper.names import Identity


def identity_mapper_from_module(module: nn.Module) -> Parallel:
    """A mapper that passes every state of a module through: parameters and persistent buffers.

    >>> from nnsplice.checkpoints import identity_mapper_from_module
    >>> identity_mapper_from_module(torch.nn.BatchNorm1d(4)).explain()
    5 groups, 5 inputs, 5 outputs
    bias                 ->  bias
    num_batches_tracked  ->  num_batches_tracked
    running_mean         ->  running_mean
    running_var          ->  running_var
    weight               ->  weight

    Args:
        module: the module.

    Returns:
        The identity of each of its states.
    """
    states: dict[str, object] = module.state_dict()
    # `get_extra_state` may return anything.
    return Parallel([Identity(name) for name, state in states.items() if isinstance(state, Tensor)])


def identity_mapper_from_mapper_outputs(mapper: ModelStateMapper) -> Parallel:
    """A mapper that passes every output of another mapper through.

    >>> from nnsplice.checkpoints import Rename, identity_mapper_from_mapper_outputs
    >>> identity_mapper_from_mapper_outputs(Rename("a", "b")).explain()
    1 groups, 1 inputs, 1 outputs
    b  ->  b

    Args:
        mapper: the other mapper.

    Returns:
        The identity of each of its outputs.
    """
    return Parallel([Identity(name) for name in sorted(outputs_of(mapper))])
