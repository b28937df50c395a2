"""Whether a model is causal, measured on the model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nnsplice.atlas import Atlas, Block, Site, fingerprint, text_config, unwrap
from nnsplice.engine.models import attention_of, is_encoder_decoder
from nnsplice.engine.recording import example_of, undisturbed
from nnsplice.engine.tracing import Model

#: Tokens of the two prompts that are compared; they differ in the last one.
TOKENS = 5
#: What a later token may change of an earlier one's logits, relative to their size: rounding, and never a dependence.
ROUNDING = 1e-3
#: What one token may change of the others' logits where none reads it: two rows of one batch round alike.
BEHIND = 1e-5

_known: weakref.WeakKeyDictionary[nn.Module, dict[object, bool]] = weakref.WeakKeyDictionary()


def is_causal(model: Model) -> bool:
    """Whether a token's values depend on the tokens before it alone.

    One short run tells: of two prompts that differ in their last token, all others have to have the same logits. It is
    kept until the structure or the attention changes. A model that does not run from tokens is believed.
    """
    module = unwrap(model)
    generates = getattr(module, "can_generate", None)
    if generates is None or is_encoder_decoder(model) or not generates():
        return False
    for config in (module.config, text_config(module)):  # pyright: ignore[reportArgumentType]
        said = (getattr(config, "is_causal", True), getattr(config, "causal", True))
        if getattr(config, "use_bidirectional_attention", False) or False in said:
            return False
    known, now = _known.setdefault(module, {}), (fingerprint(module), attention_of(model))
    if now not in known:
        known[now] = _seen(model)
    return known[now]


def _seen(model: Model) -> bool:
    try:
        runner, args, kwargs = example_of(model, TOKENS)
        ids = kwargs.get("input_ids")
        if args or not isinstance(ids, Tensor) or ids.shape != (1, TOKENS):
            return True
        other = ids.clone()
        other[0, -1] = ids[0, 0]
        with undisturbed(runner) as call:
            logits: Any = getattr(call(**{**kwargs, "input_ids": torch.cat([ids, other])}), "logits", None)
    except Exception:  # whoever runs it next is told what is wrong
        return True
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != (2, TOKENS):
        return True
    first, second = logits[:, :-1].double()
    scale = torch.where(first.abs() < 1e4, first.abs(), 0).max()  # tokens that are ruled out have logits of any size
    return bool((first - second).abs().max() <= ROUNDING * scale)


def is_causal_for(model: Model, form: Hashable, inputs: Callable[[], Any], columns: Sequence[int]) -> bool:
    """Whether the same holds in one prompt with images, which some models read forwards and backwards.

    What enters the first layer is changed at some tokens, and the logits of all tokens before have to stay.

    Args:
        form: equal for prompts of which one tells of all.
        inputs: what the model's forward takes for one such prompt; called where it is not known.
        columns: the tokens to change, beside the last.
    """
    module = unwrap(model)
    known, now = _known.setdefault(module, {}), (fingerprint(module), attention_of(model), form)
    if now not in known:
        known[now] = _seen_of(model, inputs(), columns)
    return known[now]


def _seen_of(model: Model, inputs: Mapping[str, Tensor], columns: Sequence[int]) -> bool:
    root = unwrap(model)
    first = root.get_submodule(Atlas.of(model).tower().blocks[0].module)
    changed: list[int] = []

    def change(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        named = not args
        name = next(iter(kwargs), "")
        states = (kwargs[name] if named else args[0]).clone()
        for column in changed:
            _move(states[:, column])
        return (args, {**kwargs, name: states}) if named else ((states, *args[1:]), kwargs)

    hook = first.register_forward_pre_hook(change, with_kwargs=True)
    try:
        with undisturbed(model) as call:
            base = call(**inputs).logits[0].double()
            scale = torch.where(base.abs() < 1e4, base.abs(), 0).max()
            for column in {*columns, len(base) - 1} - {0}:
                changed[:] = [column]
                moved = call(**inputs).logits[0].double()
                if bool((moved - base)[:column].abs().max() > ROUNDING * scale):
                    return False
    finally:
        hook.remove()
    return True


def _move(states: Tensor) -> None:
    """Change states in place, by as much as they vary and alike in every run."""
    draws = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).to(states)
    states += draws * states.std()


def after_last_attention(model: Model, site: Site) -> bool:
    """Whether no token reads another token's value of this site: it stands behind the last attention's mixing."""
    towers = Atlas.of(model).towers
    if site.tower not in towers:
        return False
    last = towers[site.tower].blocks[-1]
    behind = {(last.module, "output")}
    inside = {
        (last.mlp_added, "output"), (last.attn_added, "output"), (last.o, "input"), (last.o, "output"),
        (last.mlp, "output"), (last.down, "input"), (last.attn, "output"), last.mid,
    }  # fmt: skip
    if site.occurrence != last.occurrence or site.kind not in ("plain", "stream"):
        return False
    if (site.module, site.end) in inside - behind:
        return not _mixes_behind(model, last)
    return (site.module, site.end) in behind


def _mixes_behind(model: Model, last: Block) -> bool:
    """Whether a block mixes tokens behind its attention: RWKV's shift in the MLP, Inkling's convolutions.

    One short run tells: what attention adds, what the MLP is given and what it adds are changed at one token, and the
    logits of the others have to stay.
    """
    module = unwrap(model)
    block = module.get_submodule(last.module)
    kinds = {type(part).__name__ for part in block.modules()}
    if any("conv" in kind.lower() for kind in kinds - {"Conv1D"}):  # GPT-2's linear layers are called so too
        return True
    known, now = _known.setdefault(module, {}), (fingerprint(module), attention_of(model), "last")
    if now not in known:
        known[now] = _seen_behind(model, last)
    return known[now]


def _seen_behind(model: Model, last: Block) -> bool:
    root, changed = unwrap(model), 1

    def moved(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)((moved(value[0]), *value[1:]))
        if not isinstance(value, Tensor) or value.dim() != 3 or value.shape[:2] != (2, TOKENS):
            return value
        value = value.clone()
        _move(value[1, changed])
        return value

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (moved(args[0]), *args[1:]), kwargs
        return args, {name: moved(value) for name, value in kwargs.items()}

    places = {(last.o, "output"), (last.attn_added, "output"), (last.mlp_added, "output"), last.mid}
    hooks: list[Any] = []
    try:
        runner, args, kwargs = example_of(model, TOKENS)
        ids = kwargs.get("input_ids")
        if args or not isinstance(ids, Tensor) or ids.shape != (1, TOKENS):
            return True
        with undisturbed(runner) as call:
            for place in places:
                if place is None or place[0] is None:
                    continue
                part = root.get_submodule(place[0])
                if place[1] == "input":
                    hooks.append(part.register_forward_pre_hook(before, with_kwargs=True))
                else:
                    hooks.append(part.register_forward_hook(lambda _m, _a, out: moved(out)))
            logits = call(**{**kwargs, "input_ids": torch.cat([ids, ids])}).logits.double()
    except Exception:  # whoever runs it next is told what is wrong
        return True
    finally:
        for hook in hooks:
            hook.remove()
    if logits.shape[:2] != (2, TOKENS):  # of a decoder beside this tower, or of tokens that the model put in by itself
        return True
    others = [token for token in range(TOKENS) if token != changed]
    first, second = logits[:, others]
    scale = torch.where(first.abs() < 1e4, first.abs(), 0).max()
    return bool((first - second).abs().max() > BEHIND * scale)
