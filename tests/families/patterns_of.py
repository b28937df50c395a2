"""Is writing a pattern what it means: that the head mixes its values so?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import nnsplice as ns
from families.subject import Subject, gap, hooks, number
from families.values_of import Served

_SOFTMAX = {torch.softmax, torch.nn.functional.softmax, torch.Tensor.softmax}


class _Softmax(TorchFunctionMode):
    """Exchange the probabilities of one head where one module computes its softmax."""

    def __init__(self, head: int, heads: int, pattern: Tensor) -> None:
        super().__init__()
        self.head, self.heads, self.pattern, self.inside, self.done = head, heads, pattern, False, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        size = self.pattern.shape[-1]
        if self.inside and func in _SOFTMAX and out.shape[-3:] == (self.heads, size, size):
            self.done += 1
            out = out.clone()
            out[..., self.head, :, :] = self.pattern.to(out)
        return out


def judge_patterns(subject: Subject, served: dict[str, Served]) -> None:
    """Another pattern, written through nnsplice and put in the place of the softmax."""
    of = served["layers[:].heads[:].pattern"]
    if not of.values:
        return
    for block in subject.blocks:
        mine = [path for path in of.values if number(path, 0) == block.index]
        if not mine or block.pattern is None:
            continue
        path = mine[-1]
        with subject.check("pattern write", f"layer {block.index}"):
            generator = torch.Generator().manual_seed(3)
            new = torch.rand(of.values[path].shape, generator=generator, dtype=torch.float64).to(of.values[path])
            new = new * (of.values[path] != 0)
            new = new / new.sum(-1, keepdim=True).clamp_min(1e-30)
            saved = ns.SavedActivation.from_pairs(*((f"{path}[{t}]", new[None, t]) for t in range(new.shape[0])))
            found = ns.patched_logits(subject.model, subject.ids, saved)
            mode = _Softmax(number(path, 1), block.n_heads, new)
            home = subject.bare.get_submodule(block.pattern[0])
            enter = home.register_forward_pre_hook(lambda *_, mode=mode: setattr(mode, "inside", True))
            leave = home.register_forward_hook(lambda *_, mode=mode: setattr(mode, "inside", False))
            with hooks(enter, leave), mode:
                truth = subject.logits(subject.ids)
            if mode.done == 1:
                subject.found("pattern write", gap(found, truth), f"layer {block.index}")
