"""Against `devinterp`, whose functions have the same contract, where gradients show its masks to be right.

It is no dependency of the tests: `pip install --group oracles` brings it, and without it this file is skipped.
"""

from __future__ import annotations

import warnings

import pytest

from nnsplice import weights as w
from weights import long_table
from weights.oracle import dense, same

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    devinterp = pytest.importorskip("devinterp.slt.weight_restrictions", exc_type=ImportError)

#: Where version 2.0.1 answers otherwise than the model's own gradients do (tests/weights/test_families.py), or fails.
HEADS = {
    "codegen": "its four parts",
    "falcon": "how q, k and v are fused",
    "falcon/mha": "how q, k and v are fused",
    "falcon/mqa": "how q, k and v are fused",
    "gpt_bigcode": "one key/value head",
    "gpt_bigcode/mha": "how q, k and v are fused",
    "gemma4_text": "layers with heads of another size",
    "whisper": "the number of heads",
}
#: ... and where it leaves parts of an MLP out, or counts others in.
MLP = {
    "afmoe",
    "ernie4_5_moe",
    "exaone_moe",
    "glm4_moe",
    "aria_text",
    "granitemoe",
    "granitemoeshared",
    "falcon/mha",
    "xlm",
}


def theirs(model, restriction):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return devinterp.create_param_masks(model, restriction)


def check(model, restriction, *, keys: bool = True) -> None:
    mine, other = w.create_param_masks(model, restriction), theirs(model, restriction)
    # Biases of keys are not in its table where they are parameters of their own; the rest has to agree.
    missing = mine.keys() - other.keys()
    assert not other.keys() - mine.keys() and (not missing or (keys and all(is_key_bias(name) for name in missing)))
    parameters = {name: model.get_parameter(name) for name in other}
    assert same(dense(mine, parameters), dense(other, parameters)), restriction


def is_key_bias(name: str) -> bool:
    return name.endswith((".k_proj.bias", ".key.bias", ".k_lin.bias", ".Wk.bias"))


@pytest.fixture(scope="module", params=long_table.ROWS)
def family(request):
    # It takes a head to be width / heads wide.
    square = {"head_dim": 4} if "head_dim" in long_table.ROWS[request.param] else {}
    return request.param, long_table.build(request.param, **square)


def test_heads_and_groups_are_the_same(family):
    name, model = family
    if name in HEADS:
        pytest.skip(f"differs in {HEADS[name]}")
    for restriction in ("l2h1", "l2g0", "L2 H3", ["l2h0", "l2h3"], ["l1g0", ["l2h1"]]):
        check(model, restriction)


def test_layers_and_parts_are_the_same(family):
    name, model = family
    check(model, "full", keys=False)
    if name == "xlm":
        pytest.skip("differs in what is in a layer")
    check(model, "l1", keys=False)
    check(model, ["l2", "l1"], keys=False)
    if name != "falcon/mha":
        check(model, "l1 attn", keys=False)
    is_bert = any("attention.output" in name for name in w.create_param_masks(model, "l1 attn"))
    if name not in MLP and not is_bert:
        check(model, "l1 mlp", keys=False)
