"""User code around a model's modules: hooks, torch's global hooks, replaced `forward` methods, own classes."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn

from nnsplice.atlas import unwrap
from nnsplice.engine.tracing import own_body

_registry = nn.modules.module


def hooks_of(modules: Iterable[nn.Module]) -> tuple[int, ...]:
    """The ids of all forward hooks of these modules, global ones included; torch never gives an id twice."""
    everywhere = (*_registry._global_forward_hooks, *_registry._global_forward_pre_hooks)
    return (*everywhere, *(key for m in modules for key in (*m._forward_hooks, *m._forward_pre_hooks)))


def replaced_in(modules: Iterable[nn.Module]) -> tuple[int, ...]:
    """The ids of the functions that these modules run instead of their class's `forward`."""
    return tuple(id(body) for module in modules if (body := own_body(module)) is not None)


def has_code_around(modules: Iterable[nn.Module]) -> bool:
    """Whether calls of these modules run more than their classes' code."""
    found = list(modules)
    return bool(hooks_of(found) or replaced_in(found))


#: Libraries whose modules treat all rows of a batch alike, and all tokens unless they mix them.
_LIBRARIES = {
    "torch", "transformers", "peft", "accelerate", "nnsight", "nnsplice", "bitsandbytes", "torchao", "optimum", "hqq",
    "gptqmodel", "awq", "compressed_tensors",
}  # fmt: skip


def has_own_code(modules: Iterable[nn.Module]) -> bool:
    """Whether calls of these modules run user code: around a module, or in a class of no known library.

    Such code may be written for a single prompt: for its fifth token, or for the first row of a batch.
    """
    found = list(modules)
    return has_code_around(found) or any(_is_foreign(type(m).__module__) for m in found)


def has_code_by_row(model: Any) -> bool:
    """Whether a model, in nnsight or bare, runs code of the user's that may tell rows of a batch apart.

    That is code that `has_own_code` finds, except hooks of known libraries, whose steering blocks know their rows.
    """
    found = list(unwrap(model).modules())
    around: list[Any] = [*_registry._global_forward_hooks.values(), *_registry._global_forward_pre_hooks.values()]
    for module in found:
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            around += hooks.values()
        around += module._backward_pre_hooks.values()
        around.append(own_body(module))
    return any(_is_foreign(type(m).__module__) for m in found) or any(
        _is_foreign(_written_in(code)) for code in around if code is not None
    )


def _is_foreign(module: str) -> bool:
    return module.partition(".")[0] not in _LIBRARIES


def _written_in(code: Any) -> str:
    """The Python module of a function, a method or an object that is called."""
    while isinstance(code, partial):
        code = code.func
    return getattr(code, "__module__", None) or type(code).__module__
