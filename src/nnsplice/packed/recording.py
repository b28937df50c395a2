"""The recorded pass of prompts: inputs of every block, keys and values, masks.

Prompts of one length run together; what is kept of them is flat, prompt after prompt, whatever their lengths.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnsplice import engine, wire
from nnsplice.activations.access import site_of
from nnsplice.atlas import Atlas, Site, Tower
from nnsplice.packed import heads, masks
from nnsplice.packed.attention import KeyValue, Recorder, attention
from nnsplice.packed.base import Base
from nnsplice.packed.cost import Cost
from nnsplice.packed.indices import on
from nnsplice.packed.whole import Call, Whole, listening

#: Arguments of a block that packed rows do without: masks, caches.
_DROPPED = {"attention_mask", "causal_mask", "head_mask"} | engine.BLOCK_CACHE_NAMES
#: The ways of a recording: with the attention function exchanged, for prompts of several lengths in one pass, padded on
#: the right, or in a pass for each length; or with attention modules that run whole prompts.
WAYS = ("padded", "exchanged", "whole")


def ways(lengths: Iterable[int]) -> tuple[str, ...]:
    """The ways of a recording of prompts of these lengths, the fastest first; padding is one where lengths differ."""
    return WAYS if len(set(lengths)) > 1 else WAYS[1:]


def padded_at_most(prompts: int, tokens: int, longest: int) -> int:
    """How many tokens run at most where so many prompts, of so many tokens together, are recorded."""
    return min(2 * tokens, prompts * longest)


@dataclass(frozen=True)
class Recording:
    """A pass over prompts; tensors hold the tokens of all of them, one prompt after another."""

    prompts: tuple[int, ...]
    #: One of `WAYS`.
    way: str
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
    #: What each of them sees: see `masks.tables`.
    masks: Mapping[nn.Module, Tensor | None]
    #: How attention modules were called, where they run code of their own; else empty.
    whole: Whole
    #: By site, the values that `Base.keep` names: `[token, width]`.
    kept: Mapping[Site, Tensor]
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
    masks: dict[nn.Module, Tensor]
    attention_calls: dict[nn.Module, Call]
    kept: dict[Site, Tensor]
    #: What the model without its head returned.
    returned: Any
    #: Of how many tokens of each prompt logits were computed.
    logits: int


def record(base: Base, prompts: Sequence[int]) -> Recording:
    """Run these prompts once, the way that `base.memo["way"]` says; where it says none, the first that runs.

    Raises:
        NotImplementedError: this model does something that packed rows cannot repeat.
    """
    if engine.is_edited(base.model):
        raise NotImplementedError("it has edits of nnsight, which calls of its blocks pass by")
    if base.memo.setdefault("alone", None) is None:
        base.memo["alone"] = engine.runs_alone(base.model)
    if not base.memo["alone"]:
        raise NotImplementedError("what is wrapped around it does more than call it")
    root = base.root
    towers = Atlas.of(root).towers
    if set(towers) != {"decoder"} or not base.prompts.is_causal(base.model):
        raise NotImplementedError("it is no causal decoder")
    tower = towers["decoder"]
    if any(block.occurrence for block in tower.blocks) or tower.unembed is None:
        raise NotImplementedError("its layers share modules, or it has no unembedding")
    if not tower.prefix:
        raise NotImplementedError("its head is no part of its own")
    if "way" in base.memo:
        return _recorded(base, root, tower, prompts, base.memo["way"])
    try:
        recording = _recorded(base, root, tower, prompts, "exchanged")
    except NotImplementedError:
        recording = _recorded(base, root, tower, prompts, "whole")
    base.memo["way"] = recording.way
    return recording


def _recorded(base: Base, root: nn.Module, tower: Tower, prompts: Sequence[int], way: str) -> Recording:
    lengths = base.prompts.lengths("decoder")
    if way == "padded":
        batches = _padded_batches(prompts, lengths)
    else:
        batches = [[prompts[row] for row in rows] for rows in base.prompts.take(prompts).batches(None)]
    shapes = [(len(rows), max(lengths[prompt] for prompt in rows)) for rows in batches]
    passes = [_run(base, root, tower, rows, whole=way == "whole") for rows in batches]
    bases, at = {}, 0
    if any(one.entering[0].shape[:2] != shape for one, shape in zip(passes, shapes, strict=True)):
        raise NotImplementedError("its layers hold other tokens than the prompts have")
    for prompt in (prompt for rows in batches for prompt in rows):
        bases[prompt], at = at, at + lengths[prompt]
    real = _real(batches, shapes, lengths)
    # A block is where what leaves it is, and its stream is kept there; what leaves the last stays as it is.
    devices = [tensor.device for tensor in (*passes[0].entering[1:], passes[0].entering[-1])]
    entering = tuple(
        _chosen(torch.cat([tensor.flatten(0, 1) for tensor in column]), real).to(device)
        for device, column in zip(devices, zip(*(one.entering for one in passes), strict=True), strict=True)
    )
    if "head" not in base.memo:  # what stands there is the model's, whatever the prompts
        last = torch.cat([one.returned.last_hidden_state.flatten(0, 1) for one in passes])
        kind = type(passes[0].returned)
        base.memo["head"] = heads.Head.of(root, tower, entering[-1], _chosen(last, real), kind)
    return Recording(
        prompts=tuple(prompts),
        way=way,
        bases=bases,
        tower=tower,
        blocks=tuple(root.get_submodule(block.module) for block in tower.blocks),
        entering=entering,
        calls=tuple(
            _joined(column, real, device)
            for device, column in zip(devices, zip(*(one.calls for one in passes), strict=True), strict=False)
        ),
        attended={module: _flat([one.attended[module] for one in passes], real) for module in passes[0].attended},
        masks=masks.tables([one.masks for one in passes], shapes),
        kept={
            site: _chosen(torch.cat([one.kept[site].flatten(0, -2) for one in passes]), real) for site in passes[0].kept
        },
        whole=Whole.of([one.attention_calls for one in passes], [[bases[p] for p in rows] for rows in batches]),
        head=base.memo["head"],
        cost=sum(
            (
                base.law.whole(base.prompts.padded(rows), range(len(rows)), one.logits)
                for rows, one in zip(batches, passes, strict=True)
            ),
            Cost(),
        ),
    )


def _padded_batches(prompts: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Prompts that run together: as many of the next length as add no more padding than there are tokens."""
    batches: list[list[int]] = []
    tokens = 0
    for prompt in sorted(prompts, key=lambda prompt: -lengths[prompt]):
        tokens += lengths[prompt]
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > 2 * tokens:
            batches.append([])
            tokens = lengths[prompt]
        batches[-1].append(prompt)
    return batches


class _Real(dict[torch.device, Tensor]):
    """The numbers of the prompts' own tokens among those that ran, by device."""

    def __init__(self, numbers: np.ndarray) -> None:
        super().__init__()
        self.numbers = numbers

    def __missing__(self, device: torch.device) -> Tensor:
        self[device] = made = on(self.numbers, device)
        return made


def _real(batches: Sequence[Sequence[int]], shapes: Sequence[tuple[int, int]], lengths: Sequence[int]) -> _Real | None:
    """Which of the tokens that ran are the prompts' own; None where none is padding."""
    given = np.array([lengths[prompt] for rows in batches for prompt in rows])
    ran = np.array([length for rows, length in shapes for _ in range(rows)])
    if np.array_equal(given, ran):
        return None
    within = np.arange(ran.sum()) - np.repeat(ran.cumsum() - ran, ran)
    return _Real(np.flatnonzero(within < np.repeat(given, ran)))


def _chosen(tensor: Tensor, real: _Real | None, dim: int = 0) -> Tensor:
    return tensor if real is None else tensor.index_select(dim, real[tensor.device])


def _run(base: Base, root: nn.Module, tower: Tower, prompts: Sequence[int], *, whole: bool) -> _Pass:
    blocks = [root.get_submodule(block.module) for block in tower.blocks]
    backbone = root.get_submodule(tower.prefix)
    entering: list[Tensor] = []
    calls: list[dict[str, Any]] = []
    ends: list[Any] = []
    kept = Recorder()
    heard: dict[nn.Module, Call] = {}
    keep = _keeper(entering, calls, kept, whole)
    fewer = {"logits_to_keep": 1} if engine.keeps_logits(base.model) else {}
    # Before hooks of the user's, which run again where packed rows enter the block.
    hooks = [block.register_forward_pre_hook(keep, with_kwargs=True, prepend=True) for block in blocks]
    left: dict[nn.Module, Tensor] = {}
    if base.prompts.images is not None:
        hooks += [block.register_forward_hook(lambda m, _a, out: left.__setitem__(m, first(out))) for block in blocks]
    hooks.append(blocks[-1].register_forward_hook(lambda _m, _a, out: entering.append(first(out))))
    hooks.append(backbone.register_forward_hook(lambda _m, _a, out: ends.append(out)))
    inputs = base.prompts.padded(prompts).inputs(range(len(prompts)), base.model.device)
    assert isinstance(inputs, Mapping)
    sites: dict[Site, Tensor] = {}
    hooks += [_site_keeper(root, site_of(place), sites) for place in base.keep]
    try:
        with torch.no_grad(), base.around(prompts), _hearing(root, tower, kept, heard, whole):
            root(**inputs, **fewer, use_cache=False)
    except NotImplementedError:
        raise
    except Exception as error:
        if engine.is_memory(error):  # that is no reason to run another way, but to run less at once
            raise
        # A model with attention code of its own may fail in any way when it is told another name for it.
        how = "when the calls of its attention are noted" if whole else "with its attention exchanged"
        raise NotImplementedError(f"it does not run {how} ({error})") from None
    finally:
        for hook in hooks:
            hook.remove()
    attention_runs = heard if whole else kept.of
    mixing = sum(not block.only_mlp for block in tower.blocks)
    if len(entering) != len(blocks) + 1 or len(attention_runs) != mixing or len(ends) != 1:
        raise NotImplementedError("a layer of it has no attention, or more than one")
    if any(not _same(left[a], states) for a, states in zip(blocks[: len(left)], entering[1:], strict=False)):
        raise NotImplementedError("parts of the images are added to its stream between its layers")
    logits = fewer.get("logits_to_keep", entering[0].shape[1])
    return _Pass(entering, calls, kept.of, kept.masks, heard, sites, ends[0], logits)


@contextmanager
def _hearing(
    root: nn.Module, tower: Tower, kept: Recorder, heard: dict[nn.Module, Call], whole: bool
) -> Iterator[None]:
    """Keep what every attention needs: keys and values, or how the module was called."""
    if not whole:
        with attention(root, kept):
            yield
        return
    mixers = [block.mixes for block in tower.blocks if not block.only_mlp]
    if None in mixers:
        raise NotImplementedError("a layer of it has no module that mixes tokens")
    with listening([root.get_submodule(mixer) for mixer in mixers if mixer], heard):
        yield


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or torch.equal(one.to(other.device), other)


def _keeper(entering: list[Tensor], calls: list[dict[str, Any]], kept: Recorder, whole: bool) -> Any:
    def keep(block: nn.Module, args: tuple, kwargs: dict) -> None:
        kept.given = list(_tensors((args, kwargs)))
        names = list(inspect.signature(type(block).forward).parameters)[1:]
        given = dict(zip(names, args, strict=False)) | kwargs
        states = given.pop(names[0])
        entering.append(states)
        calls.append({name: _checked(name, value, states, whole) for name, value in given.items()})

    return keep


def _site_keeper(root: nn.Module, site: Site, into: dict[Site, Tensor]) -> Any:
    assert site.end == "output", "what is kept is what modules return"

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        # A copy, as some blocks add into a branch's output in place.
        into[site] = wire.unpack(output, site.item).clone()

    return root.get_submodule(site.module).register_forward_hook(keep, prepend=True)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in arguments, in whatever containers they stand."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | tuple | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)


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


def _joined(calls: Sequence[Mapping[str, Any]], real: _Real | None, device: torch.device) -> dict[str, Any]:
    """The arguments of one block in several passes, for the prompts' own tokens, on its device."""
    joined: dict[str, Any] = {}
    for name, value in calls[0].items():
        each = [call.get(name) for call in calls]
        if isinstance(value, Tensor):
            joined[name] = _side_by_side(each, real, device)
        elif isinstance(value, tuple):
            joined[name] = tuple(_side_by_side(parts, real, device) for parts in zip(*each, strict=True))
        elif any(other != value for other in each):
            raise NotImplementedError(f"its blocks are given another {name} for prompts of another length")
        else:
            joined[name] = value
    return joined


def _side_by_side(parts: Sequence[Any], real: _Real | None, device: torch.device) -> Tensor:
    dim = 0 if parts[0].dim() == 1 else 1
    return _chosen(torch.cat(list(parts), dim), real, dim).to(device)


def _flat(parts: Sequence[KeyValue], real: _Real | None) -> KeyValue:
    columns = zip(*parts, strict=True)
    keys, values = (
        _chosen(torch.cat([part.transpose(0, 1).flatten(1, 2) for part in column], 1), real, 1) for column in columns
    )
    return keys, values


def _at(value: Any, tokens: Tensor) -> Any:
    if isinstance(value, tuple):
        return tuple(_at(part, tokens) for part in value)
    if not isinstance(value, Tensor):
        return value
    return value[tokens] if value.dim() == 1 else value[:, tokens]


def first(value: Any) -> Tensor:
    """A block's stream, whether or not it stands in a tuple or a list."""
    return value[0] if isinstance(value, tuple | list) else value
