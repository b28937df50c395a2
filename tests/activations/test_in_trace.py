"""Inside the traces of a user: invokes, edits, sessions, gradients, plain modules, and calls at the wrong place."""

from __future__ import annotations

import gc
from typing import Any

import nnsight
import pytest
import torch
from torch import nn

import nnsplice as ns
from nnsplice.errors import (
    BadArgument,
    BadType,
    DuplicatePath,
    LateUpdate,
    MissingPosition,
    NeedsProbe,
    NeverFired,
    NnspliceError,
    OutsideTrace,
    OverlappingWrite,
    PathError,
    ShapeError,
    UnknownPath,
)
from zoo import build, wrap

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
    from nnsplice.engine import Place

    reads: list[str] = []
    read = Place.read
    monkeypatch.setattr(Place, "read", lambda self, mediator: (reads.append(self.key), read(self, mediator))[1])
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


# --- updates ---------------------------------------------------------------------------------------------------------


def test_updates_go_in_execution_order_and_write_at_once(gpt2) -> None:
    steer = ns.capture(gpt2, "w9 w8", ["layers[2].output[-1]", "layers[0].output[-1]", "layers[0].output[0]"])
    seen: list[str] = []
    with torch.no_grad(), gpt2.trace(PROMPT):
        for key, current, update in ns.updates(gpt2, reversed(steer.keys())):
            seen.append(key)
            update(current + 3.0 * steer.get(key))
        logits = gpt2.output.logits.save()
    with torch.no_grad(), gpt2.trace(PROMPT):
        steer.add_to(gpt2, 3.0)
        expected = gpt2.output.logits.save()
    assert seen == steer.keys()
    assert torch.allclose(logits, expected, atol=1e-5)


def test_an_update_is_kept_when_the_loop_is_left(gpt2) -> None:
    with torch.no_grad(), gpt2.trace(PROMPT):
        for _, current, update in ns.updates(gpt2, ["layers[0].output[-1]", "layers[1].output[-1]"]):
            update(current * 0)
            break
        logits = gpt2.output.logits.save()
    zero = ns.SavedActivation.from_pairs(("layers[0].output[-1]", torch.zeros(1, 16)))
    assert torch.equal(logits, ns.patched_logits(gpt2, PROMPT, zero))


def test_the_current_value_of_updates_is_a_copy(gpt2) -> None:
    with torch.no_grad(), gpt2.trace(PROMPT):
        for _, current, _ in ns.updates(gpt2, "layers[0].output[-1]"):
            current.zero_()
        logits = gpt2.output.logits.save()
    with torch.no_grad(), gpt2.trace(PROMPT):
        plain = gpt2.output.logits.save()
    assert torch.equal(logits, plain)


def test_a_late_update_is_never_a_silent_no_op(gpt2) -> None:
    with pytest.raises(LateUpdate, match=r"already gone past[\s\S]*layers\[0\]\.output\[-1\]"), gpt2.trace(PROMPT):
        for _, current, update in list(ns.updates(gpt2, ["layers[0].output[-1]", "layers[1].output[-1]"])):
            update(current * 0)


def test_updates_take_single_places_each_once(gpt2) -> None:
    for paths, kind, message in (
        ("layers[:].output[-1]", PathError, "single places"),
        ("layers[0].output[:]", PathError, "single places"),
        (["layers[0].output[-1]", "layers[-3].output[-1]"], DuplicatePath, "same place twice"),
        ([], BadArgument, "nothing to update"),
        ("layers[0].output", MissingPosition, "which tokens"),
    ):
        with pytest.raises(kind, match=message), gpt2.trace(PROMPT):
            ns.updates(gpt2, paths)


# --- calls at the wrong place or of the wrong things -----------------------------------------------------------------


def test_out_of_order_calls_are_told_before_a_pass_is_wasted(gpt2) -> None:
    with pytest.raises(LateUpdate, match=r"layers\[0\]\.output has already run"), gpt2.trace(PROMPT):
        gpt2.transformer.h[1].output.save()
        ns.save_activations(gpt2, "layers[0].output[-1]")
    saved = ns.capture(gpt2, PROMPT, "layers[0].output[-1]")
    with pytest.raises(LateUpdate, match="has already run"), gpt2.trace(PROMPT):
        gpt2.transformer.h[1].output.save()
        saved.apply(gpt2)


def test_overlapping_writes_are_refused(llama) -> None:
    both = ["layers[0].heads[3].output[-1]", "model.model.layers[0].self_attn.o_proj.input[-1]"]
    saved = ns.capture(llama, PROMPT, both)
    with pytest.raises(OverlappingWrite, match="overlap at the same token"):
        ns.patched_logits(llama, PROMPT, saved)
    twice = ns.capture(llama, PROMPT, ["layers[0].output[-1]", "layers[0].output[3]"])
    with pytest.raises(OverlappingWrite, match="same token"):
        ns.patched_logits(llama, PROMPT, twice)
    assert ns.patched_logits(llama, PROMPT + " w9", twice).shape == (1, 5, 64)  # there they are two tokens
    apart = ns.capture(llama, PROMPT, ["layers[0].heads[3].output[-1]", "layers[0].heads[2].output[-1]"])
    assert ns.patched_logits(llama, PROMPT, apart).shape == (1, 4, 64)


def test_the_same_place_under_two_names_is_written_once_only(gpt2) -> None:
    row = torch.zeros(1, 16)
    saved = ns.SavedActivation.from_pairs(("layers[2].output[-1]", row), ("model.transformer.h[-1].output[-1]", row))
    with pytest.raises(DuplicatePath, match=r"same place and position as another key[\s\S]*h\[-1\]"):
        ns.patched_logits(gpt2, PROMPT, saved)


def test_a_place_that_never_fires_is_told_before_the_run(gpt2) -> None:
    with pytest.raises(NnspliceError, match=r"transformer\.h"):
        ns.capture(gpt2, PROMPT, "model.transformer.h.output[-1]")
    with pytest.raises(NeverFired, match=r"never called"):
        ns.capture(wrap("opt"), PROMPT, "model.model.output[-1]")


@pytest.mark.parametrize(
    ("path", "kind", "message"),
    [
        ("layers[3].output[-1]", IndexError, "past the last layer"),
        ("layers[0].heads[4].output[-1]", IndexError, "past the last head"),
        ("model.transformer.h[3].output[-1]", IndexError, r"h\[0\] to h\[2\]"),
        ("model.transformer.hh[0].output[-1]", KeyError, r"\^"),
        ("layers[0].output", ValueError, r"which tokens[\s\S]*layers\[0\]\.output\[-1\]"),
        ("layers[0].output[9]", IndexError, "4 tokens"),
        ("layers[0].attn.o.heads[1]", ValueError, r"layers\[0\]\.heads\[1\]\.output"),
        ("layers[0].attn.c_proj.weight", ValueError, r"layers\[0\]\.attn\.c_proj"),
    ],
)
def test_a_wrong_path_is_answered_before_the_run(gpt2, path: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        ns.capture(gpt2, PROMPT, path)
    assert isinstance(caught.value, NnspliceError)
    with pytest.raises(kind, match=message), gpt2.trace(PROMPT):
        ns.save_activations(gpt2, path)


def test_wrong_arguments_are_named(gpt2) -> None:
    saved = ns.capture(gpt2, ["w3 w4", "w5 w6"], "layers[0].output[-1]")
    number: Any = 3
    table: Any = {}
    cases = [
        (lambda: ns.capture(gpt2, PROMPT, []), BadArgument, "no paths"),
        (lambda: ns.capture(gpt2, [], "layers[0].output[-1]"), BadArgument, "no prompts"),
        (lambda: ns.capture(gpt2, "", "layers[0].output[-1]"), BadArgument, "no tokens"),
        (lambda: ns.capture(gpt2, number, "layers[0].output[-1]"), BadType, "is no prompt"),
        (lambda: ns.capture(gpt2, PROMPT, number), BadType, "path"),
        (lambda: ns.capture(gpt2, PROMPT, ["layers[0].output[-1]", number]), BadType, "a path is a text or a Path"),
        (lambda: ns.capture(build("gpt2"), PROMPT, "layers[0].output[-1]"), BadType, r"ns\.load"),
        (lambda: ns.capture(gpt2.transformer, PROMPT, "layers[0].output[-1]"), BadArgument, "the whole model"),
        (lambda: ns.capture(gpt2, PROMPT, "layers[0].output[-1]", batch_size=0), BadArgument, "batch_size"),
        (lambda: ns.patched_logits(gpt2, ["w3", "w4", "w5"], saved), ShapeError, "2 rows, and there are 3 prompts"),
        (lambda: ns.patched_logits(gpt2, "w3", ns.SavedActivation()), BadArgument, "empty"),
        (lambda: ns.patched_logits(gpt2, "w3", table), BadType, "no capture"),
        (lambda: saved.apply(gpt2), OutsideTrace, "inside a trace"),
        (lambda: ns.updates(gpt2, saved.keys()), OutsideTrace, "inside a trace"),
        (lambda: saved["layers[1].output[-1]"], UnknownPath, r"layers\[0\]\.output\[-1\]"),
    ]
    for call, kind, message in cases:
        with pytest.raises(kind, match=message):
            call()


def test_a_capture_of_another_width_or_number_of_rows_is_refused(gpt2) -> None:
    narrow = ns.SavedActivation.from_pairs(("layers[0].output[-1]", torch.zeros(1, 8)))
    with pytest.raises(ShapeError, match="8 wide, the place 16"):
        ns.patched_logits(gpt2, PROMPT, narrow)
    three = ns.SavedActivation.from_pairs(("layers[0].output[-1]", torch.zeros(3, 16)))
    with pytest.raises(ShapeError, match=r"3 rows, the run 2[\s\S]*slice"), gpt2.trace(["w3 w4", "w5 w6"]):
        three.apply(gpt2)


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


# --- plain modules ---------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.steps = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        self.never = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for step in reversed(self.steps):
            x = x + step(x).relu()
        return x


def test_a_plain_module_is_addressed_by_its_attributes_in_the_order_it_runs() -> None:
    torch.manual_seed(0)
    model = nnsight.NNsight(Plain())
    plain: Any = model._module
    x = torch.randn(2, 5, 6)
    with pytest.raises(NeedsProbe, match="probe="):
        ns.expand(model, "model.steps[:].output[0]")
    saved = ns.capture(model, x, ["model.steps[:].output[-1]", "model.first.output[1]"])
    assert saved.keys() == ["model.first.output[1]"] + [f"model.steps[{i}].output[-1]" for i in (2, 1, 0)]
    assert torch.equal(saved["model.first.output[1]"], plain.first(x)[:, 1].detach())
    with torch.no_grad(), model.trace(x):
        (saved * 0).apply(model)
        out = model.output.save()
    with torch.no_grad():
        first = plain.first(x)
        first[:, 1] = 0
        expected = first.clone()
        for step in reversed(plain.steps):
            add = step(expected)
            add[:, -1] = 0
            expected = expected + add.relu()
    assert torch.allclose(out, expected, atol=1e-6)
    with pytest.raises(NeverFired, match=r"model\.never is never called"):
        ns.capture(model, x, "model.never.output[0]")


def test_a_value_without_tokens_is_refused_with_its_shape() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x.mean(1))

    model = nnsight.NNsight(Pooled())
    with pytest.raises(ShapeError, match=r"\[2, 6\] is not \[prompt, token, width\]"):
        ns.capture(model, torch.randn(2, 5, 6), "model.inner.output[0]")


# --- shape of a run --------------------------------------------------------------------------------------------------


def test_the_forward_stops_after_the_last_place_that_is_needed(gpt2) -> None:
    ran: list[int] = []
    hooks = [
        block.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, block in enumerate(gpt2._module.transformer.h)
    ]
    try:
        ns.capture(gpt2, PROMPT, "layers[1].output[-1]")  # the order is known by now, from other tests or from this
        ran.clear()
        ns.capture(gpt2, PROMPT, "layers[1].attn.output[-1]")
    finally:
        for hook in hooks:
            hook.remove()
    assert ran == [0]


def test_a_bar_is_shown_over_batches_when_it_is_asked_for(gpt2, capsys: pytest.CaptureFixture[str]) -> None:
    ns.capture(gpt2, [PROMPT] * 4, "layers[0].output[-1]", batch_size=2)
    assert capsys.readouterr().err == ""
    ns.capture(gpt2, [PROMPT] * 4, "layers[0].output[-1]", batch_size=2, progress=True)
    assert "2/2" in capsys.readouterr().err


def test_token_ids_in_every_form_are_the_same_prompts(gpt2) -> None:
    text = ns.capture(gpt2, ["w3 w4 w5", "w6 w7 w8"], "layers[1].output[:]")
    ids = [[3, 4, 5], [6, 7, 8]]
    padded = {
        "input_ids": torch.tensor([[0, 3, 4, 5], [0, 6, 7, 8]]),
        "attention_mask": torch.tensor([[0, 1, 1, 1]] * 2),
    }
    for prompts in (ids, torch.tensor(ids), {"input_ids": torch.tensor(ids)}, padded):
        assert ns.capture(gpt2, prompts, "layers[1].output[:]").allclose(text, atol=1e-6)
    assert ns.capture(gpt2, [3, 4, 5], "layers[1].output[:]").allclose(text.slice[0], atol=1e-6)
    assert ns.capture(gpt2, torch.tensor([3, 4, 5]), "layers[1].output[:]").allclose(text.slice[0], atol=1e-6)


def test_memory_kept_by_a_capture_is_its_own_bytes(gpt2) -> None:
    saved = ns.capture(gpt2, [PROMPT] * 8, ["layers[:].output[1]", "layers[:].heads[:].output[-1]"])
    kept = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for _, t in saved.items()}.values())
    assert kept == sum(t.numel() * t.element_size() for _, t in saved.items())


def test_repeated_traces_keep_nothing_alive(gpt2) -> None:
    def tensors() -> int:
        gc.collect()
        return sum(type(thing) in (torch.Tensor, nn.Parameter) for thing in gc.get_objects())

    def once() -> None:
        with torch.no_grad(), gpt2.trace(PROMPT):
            saved = ns.save_activations(gpt2, "layers[0:2].output[-1]")
            saved.subset("layers[1].output[-1]").add_to(gpt2)

    once()
    before = tensors()
    for _ in range(20):
        once()
    assert tensors() <= before + 2
