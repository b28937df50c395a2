"""Hooks of the user's on the model itself: they see the logits after nnsight has read them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from nnsplice.atlas import peel
from nnsplice.engine.recording import example_of, undisturbed
from nnsplice.errors import BadArgument

#: Model -> the hooks that were found to leave its logits alone.
_harmless: weakref.WeakKeyDictionary[nn.Module, tuple[int, ...]] = weakref.WeakKeyDictionary()


def refuse_changed_logits(model: Any) -> None:
    """Raise where a hook on the model itself makes other logits of those that are read.

    A value is what a module returned, before hooks of the user's; the logits are what the whole model returned, so a
    change of them by such a hook would be left out of every metric. A hook that only looks is none of our business.

    Raises:
        BadArgument: by how much they change.
    """
    root = peel(model)
    hooks = tuple(root._forward_hooks)
    if not hooks or _harmless.get(root) == hooks:
        return
    seen: list[Tensor | None] = []
    keep = root.register_forward_hook(lambda _m, _a, out: seen.append(_logits(out)), prepend=True)
    try:
        runner, args, kwargs = example_of(model, 4)
        with undisturbed(runner) as call:
            after = _logits(call(*args, **kwargs))
    except Exception:  # whoever runs it next is told what is wrong
        return
    finally:
        keep.remove()
    before = seen[-1] if seen else None
    if before is None or after is None:
        return
    changed = before.shape != after.shape or not torch.equal(before.nan_to_num(), after.nan_to_num())
    if changed:
        by = "" if before.shape != after.shape else f" by up to {float((before - after).abs().max()):.2g}"
        raise BadArgument(
            f"a hook on the model itself changes its logits{by}, after they are read here",
            expected="a hook inside the model, on its head for example, or none on the model itself",
            write="model._module.get_output_embeddings().register_forward_hook(...)",
        )
    _harmless[root] = hooks


def _logits(out: Any) -> Tensor | None:
    found = out[0] if isinstance(out, tuple) and out else getattr(out, "logits", None)
    return found.detach().clone() if isinstance(found, Tensor) else None
