"""Scores of edges equal the gradients of a model that is written out as a sum: every reader has a stream of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import nnsplice as ns
from attribution.oracle import bare, ids
from zoo import FAMILIES, MASKED, SEQ2SEQ, double, wrap

CLEAN, CORRUPTED = "w3 w4 w5 w6 w7", "w3 w9 w5 w16 w7"
METRIC = ns.logit_diff("w7", "w8")
SENDERS = ["embed", "layers[:].heads[:]", "layers[:].mlp"]


class Sum:
    """GPT-2 or Llama as a sum of what its parts add; `extra` is added to the stream as one reader sees it."""

    def __init__(self, family: str) -> None:
        self.family, self.model = family, bare(family)
        self.heads, self.groups, self.width = (4, 4, 4) if family == "gpt2" else (4, 2, 6)

    def run(self, tokens: Tensor, extra: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The metric, and what each part added: `[token, width]`."""
        gpt2 = self.family == "gpt2"
        inner = self.model.transformer if gpt2 else self.model.model
        length = tokens.shape[1]
        at = torch.arange(length)[None]
        embedded = inner.wte(tokens) + inner.wpe(at) if gpt2 else inner.embed_tokens(tokens)
        added = {"embed.output": embedded[0]}
        rest = torch.zeros_like(embedded[0])
        turns = None if gpt2 else inner.rotary_emb(embedded, at)
        hidden = torch.full((length, length), float("-inf")).triu(1).double()

        def stream(reader: str) -> Tensor:
            return (sum(added.values()) + rest + extra.get(reader, 0.0))[None]

        for layer, block in enumerate(inner.h if gpt2 else inner.layers):
            name = f"layers[{layer}]"

            def projected(
                reader: str, role: str, index: int, layer: int = layer, block: Any = block, name: str = name
            ) -> Tensor:
                start = index * self.width
                if gpt2:
                    start += {"q": 0, "k": 16, "v": 32}[role]
                    out = block.attn.c_attn(block.ln_1(stream(f"{name}.{reader}")))
                else:
                    project = getattr(block.self_attn, f"{role}_proj")
                    out = project(block.input_layernorm(stream(f"{name}.{reader}")))
                return out[0, :, start : start + self.width]

            new: dict[str, Tensor] = {}
            for head in range(self.heads):
                group = head * self.groups // self.heads
                q = projected(f"heads[{head}].q", "q", head)
                k, v = (projected(f"groups[{group}].{role}", role, group) for role in ("k", "v"))
                if turns is not None:
                    q, k = (x[0, 0] for x in apply_rotary_pos_emb(q[None, None], k[None, None], *turns))
                z = (q @ k.T / self.width**0.5 + hidden).softmax(-1) @ v
                start, stop = head * self.width, (head + 1) * self.width
                weight = block.attn.c_proj.weight[start:stop] if gpt2 else block.self_attn.o_proj.weight.T[start:stop]
                new[f"{name}.heads[{head}].output"] = z @ weight
            added |= new
            if gpt2:
                rest = rest + block.attn.c_proj.bias
            norm = block.ln_2 if gpt2 else block.post_attention_layernorm
            added[f"{name}.mlp.output"] = block.mlp(norm(stream(f"{name}.mlp.output")))[0]
        norm = inner.ln_f if gpt2 else inner.norm
        logits = self.model.lm_head(norm(stream("unembed.output")))[0, -1]
        return logits[7] - logits[8], added

    def readers(self) -> list[str]:
        """Everything that reads the stream."""
        found = []
        for layer in range(3):
            found += [f"layers[{layer}].heads[{n}].q" for n in range(self.heads)]
            found += [f"layers[{layer}].groups[{n}].{role}" for role in ("k", "v") for n in range(self.groups)]
            found += [f"layers[{layer}].mlp.output"]
        return [*found, "unembed.output"]

    def scores(self) -> dict[tuple[str, str], Tensor]:
        """Sender, receiver -> score per token."""
        streams = {reader: torch.zeros(5, 16, dtype=torch.float64, requires_grad=True) for reader in self.readers()}
        metric, here = self.run(ids(CORRUPTED), streams)
        gradients = torch.autograd.grad(metric, list(streams.values()))
        _, there = self.run(ids(CLEAN), {})
        return {
            (sender, reader): ((there[sender] - here[sender]) * gradient).sum(-1).detach()
            for sender in here
            for reader, gradient in zip(streams, gradients, strict=True)
            if self._before(sender, reader)
        }

    @staticmethod
    def _before(sender: str, reader: str) -> bool:
        if sender.startswith("embed") or reader.startswith("unembed"):
            return True
        layers = [int(text.split("[")[1].split("]")[0]) for text in (sender, reader)]
        return layers[0] < layers[1] or (layers[0] == layers[1] and "heads" in sender and "mlp" in reader)


def _eap(model: Any, senders: Any = SENDERS, method: str = "eap", **options: Any) -> Any:
    return ns.attribute(model, CLEAN, CORRUPTED, senders, METRIC, method=method, progress=False, **options)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_sum_is_the_model(family: str) -> None:
    with torch.no_grad():
        metric, _ = Sum(family).run(ids(CORRUPTED), {})
    assert abs(float(metric) - _eap(double(family)).corrupted[0]) < 1e-6  # Llama's norm and rotation are in float32


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_edge_is_the_gradient_of_the_written_out_sum(family: str) -> None:
    expected = Sum(family).scores()
    found = _eap(double(family)).edges().set_index(["sender", "receiver"])["score"]
    assert set(found.index) == set(expected)
    gap = max(abs(found[edge] - float(score.sum())) for edge, score in expected.items())
    assert gap < (1e-12 if family == "gpt2" else 1e-6)
    assert found.abs().max() > 1e-2 and len(found) > 180


def test_every_edge_at_every_token() -> None:
    expected = Sum("gpt2").scores()
    result = _eap(double("gpt2"), ["embed[:]", "layers[:].mlp[:]"])
    found = result.edges().set_index(["sender", "receiver"])["score"]
    for (sender, reader), score in expected.items():
        if "heads" in sender:
            continue
        for token in range(5):
            assert abs(found[f"{sender}[{token}]", reader] - float(score[token])) < 1e-12
    assert [str(dim) for dim in result.grid("embed").dims] == ["prompt", "position"]


def test_every_edge_is_a_small_step_along_it() -> None:
    """Finite differences: a little of the sender's change, added to the stream as one receiver reads it."""
    written = Sum("gpt2")
    found = _eap(double("gpt2")).edges().set_index(["sender", "receiver"])["score"]
    with torch.no_grad():
        _, here = written.run(ids(CORRUPTED), {})
        _, there = written.run(ids(CLEAN), {})
        for sender, receiver in list(found.index)[::7]:
            step = (there[sender] - here[sender]) * 1e-5
            ahead, behind = (float(written.run(ids(CORRUPTED), {receiver: step * sign})[0]) for sign in (1, -1))
            assert abs((ahead - behind) / 2e-5 - found[sender, receiver]) < 1e-6


def test_a_straight_line_has_exact_edges() -> None:
    from attribution.test_nodes import linear

    model = linear()
    receivers = ["layers[:].groups[:].v", "layers[:].mlp", "unembed"]
    result = _eap(model, receivers=receivers)
    frame = result.edges()
    for receiver in ("layers[1].groups[2].v", "layers[2].mlp.output", "unembed.output"):
        exact = ns.path_patch(model, CLEAN, CORRUPTED, SENDERS, receiver, METRIC, progress=False)
        found = frame[frame["receiver"] == receiver].set_index("sender")["score"]
        moved = dict(
            zip(
                (c.path.removesuffix("[:]") for c in exact.cells),
                exact.table.values[0] - exact.corrupted[0],
                strict=True,
            )
        )
        assert len(found) > 4 and max(abs(found[sender] - moved[sender]) for sender in found.index) < 1e-11


ADDITIVE = [f for f in FAMILIES if f not in (*SEQ2SEQ, *MASKED, "gemma2", "gemma3", "olmo2")]


@pytest.mark.parametrize("family", ADDITIVE)
def test_the_edges_of_a_place_add_up_to_its_own_score(family: str) -> None:
    """To the last digit on every family: each branch reads the stream through one of the receivers."""
    model = double(family)
    sites = ["embed", "layers[:].attn", "layers[:].mlp", "layers[:].heads[:]"]
    if "mixtral" not in family and "moe" not in family:
        sites.append("layers[1].neurons[0,3]")
    result = _eap(model, sites)
    alone = ns.attribute(model, CLEAN, CORRUPTED, [f"{site}.output[:]" for site in sites], METRIC, progress=False)
    by_place: dict[str, float] = {}
    for cell, value in zip(alone.cells, alone.table.values[0] - alone.corrupted[0], strict=True):
        place = cell.path.rpartition("[")[0] + "[:]"
        by_place[place] = by_place.get(place, 0.0) + value
    found = dict(zip((c.path for c in result.cells), result.table.values[0] - result.corrupted[0], strict=True))
    assert set(found) == set(by_place)
    # Some families' norms compute in single precision.
    assert max(abs(found[place] - by_place[place]) for place in found) < 1e-6
    assert max(map(abs, found.values())) > 1e-3


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_behind_a_norm_what_a_head_sends_is_its_true_change(family: str) -> None:
    """A head goes through the branch's norm, which is no straight line, so its change is computed and not estimated."""
    model = double(family)
    result = _eap(model, "layers[0].heads[2]", receivers="layers[0].mlp")
    patched = ns.sweep(model, CLEAN, CORRUPTED, "layers[0].heads[2]", METRIC, progress=False)
    assert patched.is_complete and len(result.edges()) == 1 and abs(result.edges()["score"][0]) > 1e-6
    exact = ns.path_patch(model, CLEAN, CORRUPTED, "layers[0].heads[2]", "layers[0].mlp", METRIC, progress=False)
    moved = exact.table.values[0, 0] - exact.corrupted[0]
    assert np.sign(moved) == np.sign(result.edges()["score"][0])


def test_a_branch_that_is_scaled_in_code_sends_what_is_added() -> None:
    model = double("granite")
    root: Any = model._module
    assert root.config.residual_multiplier == 0.5
    slices: dict[str, Tensor] = {}
    held: list[Tensor] = []
    layer = root.model.layers[2]

    def run(text: str) -> Tensor:
        hooks = [
            layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: slices.update({text: args[0]})),
            root.model.norm.register_forward_pre_hook(lambda _, args: held.append(args[0])),
        ]
        logits = root(torch.tensor(model.tokenizer([text])["input_ids"])).logits[0, -1]
        for hook in hooks:
            hook.remove()
        return logits

    run(CLEAN)
    logits = run(CORRUPTED)
    wanted, wrong = (model.tokenizer(word)["input_ids"][0] for word in ("w7", "w8"))
    (gradient,) = torch.autograd.grad(logits[wanted] - logits[wrong], held[-1])
    moved = slices[CLEAN] - slices[CORRUPTED]
    width = layer.self_attn.head_dim
    expected = [
        0.5 * (moved[..., h * width : (h + 1) * width] @ layer.self_attn.o_proj.weight.T[h * width : (h + 1) * width])
        for h in range(4)
    ]
    expected = [float((sent * gradient).sum().detach()) for sent in expected]
    found = _eap(model, "layers[2].heads[:]", receivers="unembed")
    assert found.table.values[0] - found.corrupted[0] == pytest.approx(expected, rel=1e-6)


def test_eap_ig_of_the_embeddings_adds_up_to_the_whole_difference() -> None:
    result = _eap(double("gpt2"), "embed", "eap-ig", steps=32)
    assert abs(result.edges()["score"].sum() - result.total_effect[0]) < 1e-4 * abs(result.total_effect[0])
    plain = _eap(double("gpt2"), "embed")
    assert abs(plain.edges()["score"].sum() - plain.total_effect[0]) > 1e-2 * abs(plain.total_effect[0])


def test_eap_ig_is_the_mean_of_gradients_on_the_way() -> None:
    """The same edges as from the written-out sum, run at the same points."""
    written = Sum("gpt2")
    _, here = written.run(ids(CORRUPTED), {})
    _, there = written.run(ids(CLEAN), {})
    way = there["embed.output"] - here["embed.output"]
    at, weights = np.polynomial.legendre.leggauss(3)
    mean = 0.0
    for x, weight in zip(at, weights, strict=True):
        streams = {reader: torch.zeros(5, 16, dtype=torch.float64, requires_grad=True) for reader in written.readers()}
        # The point on the way, as a part of the stream that every reader sees.
        wte = written.model.transformer.wte
        hook = wte.register_forward_hook(lambda _m, _a, out, x=x: out + way.detach() * (x + 1) / 2)
        metric, _ = written.run(ids(CORRUPTED), streams)
        hook.remove()
        (gradient,) = torch.autograd.grad(metric, [streams["layers[2].heads[1].q"]])
        mean = mean + gradient * weight / 2
    found = _eap(double("gpt2"), method="eap-ig", steps=3).edges().set_index(["sender", "receiver"])["score"]
    for sender in ("layers[0].heads[2].output", "layers[1].mlp.output"):
        expected = ((there[sender] - here[sender]) * mean).sum().item()
        assert abs(found[sender, "layers[2].heads[1].q"] - expected) < 1e-12 and abs(expected) > 1e-6


def test_receivers_at_chosen_tokens() -> None:
    expected = Sum("gpt2").scores()
    result = _eap(double("gpt2"), "layers[0].mlp", receivers=["layers[2].heads[1].k[1:4]", "layers[2].heads[1].k"])
    found = result.edges().set_index("receiver")["score"]
    score = expected["layers[0].mlp.output", "layers[2].groups[1].k"]
    assert abs(found["layers[2].heads[1].k"] - float(score.sum())) < 1e-12
    assert abs(found["layers[2].heads[1].k[1:4]"] - float(score[1:4].sum())) < 1e-12


def test_edges_are_a_tidy_frame_of_the_mean_or_of_one_prompt() -> None:
    model = wrap("llama")
    clean, corrupted = [CLEAN, "w13 w14 w15"], [CORRUPTED, "w13 w24 w15"]
    result: Any = ns.attribute(model, clean, corrupted, SENDERS, METRIC, method="eap", progress=False)
    frame = result.edges()
    assert list(frame.columns) == ["sender", "receiver", "score"]
    assert frame["score"].abs().is_monotonic_decreasing and not frame.duplicated(["sender", "receiver"]).any()
    each = [result.edges(prompt).set_index(["sender", "receiver"])["score"] for prompt in (0, 1)]
    mean = (each[0] + each[1]) / 2
    assert np.abs(frame.set_index(["sender", "receiver"])["score"] - mean).max() < 1e-7
    with pytest.raises(ns.errors.BadArgument, match="prompt=2"):
        result.edges(2)
    with pytest.raises(ns.errors.BadArgument, match="no edges between them"):
        ns.attribute(model, clean, corrupted, SENDERS, METRIC, progress=False).edges()
