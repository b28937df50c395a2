"""One pass of the corrupted prompts, kept: what enters every block, how blocks are called, what attention needs.

Prompts of one length run together; what is kept of them is flat, prompt after prompt, whatever their lengths.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nnsplice import engine
from nnsplice.activations.access import site_of
from nnsplice.atlas import Atlas, Tower, peel
from nnsplice.sweeps.cost import Cost
from nnsplice.sweeps.executors import Work
from nnsplice.sweeps.packed import heads
from nnsplice.sweeps.packed.attention import KeysAndValues, KeyValue, attention
from nnsplice.sweeps.packed.whole import Call, Whole, listening

#: Arguments of a block that packed rows do without: masks, caches.
_DROPPED = {"attention_mask", "causal_mask", "head_mask"} | engine.BLOCK_CACHE_NAMES
#: Models that were seen to run attention code of their own, so that nobody tries again.
_own_attention: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass(frozen=True)
class Recording:
    """A pass over prompts; tensors hold the tokens of all of them, one prompt after another."""

    prompts: tuple[int, ...]
    #: Prompt -> where its tokens begin.
    bases: Mapping[int, int]
    tower: Tower
    blocks: tuple[nn.Module, ...]
    #: What enters each block, and after the last what leaves it: `[token, width]`.
    entering: tuple[Tensor, ...]
    #: How each block was called, by the names of its arguments, without the first.
    calls: tuple[Mapping[str, Any], ...]
    #: Keys and values, by attention module: `[group, token, width]`.
    attended: Mapping[nn.Module, KeyValue]
    #: How attention modules were called, where they run code of their own; else empty.
    whole: Whole
    #: The model's own head.
    head: heads.Head
    #: What the pass cost.
    cost: Cost

    @property
    def total(self) -> int:
        """How many tokens are recorded."""
        return self.entering[0].shape[0]

    def arguments(self, layer: int, tokens: Tensor) -> dict[str, Any]:
        """The arguments of a block for packed tokens, given by their numbers among the recorded ones."""
        return {name: _at(value, tokens) for name, value in self.calls[layer].items()}


@dataclass(frozen=True)
class _Pass:
    """What one batch left, `[prompt, token, ...]`."""

    entering: list[Tensor]
    calls: list[dict[str, Any]]
    attended: dict[nn.Module, KeyValue]
    attention_calls: dict[nn.Module, Call]
    #: What the model without its head returned.
    returned: Any


def record(work: Work, prompts: Sequence[int]) -> Recording:
    """Run the corrupted prompts once.

    Raises:
        NotImplementedError: this model does something that packed rows cannot repeat.
    """
    if engine.is_edited(work.model):
        raise NotImplementedError("it has edits of nnsight, which calls of its blocks pass by")
    root = peel(work.model)
    towers = Atlas.of(root).towers
    if set(towers) != {"decoder"} or not engine.is_causal(work.model):
        raise NotImplementedError("it is no causal decoder")
    tower = towers["decoder"]
    if any(block.occurrence for block in tower.blocks) or tower.unembed is None:
        raise NotImplementedError("its layers share modules, or it has no unembedding")
    if not tower.prefix:
        raise NotImplementedError("its head is no part of its own")
    batches = work.plan.corrupted.take(prompts).batches(None)
    batches = [[prompts[row] for row in rows] for rows in batches]
    if root not in _own_attention:
        try:
            passes = [_run(work, root, tower, rows, whole=False) for rows in batches]
        except NotImplementedError:
            _own_attention.add(root)
    if root in _own_attention:
        passes = [_run(work, root, tower, rows, whole=True) for rows in batches]
    bases, at = {}, 0
    lengths = work.plan.corrupted.lengths("decoder")
    for prompt in (prompt for rows in batches for prompt in rows):
        bases[prompt], at = at, at + lengths[prompt]
    entering = tuple(
        torch.cat([tensor.flatten(0, 1) for tensor in column])
        for column in zip(*(one.entering for one in passes), strict=True)
    )
    if "head" not in work.memo:  # what stands there is the model's, whatever the prompts
        work.memo["head"] = heads.Head.of(root, tower, entering[-1], passes)
    return Recording(
        prompts=tuple(prompts),
        bases=bases,
        tower=tower,
        blocks=tuple(root.get_submodule(block.module) for block in tower.blocks),
        entering=entering,
        calls=tuple(_joined(column) for column in zip(*(one.calls for one in passes), strict=True)),
        attended={module: _flat([one.attended[module] for one in passes]) for module in passes[0].attended},
        whole=Whole.of([one.attention_calls for one in passes], [[bases[p] for p in rows] for rows in batches]),
        head=work.memo["head"],
        cost=sum((work.law.whole(work.plan.corrupted, rows, 1) for rows in batches), Cost()),
    )


def _run(work: Work, root: nn.Module, tower: Tower, prompts: Sequence[int], *, whole: bool) -> _Pass:
    blocks = [root.get_submodule(block.module) for block in tower.blocks]
    backbone = root.get_submodule(tower.prefix)
    entering: list[Tensor] = []
    calls: list[dict[str, Any]] = []
    ends: list[Any] = []
    kept = KeysAndValues()
    heard: dict[nn.Module, Call] = {}
    hooks = [block.register_forward_pre_hook(_keeper(entering, calls, whole), with_kwargs=True) for block in blocks]
    hooks.append(blocks[-1].register_forward_hook(lambda _m, _a, out: entering.append(first(out))))
    hooks.append(backbone.register_forward_hook(lambda _m, _a, out: ends.append(out)))
    if work.plan.corruption is not None:
        hooks.append(_corruption(work, root, blocks[0], prompts))
    inputs = work.plan.corrupted.inputs(prompts, work.model.device)
    assert isinstance(inputs, Mapping)
    fewer = {"logits_to_keep": 1} if engine.keeps_logits(work.model) else {}
    try:
        with torch.no_grad(), _hearing(root, tower, kept, heard, whole):
            root(**inputs, **fewer, use_cache=False)
    except NotImplementedError:
        raise
    except Exception as error:
        if engine.is_memory(error):  # that is no reason to run another way, but to run less at once
            raise
        # A model with attention code of its own may fail in any way when it is told another name for it.
        raise NotImplementedError(f"it does not run with its attention exchanged ({error})") from None
    finally:
        for hook in hooks:
            hook.remove()
    attention_runs = heard if whole else kept.of
    if len(entering) != len(blocks) + 1 or len(attention_runs) != len(blocks) or len(ends) != 1:
        raise NotImplementedError("a layer of it has no attention, or more than one")
    return _Pass(entering, calls, kept.of, heard, ends[0])


@contextmanager
def _hearing(
    root: nn.Module, tower: Tower, kept: KeysAndValues, heard: dict[nn.Module, Call], whole: bool
) -> Iterator[None]:
    """Keep what every attention needs: keys and values, or how the module was called."""
    if not whole:
        with attention(root, kept):
            yield
        return
    if any(block.attn is None for block in tower.blocks):
        raise NotImplementedError("a layer of it has no attention module")
    with listening([root.get_submodule(block.attn) for block in tower.blocks if block.attn], heard):
        yield


def _keeper(entering: list[Tensor], calls: list[dict[str, Any]], whole: bool) -> Any:
    def keep(block: nn.Module, args: tuple, kwargs: dict) -> None:
        names = list(inspect.signature(type(block).forward).parameters)[1:]
        given = dict(zip(names, args, strict=False)) | kwargs
        states = given.pop(names[0])
        entering.append(states)
        calls.append({name: _checked(name, value, states, whole) for name, value in given.items()})

    return keep


def _checked(name: str, value: Any, states: Tensor, whole: bool) -> Any:
    """An argument that can be given for single tokens: by its name, never by a size that may fit by chance."""
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
    if whole:  # what only attention reads is kept with the call of the attention itself
        return None
    raise NotImplementedError(f"its blocks are given {name}, which is not known to belong to single tokens")


def _tokens(part: Tensor, prompts: int) -> Tensor:
    """`[token]` or `[1, token, ...]`, for the tokens of all prompts, of what is given per position."""
    if part.dim() == 1:
        return part.repeat(prompts)
    return part.expand(prompts, *part.shape[1:]).reshape(1, -1, *part.shape[2:])


def _joined(calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The arguments of one block in several passes."""
    joined: dict[str, Any] = {}
    for name, value in calls[0].items():
        each = [call.get(name) for call in calls]
        if isinstance(value, Tensor):
            joined[name] = _side_by_side(each)
        elif isinstance(value, tuple):
            joined[name] = tuple(_side_by_side(parts) for parts in zip(*each, strict=True))
        elif any(other != value for other in each):
            raise NotImplementedError(f"its blocks are given another {name} for prompts of another length")
        else:
            joined[name] = value
    return joined


def _side_by_side(parts: Sequence[Any]) -> Tensor:
    return torch.cat(list(parts), dim=0 if parts[0].dim() == 1 else 1)


def _flat(parts: Sequence[KeyValue]) -> KeyValue:
    columns = zip(*parts, strict=True)
    keys, values = (torch.cat([part.transpose(0, 1).flatten(1, 2) for part in column], 1) for column in columns)
    return keys, values


def _at(value: Any, tokens: Tensor) -> Any:
    if isinstance(value, tuple):
        return tuple(_at(part, tokens) for part in value)
    if not isinstance(value, Tensor):
        return value
    return value[tokens] if value.dim() == 1 else value[:, tokens]


def _corruption(work: Work, root: nn.Module, block: nn.Module, prompts: Sequence[int]) -> Any:
    corruption = work.plan.corruption
    assert corruption is not None
    site = site_of(corruption.place)

    def changed(states: Tensor) -> Tensor:
        states = states.clone()
        for row, prompt in enumerate(prompts):
            tokens, value = list(corruption.positions[prompt]), corruption.values[prompt].to(states)
            states[row, tokens] = value if corruption.overwrites else states[row, tokens] + value
        return states

    def enter(_block: nn.Module, args: tuple, kwargs: dict) -> Any:
        states: Any = args[0] if args else next(iter(kwargs.values()))
        states = changed(states)
        return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): states})

    def embedded(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
        return changed(out)

    if site.end == "output":  # the token embedding, before positions are added
        return root.get_submodule(site.module).register_forward_hook(embedded)
    # Before what is kept of the same block: its rows begin with what the corrupted run enters it with.
    return block.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)


def first(value: Any) -> Tensor:
    """A block's stream, whether or not it stands in a tuple."""
    return value[0] if isinstance(value, tuple) else value
