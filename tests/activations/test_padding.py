"""Positions count a prompt's own tokens: each row of a padded batch holds what the prompt holds when it runs alone."""

from __future__ import annotations

import pytest
import torch

import nnsplice as ns
from nnsplice.errors import BadArgument, LateUpdate, PathError, ShortRow
from zoo import wrap

PROMPTS = ["w3 w4 w5 w6 w7", "w8 w9", "w10 w11 w12"]
FAMILIES = ("gpt2", "llama", "bloom", "opt", "qwen3", "gemma2", "olmo2")
ATOL = 2e-5
PLACES = ("layers[0].output", "layers[2].output", "layers[1].mid", "layers[1].heads[2].output", "layers[1].mlp.output")


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest):
    wrapped = wrap(request.param)
    if request.param not in ("bloom", "gemma2"):  # transformers' own eager mask is NaN for float64 with padding
        wrapped._module.double()
    return wrapped


@pytest.mark.parametrize("position", [-1, -2, 0, 1])
def test_left_padded_rows_hold_what_each_prompt_holds_alone(model, position: int) -> None:
    paths = [f"{place}[{position}]" for place in PLACES]
    with torch.no_grad(), model.trace(PROMPTS):
        saved = ns.save_activations(model, paths)
    for row, prompt in enumerate(PROMPTS):
        alone = ns.capture(model, prompt, paths)
        assert all(torch.allclose(saved[path][row], alone[path][0], atol=ATOL) for path in paths)


def _right_padded(model) -> dict[str, torch.Tensor]:
    model.tokenizer.padding_side = "right"
    return dict(model.tokenizer(PROMPTS, padding=True, return_tensors="pt", return_token_type_ids=False))


@pytest.mark.parametrize("position", [-1, -2, 0, 1])
def test_right_padded_rows_hold_what_each_prompt_holds_alone(model, position: int) -> None:
    paths = [f"{place}[{position}]" for place in PLACES]
    with torch.no_grad(), model.trace(**_right_padded(model)):
        saved = ns.save_activations(model, paths)
    for row, prompt in enumerate(PROMPTS):
        alone = ns.capture(model, prompt, paths)
        assert all(torch.allclose(saved[path][row], alone[path][0], atol=ATOL) for path in paths)


@pytest.mark.parametrize("position", [-1, 0, 1])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_write_lands_on_each_rows_own_token(model, side: str, position: int) -> None:
    new = torch.linspace(-1, 1, 16)[None]
    saved = ns.SavedActivation.from_pairs((f"layers[1].output[{position}]", new))
    inputs = _right_padded(model) if side == "right" else None
    with torch.no_grad():
        if inputs is not None:
            with model.trace(**inputs):
                saved.apply(model)
                logits = ns.save_activations(model, "unembed.output[-1]")
        else:
            with model.trace(PROMPTS):
                saved.apply(model)
                logits = ns.save_activations(model, "unembed.output[-1]")
    expected = ns.patched_logits(model, PROMPTS, saved)[:, -1]
    if model._module.config.model_type == "gemma2":  # what it returns is capped after the unembedding
        cap = model._module.config.final_logit_softcapping
        expected = cap * torch.atanh(expected / cap)
    assert torch.allclose(logits["unembed.output[-1]"], expected, atol=ATOL)


def test_capture_of_ragged_prompts_equals_each_prompt_alone(model) -> None:
    paths = [f"{place}[{position}]" for place in PLACES for position in (-1, 0, 1)]
    together = ns.capture(model, PROMPTS, paths, batch_size=2)
    for row, prompt in enumerate(PROMPTS):
        assert together.slice[row].allclose(ns.capture(model, prompt, paths), atol=ATOL)


def test_patched_logits_of_ragged_prompts_equal_each_prompt_alone_and_are_nan_where_there_is_no_token(model) -> None:
    saved = ns.capture(model, "w20 w21", "layers[1].output[-1]")
    together = ns.patched_logits(model, PROMPTS, saved)
    for row, prompt in enumerate(PROMPTS):
        alone = ns.patched_logits(model, prompt, saved)[0]
        assert torch.allclose(together[row, -len(alone) :], alone, atol=ATOL)
        assert together[row, : -len(alone)].isnan().all()


def test_a_prompt_without_the_position_is_named(model) -> None:
    with pytest.raises(ShortRow, match=r"row 1 has 2 tokens, so there is no position \[2\]"), model.trace(PROMPTS):
        ns.save_activations(model, "layers[0].output[2]")
    with pytest.raises(ShortRow, match=r"row 1 has 2 tokens[\s\S]*\[0\] to \[1\][\s\S]*ns\.capture"):
        ns.capture(model, PROMPTS, "layers[0].output[2]")


def test_a_slice_over_prompts_of_different_length_has_no_shape(model) -> None:
    for text in ("layers[0].output[:]", "layers[0].output[0:2]"):
        with pytest.raises(PathError, match=r"different length \(2, 3, 5 tokens\)[\s\S]*capture each length"):
            ns.capture(model, PROMPTS, text)
        with pytest.raises(PathError, match=r"different length"), model.trace(PROMPTS):
            ns.save_activations(model, text)


def test_asked_too_late_the_padding_is_not_guessed() -> None:
    model = wrap("llama")
    with torch.no_grad(), model.trace(PROMPTS):
        model.model.layers[0].output.save()
        saved = ns.save_activations(model, "layers[1].output[-1]")  # the padding is on the left
    assert saved.allclose(ns.capture(model, PROMPTS, "layers[1].output[-1]"), atol=1e-5)
    with pytest.raises(LateUpdate, match=r"depends on how the prompts were padded[\s\S]*before the trace's other"):
        with model.trace(PROMPTS):
            model.model.layers[0].output.save()
            ns.save_activations(model, "layers[1].output[1]")


def test_a_single_prompt_is_never_padded_so_it_may_be_asked_late() -> None:
    model = wrap("llama")
    with torch.no_grad(), model.trace("w3 w4 w5"):
        model.model.layers[0].output.save()
        saved = ns.save_activations(model, "layers[1].output[1]")
    assert saved.allclose(ns.capture(model, "w3 w4 w5", "layers[1].output[1]"))


def test_asked_once_the_padding_is_remembered() -> None:
    model = wrap("llama")
    with torch.no_grad(), model.trace(PROMPTS):
        first = ns.save_activations(model, "layers[0].output[1]")
        later = ns.save_activations(model, "layers[1].output[1]")
    assert (first | later).allclose(
        ns.capture(model, PROMPTS, ["layers[0].output[1]", "layers[1].output[1]"]), atol=1e-5
    )


def test_a_mask_with_holes_is_refused() -> None:
    model = wrap("llama")
    mask = torch.tensor([[1, 0, 1, 1]])
    with pytest.raises(BadArgument, match="holes"):
        with model.trace(input_ids=torch.tensor([[3, 4, 5, 6]]), attention_mask=mask):
            ns.save_activations(model, "layers[0].output[-1]")


def test_encoder_positions_count_the_encoders_tokens_and_decoder_positions_the_decoders() -> None:
    model = wrap("t5")
    model._module.double()
    inputs = dict(model.tokenizer(PROMPTS, padding=True, padding_side="right", return_tensors="pt"))
    inputs.pop("token_type_ids", None)
    decoder = torch.tensor([[0, 9, 8, 7], [0, 3, 4, 5], [0, 6, 7, 8]])
    paths = ["encoder.layers[2].output[-1]", "encoder.layers[0].heads[1].output[1]", "layers[1].output[-1]"]
    with torch.no_grad(), model.trace(**inputs, decoder_input_ids=decoder):
        saved = ns.save_activations(model, paths)
    for row, prompt in enumerate(PROMPTS):
        alone = ns.capture(
            model, {"input_ids": model.tokenizer(prompt)["input_ids"], "decoder_input_ids": decoder[row]}, paths
        )
        assert saved.slice[row].allclose(alone, atol=ATOL)
