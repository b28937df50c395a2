"""Is the stack that nnsplice took for the decoder the one between the tokens and the logits, all of it?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import nnsplice as ns
from families.subject import LONG, Subject, after, before, first_tensor, gap, hooks

#: Where a change is put, of twelve tokens.
_AT = 5


def recognise(subject: Subject) -> bool:
    """Judge the decoder; whether there is one at all."""
    with subject.check("load"):
        _ = subject.model
    if "model" not in vars(subject):
        return False
    with subject.check("recognition"):
        _ = subject.tower
    if "tower" not in vars(subject):
        return False
    with subject.check("recognition"):
        _stack(subject)
    return True


def _stack(subject: Subject) -> None:
    blocks, bare = subject.blocks, subject.bare
    subject.claim("recognition", len(blocks) > 0, "no layers")
    calls: list[str] = []
    entered: list[Tensor] = []
    left: list[Tensor] = []
    made = []
    for name in {block.module for block in blocks}:
        module = bare.get_submodule(name)
        made.append(module.register_forward_pre_hook(_entering(name, calls, entered), with_kwargs=True))
    for name in {block.end or block.module for block in blocks}:
        made.append(after(bare.get_submodule(name), lambda out: left.append(out.clone())))
    with hooks(*made):
        base = subject.logits(subject.ids)
    expected = [block.module for block in sorted(blocks, key=lambda block: block.index)]
    if calls != expected:
        subject.claim(
            "recognition", False, f"layers run {len(calls)} times: {' '.join(calls[:8])}; {len(expected)} claimed"
        )
        return
    subject.claim("recognition", True)
    whole = left
    entered, left = ([_tokens_before_width(value) for value in values] for values in (entered, left))
    at = entered[0].shape[-2] - LONG + _AT
    shapes = [value.shape for value in whole]
    chain = max((gap(entered[i + 1], left[i]) for i in range(len(blocks) - 1)), default=0.0)
    subject.found("recognition: each layer reads what the one before made", chain)

    def first(value: Tensor, position: int) -> Tensor:
        """What enters the first layer where one token is another."""
        ids = subject.ids.clone()
        ids[0, position] = ids[0, position] % 50 + 7
        seen: list[Tensor] = []
        with hooks(before(bare.get_submodule(blocks[0].module), lambda x: seen.append(x.clone()))):
            subject.logits(ids)
        return _tokens_before_width(seen[0])

    # (The tokens are second to last: [.., token, width].)
    moved = (first(base, _AT) - entered[0]).abs().reshape(-1, *entered[0].shape[-2:]).amax((0, 2))
    elsewhere = torch.cat([moved[:at], moved[at + 1 :]]).max() / moved[at].clamp_min(1e-30)
    subject.claim("recognition: no token is mixed before the first layer", float(elsewhere) < 1e-6,
                  "the first layer's input at other tokens moves with a token, so layers run before it")  # fmt: skip

    shape = shapes[-1]

    def drowned(ids: Tensor) -> Tensor:
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        last = blocks[-1].end or blocks[-1].module
        with hooks(after(bare.get_submodule(last), lambda out: noise.to(out))):
            return subject.logits(ids)

    with subject.check("recognition: the logits come from the last layer"):
        ns.capture(subject.model, subject.ids, "layers[-1].output[-1]")  # (refused where they do not)
        found = gap(drowned(subject.other), drowned(subject.ids))
        subject.found("recognition: the logits come from the last layer", found)

    def bumped(out: Tensor) -> Tensor:
        out = out.clone()
        step = torch.randn(out.shape[-1], generator=torch.Generator().manual_seed(0)).to(out)
        _tokens_before_width(out)[..., at, :] += step
        return out

    with hooks(after(bare.get_submodule(blocks[-1].end or blocks[-1].module), bumped)):
        moved = (subject.logits(subject.ids) - base).abs()[0].amax(-1)
    others = torch.cat([moved[:_AT], moved[_AT + 1 :]]).max()
    subject.claim("recognition: no token is mixed after the last layer",
                  bool(moved[_AT] > 0) and float(others) <= subject.tolerance * float(base.abs().max()),
                  "logits at other tokens move with the last layer's output, so layers run after it")  # fmt: skip


def _tokens_before_width(value: Tensor) -> Tensor:
    """`[.., token, width]` of a stream of several vectors for each token, wherever it keeps its tokens."""
    if value.dim() > 3 and value.shape[-2] < LONG:
        return value.movedim(1, -2)
    return value


def _entering(name: str, calls: list[str], entered: list[Tensor]) -> Any:
    def hook(_: Any, args: tuple, kwargs: dict) -> None:
        calls.append(name)
        value = first_tensor(args) if args else first_tensor(next(iter(kwargs.values())))
        entered.append(value.clone())

    return hook
