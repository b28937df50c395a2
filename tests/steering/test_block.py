"""The block: every way of calling the model is steered in it, and it leaves the model exactly as it was."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

import nnsplice as ns
from nnsplice.engine.tracing import Body
from nnsplice.errors import NeverFired, NnspliceError
from steering.vectors import PROMPTS, ids, precise, vector
from zoo import build, tokenizer, wrap

IDS = torch.tensor([[3, 4, 5, 6]])


@pytest.fixture
def model() -> Any:
    return precise("llama")


def state(module: Any) -> dict[str, Any]:
    """Everything of a model that a block might leave something in."""
    return {
        name: (
            list(part._forward_hooks), list(part._forward_pre_hooks), sorted(part.__dict__),
            Body(part).function,
        )
        for name, part in module.named_modules()
    }  # fmt: skip


def test_plain_calls_traces_and_generation_are_steered(model) -> None:
    module = model._module
    with torch.no_grad():
        plain = module(IDS).logits
        with ns.steering.steer(model, vector(1), 2.0):
            called = module(IDS).logits
            body = module.model(IDS).last_hidden_state
            with model.trace(IDS):
                saved = ns.save_activations(model, "layers[1].output[-1]")
                seen = model.model.layers[1].output.save()
                following = model.model.layers[2].input.save()
                traced = model.output.logits.save()
            captured = ns.capture(model, IDS, "layers[1].output[-1]")
            generated = model.generate(IDS, max_new_tokens=4, do_sample=False)
            by_module = module.generate(IDS, max_new_tokens=4, do_sample=False)
            with model.generate(IDS, max_new_tokens=4, do_sample=False) as tracer:
                result = tracer.result.save()
        with model.trace(IDS):
            unsteered = model.model.layers[1].output.save()
    assert torch.equal(called, traced) and not torch.allclose(called, plain)
    # The steered layer's own output shows the change, and so does what the next one reads.
    torch.testing.assert_close(seen, unsteered + 2.0 * vector(1)["layers[1].output[-1]"], rtol=0, atol=1e-14)
    assert torch.equal(seen, following)
    assert torch.equal(saved["layers[1].output[-1]"], seen[:, -1])
    assert torch.equal(captured["layers[1].output[-1]"], seen[:, -1])
    assert torch.equal(module.lm_head(body), called)
    assert torch.equal(generated, by_module) and torch.equal(generated, result)
    assert not torch.equal(generated, module.generate(IDS, max_new_tokens=4, do_sample=False))


def test_a_patch_inside_the_block_wins_over_the_steering(model) -> None:
    clean = ns.capture(model, IDS, "layers[1].output[:]")
    with torch.no_grad():
        plain = model._module(IDS).logits
    with ns.steering.steer(model, vector(1), 2.0):
        assert torch.equal(ns.patched_logits(model, IDS, clean), plain)


def test_a_batch_of_several_invokes_is_steered_row_by_row(model) -> None:
    direction = vector(1)
    with torch.no_grad():
        alone = []
        for prompt, coefficient in zip(PROMPTS, (1.0, -2.0, 3.0), strict=True):
            with ns.steering.steer(model, direction, coefficient, where=ns.steering.from_token(1)):
                alone.append(model._module(torch.tensor(ids(model, [prompt]))).logits[0, -1])
        found = []
        with ns.steering.steer(model, direction, [1.0, -2.0, 3.0], where=ns.steering.from_token(1)):
            with model.trace() as tracer:
                for prompt in PROMPTS:
                    with tracer.invoke(prompt):
                        found.append(model.output.logits[0, -1].save())
    torch.testing.assert_close(torch.stack(found), torch.stack(alone), rtol=0, atol=1e-12)


@pytest.mark.parametrize("how", ["whole", "raises", "stopped", "never fired"])
def test_the_model_is_left_exactly_as_it_was(model, how: str) -> None:
    before, plain = state(model._module), model._module(IDS).logits
    both = ns.steering.steer(model, vector(0, 1, site="mlp.output"), 2.0) + ns.steering.steer(
        model, vector(2, site="input"), operator="project_out"
    )
    if how == "raises":
        with pytest.raises(ZeroDivisionError):
            with both:
                model._module(IDS)
                _ = 1 / 0
    elif how == "stopped":
        with both:
            ns.capture(model, IDS, "layers[1].output[-1]")  # the pass stops in the middle
            model._module(IDS)
    elif how == "never fired":
        with pytest.raises(NeverFired), both:
            pass
    else:
        with both, both:
            model._module(IDS)
    assert state(model._module) == before
    assert torch.equal(model._module(IDS).logits, plain)


def test_blocks_may_be_left_in_any_order(model) -> None:
    plain = model._module(IDS).logits
    first, second = ns.steering.steer(model, vector(1)), ns.steering.steer(model, vector(1, seed=1))
    before = state(model._module)
    first.__enter__()
    second.__enter__()
    both = model._module(IDS).logits
    first.__exit__(None, None, None)
    alone = model._module(IDS).logits
    second.__exit__(None, None, None)
    with second:
        assert torch.equal(model._module(IDS).logits, alone)
    with first + second:
        assert torch.equal(model._module(IDS).logits, both)
    assert not torch.allclose(alone, both)
    assert state(model._module) == before and torch.equal(model._module(IDS).logits, plain)


def test_steerings_add_up_in_their_order(model) -> None:
    out = ns.steering.steer(model, vector(1), operator="project_out")
    add = ns.steering.steer(model, vector(1), 3.0)
    unit = vector(1)["layers[1].output[-1]"][0] / 3
    for both, expected in ((out + add, 9.0), (add + out, 0.0)):
        with both:
            along = ns.capture(model, IDS, "layers[1].output[-1]")["layers[1].output[-1]"] @ unit
        torch.testing.assert_close(along, torch.tensor([expected], dtype=torch.float64), rtol=0, atol=1e-12)
    assert len((out + add).rules) == 2 and len(out.rules) == 1
    with pytest.raises(ValueError, match="two models"):
        _ = out + ns.steering.steer(precise("gpt2"), vector(1))
    with pytest.raises(TypeError):
        _ = out + 1  # pyright: ignore[reportOperatorIssue]


def test_two_models_in_one_process_know_nothing_of_each_other() -> None:
    first, second = precise("llama"), precise("gpt2")
    plain = second._module(IDS).logits
    with ns.steering.steer(first, vector(1), [1.0, 2.0], where="generated"):
        assert torch.equal(second._module(IDS).logits, plain)
        with ns.steering.steer(second, vector(1), where="generated"):
            one = ns.steering.generate(second, PROMPTS[0], max_new_tokens=3, do_sample=False)
            ns.steering.generate(first, PROMPTS[:2], max_new_tokens=3, do_sample=False)
            # Generations follow each other without anything to reset.
            assert ns.steering.generate(second, PROMPTS[0], max_new_tokens=3, do_sample=False) == one


def test_a_source_that_is_asked_for_inside_the_block_is_steered_too(model) -> None:
    """nnsight builds a module's body anew when its inside is looked at."""
    before = None
    with torch.no_grad():
        with ns.steering.steer(model, vector(1), 2.0):
            expected = model._module(IDS).logits
            with model.trace(IDS):
                inner = model.model.layers[1].source
                assert inner is not None
                steered = model.output.logits.save()
            again = model._module(IDS).logits
            before = again
        plain = model._module(IDS).logits
    assert torch.equal(steered, expected) and torch.equal(before, expected)
    assert torch.equal(plain, precise("llama")._module(IDS).logits)


def test_nothing_holds_a_model_that_is_gone() -> None:
    model = precise("gpt2")
    with ns.steering.steer(model, vector(1)):
        model._module(IDS)
    gone = weakref.ref(model._module)
    del model
    gc.collect()
    assert gone() is None


def test_gradients_flow_through_a_steered_run(model) -> None:
    with ns.steering.steer(model, vector(1), 2.0):
        model._module(IDS).logits.sum().backward()
    assert model._module.model.embed_tokens.weight.grad.abs().sum() > 0


# --- nothing silently does nothing ------------------------------------------------------------------------------------


def test_a_rule_that_never_fires_is_an_error(model) -> None:
    for where, text in (("generated", "generation of two tokens"), (ns.steering.from_token(30), "smaller number")):
        with pytest.raises(NeverFired, match=text):
            with ns.steering.steer(model, vector(1), where=where):
                model._module(IDS)
    with pytest.raises(NeverFired, match="nothing ran"):
        with ns.steering.steer(model, vector(1)):
            pass
    with pytest.raises(NeverFired, match="no token of 1 pass"):
        # One rule of two is enough.
        both = ns.steering.steer(model, vector(1)) + ns.steering.steer(model, vector(2), where="generated")
        with both:
            model._module(IDS)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"vector": vector(9)}, "layers\\[0\\] to layers\\[2\\]|past the last"),
        ({"operator": "multiply"}, "no operator 'multiply'"),
        ({"where": "prompts"}, "'prompt'"),
        ({"where": "last"}, "from_token"),
        ({"where": [-1]}, "from_token"),
        ({"plane": vector(1, seed=1)}, "turns nothing"),
        ({"operator": "rotate", "plane": vector(1)}, "one line"),
        ({"when": 0.2}, "similar"),
        ({"vector": 0 * vector(1)}, "zero vector"),
        ({"vector": torch.ones(16)}, "no vector"),
        ({"vector": vector(1).at(1).map(lambda t: t.repeat(2, 1, 1))}, "2 rows"),
        ({"vector": ns.SavedActivation()}, "no one direction|empty"),
        ({"coefficient": "2"}, "coefficient"),
        ({"coefficient": []}, "coefficient"),
        ({"coefficient": float("nan")}, "finite"),
        ({"coefficient": torch.ones(2, 2)}, "shape"),
    ],
)
def test_a_mistake_is_answered_before_anything_runs(model, arguments: dict, text: str) -> None:
    given = {"vector": vector(1), **arguments}
    with pytest.raises(NnspliceError, match=text):
        ns.steering.steer(model, **given)


def test_a_mistake_that_only_a_run_can_show(model) -> None:
    for arguments, text in (
        ({"vector": vector(1, width=8)}, "8 wide, the site 16"),
        ({"coefficient": [1.0, 2.0]}, "2 rows, and the run has 1"),
        ({"where": ns.steering.mask([[True], [True]])}, "2 rows"),
        ({"operator": lambda h, v, c: (c * v)[0]}, "the new states, not what is added"),
    ):
        given: Any = {"vector": vector(1), **arguments}
        with pytest.raises(NnspliceError, match=text):
            with ns.steering.steer(model, **given):
                model._module(IDS)
        assert not torch.isnan(model._module(IDS).logits).any()
    with pytest.raises(ValueError, match="called by itself"):
        with ns.steering.steer(model, ns.SavedActivation.from_pairs(("final_norm.output[-1]", torch.ones(1, 16)))):
            model._module.model.norm(torch.zeros(1, 2, 16, dtype=torch.float64))


def test_the_logits_of_a_router_are_refused() -> None:
    saved = ns.SavedActivation.from_pairs(("layers[1].mlp.router.output[-1]", torch.ones(1, 4)))
    with pytest.raises(ns.errors.RefusedPlace, match="chosen inside the router"):
        ns.steering.steer(wrap("mixtral"), saved)


def test_derived_places_are_refused() -> None:
    mixture = wrap("mixtral", attn_implementation="eager")
    for place, width in (("layers[1].experts[2].output", 16), ("layers[1].heads[0].pattern", 4)):
        saved = ns.SavedActivation.from_pairs((f"{place}[-1]", torch.ones(1, width)))
        with pytest.raises(ValueError, match="derived from several values"):
            ns.steering.steer(mixture, saved)


# --- models of other kinds --------------------------------------------------------------------------------------------


def test_a_model_in_pieces_is_steered_as_a_whole_one(tmp_path) -> None:
    from accelerate import dispatch_model

    places: Any = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{n}": "disk" if n == 1 else "cpu" for n in range(3)}
    cpu: Any = "cpu"
    module: Any = build("llama")
    module = dispatch_model(module, places, main_device=cpu, offload_dir=str(tmp_path), force_hooks=True)
    pieces = ns.load(module, tokenizer=tokenizer())
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "where": ns.steering.from_token(2)}
    expected = ns.steering.generate(wrap("llama"), PROMPTS, vector(1), 9.0, **options)
    ns.expand(pieces, "layers[1]", probe={"input_ids": torch.tensor([[3, 4]])})
    assert ns.steering.generate(pieces, PROMPTS, vector(1), 9.0, **options) == expected


def test_a_quantised_model_is_steered() -> None:
    import warnings

    model = wrap("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own quantisation is on its way out, but what it made is still about
        module: Any = torch.ao.quantization.quantize_dynamic(build("llama"), {torch.nn.Linear}, dtype=torch.qint8)
    quantised = ns.load(module.eval(), tokenizer=model.tokenizer)
    with torch.no_grad():
        plain = ns.capture(quantised, IDS, "layers[1].output[-1]")
        with ns.steering.steer(quantised, vector(1), 2.0):
            steered = ns.capture(quantised, IDS, "layers[1].output[-1]")
    moved = (steered - plain)["layers[1].output[-1]"]
    torch.testing.assert_close(moved, (2 * vector(1)["layers[1].output[-1]"]).float(), rtol=0, atol=1e-5)


def test_an_adapter_around_the_model_changes_nothing() -> None:
    from peft import LoraConfig, get_peft_model

    module: Any = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"], init_lora_weights=True))
    adapted = ns.load(module, tokenizer=tokenizer())
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "where": "generated"}
    expected = ns.steering.generate(wrap("llama"), PROMPTS, vector(1), 9.0, **options)
    assert ns.steering.generate(adapted, PROMPTS, vector(1), 9.0, **options) == expected
    (row,) = ids(adapted, PROMPTS[:1])
    with ns.steering.steer(adapted, vector(1), 9.0, where="generated"):
        out = module.generate(input_ids=torch.tensor([row]), max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert adapted.tokenizer.decode(out[0, len(row) :], skip_special_tokens=True) == expected[0]


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_what_is_touched_is_shown_before_anything_is_done(model) -> None:
    steering = ns.steering.steer(model, vector(1), [1.0, 2.0], where=ns.steering.from_token(4)) + ns.steering.steer(
        model, vector(0), where="generated", operator="clamp"
    )
    assert str(steering).splitlines() == [
        "Steering:",
        "  layers[1].output  add [1, 2], where from_token(4)",
        "  layers[0].output  clamp 1, where generated",
    ]
    before = state(model._module)
    shown = steering.show(model, PROMPTS[:2])
    lines = str(shown).splitlines()
    assert lines[1].startswith("  w3 w4 w5 w6 [w7] [w8]   (2 of 6 tokens, by ")
    assert lines[2] == "  w9 w10 w11   (0 of 3 tokens, none of the prompt)"
    assert lines[4].endswith("(0 of 6 tokens, none of the prompt)")
    assert "<mark>w7</mark>" in shown._repr_html_()
    (touched, _) = shown.rules
    states = ns.capture(model, PROMPTS[0], "layers[1].output[4]")["layers[1].output[4]"].norm().item()
    assert touched.shares[0][4] == pytest.approx(3.0 / states)
    assert state(model._module) == before
    assert str(steering.show(PROMPTS[:2])) == str(shown)
