"""Tasks: every record is what its task says, for the tokenizer that it was made for."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import nnsplice as ns
from english import english
from nnsplice.errors import BadArgument, BadType
from nnsplice.tasks import Record, Task

#: Every task of the room, one that is new too.
NAMES = tuple(name for name in ns.tasks.__all__ if name.islower())


@pytest.fixture(scope="module", params=["digits", "years"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return english(digits=request.param == "digits")


def _each(answer) -> list[str]:
    return [answer] if isinstance(answer, str) else list(answer)


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_the_one_token_that_follows_and_pairs_are_as_long(name: str, tokenizer) -> None:
    task: Task = getattr(ns.tasks, name)(tokenizer, 12, seed=3)
    assert len(task) == 12 and len({record.clean for record in task}) == 12
    for record in task:
        clean, corrupted = (list(tokenizer(text)["input_ids"]) for text in (record.clean, record.corrupted))
        assert len(clean) == len(corrupted) and clean != corrupted
        for answer in _each(record.answer) + _each(record.wrong):
            behind = list(tokenizer(record.clean + answer)["input_ids"])
            assert behind[: len(clean)] == clean and len(behind) == len(clean) + 1, answer
        assert not set(_each(record.answer)) & set(_each(record.wrong))


@pytest.mark.parametrize("name", NAMES)
def test_spans_cover_what_they_name_and_all_that_differs(name: str, tokenizer) -> None:
    for record in getattr(ns.tasks, name)(tokenizer, 8, seed=1):
        a, b = (list(tokenizer(text)["input_ids"]) for text in (record.clean, record.corrupted))
        covered = {token for start, stop in record.spans.values() for token in range(start, stop)}
        assert {n for n, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1]} <= covered
        for name_, value in record.variables.items():
            if name_ in record.spans and isinstance(value, str):
                start, stop = record.spans[name_]
                assert value in tokenizer.decode(a[start:stop])


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_gives_the_same_records_and_another_others(name: str, tokenizer) -> None:
    make = getattr(ns.tasks, name)
    assert make(tokenizer, 5, seed=2) == make(tokenizer, 5, seed=2)
    assert make(tokenizer, 5, seed=2).records != make(tokenizer, 5, seed=4).records


def test_what_an_answer_hangs_on_is_what_the_task_says(tokenizer) -> None:
    for record in ns.tasks.ioi(tokenizer, 10):
        io, s = record.variables["io"], record.variables["s"]
        assert record.answer == f" {io}" and record.clean.count(s) == 2 and record.corrupted.count(io) == 2
    for record in ns.tasks.arithmetic(tokenizer, 10):
        a, b = record.clean.splitlines()[-1].rstrip("=").split("+")
        assert int(str(record.answer)) == int(a) + int(b) == record.variables["sum"]
        a, b = record.corrupted.splitlines()[-1].rstrip("=").split("+")
        assert int(str(record.wrong)) == int(a) + int(b)
    for record in ns.tasks.greater_than(tokenizer, 10):
        year, two = record.variables["year"], record.variables["asked"] == "year"
        assert {int(one) for one in record.answer} == (
            set(range(year + 1, 99)) if two else set(range(year // 10 + 1, 10))
        )
        assert {int(one) for one in record.wrong} == (set(range(2, year)) if two else set(range(year // 10)))
    for record in ns.tasks.induction(tokenizer, 10):
        words = record.clean.split()
        assert words[words.index(words[-1]) + 1] == str(record.answer).strip()
    for record in ns.tasks.mcqa(tokenizer, 10, choices=3):
        right = next(line for line in record.clean.splitlines() if line.endswith(f". {record.variables['colour']}"))
        assert record.answer == f" {right[0]}"
    for record in ns.tasks.docstring(tokenizer, 5):
        defined = record.clean.splitlines()[0].rstrip("):").split(", ")[1:]
        assert record.answer == f" {defined[2]}" and record.wrong == f" {defined[3]}"


def test_years_are_asked_for_as_the_tokenizer_makes_them() -> None:
    asked = {digits: ns.tasks.greater_than(english(digits=digits), 3)[0].variables["asked"] for digits in (True, False)}
    assert asked == {True: "decade", False: "year"}


def test_facts_of_some_relations_only(tokenizer) -> None:
    task = ns.tasks.facts(tokenizer, 10, relations=["P36", "P103"])
    assert {record.variables["relation"] for record in task} == {"P36", "P103"}
    assert all(record.variables["subject"] in record.clean for record in task)
    with pytest.raises(BadArgument, match="no facts of the relation 'P0'"):
        ns.tasks.facts(tokenizer, relations=["P0"])


def test_more_records_than_there_are_is_told(tokenizer) -> None:
    with pytest.raises(BadArgument, match=r"only [0-9]+ different pairs were found, and n=100"):
        ns.tasks.arithmetic(tokenizer, 100, shots=0)


# --- with a model -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy():
    return ns.load("toy")


def _logits(model, text: str) -> torch.Tensor:
    ids = torch.tensor([model.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        return ns.models.unwrap(model)(ids).logits[0, -1]


def test_a_model_keeps_the_pairs_that_it_tells_apart(toy) -> None:
    task = ns.tasks.induction(toy, 30, seed=7, length=12)
    expected = []
    for record in task:
        answer, wrong = (
            toy.tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in (record.answer, record.wrong)
        )
        clean, corrupted = _logits(toy, record.clean), _logits(toy, record.corrupted)
        expected.append(bool(clean[answer] > clean[wrong] and corrupted[answer] < corrupted[wrong]))
    assert sum(expected) > 0
    kept = task.filter(toy)
    assert list(kept) == [record for record, right in zip(task, expected, strict=True) if right]
    assert task.accuracy(toy) == sum(expected) / 30
    assert repr(kept) == f"Task induction: {len(kept)} of 30 pairs that this model tells apart"
    top = [
        int(_logits(toy, r.clean).argmax()) == toy.tokenizer(r.answer, add_special_tokens=False)["input_ids"][0]
        for r in task
    ]
    assert task.accuracy(toy, by="top") == sum(top) / 30


def test_a_task_is_what_a_sweep_takes(toy) -> None:
    task = ns.tasks.ioi(toy, 4)
    result = ns.sweep(
        toy, task.clean, task.corrupted, 'layers[:].output["s2"]', task.metric, spans=task.spans, progress=False
    )
    assert result.grid().sizes["prompt"] == 4
    assert task[1:3].clean == task.clean[1:3] and isinstance(task[0], Record) and len(task[:2]) == 2
    for prompt, record in zip(result.table.tokens, task, strict=True):
        assert prompt[record.spans["s2"][0]] == record.variables["io"]  # of the corrupted prompt


def test_a_model_that_knows_nothing_of_a_task_is_told(toy) -> None:
    task = ns.tasks.ioi(toy, 4)
    turned = Task("turned", tuple(Record(r.clean, r.corrupted, r.wrong, r.answer) for r in task))
    with pytest.raises(BadArgument, match="gets none of the 4 pairs of the task turned right"):
        turned.filter(toy)
    half = Task("half", (*task.records[:1], *turned.records[1:]))
    with pytest.warns(UserWarning, match="1 of 4 pairs of the task half"):
        assert len(half.filter(toy)) == 1


def test_what_is_no_task_is_told(toy) -> None:
    with pytest.raises(BadType, match=r"ns\.tasks\.ioi\(model, 20\)"):
        ns.tasks.ioi(20)
    with pytest.raises(BadArgument, match="at least one pair"):
        ns.tasks.ioi(toy, 0)
    with pytest.raises(BadArgument, match="a tokenizer of English text"):
        ns.tasks.mcqa(toy)
    with pytest.raises(BadArgument, match="3 to 30 words"):
        ns.tasks.induction(toy, length=2)
    with pytest.raises(BadArgument, match="2 to 8"):
        ns.tasks.mcqa(toy, choices=1)
    with pytest.raises(BadArgument, match='"pair" or "top"'):
        ns.tasks.ioi(toy, 2).accuracy(toy, by="best")  # type: ignore[arg-type]
