"""`ifr` is the share of proximities, written out in plain torch for GPT-2 and Llama."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nnsplice as ns
from attribution.oracle import bare, ids
from attribution.test_nodes import linear
from zoo import FAMILIES, MASKED, SEQ2SEQ, double

CLEAN, CORRUPTED = "w3 w4 w5 w6 w8", "w3 w9 w5 w16 w7"
METRIC = ns.logit_diff("w7", "w8")
SENDERS = ["embed", "layers[:].heads[:]", "layers[:].mlp"]


def scored(model: Any, sites: Any = SENDERS, **options: Any) -> ns.SweepResult:
    given = {"clean": CLEAN, "corrupted": CORRUPTED, **options}
    return ns.attribute(
        model, given.pop("clean"), given.pop("corrupted"), sites, METRIC, method="ifr", progress=False, **given
    )


def inputs_of(module: nn.Module, tokens: Tensor, names: list[str]) -> dict[str, Tensor]:
    """What each of these modules is called with: `[token, width]`."""
    found: dict[str, Tensor] = {}
    hooks = [
        module.get_submodule(name).register_forward_pre_hook(
            lambda _m, args, kwargs, n=name: found.__setitem__(n, (args or list(kwargs.values()))[0][0]),
            with_kwargs=True,
        )
        for name in names
    ]
    with torch.no_grad():
        module(tokens)
    for hook in hooks:
        hook.remove()
    return found


def by_hand(family: str, tokens: Tensor) -> dict[tuple[str, str], Tensor]:
    """`(sender, "attn" | "mlp" of a layer, or "unembed")` -> the share at each token."""
    module: Any = bare(family)
    gpt2 = family == "gpt2"
    blocks = [f"transformer.h.{n}" if gpt2 else f"model.layers.{n}" for n in range(3)]
    out = "attn.c_proj" if gpt2 else "self_attn.o_proj"
    norms = ("ln_1", "ln_2") if gpt2 else ("input_layernorm", "post_attention_layernorm")
    final = "transformer.ln_f" if gpt2 else "model.norm"
    names = [f"{block}.{part}" for block in blocks for part in (out, *norms)]
    seen = inputs_of(module, tokens, [*names, final])
    heads, size = (4, 4) if gpt2 else (4, 6)
    added: dict[str, Tensor] = {"embed": seen[f"{blocks[0]}.{norms[0]}"]}
    shares: dict[tuple[str, str], Tensor] = {}

    def read(receiver: str, stream: Tensor) -> None:
        near = {name: (stream.abs().sum(1) - (stream - x).abs().sum(1)).clamp(min=0) for name, x in added.items()}
        for name, one in near.items():
            shares[name, receiver] = one / sum(near.values())

    for n, block in enumerate(blocks):
        read(f"layers[{n}].attn", seen[f"{block}.{norms[0]}"])
        weight = module.get_submodule(f"{block}.{out}").weight.detach()
        weight = weight if gpt2 else weight.T
        for head in range(heads):
            columns = slice(head * size, (head + 1) * size)
            added[f"layers[{n}].heads[{head}]"] = seen[f"{block}.{out}"][:, columns] @ weight[columns]
        middle = seen[f"{block}.{norms[1]}"]
        read(f"layers[{n}].mlp", middle)
        after = seen[f"{blocks[n + 1]}.{norms[0]}" if n < 2 else final]
        added[f"layers[{n}].mlp"] = after - middle
    read("unembed", seen[final])
    return shares


def kind_of(receiver: str) -> str:
    name = receiver.removesuffix(".output")
    return name if name == "unembed" or name.endswith(".mlp") else f"{name.partition('].')[0]}].attn"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_edges_score_is_its_share_of_the_proximities_written_out(family: str) -> None:
    expected = by_hand(family, ids(CLEAN))
    frame: Any = scored(double(family)).edges()
    assert len(frame) == len(ns.Circuit.full(double(family)))
    for sender, receiver, score in zip(frame["sender"], frame["receiver"], frame["score"], strict=True):
        share = expected[sender.removesuffix(".output"), kind_of(receiver)]
        share = share[-1] if receiver.startswith("unembed") else share.mean()
        np.testing.assert_allclose(score, float(share), rtol=0, atol=1e-10, err_msg=f"{sender} -> {receiver}")
    assert frame["score"].max() > 0.1 and frame["score"].min() >= 0.0


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_cells_of_single_tokens_and_receivers_at_some_tokens(family: str) -> None:
    expected = by_hand(family, ids(CLEAN))
    result = scored(double(family), ["layers[0].heads[2][:]", "layers[0].mlp[1]"], receivers=["layers[1].mlp[1,4]"])
    frame: Any = result.edges().set_index("sender")["score"]
    share = expected["layers[0].heads[2]", "layers[1].mlp"]
    for token in range(5):
        wanted = float(share[token]) / 2 if token in (1, 4) else 0.0
        np.testing.assert_allclose(frame[f"layers[0].heads[2].output[{token}]"], wanted, rtol=0, atol=1e-10)
    other = float(expected["layers[0].mlp", "layers[1].mlp"][1]) / 2
    np.testing.assert_allclose(frame["layers[0].mlp.output[1]"], other, rtol=0, atol=1e-10)


def test_the_shares_of_all_senders_into_a_receiver_are_one_and_do_not_depend_on_who_is_asked_about() -> None:
    model = double("llama")
    edges: Any = scored(model).edges()
    np.testing.assert_allclose(edges.groupby("receiver")["score"].sum(), 1.0, atol=1e-12)
    one: Any = scored(model, "layers[1].heads[2]").edges()
    whole = edges.set_index(["sender", "receiver"])["score"]
    assert len(one) > 3
    for sender, receiver, score in one[["sender", "receiver", "score"]].itertuples(index=False):
        assert score == whole[sender, receiver]


def test_on_a_straight_line_it_is_its_own_closed_form_and_not_the_exact_effect() -> None:
    """Two senders of one sign: of x and y - x that are nowhere of opposite sign, |y| - |y - x| is |x|, so the share
    is |x| / |y|: what a part adds, whatever the metric makes of it."""
    model = linear()
    with torch.no_grad():
        module = model._module.transformer
        module.wte.weight.abs_()
        module.wpe.weight.abs_()
        for block in module.h:
            for part in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
                part.weight.abs_()
                part.bias.zero_()
            block.attn.c_attn.weight[:, :32] = 0.0
    found: Any = scored(model).edges().set_index(["sender", "receiver"])["score"]
    seen = inputs_of(model._module, ids(CLEAN), ["transformer.h.0", "transformer.ln_f"])
    size = seen["transformer.h.0"][-1].abs().sum() / seen["transformer.ln_f"][-1].abs().sum()
    name = next(receiver for _, receiver in found.index if receiver.startswith("unembed"))
    np.testing.assert_allclose(found["embed.output", name], float(size), atol=1e-10)
    exact = ns.attribute(model, CLEAN, CORRUPTED, "embed", METRIC, method="exact", receivers="unembed", progress=False)
    assert abs(float(exact.edges()["score"].iloc[0]) - float(size)) > 1e-2


def test_prompts_of_several_lengths_are_as_each_by_itself() -> None:
    model = double("gpt2")
    pairs = [(CLEAN, CORRUPTED), ("w8 w4 w5", "w3 w4 w9"), ("w9 w4 w5 w6 w61", "w3 w4 w5 w6 w8")]
    clean, corrupted = map(list, zip(*pairs, strict=True))
    together = scored(model, clean=clean, corrupted=corrupted).table.edges
    alone = [scored(model, clean=a, corrupted=b).table.edges for a, b in pairs]
    np.testing.assert_allclose(together, np.concatenate(alone), rtol=0, atol=1e-12)  # type: ignore[arg-type]


def test_with_pairs_aligned_at_the_end_the_clean_runs_own_tokens_count() -> None:
    model = double("gpt2")
    result = scored(model, "layers[0].mlp[-1]", clean="w9 " + CLEAN, receivers="unembed", align="end")
    expected = by_hand("gpt2", ids("w9 " + CLEAN))["layers[0].mlp", "unembed"][-1]
    np.testing.assert_allclose(result.edges()["score"].iloc[0], float(expected), rtol=0, atol=1e-10)


def test_it_says_that_shares_are_no_changes_of_the_metric() -> None:
    result = scored(double("gpt2"), verify=3)
    assert result.method == "ifr" and "shares of what receivers read" in result.run.note
    assert result.verification.k == 3


@pytest.mark.parametrize("site", ["layers[1].attn", "layers[1].output", "layers[0].neurons[2]"])
def test_places_that_are_no_senders_of_the_graph_are_refused(site: str) -> None:
    with pytest.raises(ns.errors.RefusedPlace, match="embed, heads and MLPs"):
        scored(double("gpt2"), site)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in (*SEQ2SEQ, *MASKED)])
def test_a_family_has_shares_that_add_up_or_is_refused_by_name(family: str) -> None:
    if family in ("gemma2", "gemma3", "olmo2"):
        with pytest.raises(ns.errors.RefusedPlace, match="ifr needs what each head adds"):
            scored(double(family))
        return
    edges: Any = scored(double(family)).edges()
    np.testing.assert_allclose(edges.groupby("receiver")["score"].sum(), 1.0, atol=1e-6)
