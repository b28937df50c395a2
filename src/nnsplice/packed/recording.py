"""The recorded pass of prompts: inputs of every block, keys and values, masks.

Prompts of one length run together. Values are stored flat, prompt after prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnsplice import engine
from nnsplice.atlas import Atlas, Site, Tower
from nnsplice.packed import heads, masks
from nnsplice.packed.attention import KeyValue
from nnsplice.packed.base_runs import BaseRuns
from nnsplice.packed.cost import Cost
from nnsplice.packed.indices import on_device
from nnsplice.packed.passes import run_pass
from nnsplice.packed.whole_prompts import WholePrompts

#: The ways of a recording. "padded": attention through the registry, prompts of several lengths padded on the right in
#: one pass; "exchanged": the same with a pass for each length; "whole": attention modules that run whole prompts.
WAYS = ("padded", "exchanged", "whole")


def ways(lengths: Iterable[int]) -> tuple[str, ...]:
    """The ways to record prompts of these lengths, the fastest first; \"padded\" only if lengths differ."""
    return WAYS if len(set(lengths)) > 1 else WAYS[1:]


def padded_at_most(prompts: int, tokens: int, longest: int) -> int:
    """The largest number of tokens in a padded recording of so many prompts with so many tokens."""
    return min(2 * tokens, prompts * longest)


@dataclass(frozen=True)
class Recording:
    """The recorded pass of some prompts; tensors have the tokens of all prompts, one prompt after another."""

    prompts: tuple[int, ...]
    #: One of `WAYS`.
    way: str
    #: Prompt -> the index of its first token.
    bases: Mapping[int, int]
    tower: Tower
    blocks: tuple[nn.Module, ...]
    #: The input of each block, and the output of the last one: `[token, width]` each.
    entering: tuple[Tensor, ...]
    #: The arguments of each block by name, without the first.
    calls: tuple[Mapping[str, Any], ...]
    #: The keys and values of each attention module: `[group, token, width]`.
    attended: Mapping[nn.Module, KeyValue]
    #: The mask of each attention module; see `masks.tables`.
    masks: Mapping[nn.Module, Tensor | None]
    #: The calls of attention modules that run whole prompts; else empty.
    whole: WholePrompts
    #: The values of the sites in `BaseRuns.keep`: `[token, width]`.
    kept: Mapping[Site, Tensor]
    #: The model's own head.
    head: heads.Head
    #: The cost of the pass.
    cost: Cost

    @property
    def total(self) -> int:
        """The number of recorded tokens."""
        return self.entering[0].shape[0]

    def arguments(self, layer: int, tokens: Tensor) -> dict[str, Any]:
        """The arguments of a block for packed tokens, given by their indices among the recorded tokens."""
        return {name: _for_tokens(value, tokens) for name, value in self.calls[layer].items()}


def record(base: BaseRuns, prompts: Sequence[int]) -> Recording:
    """Record these prompts in the way `base.memo["way"]`; without one, in the first way that works.

    Raises:
        NotImplementedError: packed rows do not cover this model.
    """
    if engine.is_edited(base.model):
        raise NotImplementedError("it has edits of nnsight, which calls of its blocks pass by")
    if base.memo.setdefault("runs_alone", None) is None:
        base.memo["runs_alone"] = engine.runs_alone(base.model)
    if not base.memo["runs_alone"]:
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


def _recorded(base: BaseRuns, root: nn.Module, tower: Tower, prompts: Sequence[int], way: str) -> Recording:
    lengths = base.prompts.lengths("decoder")
    if engine.has_own_code(root.modules()):  # a user's hook may be written for one prompt at a time
        batches = [[prompt] for prompt in prompts]
    elif way == "padded":
        batches = _padded_batches(prompts, lengths)
    else:
        batches = [[prompts[row] for row in rows] for rows in base.prompts.take(prompts).batches(root)]
    shapes = [(len(rows), max(lengths[prompt] for prompt in rows)) for rows in batches]
    passes = [run_pass(base, root, tower, rows, whole=way == "whole") for rows in batches]
    bases, at = {}, 0
    if any(one.entering[0].shape[:2] != shape for one, shape in zip(passes, shapes, strict=True)):
        raise NotImplementedError("its layers hold other tokens than the prompts have")
    for prompt in (prompt for rows in batches for prompt in rows):
        bases[prompt], at = at, at + lengths[prompt]
    own = _own_tokens(batches, shapes, lengths)
    # The input of a block is kept on the block's device, which is that of its output.
    devices = [tensor.device for tensor in (*passes[0].entering[1:], passes[0].entering[-1])]
    entering = tuple(
        _select(torch.cat([tensor.flatten(0, 1) for tensor in column]), own).to(device)
        for device, column in zip(devices, zip(*(one.entering for one in passes), strict=True), strict=True)
    )
    if "head" not in base.memo:  # the same for all prompts
        last = torch.cat([one.returned.last_hidden_state.flatten(0, 1) for one in passes])
        kind = type(passes[0].returned)
        base.memo["head"] = heads.Head.of(root, tower, entering[-1], _select(last, own), kind)
    return Recording(
        prompts=tuple(prompts),
        way=way,
        bases=bases,
        tower=tower,
        blocks=tuple(root.get_submodule(block.module) for block in tower.blocks),
        entering=entering,
        calls=tuple(
            _joined_arguments(column, own, device)
            for device, column in zip(devices, zip(*(one.calls for one in passes), strict=True), strict=False)
        ),
        attended={
            module: _joined_key_values([one.attended[module] for one in passes], own) for module in passes[0].attended
        },
        masks=masks.tables([one.masks for one in passes], shapes),
        kept={
            site: _select(torch.cat([one.kept[site].flatten(0, -2) for one in passes]), own) for site in passes[0].kept
        },
        whole=WholePrompts.of([one.attention_calls for one in passes], [[bases[p] for p in rows] for rows in batches]),
        head=base.memo["head"],
        cost=sum(
            (
                base.cost_model.whole(base.prompts.padded(rows), range(len(rows)), one.logits)
                for rows, one in zip(batches, passes, strict=True)
            ),
            Cost(),
        ),
    )


def _padded_batches(prompts: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Batches of prompts, longest first, with at most as much padding as tokens."""
    batches: list[list[int]] = []
    tokens = 0
    for prompt in sorted(prompts, key=lambda prompt: -lengths[prompt]):
        tokens += lengths[prompt]
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > 2 * tokens:
            batches.append([])
            tokens = lengths[prompt]
        batches[-1].append(prompt)
    return batches


class _OwnTokens(dict[torch.device, Tensor]):
    """The indices of the prompts' own tokens in the padded batches, on each device."""

    def __init__(self, numbers: np.ndarray) -> None:
        super().__init__()
        self.numbers = numbers

    def __missing__(self, device: torch.device) -> Tensor:
        self[device] = made = on_device(self.numbers, device)
        return made


def _own_tokens(
    batches: Sequence[Sequence[int]], shapes: Sequence[tuple[int, int]], lengths: Sequence[int]
) -> _OwnTokens | None:
    """The indices of the prompts' own tokens in the batches; None if there is no padding."""
    given = np.array([lengths[prompt] for rows in batches for prompt in rows])
    ran = np.array([length for rows, length in shapes for _ in range(rows)])
    if np.array_equal(given, ran):
        return None
    within = np.arange(ran.sum()) - np.repeat(ran.cumsum() - ran, ran)
    return _OwnTokens(np.flatnonzero(within < np.repeat(given, ran)))


def _select(tensor: Tensor, own: _OwnTokens | None, dim: int = 0) -> Tensor:
    return tensor if own is None else tensor.index_select(dim, own[tensor.device])


def _joined_arguments(
    calls: Sequence[Mapping[str, Any]], own: _OwnTokens | None, device: torch.device
) -> dict[str, Any]:
    """The arguments of one block, joined over passes, for the prompts' own tokens, on its device."""
    joined: dict[str, Any] = {}
    for name, value in calls[0].items():
        each = [call.get(name) for call in calls]
        if isinstance(value, Tensor):
            joined[name] = _side_by_side(each, own, device)
        elif isinstance(value, tuple):
            joined[name] = tuple(_side_by_side(parts, own, device) for parts in zip(*each, strict=True))
        elif any(other != value for other in each):
            raise NotImplementedError(f"its blocks are given another {name} for prompts of another length")
        else:
            joined[name] = value
    return joined


def _side_by_side(parts: Sequence[Any], own: _OwnTokens | None, device: torch.device) -> Tensor:
    dim = 0 if parts[0].dim() == 1 else 1
    return _select(torch.cat(list(parts), dim), own, dim).to(device)


def _joined_key_values(parts: Sequence[KeyValue], own: _OwnTokens | None) -> KeyValue:
    columns = zip(*parts, strict=True)
    keys, values = (
        _select(torch.cat([part.transpose(0, 1).flatten(1, 2) for part in column], 1), own, 1) for column in columns
    )
    return keys, values


def _for_tokens(value: Any, tokens: Tensor) -> Any:
    if isinstance(value, tuple):
        return tuple(_for_tokens(part, tokens) for part in value)
    if not isinstance(value, Tensor):
        return value
    return value[tokens] if value.dim() == 1 else value[:, tokens]
