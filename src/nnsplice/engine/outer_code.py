"""User code around the model that changes values after nnsight has read them, or does not do the same in every run.

nnsight reads what a module returns before the user's hooks run. So changes of the logits by a hook on the whole model,
or by a `forward` that was replaced after nnsight had wrapped the model, would be missing in every result. Code that
changes nothing is accepted; this is measured in short passes.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nnsplice.atlas import unwrap
from nnsplice.engine.hooks import has_code_by_row, hooks_of
from nnsplice.engine.model_lock import locked
from nnsplice.engine.recording import example_of, undisturbed
from nnsplice.engine.sharding import meshes_of
from nnsplice.engine.tracing import Body, Model, callable_of, is_passed_by
from nnsplice.errors import BadArgument

#: Tokens of the short pass.
_TOKENS = 4
#: Model -> the hooks that were measured not to change its logits.
_harmless: weakref.WeakKeyDictionary[nn.Module, set[tuple[int, ...]]] = weakref.WeakKeyDictionary()


def refuse_changed_logits(model: Model, *, bare: bool = False) -> None:
    """Raise if code around the model changes the logits after they are read, or code in it does from run to run.

    Args:
        bare: the bare module will be called, so wrappers around it must not change the logits either.

    Raises:
        BadArgument: with the size of the change.
    """
    _refuse_unsteady(model)
    outer, root = model._module, unwrap(model)
    around = list(_around(outer, root))
    wrapped, hooks, replaced = bare and outer is not root, hooks_of(around), any(map(is_passed_by, around))
    if not (wrapped or replaced) and (not hooks or hooks in _harmless.get(root, ())):
        return
    try:
        read, whole, alone = _three(model, wrapped)
    except Exception:  # the next run raises it
        return
    if (by := _apart(read, whole)) is not None:
        raise BadArgument(
            f"a hook on the model itself, or a forward in the place of its own, changes its logits{by}, after they are "
            "read here",
            expected="a hook inside the model, on its head for example, and none on the model itself, on a wrapper "
            "around it, or on all modules",
            write="model._module.get_output_embeddings().register_forward_hook(...)",
        )
    if wrapped and (by := _apart(alone, whole)) is not None:
        raise BadArgument(
            f"{type(outer).__name__} around the model changes its logits{by}, and what runs here calls the model "
            "inside of it",
            expected="a wrapper that only calls the model, such as LoRA's; no hooks on it, and no soft tokens",
            write="ns.load(ns.models.unwrap(model), tokenizer=tokenizer), where the model inside is meant",
        )
    if not replaced:  # the id of a replaced function may be given again
        _harmless.setdefault(root, set()).add(hooks)


def _refuse_unsteady(model: Model) -> None:
    """Raise if user code makes other logits of the same prompt in a second run, so that no two runs can be compared."""
    # Of a model that several processes share, one alone may have such code, and a run of its own would wait for them.
    if not has_code_by_row(model) or meshes_of(unwrap(model)):
        return
    try:
        runner, args, kwargs = example_of(model, _TOKENS)
        if runner is not model:  # a twin has no user code
            return
        with locked(model), undisturbed(model) as call:
            one, other = (_logits(call(*args, **kwargs)) for _ in range(2))
    except Exception:  # the next run raises it
        return
    if one is None or other is None or one.shape != other.shape or not one.is_floating_point():
        return
    # Some kernels of a GPU add in another order each time.
    apart, size = float((one - other).abs().nan_to_num().max()), float(one.abs().nan_to_num().max())
    if apart > 16 * torch.finfo(one.dtype).eps * size:
        raise BadArgument(
            f"a hook or class of yours in the model does not do the same in every run: the logits of one prompt, run "
            f"twice, are up to {apart:.2g} apart, so a difference between two runs says nothing",
            expected="code that goes by the values it is given, and not by calls that it counts or by random numbers",
            write="hook.remove()   (before this call)",
        )


def runs_alone(model: Model) -> bool:
    """Whether a call of the bare module gives the logits that the model gives with all its wrappers."""
    if model._module is unwrap(model):
        return True
    try:
        _, whole, alone = _three(model, bare=True)
    except Exception:
        return False
    return _apart(alone, whole) is None


def refuse_replaced(model: Any, names: Iterable[str]) -> None:
    """Raise if a replaced `forward` of a module changes its values after they are read.

    Args:
        names: the modules that are read or written, by their names in the bare model.

    Raises:
        BadArgument: with the name of the module.
    """
    root = unwrap(model)
    modules = [(name, module) for name in dict.fromkeys(names) if is_passed_by(module := root.get_submodule(name))]
    if not modules:
        return
    with ExitStack() as stack:
        stack.enter_context(locked(root))
        seen = {name: stack.enter_context(_both(module)) for name, module in modules}
        try:
            runner, args, kwargs = example_of(model, _TOKENS)
            if runner is not model:  # a twin has no user code
                return
            call = stack.enter_context(undisturbed(model))
            call(*args, **kwargs)
        except Exception:  # the next run raises it
            return
    for name, (inside, outside) in seen.items():
        if len(inside) == len(outside) and all(map(_alike, inside, outside)):
            continue
        raise BadArgument(
            f"the forward of {name or 'the model'} was replaced after nnsight had wrapped the model, and does more "
            "than call what was there, so what is read here is not what the module is given and returns",
            expected="a forward that is replaced before the model is loaded, or a hook",
            write=f"model.{name or '_module'}.register_forward_hook(...)",
        )


# --- measuring --------------------------------------------------------------------------------------------------------


def _around(outer: Any, root: nn.Module) -> Iterator[nn.Module]:
    """The wrappers of a model from the outermost, then the model."""
    names = next(name for name, module in outer.named_modules() if module is root)
    yield outer
    for part in filter(None, names.split(".")):
        outer = getattr(outer, part)
        yield outer


def _three(model: Model, bare: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The logits of one prompt: as a trace reads them, as a call returns them, and of the bare module."""
    runner, args, kwargs = example_of(model, _TOKENS)
    if runner is not model:  # a twin, without the model's hooks
        return None, None, None
    with locked(model), _noted(model._module) as read, undisturbed(model) as call:
        whole = _logits(call(*args, **kwargs))
        alone = _logits(callable_of(model, "")(*args, **kwargs)) if bare else None
    return _logits(read[-1][1]) if read else torch.empty(0), whole, alone


#: The input and the output of a call of a module.
_Call = tuple[Any, Any]


@contextmanager
def _noted(module: nn.Module) -> Iterator[list[_Call]]:
    """The calls of a module as nnsight reads them."""
    body, calls = Body(module), []
    inner = body.function

    def note(owner: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = inner(owner, *args, **kwargs)
        calls.append(((args, kwargs), _copied(output)))
        return output

    body.function = note
    try:
        yield calls
    finally:
        body.function = inner


@contextmanager
def _both(module: nn.Module) -> Iterator[tuple[list[_Call], list[_Call]]]:
    """The calls of a module as nnsight reads them, and as its `forward` runs."""
    outside: list[_Call] = []

    def meet(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        outside.append(((args, kwargs), _copied(output)))

    hook = module.register_forward_hook(meet, prepend=True, with_kwargs=True)
    try:
        with _noted(module) as inside:
            yield inside, outside
    finally:
        hook.remove()


def _alike(one: _Call, other: _Call) -> bool:
    """Whether two records are of one call: the same first input tensor, the same output tensors."""
    return _equal(_tensors(one[0])[:1], _tensors(other[0])[:1]) and _equal(_tensors(one[1]), _tensors(other[1]))


def _equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(
        a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(some, others, strict=True)
    )


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _copied(output: Any) -> Any:
    """A copy of an output, as hooks may change its tensors in place."""
    if isinstance(output, Tensor):
        return output.detach().clone()
    if isinstance(output, Mapping):
        return {name: _copied(part) for name, part in output.items()}
    return tuple(map(_copied, output)) if isinstance(output, tuple | list) else output


def _logits(out: Any) -> Tensor | None:
    found = out.get("logits") if isinstance(out, Mapping) else out[0] if isinstance(out, tuple) and out else out
    return found.detach().clone() if isinstance(found, Tensor) else None


def _apart(one: Tensor | None, other: Tensor | None) -> str | None:
    """The size of a difference of logits, for a message; None if they are equal or missing."""
    if one is None or other is None:
        return None
    if one.shape != other.shape:
        return ""
    if torch.equal(one.nan_to_num(), other.nan_to_num()):
        return None
    return f" by up to {float((one - other).abs().max()):.2g}"
