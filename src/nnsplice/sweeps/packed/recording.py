"""One pass of the corrupted prompts, kept: what enters every block, how blocks are called, keys and values."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nnsplice import engine
from nnsplice.atlas import Atlas, Tower, peel
from nnsplice.sweeps.executors import Work
from nnsplice.sweeps.packed.attention import KeysAndValues, attention

#: Arguments of a block that packed rows do without: masks, caches.
_DROPPED = {"attention_mask", "causal_mask", "past_key_values", "past_key_value", "layer_past", "head_mask"}


@dataclass(frozen=True)
class Recording:
    """A pass over prompts of one length."""

    #: Prompt -> its number in what follows.
    number: Mapping[int, int]
    tower: Tower
    blocks: tuple[nn.Module, ...]
    #: What enters each block, and after the last what leaves it: `[prompt, token, width]`.
    entering: tuple[Tensor, ...]
    #: How each block was called, by the names of its arguments, without the first.
    calls: tuple[Mapping[str, Any], ...]
    #: Keys and values, by attention module.
    attended: Mapping[nn.Module, tuple[Tensor, Tensor]]
    #: What the model without its head returns; its type carries hidden states into the head.
    returned: Any

    def arguments(self, layer: int, positions: Tensor) -> dict[str, Any]:
        """The arguments of a block for packed tokens that stand at these positions."""
        return {name: _at(name, value, positions) for name, value in self.calls[layer].items()}


def record(work: Work, prompts: Sequence[int]) -> Recording:
    """Run the corrupted prompts once.

    Raises:
        NotImplementedError: this model does something that packed rows cannot repeat.
    """
    root = peel(work.model)
    towers = Atlas.of(root).towers
    if set(towers) != {"decoder"} or not engine.is_causal(work.model):
        raise NotImplementedError("it is no causal decoder")
    tower = towers["decoder"]
    if any(block.occurrence for block in tower.blocks) or tower.unembed is None:
        raise NotImplementedError("its layers share modules, or it has no unembedding")
    blocks = tuple(root.get_submodule(block.module) for block in tower.blocks)
    if not tower.prefix:
        raise NotImplementedError("its head is no part of its own")
    backbone = root.get_submodule(tower.prefix)
    entering: list[Tensor] = []
    calls: list[Mapping[str, Any]] = []
    ends: list[Any] = []
    hooks = [block.register_forward_pre_hook(_keeper(entering, calls), with_kwargs=True) for block in blocks]
    hooks.append(blocks[-1].register_forward_hook(lambda _m, _a, out: entering.append(first(out))))
    hooks.append(backbone.register_forward_hook(lambda _m, _a, out: ends.append(out)))
    if work.plan.corruption is not None:
        hooks.insert(0, _corruption(work, blocks[0], prompts))
    kept = KeysAndValues()
    inputs = work.plan.corrupted.inputs(prompts, work.model.device)
    assert isinstance(inputs, dict)
    try:
        with torch.no_grad(), attention(root, kept):
            root(**inputs, use_cache=False)
    except NotImplementedError:
        raise
    except Exception as error:
        # A model with attention code of its own may fail in any way when it is told another name for it.
        raise NotImplementedError(f"it does not run with its attention exchanged ({error})") from None
    finally:
        for hook in hooks:
            hook.remove()
    if len(entering) != len(blocks) + 1 or len(kept.of) != len(blocks) or len(ends) != 1:
        raise NotImplementedError("its attention does not go through transformers' registry, or a layer has none")
    recording = Recording(
        number={prompt: number for number, prompt in enumerate(prompts)},
        tower=tower,
        blocks=blocks,
        entering=tuple(entering),
        calls=tuple(calls),
        attended=kept.of,
        returned=ends[0],
    )
    _check_end(root, recording)
    return recording


def _keeper(entering: list[Tensor], calls: list[Mapping[str, Any]]) -> Any:
    def keep(block: nn.Module, args: tuple, kwargs: dict) -> None:
        names = list(inspect.signature(type(block).forward).parameters)[1:]
        given = dict(zip(names, args, strict=False)) | kwargs
        states = given.pop(names[0])
        entering.append(states)
        calls.append({name: _checked(name, value, states.shape[1]) for name, value in given.items()})

    return keep


def _checked(name: str, value: Any, length: int) -> Any:
    """An argument that can be given for single tokens: by its name, never by a size that may fit by chance."""
    if name in _DROPPED or value is None:
        return None
    if "position" in name:
        parts = value if isinstance(value, tuple) else (value,)
        if all(isinstance(p, Tensor) and length in (p.shape[0] if p.dim() == 1 else p.shape[1],) for p in parts):
            return value
    elif not isinstance(value, Tensor | tuple | list | dict):
        return value
    raise NotImplementedError(f"its blocks are given {name}, which is not known to belong to single tokens")


def _at(name: str, value: Any, positions: Tensor) -> Any:
    if "position" not in name or value is None:
        return value
    if isinstance(value, tuple):
        return tuple(_at(name, part, positions) for part in value)
    return value[positions] if value.dim() == 1 else value[:1, positions]


def _corruption(work: Work, block: nn.Module, prompts: Sequence[int]) -> Any:
    corruption = work.plan.corruption
    assert corruption is not None

    def corrupt(_block: nn.Module, args: tuple, kwargs: dict) -> Any:
        states = (args[0] if args else next(iter(kwargs.values()))).clone()
        for row, prompt in enumerate(prompts):
            tokens, value = list(corruption.positions[prompt]), corruption.values[prompt].to(states)
            states[row, tokens] = value if corruption.overwrites else states[row, tokens] + value
        return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): states})

    return block.register_forward_pre_hook(corrupt, with_kwargs=True)


def _check_end(root: nn.Module, recording: Recording) -> None:
    """That nothing but the final norm stands between the last block and the head."""
    normed = final(root, recording.tower, recording.entering[-1])
    last = recording.returned.last_hidden_state
    if normed.shape != last.shape or not torch.allclose(normed, last, rtol=1e-3, atol=1e-3):
        raise NotImplementedError("more than a norm stands between its last layer and its head")


def final(root: nn.Module, tower: Tower, states: Tensor) -> Tensor:
    """The final norm, where the model has one."""
    return states if tower.final_norm is None else root.get_submodule(tower.final_norm)(states)


def logits_of(root: nn.Module, recording: Recording, states: Tensor) -> Tensor:
    """The logits of final states `[row, width]`: the model's own head, with whatever it does after the unembedding."""
    backbone: Any = root.get_submodule(recording.tower.prefix)
    returned = type(recording.returned)(last_hidden_state=final(root, recording.tower, states)[:, None])
    # The head is code of the model's forward, so that runs, with the rest of the model standing still.
    before = backbone.__dict__.get("forward")
    backbone.forward = lambda *_, **__: returned
    try:
        ids = torch.zeros(states.shape[0], 1, dtype=torch.long, device=states.device)
        return root(input_ids=ids, use_cache=False).logits[:, -1]
    finally:
        if before is None:
            del backbone.forward
        else:
            backbone.forward = before


def first(value: Any) -> Tensor:
    """A block's stream, whether or not it stands in a tuple."""
    return value[0] if isinstance(value, tuple) else value
