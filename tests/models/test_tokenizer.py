"""Words with and without a space before them: a small BPE tokenizer, and the toy's own."""

from __future__ import annotations

import pytest
import torch

import nnsplice as ns
import zoo
from models import bpe
from nnsplice.models import load, toy_prompts


@pytest.fixture(scope="module", params=[True, False], ids=["trimmed", "with-space"])
def spaced(request: pytest.FixtureRequest):
    tokenizer = bpe.tokenizer(trim_offsets=request.param)
    return load(zoo.build("gpt2", vocab_size=len(tokenizer)), tokenizer=tokenizer)


@pytest.mark.parametrize("word", bpe.WHOLE)
def test_a_leading_space_makes_another_token(word: str) -> None:
    encode = bpe.tokenizer().encode
    plain, spaced = encode(word), encode(f" {word}")
    assert len(plain) == len(spaced) == 1
    assert plain != spaced


def test_it_is_the_same_on_every_call() -> None:
    assert bpe.tokenizer().get_vocab() == bpe.tokenizer().get_vocab()
    text = f"The {bpe.PIECES} Tower is in Paris"
    assert bpe.tokenizer().decode(bpe.tokenizer().encode(text)) == text


def tokens_of(model, text: str) -> list[str]:
    return [model.tokenizer.decode([token]) for token in model.tokenizer(text)["input_ids"]]


@pytest.mark.parametrize(
    ("text", "span", "tokens"),
    [
        ("The Tower is in Paris", "Tower", [" Tower"]),
        ("The Tower is in Paris", "Paris", [" Paris"]),
        ("Paris is in the Tower", "Paris", ["Paris"]),
        ("The Tower is in Paris", "Tower is", [" Tower", " is"]),
        # Part of a token is enough for the token to belong to the span.
        ("The Tower is in Paris", "ari", [" Paris"]),
    ],
)
def test_a_span_finds_its_tokens(spaced, text: str, span: str, tokens: list[str]) -> None:
    words = tokens_of(spaced, text)
    saved = ns.capture(spaced, text, 'layers[1].output["it"]', spans={"it": [span]})
    at = saved.positions
    assert [words[place] for places in at.values() for place in places or ()] == tokens
    for (_, tensor), places in zip(saved.items(), at.values(), strict=True):
        assert places is not None
        path = f"layers[1].output[{places[0]}]"
        torch.testing.assert_close(tensor, ns.capture(spaced, text, path)[path])


def test_a_span_of_several_pieces_in_prompts_of_different_length(spaced) -> None:
    texts = [f"The {bpe.PIECES} Tower is in", f"Paris is in the {bpe.PIECES} Tower"]
    last = 'layers[0].output["subject"][-1]'
    saved = ns.capture(spaced, texts, last, spans={"subject": f"{bpe.PIECES} Tower"})
    (places,) = saved.positions.values()
    assert places is not None
    words = [tokens_of(spaced, text) for text in texts]
    assert [row[place] for row, place in zip(words, places, strict=True)] == [" Tower", " Tower"]
    pieces = [row.index(" Tower") for row in words]
    assert places == pieces and all(place > 4 for place in places), "the name is in several tokens"
    for row, (text, place) in enumerate(zip(texts, places, strict=True)):
        path = f"layers[0].output[{place}]"
        torch.testing.assert_close(saved[last][row : row + 1], ns.capture(spaced, text, path)[path])


def test_a_span_does_not_take_the_space_of_its_neighbour(spaced) -> None:
    """The token before it ends where the span's space begins; where offsets hold the space, they touch."""
    text = "Paris Rome Tower"
    saved = ns.capture(spaced, text, 'layers[0].output["it"]', spans={"it": ["Rome"]})
    assert list(saved.positions.values()) == [[1]]


# -------------------------------------------------------------------------------------------------------- the toy's own


@pytest.fixture(scope="module")
def toy():
    return load("toy")


def test_the_toy_does_not_mind_spaces(toy) -> None:
    encode = toy.tokenizer.encode
    assert encode("Paris", add_special_tokens=False) == encode(" Paris", add_special_tokens=False)
    assert len(encode(" Paris", add_special_tokens=False)) == 1


def test_the_toy_puts_the_start_token_first_and_pads_on_the_left(toy) -> None:
    batch = toy.tokenizer(["The Velmar Tower", "The"], padding=True)
    assert batch["attention_mask"] == [[1, 1, 1, 1], [0, 0, 1, 1]]
    long, short = batch["input_ids"]
    assert long[0] == short[2] == toy.tokenizer.bos_token_id


def test_a_word_that_is_not_of_the_language_is_told_apart(toy) -> None:
    assert toy.tokenizer.encode("Gondwana", add_special_tokens=False) == [toy.tokenizer.unk_token_id]


def test_spans_by_text_and_by_tokens_are_the_same(toy) -> None:
    facts = [*toy_prompts().facts[:3], *toy_prompts().facts[64:67], *toy_prompts().facts[-3:]]
    prompts = [fact.clean for fact in facts]
    path = 'layers[2].output["subject"][-1]'
    by_text = ns.capture(toy, prompts, path, spans={"subject": [fact.subject for fact in facts]})
    by_token = ns.capture(toy, prompts, path, spans={"subject": [fact.subject_span for fact in facts]})
    assert by_text.positions == by_token.positions
    torch.testing.assert_close(by_text[path], by_token[path], rtol=0, atol=0)
