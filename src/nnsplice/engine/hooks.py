"""Code around a model's modules: hooks, torch's global hooks, replaced `forward` methods, classes of the user's."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from nnsplice.engine.tracing import own_body

_registry = nn.modules.module


def hooks_of(modules: Iterable[nn.Module]) -> tuple[int, ...]:
    """The numbers of all forward hooks that calls of these modules go through; a number never comes again."""
    everywhere = (*_registry._global_forward_hooks, *_registry._global_forward_pre_hooks)
    return (*everywhere, *(key for m in modules for key in (*m._forward_hooks, *m._forward_pre_hooks)))


def replaced_in(modules: Iterable[nn.Module]) -> tuple[int, ...]:
    """What these modules run in the place of their class's `forward`, by its id."""
    return tuple(id(body) for module in modules if (body := own_body(module)) is not None)


def has_code_around(modules: Iterable[nn.Module]) -> bool:
    """Whether calls of these modules run more than their classes' code."""
    found = list(modules)
    return bool(hooks_of(found) or replaced_in(found))


#: Libraries whose modules treat every row of a batch alike, and every token by itself where they mix none.
_LIBRARIES = {
    "torch", "transformers", "peft", "accelerate", "nnsight", "nnsplice", "bitsandbytes", "torchao", "optimum", "hqq",
    "gptqmodel", "awq", "compressed_tensors",
}  # fmt: skip


def has_own_code(modules: Iterable[nn.Module]) -> bool:
    """Whether calls of these modules run code of the user's: around a module, or in a class of no known library.

    Such code may be written for one prompt at a time: for its fifth token, or for the first row of a batch.
    """
    found = list(modules)
    return has_code_around(found) or any(type(m).__module__.partition(".")[0] not in _LIBRARIES for m in found)
