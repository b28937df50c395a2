"""One pass of a recording: a batch of prompts run once, with block inputs, keys, values and masks kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nnsplice import engine, wire
from nnsplice.activations.access import site_of
from nnsplice.atlas import Site, Tower
from nnsplice.packed.attention import KeyValue, KeyValueRecorder, attention
from nnsplice.packed.base_runs import BaseRuns
from nnsplice.packed.whole_prompts import ModuleCall, recording_calls

#: Arguments of a block that packed rows do not need: masks, caches.
_DROPPED = {"attention_mask", "causal_mask", "head_mask"} | engine.BLOCK_CACHE_NAMES


@dataclass(frozen=True)
class RecordedPass:
    """The values of one batch, `[prompt, token, ...]`."""

    entering: list[Tensor]
    calls: list[dict[str, Any]]
    attended: dict[nn.Module, KeyValue]
    masks: dict[nn.Module, Tensor]
    attention_calls: dict[nn.Module, ModuleCall]
    kept: dict[Site, Tensor]
    #: The return value of the backbone (the model without its head).
    returned: Any
    #: The number of tokens of each prompt whose logits were computed.
    logits: int


def run_pass(base: BaseRuns, root: nn.Module, tower: Tower, prompts: Sequence[int], *, whole: bool) -> RecordedPass:
    """Run some prompts, padded on the right, and keep what packed rows need."""
    blocks = [root.get_submodule(block.module) for block in tower.blocks]
    backbone = root.get_submodule(tower.prefix)
    entering: list[Tensor] = []
    calls: list[dict[str, Any]] = []
    ends: list[Any] = []
    kept = KeyValueRecorder()
    module_calls: dict[nn.Module, ModuleCall] = {}
    keep = _keeper(entering, calls, kept, whole)
    fewer = {"logits_to_keep": 1} if engine.keeps_logits(base.model) else {}
    # Before hooks of the user's, which run again when packed rows enter the block.
    hooks = [block.register_forward_pre_hook(keep, with_kwargs=True, prepend=True) for block in blocks]
    left: dict[nn.Module, Tensor] = {}
    if base.prompts.images is not None:
        hooks += [
            block.register_forward_hook(lambda m, _a, out: left.__setitem__(m, block_stream(out))) for block in blocks
        ]
    hooks.append(blocks[-1].register_forward_hook(lambda _m, _a, out: entering.append(block_stream(out))))
    hooks.append(backbone.register_forward_hook(lambda _m, _a, out: ends.append(out)))
    inputs = base.prompts.padded(prompts).inputs(range(len(prompts)), base.model.device)
    assert isinstance(inputs, Mapping)
    sites: dict[Site, Tensor] = {}
    hooks += [_site_keeper(root, site_of(place), sites) for place in base.keep]
    try:
        with torch.no_grad(), base.around(prompts), _recording_attention(root, tower, kept, module_calls, whole):
            root(**{**inputs, **fewer, "use_cache": False})
    except NotImplementedError:
        raise
    except Exception as error:
        if engine.is_out_of_memory(error):  # the caller runs fewer tokens at once
            raise
        # A model with attention code of its own may fail in any way under another attention name.
        how = "when the calls of its attention are noted" if whole else "with its attention exchanged"
        raise NotImplementedError(f"it does not run {how} ({error})") from None
    finally:
        for hook in hooks:
            hook.remove()
    attention_runs = module_calls if whole else kept.key_values
    mixing = sum(not block.only_mlp for block in tower.blocks)
    if len(entering) != len(blocks) + 1 or len(attention_runs) != mixing or len(ends) != 1:
        raise NotImplementedError("a layer of it has no attention, or more than one")
    if any(not _same(left[a], states) for a, states in zip(blocks[: len(left)], entering[1:], strict=False)):
        raise NotImplementedError("parts of the images are added to its stream between its layers")
    logits = fewer.get("logits_to_keep", entering[0].shape[1])
    return RecordedPass(entering, calls, kept.key_values, kept.masks, module_calls, sites, ends[0], logits)


@contextmanager
def _recording_attention(
    root: nn.Module, tower: Tower, kept: KeyValueRecorder, module_calls: dict[nn.Module, ModuleCall], whole: bool
) -> Iterator[None]:
    """In this block attention is recorded: keys and values, or the arguments of whole modules."""
    if not whole:
        with attention(root, kept):
            yield
        return
    mixers = [block.mixes for block in tower.blocks if not block.only_mlp]
    if None in mixers:
        raise NotImplementedError("a layer of it has no module that mixes tokens")
    with recording_calls([root.get_submodule(mixer) for mixer in mixers if mixer], module_calls):
        yield


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or torch.equal(one.to(other.device), other)


def _keeper(entering: list[Tensor], calls: list[dict[str, Any]], kept: KeyValueRecorder, whole: bool) -> Any:
    def keep(block: nn.Module, args: tuple, kwargs: dict) -> None:
        kept.block_inputs = list(_tensors((args, kwargs)))
        given = engine.arguments_of(block, args, kwargs)
        states = given.pop(engine.parameters_of(type(block))[0])
        entering.append(states)
        calls.append({name: _per_token_argument(name, value, states, whole) for name, value in given.items()})

    return keep


def _site_keeper(root: nn.Module, site: Site, into: dict[Site, Tensor]) -> Any:
    assert site.end == "output", "what is kept is what modules return"

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        # A copy, as some blocks add into a branch's output in place.
        into[site] = wire.unpack(output, site.item).clone()

    return root.get_submodule(site.module).register_forward_hook(keep, prepend=True)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in arguments, also in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | tuple | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)


def _per_token_argument(name: str, value: Any, states: Tensor, whole: bool) -> Any:
    """An argument with an entry per token, recognised by its name and never by a size that may fit by chance."""
    if name in _DROPPED or value is None:
        return None
    prompts, length = states.shape[:2]
    if "position" in name:
        parts = value if isinstance(value, tuple) else (value,)
        if all(isinstance(p, Tensor) and length in (p.shape[0] if p.dim() == 1 else p.shape[1],) for p in parts):
            flat = tuple(_tokens(part, prompts) for part in parts)
            return flat if isinstance(value, tuple) else flat[0]
    elif not isinstance(value, Tensor | tuple | list | dict):
        return value
    if whole:  # arguments of attention are recorded with the call of the attention module
        return None
    raise NotImplementedError(f"its blocks are given {name}, which is not known to belong to single tokens")


def _tokens(part: Tensor, prompts: int) -> Tensor:
    """A per-position argument for the tokens of all prompts: `[token]` or `[1, token, ...]`."""
    if part.dim() == 1:
        return part.repeat(prompts)
    return part.expand(prompts, *part.shape[1:]).reshape(1, -1, *part.shape[2:])


def block_stream(value: Any) -> Tensor:
    """The residual stream in a block's output: the first element if it is a tuple or a list."""
    return value[0] if isinstance(value, tuple | list) else value
