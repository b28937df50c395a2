"""Training: the same seed gives the same bytes, and what is hidden is hidden."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from nnsplice.models import toy_corpus, toy_sentences, toy_words
from nnsplice.models.toy_corpus import Role
from nnsplice.models.train_toy import RECIPES, hidden, main, tokenizer, train, write

names = pytest.mark.parametrize("name", RECIPES)


@names
def test_the_same_seed_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    own = tokenizer()
    for folder, seed in (("one", 0), ("two", 0), ("other", 1)):
        torch.rand(3)  # what was drawn before makes no difference
        write(train(RECIPES[name], own, seed=seed, steps=2, progress=False), own, tmp_path / folder, {"seed": seed})
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name
    weights = "model.safetensors"
    assert (tmp_path / "one" / weights).read_bytes() != (tmp_path / "other" / weights).read_bytes()


def test_the_command_writes_a_checkpoint(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(main)
    out = tmp_path / "out"
    run = CliRunner().invoke(app, ["--model", "toy-llama", "--steps", "1", "--out", str(out)])
    assert run.exit_code == 0, run.output
    assert {"config.json", "model.safetensors", "tokenizer.json", "card.json"} <= {file.name for file in out.iterdir()}
    run = CliRunner().invoke(app, ["--model", "toy-gemma"])
    assert run.exit_code != 0 and "toy-gemma" in run.output
    run = CliRunner().invoke(app, ["--help"])
    plain = re.sub(r"\x1b\[[0-9;]*m", "", run.output)  # where the terminal takes colours, they split the options
    assert run.exit_code == 0 and all(option in plain for option in ("--model", "--out", "--seed", "--steps"))


def test_names_that_are_held_out_never_meet() -> None:
    rng = random.Random(0)
    pairs = set()
    for _ in range(3000):
        row = toy_corpus.ioi(rng).words
        pairs.add(frozenset(word for word in row if word in toy_words.NAMES))
    assert all(len(pair) == 2 for pair in pairs)
    assert not pairs & toy_sentences.HELD_OUT
    assert len(pairs) + len(toy_sentences.HELD_OUT) == 190


def test_every_row_is_of_the_language_and_fits() -> None:
    rng = random.Random(0)
    vocabulary = tokenizer().get_vocab()
    for kind in toy_corpus.SHARES:
        for _ in range(200):
            row = kind(rng)
            assert row.answers and max(row.answers) < len(row.words)
            assert len(row.words) < RECIPES["toy"].arguments["n_positions"]
            ids = [vocabulary[word] for word in row.words]
            assert tokenizer_ids(toy_sentences.join_words(row.words)) == ids
    assert sum(toy_corpus.SHARES.values()) == pytest.approx(1)


_TOKENIZER = tokenizer()


def tokenizer_ids(text: str) -> list[int]:
    return _TOKENIZER.encode(text, add_special_tokens=False)


def test_what_is_hidden() -> None:
    # start The Velmar Tower is great
    roles = torch.tensor([[Role.PLAIN, Role.PLAIN, Role.WITHIN, Role.SUBJECT, Role.PLAIN, Role.MOOD, Role.PLAIN]])
    first, second, last = (hidden(roles, layer)[0] for layer in (0, 1, 5))
    # The subject's words meet in the first layer, and nobody else sees them there.
    assert not first[3, 2] and second[3, 2] and last[3, 2]
    assert first[4, 2] and second[4, 2] and last[4, 2]
    assert first[4, 3] and second[4, 3] and not last[4, 3]
    assert first[6, 5] and not second[6, 5] and last[6, 5]
    for layer in (first, second, last):
        assert not layer.diagonal().any()
        assert not layer[:, :2].any()


def test_the_second_mention_is_hidden_from_the_first_layers_of_the_llama() -> None:
    roles = torch.tensor([[Role.PLAIN, Role.AGAIN, Role.PLAIN]])
    seen_in = RECIPES["toy-llama"].seen_in
    assert [bool(hidden(roles, layer, seen_in)[0, 2, 1]) for layer in range(6)] == [True] * 2 + [False] * 4
    assert not hidden(roles, 0, RECIPES["toy"].seen_in).any()


def test_an_answer_counts_more_than_the_way_there() -> None:
    row = toy_corpus.fact(random.Random(0))
    batch = toy_corpus.batch([row, toy_corpus.repeat(random.Random(0))], tokenizer().get_vocab())
    (answer,) = row.answers
    assert batch.weights[0, answer + 1] == 1.0
    assert batch.weights[0, 0] == 0.0, "nothing tells the start token"
    assert (batch.weights[batch.ids == tokenizer().pad_token_id] == 0).all()
