"""Named spans: found in each prompt's own text, used in positions, refused where they are not one stretch."""

from __future__ import annotations

import pytest
import torch

import nnsplice as ns
from nnsplice.errors import BadArgument, BadType, ShortRow, SpanError
from zoo import wrap

PROMPTS = ["w3 w4 w5 w6", "w7 w8 w9", "w10 w11 w12 w13 w14"]
SUBJECTS = ["w4 w5", "w7", "w12 w13 w14"]
PLACE = "layers[1].output"


@pytest.fixture(scope="module")
def model():
    return wrap("llama")


def test_the_last_and_first_token_of_a_span_serve_where_spans_differ_in_length(model) -> None:
    saved = ns.capture(
        model, PROMPTS, [f'{PLACE}["subject"][-1]', f'{PLACE}["subject"][0]'], spans={"subject": SUBJECTS}
    )
    for row, (prompt, last, first) in enumerate(zip(PROMPTS, (2, 0, 4), (1, 0, 2), strict=True)):
        alone = ns.capture(model, prompt, f"{PLACE}[:]")
        assert torch.allclose(saved[f'{PLACE}["subject"][-1]'][row], alone[f"{PLACE}[{last}]"][0], atol=1e-6)
        assert torch.allclose(saved[f'{PLACE}["subject"][0]'][row], alone[f"{PLACE}[{first}]"][0], atol=1e-6)
    assert saved.positions == {f'{PLACE}["subject"][0]': [1, 0, 2], f'{PLACE}["subject"][-1]': [2, 0, 4]}


def test_every_token_of_a_span_where_spans_are_as_long(model) -> None:
    saved = ns.capture(model, PROMPTS[:2], f'{PLACE}["s"]', spans={"s": ["w4 w5", (1, 3)]})
    assert saved.keys() == [f'{PLACE}["s"][0]', f'{PLACE}["s"][1]']
    assert saved.get(f'{PLACE}["s"]').shape == (2, 2, 16)
    one = ns.capture(model, PROMPTS[0], f"{PLACE}[1:3]")
    assert torch.allclose(saved.get(f'{PLACE}["s"]')[0], one.get(f"{PLACE}[1:3]")[0], atol=1e-6)


def test_one_span_for_all_prompts(model) -> None:
    saved = ns.capture(model, ["w3 w4", "w4 w3"], f'{PLACE}["s"][0]', spans={"s": "w4"})
    assert saved.positions == {f'{PLACE}["s"][0]': [1, 0]}
    assert ns.capture(model, PROMPTS, f'{PLACE}["s"][0]', spans={"s": (1, 2)}).rows == 3


@pytest.mark.filterwarnings("ignore:the tokenizer does not know")
def test_a_span_in_other_letters_is_answered_with_those_of_the_prompt(model) -> None:
    for prompt, span, write in (("The w4 of W5", "w5", "'W5'"), ("w3 w4", "w5", None), ("W5 and W5", "w5", "'W5'")):
        with pytest.raises(SpanError, match=f"{span!r} does not occur") as refused:
            ns.capture(model, prompt, f'{PLACE}["s"]', spans={"s": span})
        assert ("write: " in str(refused.value)) == (write is not None)
        assert write is None or f"write: {write}" in str(refused.value)


def test_a_span_is_written_where_it_stands_in_the_prompts_of_the_run(model) -> None:
    saved = ns.capture(model, PROMPTS, f'{PLACE}["subject"][-1]', spans={"subject": SUBJECTS})
    turned = PROMPTS[::-1]
    logits = ns.patched_logits(model, turned, saved, spans={"subject": SUBJECTS[::-1]})
    for row, (prompt, at) in enumerate(zip(turned, (4, 0, 2), strict=True)):
        expected = ns.patched_logits(model, prompt, saved.slice[row], at=at)[0]
        assert torch.allclose(logits[row, -len(expected) :], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("spans", "kind", "message"),
    [
        ({"subject": ["w4", "w9", "w20"]}, SpanError, r"'w20' does not occur in row 2"),
        ({"subject": ["w3", "w9"]}, SpanError, "given 2 times for 3 prompts"),
        ({"subject": SUBJECTS}, SpanError, r"1, 2, 3 tokens in different prompts[\s\S]*\[-1\] for its last"),
        ({"other": SUBJECTS}, SpanError, r'the span "subject" is not given; spans given: "other"'),
        (None, SpanError, "is not given"),
        ({"subject": [(0, 9), (0, 1), (0, 1)]}, SpanError, "tokens 0 to 9, and the prompt has 4"),
        ({"subject": [(2, 2), (0, 1), (0, 1)]}, SpanError, "0 <= start < stop"),
        ({"subject": [3, 4, 5]}, BadType, r"is 3[\s\S]*a text, or \(start, stop\)"),
    ],
)
def test_a_span_that_cannot_be_found_is_named(model, spans, kind, message) -> None:
    with pytest.raises(kind, match=message):
        ns.capture(model, PROMPTS, f'{PLACE}["subject"]', spans=spans)


def test_a_text_that_occurs_twice_is_refused(model) -> None:
    with pytest.raises(SpanError, match="occurs 2 times in row 0"):
        ns.capture(model, "w3 w4 w3", f'{PLACE}["s"][0]', spans={"s": "w3"})


def test_a_token_past_the_span_is_refused(model) -> None:
    with pytest.raises(ShortRow, match=r'span "s" of row 0 has 2 tokens, and \[2\] is past them'):
        ns.capture(model, PROMPTS[:1], f'{PLACE}["s"][2]', spans={"s": "w4 w5"})


def test_texts_cannot_be_found_in_token_ids(model) -> None:
    with pytest.raises(SpanError, match="is a text, and the prompts are token ids"):
        ns.capture(model, [[3, 4, 5]], f'{PLACE}["s"][0]', spans={"s": "w4"})
    assert ns.capture(model, [[3, 4, 5]], f'{PLACE}["s"][0]', spans={"s": (1, 2)}).rows == 1
    with pytest.raises(BadArgument, match="not tokens"):
        ns.capture(model, torch.zeros(1, 2, 16), f'{PLACE}["s"][0]', spans={"s": (1, 2)})


def test_inside_a_trace_spans_are_not_known(model) -> None:
    with pytest.raises(SpanError, match="is not given"):
        with model.trace(PROMPTS):
            ns.save_activations(model, f'{PLACE}["subject"][0]')


def test_a_span_of_the_encoders_prompt_is_no_place_in_the_decoder() -> None:
    model = wrap("t5")
    spans = {"s": (1, 3)}
    ids = {"input_ids": [[3, 4, 5, 6]], "decoder_input_ids": [[0, 7, 8, 9]]}
    assert len(ns.capture(model, ids, 'encoder.layers[1].output["s"][-1]', spans=spans)) == 1
    metric = ns.logit_diff("w7", "w8")
    decoder = ns.SavedActivation.from_pairs(('layers[1].output["s"][-1]', torch.ones(1, 16)))
    encoder = ns.SavedActivation.from_pairs(('encoder.layers[1].output["s"][-1]', torch.ones(1, 16)))
    for use in (
        lambda: ns.patched_logits(model, ids, decoder, spans=spans),
        lambda: ns.patched_logits(model, ids, decoder, spans=spans, add=True),
        lambda: ns.capture(model, ids, 'layers[1].output["s"][-1]', spans=spans),
        lambda: ns.plan_sweep(model, ids, ids, 'layers[1].output["s"][-1]', metric, spans=spans),
        lambda: ns.plan_sweep(
            model, ids, ids, [['layers[1].output["s"][-1]', "layers[0].output[0]"]], metric, spans=spans
        ),
    ):
        with pytest.raises(SpanError, match="is a stretch of the encoder's prompts"):
            use()
    at_two = ns.SavedActivation.from_pairs(("layers[1].output[2]", torch.ones(1, 16)))
    moved = ns.patched_logits(model, ids, decoder, at=2, spans=spans)
    assert torch.equal(moved, ns.patched_logits(model, ids, at_two))
    here = ns.patched_logits(model, ids, encoder, spans=spans)
    there = ns.SavedActivation.from_pairs(("encoder.layers[1].output[2]", torch.ones(1, 16)))
    assert torch.equal(here, ns.patched_logits(model, ids, there))
