"""Against `devinterp`, which has functions of the same contract, on the families where its own masks are right.

It is no dependency of the tests: `pip install --group oracles` brings it, and without it this file is skipped.
"""

from __future__ import annotations

import contextlib
import io
import warnings

import pytest
import torch

from nnsplice import weights as w
from weights import long_table

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    devinterp = pytest.importorskip("devinterp.slt.weight_restrictions", exc_type=ImportError)

#: Layouts and key/value heads that gradients show it to have wrong, or that it does not know.
OTHERWISE: dict[str, str] = {}


def theirs(model, restriction):
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return devinterp.create_param_masks(model, restriction)


@pytest.mark.parametrize("name", long_table.ROWS)
def test_masks_of_heads_and_layers_are_the_same(name):
    model = long_table.build(name)
    for restriction in ("l2h1", "l2g0", ["l2h0", "l2h3"], "l1 mlp", "l1 attn", "l1", "full"):
        mine, other = w.create_param_masks(model, restriction), theirs(model, restriction)
        assert mine.keys() == other.keys(), restriction
        for key, mask in mine.items():
            a = torch.ones(()) if mask is None else mask
            b = torch.ones(()) if other[key] is None else other[key]
            shape = model.get_parameter(key).shape
            assert torch.equal(a.expand(shape).bool(), b.expand(shape).bool()), (restriction, key)
