"""Each kind of question in units: the numbers of the one call, the same bits in any order, and what is refused."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nnsplice as ns
import sweep_functions
from nnsplice.errors import BadArgument, BadType, FileError, NeverFired, ShapeError
from nnsplice.kinds import KINDS
from nnsplice.units import UnitPlan
from nnsplice.units.running import merged
from nnsplice.work import RunFolder, Worker
from units import questions
from units.questions import CLEAN, CORRUPTED, HEADS, LOAD, METRIC, NAMES, SOURCE, vector


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[1]), *sys.path])
    warnings.filterwarnings("ignore", message=".*apart in the mean")


@pytest.fixture(scope="module")
def model() -> Any:
    return sweep_functions.precise()


@pytest.fixture(scope="module")
def other() -> Any:
    return sweep_functions.precise_other()


def _folder(plan: Any, path: Path, source: bool, **more: Any) -> RunFolder:
    """The plan in a run folder, of which no unit is done."""
    given = {"source": SOURCE} if source else {}
    with pytest.raises(FileError, match="no unit of"):
        ns.run(plan, LOAD, on="folder", out=path, size=1, max_tokens=64, progress=False, **given, **more)
    return RunFolder.open(path)


@pytest.mark.parametrize("name", NAMES)
def test_units_give_the_numbers_of_the_call_and_the_same_bits_in_any_order(
    model: Any, other: Any, tmp_path: Path, name: str
) -> None:
    question, arguments, options = questions.asked(name, model, other)
    plan = ns.plan(question, *arguments, **options)
    source = {"source": other} if question is ns.sweep_weights else {}
    whole = question(*arguments, **options, progress=False)
    here = ns.run(plan, model, size=1, max_tokens=64, progress=False, **source)
    assert questions.told(here) == questions.told(whole)
    for key, array in questions.numbers(whole).items():
        np.testing.assert_allclose(questions.numbers(here)[key], array, rtol=0, atol=1e-11)

    folder = _folder(plan, tmp_path / "run", bool(source))
    assert folder.units == len(CLEAN)
    threads = torch.get_num_threads()
    try:
        task = folder.task()  # another model object, made anew from its name
        for number in reversed(range(folder.units)):
            folder.keep(number, task.run(number), {})
    finally:
        torch.set_num_threads(threads)
    there = merged(folder.path)
    assert questions.bits(there) == questions.bits(here)
    assert questions.told(there) == questions.told(here)


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_is_plain_data_and_the_same_again(model: Any, other: Any, tmp_path: Path, name: str) -> None:
    question, arguments, options = questions.asked(name, model, other)
    plan, again = (ns.plan(question, *arguments, **options) for _ in range(2))
    assert plan == again
    assert hash(plan) == hash(again)
    assert plan.digest == again.digest
    plan.write(tmp_path, size=None)
    read, _ = UnitPlan.read(tmp_path)
    assert read == plan
    assert (
        json.loads(plan.text)["weights"]
        == ns.plan_sweep(model, CLEAN[:1], CORRUPTED[:1], HEADS, METRIC).asked["weights"]
    )
    for size in (None, 1, 700):
        units = plan.units(size)
        assert sorted(prompt for unit in units for prompt in unit) == list(range(len(CLEAN)))
        assert units == again.units(size)


@pytest.mark.parametrize("name", ["steering, generated", "path_patch", "attribute, eap-ig", "faithfulness",
                                  "sweep_weights", "capture"])  # fmt: skip
def test_a_part_of_the_units_gives_the_prompts_that_are_there(
    model: Any, other: Any, tmp_path: Path, name: str
) -> None:
    question, arguments, options = questions.asked(name, model, other)
    plan = ns.plan(question, *arguments, **options)
    folder = _folder(plan, tmp_path / "run", question is ns.sweep_weights)
    task = folder.task()
    units = plan.units(1)
    done = [number for number, unit in enumerate(units) if unit[0] in (1, 3)]
    for number in done:
        folder.keep(number, task.run(number), {})
    with pytest.raises(FileError, match="3 of 5 units are missing"):
        merged(folder.path)
    some = merged(folder.path, partial=True)
    assert Worker(folder).work() == 0
    whole = merged(folder.path)
    for key, array in questions.numbers(some).items():
        np.testing.assert_array_equal(array, questions.numbers(whole)[key][[1, 3]])
    if isinstance(some, ns.SweepResult):
        assert some.table.prompts.tolist() == [1, 3]
        assert some.table.tokens == tuple(whole.table.tokens[row] for row in (1, 3))
        asked = some.asked.get("clean", some.asked.get("prompts"))
        assert asked["texts"] == [CLEAN[1], CLEAN[3]]
    if isinstance(some, ns.steering.SteeringSweep):
        assert some.texts == tuple(whole.texts[row] for row in (1, 3))


def test_all_kinds_are_tried_here(model: Any, other: Any) -> None:
    tried = {questions.asked(name, model, other)[0] for name in NAMES}
    assert len(tried) == len(KINDS)


def test_a_sweep_has_a_plan_of_its_own(model: Any) -> None:
    with pytest.raises(BadArgument, match=r"sweep is not run in units[\s\S]*ns\.plan_sweep"):
        ns.plan(ns.sweep, model, CLEAN, CORRUPTED, HEADS, METRIC)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"method": "auto"}, "best on a slice of all prompts"),
        ({"method": "exact"}, "path patching, which has units of its own"),
        ({"verify": 3}, "ranks the estimates of all prompts"),
        ({"method": "best"}, "there is no method"),
        ({"method": "ig", "receivers": "unembed"}, "receivers would do nothing"),
    ],
)
def test_what_ranks_over_all_prompts_is_refused_by_name(model: Any, options: dict[str, Any], why: str) -> None:
    with pytest.raises(BadArgument, match=why):
        ns.plan(ns.attribute, model, CLEAN, CORRUPTED, HEADS, METRIC, **options)


def test_pairs_that_a_method_cannot_take_are_told_before_anything_runs(model: Any) -> None:
    with pytest.raises(ShapeError, match="embeddings of one prompt"):
        ns.plan(ns.attribute, model, ["w3 w4 w5 w6 w7"], ["w3 w9 w5 w6"], HEADS, METRIC, method="ig", align="end")


def test_constants_that_are_trained_for_each_circuit_are_refused(model: Any) -> None:
    with pytest.raises(BadArgument, match=r"trains constants[\s\S]*ns\.optimal_ablation"):
        ns.plan(ns.faithfulness, model, questions.circuits(model), CLEAN, None, METRIC, ablation="optimal")


def test_trained_constants_go_along(model: Any) -> None:
    circuit = questions.circuits(model)[0]
    constants = ns.optimal_ablation(model, circuit, CLEAN, CORRUPTED, steps=2, progress=False)
    options: dict[str, Any] = {"ablation": constants}
    plan = ns.plan(ns.faithfulness, model, circuit, CLEAN, None, METRIC, **options)
    whole = ns.faithfulness(model, circuit, CLEAN, None, METRIC, **options, progress=False)
    np.testing.assert_allclose(ns.run(plan, model, progress=False).values, whole.values, rtol=0, atol=1e-11)


def test_what_other_processes_cannot_have_is_refused(model: Any, other: Any) -> None:
    steer = (model, CLEAN, vector(), [1.0])
    weights = dict(other._module.named_parameters())
    for ask, what in (
        (lambda: ns.plan(ns.steering.sweep, *steer, lambda logits: logits[:, 0]), "the metric is '<lambda>'"),
        (lambda: ns.plan(ns.steering.sweep, *steer, METRIC, operator=lambda h, v, c: h), "the operator is '<lambda>'"),
        (lambda: ns.plan(ns.steering.sweep, *steer, len, max_new_tokens=2, do_sample=True), "do_sample=True draws"),
        (lambda: ns.plan(ns.steering.sweep, *steer, sweep_functions.words, max_new_tokens=2, stop_strings=["a"]),
         "stop_strings= is no text and no number"),
        (lambda: ns.plan(ns.sweep_weights, model, weights, CLEAN, HEADS, METRIC), "tensors of this process"),
        (lambda: ns.plan(ns.attribute, model, CLEAN, CORRUPTED, HEADS, lambda logits: logits[:, 0]), "<lambda>"),
    ):  # fmt: skip
        with pytest.raises(BadArgument, match=what):
            ask()


def test_options_that_would_do_nothing_are_refused(model: Any, other: Any) -> None:
    plan = ns.plan(ns.attribute, model, CLEAN, CORRUPTED, HEADS, METRIC)
    with pytest.raises(BadArgument, match=r"executor, journal says nothing to a run of ns\.attribute"):
        ns.run(plan, model, executor="packed", journal="j.jsonl")
    with pytest.raises(BadArgument, match="threads, partial says nothing to a run in this process"):
        ns.run(plan, model, threads=2, partial=True)
    with pytest.raises(
        BadArgument, match=r"executor, max_tokens says how a plan is run[\s\S]*ns\.run\(plan, model, ex"
    ):
        ns.plan(ns.attribute, model, CLEAN, CORRUPTED, HEADS, METRIC, executor="packed", max_tokens=4)
    with pytest.raises(BadType, match="no option oter="):
        ns.plan(ns.path_patch, model, CLEAN, CORRUPTED, HEADS, "unembed", METRIC, oter=1)
    with pytest.raises(BadArgument, match="source= would do nothing"):
        ns.run(plan, model, source=other)
    with pytest.raises(BadArgument, match="is about two"):
        ns.run(ns.plan(ns.sweep_weights, model, other, CLEAN, HEADS, METRIC), model)
    with pytest.raises(BadArgument, match="acdc is not run in units"):
        ns.plan(ns.acdc, model)
    with pytest.raises(BadArgument, match="size=0"):
        plan.units(0)


@pytest.mark.parametrize("out", ["a/run.zarr", "a/run.zarr/", Path("a/run.zarr"), "s3://bucket/a/run.zarr"])
def test_a_zarr_store_is_for_sweeps_alone(model: Any, tmp_path: Path, monkeypatch: Any, out: Any) -> None:
    monkeypatch.chdir(tmp_path)
    plan = ns.plan(ns.attribute, model, CLEAN, CORRUPTED, HEADS, METRIC)
    for on in (None, "local:1", "folder"):
        with pytest.raises(BadArgument, match=r"sweep go to alone; this is ns\.attribute[\s\S]*write: out='.*a/run'"):
            ns.run(plan, LOAD, on=on, out=out)
    assert list(tmp_path.iterdir()) == []


def test_other_models_are_refused(model: Any, other: Any, tmp_path: Path) -> None:
    plan = ns.plan(ns.sweep_weights, model, other, CLEAN, HEADS, METRIC)
    with pytest.raises(BadArgument, match="the model has other weights"):
        ns.run(plan, other, source=other)
    with pytest.raises(BadArgument, match="the source has other weights"):
        ns.run(plan, model, source=model)
    with pytest.raises(FileError, match="no unit of"):
        ns.run(plan, LOAD, source=LOAD, on="folder", out=tmp_path / "run")
    worker = Worker(RunFolder.open(tmp_path / "run"))
    assert worker.work() == 3
    assert "the source sweep_functions:precise has the weights" in worker.record["reason"]


def test_a_function_that_has_changed_is_refused(model: Any, tmp_path: Path, monkeypatch: Any) -> None:
    plan = ns.plan(ns.steering.sweep, model, CLEAN, vector(), [1.0], sweep_functions.words, max_new_tokens=2)
    folder = _folder(plan, tmp_path / "run", False)

    def words(text: str) -> float:
        return -1.0

    monkeypatch.setattr(sweep_functions, "words", words)
    worker = Worker(folder)
    assert worker.work() == 3
    assert "the metric is another function here" in worker.record["reason"]


def test_a_folder_of_another_question_is_refused(model: Any, tmp_path: Path) -> None:
    plan = ns.plan(ns.attribute, model, CLEAN, CORRUPTED, HEADS, METRIC)
    _folder(plan, tmp_path / "run", False)
    _folder(plan, tmp_path / "run", False)
    for one, more, differs in (
        (ns.plan(ns.attribute, model, CLEAN, CORRUPTED, HEADS, METRIC, method="ig"), {}, "asked: "),
        (ns.plan(ns.path_patch, model, CLEAN, CORRUPTED, HEADS, "unembed", METRIC), {}, "question: "),
        (plan, {"size": 900}, "units: "),
        (plan, {"max_tokens": 65}, "max_tokens: 64 there, 65 here"),
    ):
        with pytest.raises(FileError, match=differs):
            options: dict[str, Any] = {"size": 1, "max_tokens": 64, **more}
            ns.run(one, LOAD, on="folder", out=tmp_path / "run", **options)


def test_steering_that_reaches_no_token_of_any_unit_is_told(model: Any) -> None:
    """A unit of short prompts alone is no mistake; that of all is, as in one process."""
    far = ns.plan(ns.steering.sweep, model, CLEAN, vector(), [1.0], METRIC, where=ns.steering.from_token(9))
    with pytest.raises(NeverFired):
        ns.run(far, model, size=1, progress=False)
    some = ns.plan(ns.steering.sweep, model, CLEAN, vector(), [1.0], METRIC, where=ns.steering.from_token(4))
    found = ns.run(some, model, size=1, progress=False)
    moved = np.abs(found.values - found.baseline[:, None, None]).max((1, 2))
    assert (moved > 1e-6).tolist() == [False, False, True, False, False]


def test_a_steering_plan_holds_no_model(model: Any) -> None:
    import gc
    import weakref

    own = sweep_functions.precise()
    plan = ns.plan(ns.steering.sweep, own, CLEAN, vector(), [1.0], METRIC)
    gone = weakref.ref(own._module)
    del own
    gc.collect()
    assert gone() is None
    assert ns.run(plan, model, progress=False).values.shape == (5, 2, 1)
