"""Whether later tokens of a prompt change values of earlier ones, measured on the model."""

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

#: Tokens of the two compared prompts, which differ in the last one.
TOKENS = 5
#: The largest change of an earlier token's logits that counts as rounding, relative to their size.
ROUNDING = 1e-3
#: The same where both runs are rows of one batch, which round alike.
SAME_BATCH_ROUNDING = 1e-5

#: Model -> the results of measurements, by structure and attention.
_known: weakref.WeakKeyDictionary[nn.Module, dict[object, bool]] = weakref.WeakKeyDictionary()


def is_causal(model: Model) -> bool:
    """Whether the logits of each token depend on this and earlier tokens only.

    Measured by one short run of two prompts that differ in their last token, and kept until the structure or the
    attention changes. A model that does not run from tokens counts as causal.
    """
    module = unwrap(model)
    generates = getattr(module, "can_generate", None)
    if generates is None or is_encoder_decoder(model) or not generates():
        return False
    for config in (module.config, text_config(module)):  # pyright: ignore[reportArgumentType]
        flags = (getattr(config, "is_causal", True), getattr(config, "causal", True))
        if getattr(config, "use_bidirectional_attention", False) or False in flags:
            return False
    known, key = _known.setdefault(module, {}), (fingerprint(module), attention_of(model))
    if key not in known:
        known[key] = _measure_causal(model)
    return known[key]


def _measure_causal(model: Model) -> bool:
    try:
        runner, args, kwargs = example_of(model, TOKENS)
        ids = kwargs.get("input_ids")
        if args or not isinstance(ids, Tensor) or ids.shape != (1, TOKENS):
            return True
        other = ids.clone()
        other[0, -1] = ids[0, 0]
        with undisturbed(runner) as call:
            logits: Any = getattr(call(**{**kwargs, "input_ids": torch.cat([ids, other])}), "logits", None)
    except Exception:  # the next run raises it
        return True
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != (2, TOKENS):
        return True
    first, second = logits[:, :-1].double()
    return bool((first - second).abs().max() <= ROUNDING * _size(first))


def _size(logits: Tensor) -> Tensor:
    """The largest logit, without tokens that are masked by a huge one."""
    return torch.where(logits.abs() < 1e4, logits.abs(), 0).max()


def is_causal_for(model: Model, form: Hashable, inputs: Callable[[], Any], columns: Sequence[int]) -> bool:
    """Whether the same holds for a prompt with images, whose tokens some models read in both directions.

    The input of the first layer is changed at some tokens, and the logits of all earlier tokens must stay.

    Args:
        form: equal for prompts with the same result.
        inputs: makes the inputs of one such prompt; only called if the result is not known.
        columns: the tokens to change, besides the last.
    """
    module = unwrap(model)
    known, key = _known.setdefault(module, {}), (fingerprint(module), attention_of(model), form)
    if key not in known:
        known[key] = _measure_causal_for(model, inputs(), columns)
    return known[key]


def _measure_causal_for(model: Model, inputs: Mapping[str, Tensor], columns: Sequence[int]) -> bool:
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
            for column in {*columns, len(base) - 1} - {0}:
                changed[:] = [column]
                moved = call(**inputs).logits[0].double()
                if bool((moved - base)[:column].abs().max() > ROUNDING * _size(base)):
                    return False
    finally:
        hook.remove()
    return True


def _move(states: Tensor) -> None:
    """Change states in place, by their standard deviation, with the same random numbers in every run."""
    draws = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).to(states)
    states += draws * states.std()


# --- behind the last attention ----------------------------------------------------------------------------------------


def after_last_attention(model: Model, site: Site) -> bool:
    """Whether a change of one token at this site changes no other token, as no attention follows."""
    towers = Atlas.of(model).towers
    if site.tower not in towers:
        return False
    last = towers[site.tower].blocks[-1]
    if site.occurrence != last.occurrence or site.kind not in ("plain", "stream"):
        return False
    end = (site.module, site.end)
    if end == (last.module, "output"):
        return True
    return end in _ends_behind_attention(last) and not _mixes_behind(model, last)


def _ends_behind_attention(block: Block) -> set[tuple[str, str]]:
    """The ends of modules inside a block that follow its attention, by their names."""
    outputs = (block.mlp_added, block.attn_added, block.o, block.mlp, block.attn)
    ends: set[Any] = {(name, "output") for name in outputs if name is not None}
    ends |= {(name, "input") for name in (block.o, block.down) if name is not None}
    return ends | ({block.mid} if block.mid is not None else set())


def _mixes_behind(model: Model, last: Block) -> bool:
    """Whether a block mixes tokens behind its attention: RWKV's shift in the MLP, Inkling's convolutions.

    Measured by one short run: all values behind the attention are changed at one token, and the logits of the other
    tokens must stay.
    """
    module = unwrap(model)
    known, key = _known.setdefault(module, {}), (fingerprint(module), attention_of(model), "behind")
    if key not in known:
        known[key] = _measure_mixing_behind(model, last)
    return known[key]


def _measure_mixing_behind(model: Model, last: Block) -> bool:
    root, changed = unwrap(model), 1
    # Ends with a value of another shape, which is not changed.
    skipped: list[tuple[str, str]] = []

    def moved(value: Any) -> Any:
        """A copy of a value with one token of the second row changed; None if it is not `[row, token, width]`."""
        if isinstance(value, tuple | list) and value:
            new = moved(value[0])
            return None if new is None else type(value)((new, *value[1:]))
        if not isinstance(value, Tensor) or value.dim() not in (2, 3) or value.numel() % (2 * TOKENS):
            return None
        rows = value.clone().reshape(2, TOKENS, -1) if value.shape[:-1] in ((2, TOKENS), (2 * TOKENS,)) else None
        if rows is None:
            return None
        _move(rows[1, changed])
        return rows.reshape(value.shape)

    def before(end: tuple[str, str]) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            name = None if args else next(iter(kwargs), None)
            new = moved(args[0] if args else kwargs.get(str(name)))
            if new is None:
                skipped.append(end)
                return None
            return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, str(name): new})

        return hook

    def after(end: tuple[str, str]) -> Callable[..., Any]:
        def hook(_: nn.Module, _args: Any, output: Any) -> Any:
            new = moved(output)
            if new is None:
                skipped.append(end)
            return new

        return hook

    hooks: list[Any] = []
    try:
        runner, args, kwargs = example_of(model, TOKENS)
        ids = kwargs.get("input_ids")
        if args or runner is not model or not isinstance(ids, Tensor) or ids.shape != (1, TOKENS):
            return True
        for end in _ends_behind_attention(last):
            part = root.get_submodule(end[0])
            if end[1] == "input":
                hooks.append(part.register_forward_pre_hook(before(end), with_kwargs=True))
            else:
                hooks.append(part.register_forward_hook(after(end)))
        with undisturbed(model) as call:
            logits = call(**{**kwargs, "input_ids": torch.cat([ids, ids])}).logits.double()
    except Exception:  # the next run raises it
        return True
    finally:
        for hook in hooks:
            hook.remove()
    # Logits of another shape are of a decoder beside this tower, or have tokens that the model added.
    if skipped or logits.shape[:2] != (2, TOKENS):
        return True
    others = [token for token in range(TOKENS) if token != changed]
    first, second = logits[:, others]
    return bool((first - second).abs().max() > SAME_BATCH_ROUNDING * _size(first))
