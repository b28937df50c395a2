"""Inside the traces of a user: order, memory, gradients, invokes, edits, sessions."""

from __future__ import annotations

import pytest
import torch

import nnsplice as ns
from nnsplice.closures import gate
from nnsplice.errors import MissingPosition, OutsideTrace
from zoo import wrap

PROMPT = "w3 w4 w5 w6"


@pytest.fixture(scope="module")
def gpt2():
    return wrap("gpt2")


@pytest.fixture(scope="module")
def llama():
    return wrap("llama")


# --- one access per value, in the model's order ----------------------------------------------------------------------


def test_paths_come_back_in_execution_order_however_they_are_listed(gpt2) -> None:
    asked = ["unembed.output[-1]", "layers[2].mlp.output[0]", "layers[0].attn.output[1]", "layers[0].output[-1]"]
    keys = ns.capture(gpt2, PROMPT, asked).keys()
    assert keys == [
        "layers[0].attn.output[1]", "layers[0].output[-1]", "layers[2].mlp.output[0]", "unembed.output[-1]",
    ]  # fmt: skip


def test_a_run_is_asked_once_for_each_value(gpt2, monkeypatch: pytest.MonkeyPatch) -> None:
    from nnsplice.engine import TracedEnd

    reads: list[str] = []
    read = TracedEnd.read
    monkeypatch.setattr(TracedEnd, "read", lambda self, mediator: (reads.append(self.key), read(self, mediator))[1])
    saved = ns.capture(gpt2, PROMPT, ["layers[1].heads[:].output[:]", "layers[1].output[0,2]", "layers[1].output[-1]"])
    assert len(saved) == 4 * 4 + 3
    assert reads == ["model.transformer.h.1.attn.c_proj.input", "model.transformer.h.1.output"]


def test_the_same_place_under_two_names_comes_once(gpt2) -> None:
    saved = ns.capture(gpt2, PROMPT, ["layers[-1].output[-1]", "model.transformer.h[2].output[-1]", "l2.output[-1]"])
    assert saved.keys() == ["layers[2].output[-1]"]
    assert torch.equal(saved["model.transformer.h[-1].output[-1]"], saved["L2[-1]"])


def test_native_paths_follow_the_model(llama) -> None:
    saved = ns.capture(
        llama,
        PROMPT,
        [
            "model.model.layers[:].self_attn.output[0][-1]",
            "model.model.layers[1].self_attn.o_proj.input[2]",
            "model.model.norm.output[:]",
            "model.output[0]",
        ],
    )
    with torch.no_grad(), llama.trace(PROMPT):
        attn = llama.model.layers[1].self_attn.output[0].save()
        norm = llama.model.norm.output.save()
        out = llama.output.logits.save()
    assert torch.equal(saved["model.model.layers[1].self_attn.output[0][-1]"], attn[:, -1])
    assert torch.equal(saved["model.model.norm.output[:]"], norm)
    assert torch.equal(saved["model.output[0]"], out[:, 0])


# --- captures own their memory, patches replace ----------------------------------------------------------------------


def test_patching_in_place_afterwards_does_not_change_a_capture(gpt2) -> None:
    clean = ns.capture(gpt2, PROMPT, "layers[:].output[:]")
    with torch.no_grad(), gpt2.trace(PROMPT):
        saved = ns.save_activations(gpt2, "layers[0].output[:]")
        gpt2.transformer.h[0].output[:] = 0
    assert saved.allclose(clean.subset("layers[0].output[:]"), atol=0)


def test_a_capture_is_detached_unless_the_graph_is_asked_for(gpt2) -> None:
    with gpt2.trace(PROMPT):
        plain = ns.save_activations(gpt2, "layers[0].output[-1]")
        kept = ns.save_activations(gpt2, "layers[1].output[-1]", keep_graph=True)
    assert not plain["layers[0].output[-1]"].requires_grad
    kept["layers[1].output[-1]"].sum().backward()
    assert gpt2._module.transformer.h[0].mlp.c_fc.weight.grad.abs().sum() > 0
    gpt2._module.zero_grad()


def test_gradients_flow_through_a_written_capture(gpt2) -> None:
    delta = torch.zeros(1, 16, requires_grad=True)
    with gpt2.trace(PROMPT):
        ns.SavedActivation.from_pairs(("layers[0].output[-1]", delta)).add_to(gpt2, 2.0)
        loss = gpt2.output.logits[0, -1, 5].save()
    loss.backward()
    step = 1e-3
    with torch.no_grad(), gpt2.trace(PROMPT):
        ns.SavedActivation.from_pairs(("layers[0].output[-1]", torch.eye(16)[:1] * step)).add_to(gpt2, 2.0)
        moved = gpt2.output.logits[0, -1, 5].save()
    assert delta.grad is not None
    assert torch.isclose((moved - loss.detach()) / step, delta.grad[0, 0], rtol=0.05)
    gpt2._module.zero_grad()


def test_a_patch_at_the_mlps_input_does_not_leak_into_the_skip_path(llama) -> None:
    zero = ns.SavedActivation.from_pairs(("model.model.layers[1].mlp.input[2]", torch.zeros(1, 16)))
    with torch.no_grad(), llama.trace(PROMPT):
        mid = ns.save_activations(llama, "layers[1].mid[2]")
        zero.apply(llama)
        saved = mid | ns.save_activations(llama, ["layers[1].mlp.output[2]", "layers[1].output[2]"])
    clean = ns.capture(llama, PROMPT, "layers[1].mid[2]")
    assert torch.equal(saved["layers[1].mid[2]"], clean["layers[1].mid[2]"])
    assert torch.allclose(
        saved["layers[1].output[2]"], saved["layers[1].mid[2]"] + saved["layers[1].mlp.output[2]"], atol=1e-6
    )


def test_values_are_cast_to_the_place_they_are_written_to(gpt2) -> None:
    saved = ns.capture(gpt2, PROMPT, "layers[0].output[-1]")
    double = saved.to(torch.float64)
    assert double["layers[0].output[-1]"].dtype == torch.float64
    assert torch.equal(ns.patched_logits(gpt2, PROMPT, double), ns.patched_logits(gpt2, PROMPT, saved))


# --- several invokes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "mixtral"])
def test_each_invoke_reads_and_writes_its_own_rows(family: str) -> None:
    model = wrap(family)
    model._module.double()
    source = ns.capture(model, "w9 w8 w7", ["layers[1].output[-1]", "layers[0].heads[2].output[0]"])
    paths = ["layers[2].output[-1]", "layers[2].mlp.output[0]", "layers[2].mid[1]"]
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke("w3 w4 w5"):
            source.apply(model)
            patched = ns.save_activations(model, paths)
        with tracer.invoke(["w6 w7 w8 w9 w10", "w11 w12"]):
            clean = ns.save_activations(model, paths)
    assert clean.rows == 2
    assert clean.allclose(ns.capture(model, ["w6 w7 w8 w9 w10", "w11 w12"], paths), atol=1e-10)
    with torch.no_grad(), model.trace("w3 w4 w5"):
        source.apply(model)
        alone = ns.save_activations(model, paths)
    assert patched.allclose(alone, atol=1e-10)
    assert not patched.allclose(ns.capture(model, "w3 w4 w5", paths), atol=1e-3)


def test_a_flat_value_is_written_for_one_invoke_alone() -> None:
    model = wrap("opt")
    model._module.double()
    zero = ns.SavedActivation.from_pairs(("model.model.decoder.layers[1].fc1.output[-1]", torch.zeros(1, 32)))
    with torch.no_grad():
        with model.trace() as tracer:
            with tracer.invoke("w3 w4 w5"):
                zero.apply(model)
                first = model.output.logits.save()
            with tracer.invoke("w6 w7 w8 w9"):
                second = model.output.logits.save()
        with model.trace("w6 w7 w8 w9"):
            untouched = model.output.logits.save()
    assert torch.allclose(second, untouched, atol=1e-12)
    assert torch.allclose(first[:, -1], ns.patched_logits(model, "w3 w4 w5", zero)[:, -1], atol=1e-12)


def test_outside_an_invoke_there_is_nothing_to_read(gpt2) -> None:
    with pytest.raises(OutsideTrace, match=r"tracer\.invoke"), gpt2.trace() as tracer:
        ns.save_activations(gpt2, "layers[0].output[-1]")
        with tracer.invoke(PROMPT):
            gpt2.output.save()


# --- edits, sessions, algebra inside ---------------------------------------------------------------------------------


def test_an_edit_writes_in_every_later_trace(gpt2) -> None:
    saved = ns.capture(gpt2, "w9 w8", "layers[1].output[-1]")
    with gpt2.edit() as (_, edited):
        saved.apply(edited)
    with torch.no_grad():
        for prompt in (PROMPT, "w20 w21"):
            with edited.trace(prompt):
                logits = edited.output.logits.save()
            assert torch.equal(logits, ns.patched_logits(gpt2, prompt, saved))


def test_an_edit_finds_its_tokens_in_every_run_anew(gpt2) -> None:
    saved = ns.capture(gpt2, "w9 w8", "layers[1].output[-1]")
    with gpt2.edit() as (_, edited):
        saved.add_to(edited, at=1)
    for prompts in ("w3 w4", "w20 w21 w22 w23 w24", ["w3 w4 w5", "w6 w7"], [PROMPT]):
        with edited.trace(prompts):
            logits = edited.output.logits[:, -1].save()
        assert torch.allclose(logits, ns.patched_logits(gpt2, prompts, saved, add=True, at=1)[:, -1], atol=1e-6)


def test_what_is_made_inside_a_trace_survives_it(gpt2) -> None:
    with torch.no_grad(), gpt2.trace(["w3 w4", "w5 w6"]):
        a = ns.save_activations(gpt2, "layers[0].output[-1]")
        b = ns.save_activations(gpt2, "layers[1].output[-1]")
        both = a | b
        part = both.subset("layers[1].output[-1]")
        mean = (both * 2.0 - both).mean()
        row = both.slice[1]
        same = both.save()
    expected = ns.capture(gpt2, ["w3 w4", "w5 w6"], ["layers[0].output[-1]", "layers[1].output[-1]"])
    assert both.allclose(expected)
    assert same is both
    assert part.keys() == ["layers[1].output[-1]"]
    assert mean.allclose(expected.mean(), atol=1e-6)
    assert row.allclose(expected.slice[1])


def test_a_session_hands_captures_from_trace_to_trace(gpt2) -> None:
    with torch.no_grad(), gpt2.session():
        with gpt2.trace(PROMPT):
            saved = ns.save_activations(gpt2, "layers[1].output[-1]")
        with gpt2.trace("w9 w8 w7"):
            saved.apply(gpt2)
            logits = gpt2.output.logits.save()
    assert torch.equal(logits, ns.patched_logits(gpt2, "w9 w8 w7", ns.capture(gpt2, PROMPT, "layers[1].output[-1]")))


# --- at another position than the keys' own ---------------------------------------------------------------------------


def test_mean_over_positions_is_replayed_at_a_position(gpt2) -> None:
    saved = ns.capture(gpt2, PROMPT, "layers[1].output[:]").mean("position")
    assert saved.keys() == ['layers[1].output["mean"]']
    with pytest.raises(MissingPosition, match=r"at="):
        ns.patched_logits(gpt2, PROMPT, saved)
    moved = ns.SavedActivation.from_pairs(("layers[1].output[2]", saved['layers[1].output["mean"]']))
    assert torch.equal(ns.patched_logits(gpt2, PROMPT, saved, at=2), ns.patched_logits(gpt2, PROMPT, moved))


def test_at_one_position_for_each_row(gpt2) -> None:
    saved = ns.capture(gpt2, "w9 w8", "layers[1].output[-1]")
    with torch.no_grad(), gpt2.trace(["w3 w4 w5", "w6 w7"]):
        saved.apply(gpt2, at=[2, 0])
        logits = gpt2.output.logits.save()
    for row, (prompt, at) in enumerate([("w3 w4 w5", 2), ("w6 w7", 0)]):
        expected = ns.patched_logits(gpt2, prompt, saved, at=at)[0]
        assert torch.allclose(logits[row, -len(expected) :], expected, atol=1e-5)


@pytest.mark.parametrize("run", ["capture", "apply", "updates"])
def test_what_sites_promise_is_looked_up_a_fixed_number_of_times_however_many_sites_there_are(
    gpt2, monkeypatch: pytest.MonkeyPatch, run: str
) -> None:
    looked: list[object] = []
    marks = gate.state_of
    monkeypatch.setattr(gate, "state_of", lambda model: (looked.append(model), marks(model))[1])

    def looks(sites: list[str]) -> int:
        saved = ns.capture(gpt2, PROMPT, sites)
        looked.clear()
        with torch.no_grad(), gpt2.trace(PROMPT):
            if run == "capture":
                ns.save_activations(gpt2, sites)
            elif run == "apply":
                saved.apply(gpt2)
            else:
                for _, current, update in ns.updates(gpt2, sites):
                    update(current * 2)
        return len(looked)

    one = looks(["layers[0].output[-1]"])
    assert one >= 1
    assert (
        looks([f"layers[{n}].{part}[{at}]" for n in range(3) for part in ("mlp.output", "output") for at in (0, 1)])
        == one
    )
