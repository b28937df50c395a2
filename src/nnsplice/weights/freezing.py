"""`freeze_except`: training of some weights only.

Masking gradients is not enough, as weight decay and momentum change weights whose gradient is zero. So

* parameters without a selected part require no gradient and have none, so every optimizer skips them;
* in parameters that are selected in part, the gradient of the rest is set to zero (so that it has no effect on clipping
  and momentum), and the rest is restored after every step of an optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from nnsplice.atlas import unwrap
from nnsplice.errors import BadArgument, circumstances
from nnsplice.weights.regions import Region, Selected, regions


@contextmanager
def freeze_except(model: Any, selection: Selected) -> Iterator[list[nn.Parameter]]:
    """Freeze everything except an address, in a `with` block; frozen weights stay bit for bit, also with weight decay.

    >>> import copy
    >>> tuned = copy.deepcopy(ns.models.unwrap(model))
    >>> with ns.weights.freeze_except(tuned, "l1h2") as parameters:
    ...     optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)
    ...     for _ in range(3):
    ...         optimizer.zero_grad()
    ...         tuned(torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    ...         optimizer.step()
    >>> changed = ns.weights.diff(model, tuned, by="layers[:].heads[:]")
    >>> changed[changed.norm > 0].index.tolist()
    ['layers[1].heads[2]']

    An optimizer of all parameters that was made before the block works as well. At the end of the block, also after an
    exception, the gradients and `requires_grad` of frozen parameters are restored.

    Args:
        model: a model from `ns.load`, or a module.
        selection: an address, as for `ns.weights.select`, a selection, or masks. A parameter that is already frozen
            stays so. For a head that shares its keys and values, q and o are trained; the shared k and v are trained
            with the group (`"l1g0"`, or all of its heads).

    Yields:
        The parameters that are trained, for an optimizer.

    Raises:
        BadArgument: an address without parameters, or without any that requires a gradient.
        OutOfRange: a layer, head or group that does not exist.
        UnknownParameter: masks of a parameter that the model does not have.
    """
    with circumstances("ns.weights.freeze_except"):
        found = {id(region.tensor): region for region in regions(model, selection)}
        trained = [region.tensor for region in found.values() if region.tensor.requires_grad]
        if not trained:
            raise BadArgument(
                "nothing of this selection requires a gradient, so nothing would be trained",
                expected="at least one parameter with requires_grad=True",
                write="model.requires_grad_(True)",
            )
    frozen = [parameter for parameter in unwrap(model).parameters() if id(parameter) not in found]
    rests = [rest for region in found.values() if (rest := region.rest()) is not None]
    with ExitStack() as stack:
        _without_gradients(frozen, stack)
        _restore_after_steps(rests, stack)
        for rest in rests:
            if rest.tensor.requires_grad:
                handle = rest.tensor.register_post_accumulate_grad_hook(_zero_gradient_hook(rest))
                stack.callback(handle.remove)
        yield trained


def _without_gradients(frozen: list[nn.Parameter], stack: ExitStack) -> None:
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in frozen]

    def restore() -> None:
        for parameter, flag, grad in before:
            parameter.requires_grad_(flag)
            parameter.grad = grad

    stack.callback(restore)
    for parameter in frozen:
        parameter.requires_grad_(False)
        parameter.grad = None


def _restore_after_steps(rests: list[Region], stack: ExitStack) -> None:
    """Restore regions after every optimizer step, and at the end."""
    before = [(rest, rest.read()) for rest in rests]
    members = {id(rest.tensor) for rest in rests}

    def restore() -> None:
        for rest, values in before:
            rest.write(values)

    def after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if any(id(parameter) in members for group in optimizer.param_groups for parameter in group["params"]):
            restore()

    stack.callback(restore)
    stack.callback(register_optimizer_step_post_hook(after_step).remove)


def _zero_gradient_hook(rest: Region) -> Any:
    """A hook that sets the gradient of a region to zero."""

    def hook(parameter: Tensor) -> None:
        if parameter.grad is not None and not parameter.grad.is_sparse:
            rest.write([torch.zeros_like(view) for view in rest.views(parameter.grad)], parameter.grad)

    return hook
