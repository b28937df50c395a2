"""The laws of lenses on one family: what plain hooks on the bare module say, and what `ns.lens` says."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import nnsplice as ns
from families.subject import Subject, after, first_tensor, hooks, own, told
from nnsplice.errors import NnspliceError

TOKENS = 9


@dataclass(frozen=True)
class Said:
    """What one law gave: how far off it was, or why it was refused."""

    gap: float | None
    refused: str = ""


def logit_law(subject: Subject) -> Said:
    """The lens at two layers, at every token, beside runs in which the last layer puts out those states."""
    ids = subject.ids[:, :TOKENS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            last = subject.blocks[-1].index
            layers = sorted({last, last // 2})
            lens = ns.lens.logit(subject.model, ids, [f"layers[{n}].output" for n in layers], answers=7, k=3)
        except NnspliceError as error:
            return Said(None, told(error))
    worst = 0.0
    for layer in layers:
        logits = _read_at(subject, ids, layer)
        expected = logits.double().log_softmax(-1)[..., 7]
        found = torch.tensor(lens.only("log_probability").grid().sel(layer=layer).values[0])
        worst = max(worst, float((found - expected).abs().max()))
        tokens = lens.tokens()
        top = torch.tensor(tokens[(tokens["layer"] == layer) & (tokens["rank"] == 0)]["id"].tolist())
        assert torch.equal(top, logits.argmax(-1))
    return Said(worst)


def _read_at(subject: Subject, ids: Tensor, layer: int) -> Tensor:
    """`[token, vocab]` of the bare module whose last layer puts out what an earlier one did."""
    kept: list[Tensor] = []
    blocks = [subject.bare.get_submodule(block.end or block.module) for block in subject.blocks]

    def keep(_: Any, __: Any, out: Any) -> None:
        kept.append(first_tensor(out).clone())

    with torch.no_grad(), hooks(blocks[layer].register_forward_hook(keep), after(blocks[-1], lambda _: kept[0])):
        return own(subject.bare(ids).logits, ids.shape[1])[0]


def direct_law(subject: Subject) -> Said:
    """All parts of a difference of logits, beside plain hooks: heads through the bare projection, and their sum."""
    ids = subject.ids[:, :TOKENS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            asked = (["layers[:].heads[:]", "layers[:].mlp"], ["embed", "layers[:].attn", "layers[:].mlp"])
            both = [ns.lens.direct(subject.model, ids, ns.logit_diff(7, 8), sites) for sites in asked]
        except NnspliceError as error:
            return Said(None, told(error))
    logits = subject.logits(ids)[0, -1].double()
    cap = getattr(subject.bare.config.get_text_config(), "final_logit_softcapping", None)
    logits = logits if cap is None else torch.atanh(logits / cap) * cap
    expected = float(logits[7] - logits[8])
    size = float(logits.abs().max())
    found = [float(one.table.values.sum() + one.rest.sum()) for one in both]
    return Said(max(abs(value - expected) for value in found) / size)
