"""`unwrap`: the innermost module below all wrappers."""

from __future__ import annotations

from os import PathLike
from typing import Any

from torch import nn

from nnsplice.errors import BadType


def unwrap(model: Any) -> nn.Module:
    """The plain module inside nnsight, `torch.compile`, DDP or PEFT wrappers, nested in any order.

    For copies, training and other libraries, which need a plain module. Adapter layers that PEFT injected stay, as
    parts of the model.

    >>> type(ns.models.unwrap(ns.load("toy"))).__name__
    'GPT2LMHeadModel'
    >>> inner = torch.nn.Linear(2, 2)
    >>> ns.models.unwrap(torch.nn.DataParallel(inner)) is inner
    True

    Args:
        model: a module or an nnsight model.

    Returns:
        The module itself.

    Raises:
        BadType: neither a module nor an nnsight model.
    """
    while True:
        inner = _inside(model)
        if inner is None:
            break
        model = inner
    if not isinstance(model, nn.Module):
        raise BadType(
            f"a model was expected, not {type(model).__name__}",
            expected="a torch.nn.Module or an nnsight model",
            write="ns.load(name_or_folder)" if isinstance(model, str | PathLike) else None,
        )
    return model


def _inside(model: Any) -> nn.Module | None:
    if not isinstance(model, nn.Module):
        # nnsight's wrapper, told by its parts so that this room needs no nnsight.
        state = getattr(model, "__dict__", {})
        module = state.get("_module")
        return module if isinstance(module, nn.Module) and hasattr(model, "interleaver") else None
    children = model._modules
    if list(children) == ["_orig_mod"]:
        return children["_orig_mod"]
    if list(children) == ["module"] and not model._parameters:
        # DDP, DataParallel, FSDP and their like hold nothing else.
        return children["module"]
    if list(children) == ["base_model"] and hasattr(model, "peft_config"):
        tuner = children["base_model"]
        # LoRA-like tuners wrap the model once more; prompt tuning leaves it as it is.
        wrapped = tuner._modules.get("model") if tuner is not None and hasattr(tuner, "targeted_module_names") else None
        return wrapped if wrapped is not None else tuner
    return None
