"""Public formats become pairs of prompts; what is not that format is named with its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import nnsplice as ns
from nnsplice.errors import FileError, NnspliceError

DATA = Path(__file__).parent / "data"
SAME = json.dumps({"question": "a", "answer_matching_behavior": "x", "answer_not_matching_behavior": "x"})


def test_ab_questions() -> None:
    pairs = ns.steering.read_evals(DATA / "evals.jsonl")
    assert len(pairs) == 8
    for line, (positive, negative) in zip((DATA / "evals.jsonl").read_text().splitlines(), pairs, strict=True):
        row = json.loads(line)
        assert positive == f"{row['question']}\n\nAnswer:{row['answer_matching_behavior']}"
        assert negative == f"{row['question']}\n\nAnswer:{row['answer_not_matching_behavior']}"
    persona = ns.steering.read_evals(DATA / "evals_persona.jsonl", template="{question} ->{answer}")
    assert len(persona) == 6 and persona.positive[0].endswith(("-> Yes", "-> No"))


def test_separators_inside_of_a_text_end_no_line(tmp_path) -> None:
    row = {"question": "one\u2028two", "answer_matching_behavior": " Yes", "answer_not_matching_behavior": "\x85No"}
    (tmp_path / "evals.jsonl").write_text("\n".join([json.dumps(row, ensure_ascii=False)] * 2), encoding="utf-8")
    pairs = ns.steering.read_evals(tmp_path / "evals.jsonl", template="{question}{answer}")
    assert list(pairs) == [("one\u2028two Yes", "one\u2028two\x85No")] * 2


def test_suffixes_behind_two_personas() -> None:
    pairs = ns.steering.read_suffixes(DATA / "suffixes.json", "someone happy", "someone sad")
    texts = [text for text in json.loads((DATA / "suffixes.json").read_text()) if text]
    assert pairs.positive == tuple(f"Pretend you're someone happy. {text}" for text in texts)
    assert pairs.negative == tuple(f"Pretend you're someone sad. {text}" for text in texts)


def test_function_pairs_show_the_function_or_shuffled_outputs() -> None:
    known = {row["input"]: row["output"] for row in json.loads((DATA / "pairs.json").read_text())}
    pairs = ns.steering.read_pairs(DATA / "pairs.json", examples=4, n=20, seed=1)
    assert len(pairs) == 20
    for positive, negative in pairs:
        *right, asked = positive.splitlines()
        *wrong, same = negative.splitlines()
        assert asked == same and asked.endswith(":") and asked[:-1] in known and len(right) == 4
        assert asked[:-1] not in [line.split(":")[0] for line in right]
        assert all(known[line.split(":")[0]] == line.split(":")[1] for line in right)
        assert not any(known[line.split(":")[0]] == line.split(":")[1] for line in wrong)
        assert sorted(line.split(":")[1] for line in right) == sorted(line.split(":")[1] for line in wrong)
    assert pairs == ns.steering.read_pairs(DATA / "pairs.json", examples=4, n=20, seed=1)
    assert pairs != ns.steering.read_pairs(DATA / "pairs.json", examples=4, n=20, seed=2)


def test_pairs_are_fitted_on(model) -> None:
    pairs = ns.steering.Contrast(("w3 w4", "w5 w6", "w7 w8"), ("w3 w9", "w5 w9", "w7 w9")).shuffled(1)
    vector = ns.steering.fit_from_prompts(model, pairs.positive, pairs.negative, "layers[1].output[-1]")
    assert vector.about.rows == (3, 3)
    assert len(pairs[1:]) == 2 and dict(pairs)["w3 w4"] == "w3 w9"


@pytest.mark.parametrize(
    ("reader", "content", "text"),
    [
        ("read_evals", '{"question": "a"}', "line 1 .* is no question"),
        ("read_evals", "\n\n{", "line 3 .*no JSON"),
        ("read_evals", "", "holds no pair"),
        ("read_evals", SAME, "same"),
        ("read_pairs", '[{"input": "a"}]', "no list of inputs"),
        ("read_pairs", '[{"input": "a", "output": "b"}]', "has 1 pairs"),
        ("read_suffixes", '{"a": 1}', "no list of texts"),
        ("read_suffixes", '[""]', "holds no pair"),
    ],
)
def test_another_file_is_refused(tmp_path, reader: str, content: str, text: str) -> None:
    path = tmp_path / "file"
    path.write_text(content)
    more = ("a", "b") if reader == "read_suffixes" else ()
    with pytest.raises(NnspliceError, match=text):
        getattr(ns.steering, reader)(path, *more)


def test_mistakes_in_the_call_are_answered(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"no \{answer\}"):
        ns.steering.read_evals(DATA / "evals.jsonl", template="{question}")
    with pytest.raises(ValueError, match="both personas"):
        ns.steering.read_suffixes(DATA / "suffixes.json", "a", "a")
    with pytest.raises(ValueError, match="no pairs"):
        ns.steering.Contrast(("a",), ())
    with pytest.raises(FileNotFoundError):
        ns.steering.read_evals(tmp_path / "none")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FileError, match="no text"):
        ns.steering.read_evals(tmp_path / "bytes")
