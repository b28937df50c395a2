"""Weights that are packed with scales: what cuts, scales or copies parts of them is refused by the parameter's name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import nnsplice as ns
from nnsplice.errors import BadArgument
from sweeps.test_placement import _quantise, _toy


def entered(block: Any) -> str:
    with block:
        return "entered"


ASKED: dict[str, Callable[[Any, Any], object]] = {
    "ablate": lambda packed, plain: entered(ns.weights.ablate(packed, "l1h2")),
    "ablate a whole mlp": lambda packed, plain: entered(ns.weights.ablate(packed, "l1 mlp")),
    "masks": lambda packed, plain: entered(ns.weights.ablate(packed, ns.weights.create_param_masks(packed, "l1h2"))),
    "swap": lambda packed, plain: entered(ns.weights.swap(packed, plain, "l1h2")),
    "swap in": lambda packed, plain: entered(ns.weights.swap(plain, packed, "l1h2")),
    "interpolate": lambda packed, plain: entered(ns.weights.interpolate(plain, packed, "l1h2", 0.5)),
    "diff": lambda packed, plain: ns.weights.diff(plain, packed, by="heads"),
    "diff of layers": lambda packed, plain: ns.weights.diff(packed, plain, by="layers"),
}


@pytest.mark.parametrize("asked", ASKED)
def test_quantised_weights_are_refused_by_name_and_stay_as_they_are(asked):
    packed, plain = _toy(), _toy()
    _quantise(packed)
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        before = packed(ids).logits, plain(ids).logits
    with pytest.raises(BadArgument, match=r"(?s)layers\.\d\.\S+\.weight is quantised \(Packed .*without quantization"):
        ASKED[asked](packed, plain)
    with torch.no_grad():
        assert torch.equal(packed(ids).logits, before[0]) and torch.equal(plain(ids).logits, before[1])


def test_whole_bytes_are_refused_too_and_plain_places_beside_them_are_not():
    packed, plain = _toy(), _toy()
    layer = packed.model.layers[1].mlp.down_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().mul(100).to(torch.int8), requires_grad=False)
    with pytest.raises(BadArgument, match=r"layers\.1\.mlp\.down_proj\.weight is quantised \(Tensor of int8\)"):
        entered(ns.weights.ablate(packed, "l1 mlp"))
    assert entered(ns.weights.ablate(packed, "l1h2")) == entered(ns.weights.swap(packed, plain, "l0 mlp")) == "entered"
