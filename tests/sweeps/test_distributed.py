"""A plan in other processes: the same plan again from its files, the same bits whoever runs its units."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nnsplice as ns
import sweep_functions
from nnsplice.errors import BadArgument, FileError, MissingPackage, TeamError
from nnsplice.sweeps import distributed
from nnsplice.sweeps.plan import Plan
from nnsplice.sweeps.plan_files import read_plan, write_plan
from nnsplice.work import RunFolder, Worker

ROOT = Path(__file__).parents[2]
CLEAN = ["w3 w4 w5 w6", "w3 w4 w8", "w5 w9 w3 w7 w8", "w4 w4"]
CORRUPTED = ["w3 w9 w5 w6", "w3 w9 w8", "w5 w4 w3 w7 w8", "w5 w4"]
SITES = ["layers[:].output[:]", "layers[:].heads[:].output[:]"]
LOAD, OTHER = "sweep_functions:tiny", "sweep_functions:other"


@pytest.fixture(autouse=True)
def _found_by_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "tests"), str(ROOT / "src"), *sys.path])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="module")
def tiny() -> Any:
    return sweep_functions.tiny()


def _plan(model: Any, metric: Any = None, **options: Any) -> Plan:
    return ns.plan_sweep(model, CLEAN, CORRUPTED, SITES, metric or ns.logit_diff("w7", "w8"), **options)


def _folder(plan: Plan, path: Path, *, load: str = LOAD, size: float = 20, **more: Any) -> RunFolder:
    options: dict[str, Any] = {"executor": "auto", "max_tokens": 64, "threads": 1, "size": size, **more}
    folder = distributed.prepared(plan, path, **options)
    (folder.path / "load.json").write_text(json.dumps({"load": load, "options": {}}))
    return folder


def _same(a: Any, b: Any) -> bool:
    return a.table.values.tobytes() == b.table.values.tobytes() and a == b


PLANS: dict[str, Any] = {
    "patch": {},
    "several metrics": {"metric": {"a": ns.logit_diff("w7", "w8"), "b": ns.rank({"w7", "w9"})}},
    "a metric that compares": {"metric": [ns.kl_divergence(), ns.rank("w7")]},
    "sequence": {"metric": ns.sequence_log_probability(["w5 w6", "w7", "w8 w9 w3", "w4"])},
    "own metric": {"metric": sweep_functions.largest},
    "own operation": {"operation": sweep_functions.halved},
    "noise": {"operation": "noise", "seed": 3},
    "window": {"window": 2},
    "span": {"spans": {"subject": [(1, 2), (1, 3), (0, 2), (0, 1)]}, "sites": ['layers[:].output["subject"]']},
    "role": {
        "spans": {"clean": {"subject": [(1, 2), (1, 2), (0, 2), (0, 1)]},
                  "corrupted": {"subject": [(1, 2), (1, 2), (0, 2), (0, 1)]}},
        "align": "role",
    },
    "sets": {"sites": [["layers[0].heads[1][0]", "layers[2].output[-1]"], ["layers[1]"]]},
    "subspace": {"subspace": ns.Subspace.of("layers[1].output", torch.eye(16)[:3]), "sites": "layers[:].output[:]"},
    "knockout": {"operation": "knockout", "sites": ["layers[:].heads[0].pattern[-1][0]"]},
}  # fmt: skip


@pytest.mark.parametrize("kind", PLANS)
def test_a_plan_from_its_files_is_the_plan(tiny: Any, tmp_path: Path, kind: str) -> None:
    options = {"metric": ns.logit_diff("w7", "w8"), "sites": SITES, **PLANS[kind]}
    plan = ns.plan_sweep(tiny, CLEAN, CORRUPTED, **options)
    write_plan(plan, tmp_path)
    again = read_plan(json.loads((tmp_path / "plan.json").read_text())["plan"], tmp_path, tiny)
    assert again.jobs == plan.jobs
    assert again.known == plan.known
    assert [target.cell for target in again.targets] == [target.cell for target in plan.targets]
    assert [(p.places, p.position, p.key) for t in again.targets for p in t.parts] == [
        (p.places, p.position, p.key) for t in plan.targets for p in t.parts
    ]
    one, two = (ns.run(of, tiny, progress=False) for of in (plan, again))
    assert _same(one, two)


@pytest.mark.parametrize("operation", ["mean", "add", "resample"])
def test_a_reference_goes_along(tiny: Any, tmp_path: Path, operation: str) -> None:
    sites = ["layers[1].output[0]"]
    reference = ns.capture(tiny, [row[:5] for row in CLEAN], sites)
    plan = ns.plan_sweep(
        tiny, None, CORRUPTED, sites, ns.logit_diff("w7", "w8"), operation=operation, reference=reference
    )
    write_plan(plan, tmp_path)
    again = read_plan(json.loads((tmp_path / "plan.json").read_text())["plan"], tmp_path, tiny)
    assert _same(ns.run(plan, tiny, progress=False), ns.run(again, tiny, progress=False))


def test_a_corruption_goes_along(tiny: Any, tmp_path: Path) -> None:
    from nnsplice.sweeps.corruption import Corruption

    (place,) = ns.expand(tiny, "embed.output")
    noise = tuple(torch.randn(1, 16, generator=torch.Generator().manual_seed(n)) for n in range(4))
    change = Corruption(place, ((0,),) * 4, noise)
    plan = ns.plan_sweep(tiny, CORRUPTED, None, SITES, ns.logit_diff("w7", "w8"), corruption=change)
    write_plan(plan, tmp_path)
    again = read_plan(json.loads((tmp_path / "plan.json").read_text())["plan"], tmp_path, tiny)
    assert _same(ns.run(plan, tiny, progress=False), ns.run(again, tiny, progress=False))


@pytest.mark.parametrize("kind", ["patch", "several metrics", "sequence"])
def test_a_worker_in_this_process_finds_what_a_run_finds(tiny: Any, tmp_path: Path, kind: str) -> None:
    options = {"metric": ns.logit_diff("w7", "w8"), "sites": SITES, **PLANS[kind]}
    plan = ns.plan_sweep(tiny, CLEAN, CORRUPTED, **options)
    whole = ns.run(plan, tiny, progress=False)
    folder = _folder(plan, tmp_path / "run")
    assert folder.units > 4
    assert Worker(folder).work() == 0
    found = distributed.merged(folder.path)
    assert found.asked == whole.asked
    assert found.is_complete
    assert found.cells == whole.cells
    assert found.run.executor == whole.run.executor
    np.testing.assert_allclose(found.table.values, whole.table.values, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.clean, whole.clean, rtol=1e-4, atol=1e-5)
    assert (found.table.exists == whole.table.exists).all()


def test_processes_give_the_bits_of_one(tiny: Any, tmp_path: Path) -> None:
    """Two processes, and one worker here that takes the units from the end."""
    plan = _plan(tiny)
    found = ns.run(
        plan, sweep_functions.tiny, on="local:2", out=tmp_path / "run", size=20, max_tokens=64, progress=False
    )
    folder = _folder(plan, tmp_path / "other")
    units = distributed.opened(folder)
    for number in reversed(range(folder.units)):
        folder.keep(number, units.run(number), {})
    assert _same(found, distributed.merged(folder.path))
    # ... and the same call again runs nothing.
    again = ns.run(
        plan, sweep_functions.tiny, on="local:2", out=tmp_path / "run", size=20, max_tokens=64, progress=False
    )
    assert _same(found, again)


def test_a_model_with_other_weights_is_refused_with_both_digests(tiny: Any, tmp_path: Path) -> None:
    plan = _plan(tiny)
    folder = _folder(plan, tmp_path / "run", load="sweep_functions:other")
    worker = Worker(folder)
    assert worker.work() == 3
    from nnsplice import engine

    other = engine.weights_digest(sweep_functions.other())
    assert other in worker.record["reason"]
    assert plan.asked["weights"] in worker.record["reason"]


def test_what_is_missing_is_marked(tiny: Any, tmp_path: Path) -> None:
    plan = _plan(tiny)
    folder = _folder(plan, tmp_path / "run")
    with pytest.raises(FileError, match="no unit"):
        distributed.merged(folder.path, partial=True)
    units = distributed.opened(folder)
    chosen = [unit.number for unit in units.units if unit.prompts == (2,)][:1]
    chosen += [unit.number for unit in units.units if 3 in unit.prompts]
    for number in chosen:
        folder.keep(number, units.run(number), {})
    with pytest.raises(FileError, match="are missing"):
        distributed.merged(folder.path)
    some = distributed.merged(folder.path, partial=True)
    assert 2 in some.grid("layers[:].output").prompt
    assert 0 not in some.grid("layers[:].output").prompt
    assert not some.is_complete
    rest = [number for number in range(folder.units) if number not in chosen]
    for number in rest:
        folder.keep(number, units.run(number), {})
    whole = distributed.merged(folder.path)
    rows = some.table.prompts
    done = some.table.done
    assert (whole.table.values[rows][done] == some.table.values[done]).all()


def test_a_folder_of_another_run_is_refused(tiny: Any, tmp_path: Path) -> None:
    plan = _plan(tiny)
    _folder(plan, tmp_path / "run")
    _folder(plan, tmp_path / "run")
    with pytest.raises(FileError, match=r"cut differently[\s\S]*units: "):
        _folder(plan, tmp_path / "run", size=90)
    with pytest.raises(FileError, match=r"max_tokens: 64 there, 65 here"):
        _folder(plan, tmp_path / "run", max_tokens=65)
    with pytest.raises(FileError, match="asked: "):
        _folder(_plan(tiny, ns.rank("w7")), tmp_path / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(FileError, match=r"holds notes\.txt"):
        _folder(plan, tmp_path / "full")


@pytest.mark.parametrize(
    ("metric", "operation", "what"),
    [(lambda logits: logits[:, 0], "patch", "the metric"), (None, lambda value: value, "the operation")],
)
def test_lambdas_are_refused(tiny: Any, tmp_path: Path, metric: Any, operation: Any, what: str) -> None:
    plan = _plan(tiny, metric, operation=operation)
    with pytest.raises(BadArgument, match=rf"{what} is '<lambda>'[\s\S]*my_module:my_function"):
        ns.run(plan, LOAD, on="local:1", out=tmp_path / "run")


def test_what_loads_the_model_has_to_be_found_by_others(tiny: Any, tmp_path: Path) -> None:
    plan = _plan(tiny)
    with pytest.raises(BadArgument, match="what loads the model is '<lambda>'"):
        ns.run(plan, lambda: tiny, on="local:1", out=tmp_path / "run")
    with pytest.raises(BadArgument, match="lives in this process"):
        ns.run(plan, tiny, on="local:1", out=tmp_path / "run")


@pytest.mark.parametrize("where", ["s3://bucket/run", "gs://bucket/run"])
def test_without_obstore_an_address_is_refused(tiny: Any, tmp_path: Path, monkeypatch: Any, where: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(MissingPackage, match=r"nnsplice\[cloud\]"):
        ns.run(_plan(tiny), LOAD, on="local:1", out=where)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("on", ["locl", "local:0", "local:x", "", 3])
def test_where_nothing_runs_is_refused(tiny: Any, tmp_path: Path, on: Any) -> None:
    with pytest.raises(BadArgument, match="local:8"):
        ns.run(_plan(tiny), LOAD, on=on, out=tmp_path / "run")


def test_options_without_effect_are_refused(tiny: Any) -> None:
    with pytest.raises(BadArgument, match="size, partial says nothing"):
        ns.run(_plan(tiny), tiny, size=3, partial=True)
    with pytest.raises(BadArgument, match="journal beside a run folder"):
        ns.run(_plan(tiny), LOAD, on="local:1", journal="x.jsonl")


def test_a_folder_is_written_and_left(tiny: Any, tmp_path: Path) -> None:
    plan = _plan(tiny)
    with pytest.raises(FileError, match="no unit of"):
        ns.run(plan, LOAD, on="folder", out=tmp_path / "run", progress=False)
    assert (tmp_path / "run" / "plan.json").exists()
    assert Worker(RunFolder.open(tmp_path / "run")).work() == 0
    assert ns.run(plan, LOAD, on="folder", out=tmp_path / "run", progress=False).is_complete


def test_a_model_that_cannot_be_loaded_is_told(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(TeamError, match="no_such_module"):
        ns.run(_plan(tiny), "no_such_module:load", on="local:1", out=tmp_path / "run", progress=False)


def test_a_function_that_has_changed_is_refused(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    plan = _plan(tiny, sweep_functions.largest)
    folder = _folder(plan, tmp_path / "run")

    def largest(logits: torch.Tensor) -> torch.Tensor:
        return logits.min(-1).values

    monkeypatch.setattr(sweep_functions, "largest", largest)
    worker = Worker(folder)
    assert worker.work() == 3
    assert "the metric is another function here" in worker.record["reason"]


def test_another_models_values_come_from_a_model_that_workers_load(tiny: Any, tmp_path: Path) -> None:
    """Two models in one process each, and two workers: the same bits; the whole in one process: the same numbers."""
    other, metric = sweep_functions.other(), ns.logit_diff("w7", "w8")
    plan = ns.plan_sweep(tiny, CLEAN, None, SITES, metric, source=other)
    options: dict[str, Any] = {"size": 20, "max_tokens": 64, "progress": False}
    with pytest.raises(BadArgument, match=r"values from another model[\s\S]*source=\"tuned\""):
        ns.run(plan, LOAD, on="local:1", out=tmp_path / "run", **options)
    with pytest.raises(BadArgument, match="lives in this process"):
        ns.run(plan, LOAD, on="local:1", out=tmp_path / "run", source=other, **options)
    with pytest.raises(BadArgument, match="source would do nothing"):
        ns.run(_plan(tiny), LOAD, on="local:1", out=tmp_path / "run", source=OTHER, **options)
    found = ns.run(plan, LOAD, on="local:2", out=tmp_path / "run", source=OTHER, **options)
    alone = ns.run(plan, LOAD, on="local:1", out=tmp_path / "one", source=OTHER, **options)
    whole = ns.run(plan, tiny, source=other, progress=False)
    assert _same(found, alone)
    assert found.asked == whole.asked
    np.testing.assert_allclose(found.table.values, whole.table.values, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.clean, whole.clean, rtol=1e-4, atol=1e-5)
    assert np.abs(found.clean - found.corrupted).min() > 1e-4  # the two models differ, so the right one was loaded


def test_a_source_with_other_weights_is_refused(tiny: Any, tmp_path: Path) -> None:
    plan = ns.plan_sweep(tiny, CLEAN, None, SITES, ns.logit_diff("w7", "w8"), source=sweep_functions.other())
    with pytest.raises(TeamError, match="the source sweep_functions:tiny has the weights"):
        ns.run(plan, LOAD, on="local:1", out=tmp_path / "run", source=LOAD, progress=False)


def test_a_subspace_changes_the_part_that_lies_in_it_in_other_processes_too(tiny: Any, tmp_path: Path) -> None:
    """Beside the sweep of all of a value: a subspace that was lost on the way would give those numbers."""
    sites, metric = "layers[:].output[:]", ns.logit_diff("w7", "w8")
    vectors = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    part = ns.Subspace.of("layers[1].output", vectors)
    plan = ns.plan_sweep(tiny, CLEAN, CORRUPTED, sites, metric, subspace=part)
    found = ns.run(plan, LOAD, on="local:1", out=tmp_path / "run", size=20, max_tokens=64, progress=False)
    whole = ns.run(plan, tiny, progress=False)
    assert found.asked == whole.asked
    np.testing.assert_allclose(found.table.values, whole.table.values, rtol=1e-4, atol=1e-5)
    wholly = ns.sweep(tiny, CLEAN, CORRUPTED, sites, metric, progress=False)
    assert np.nanmax(np.abs(found.table.values - wholly.table.values)) > 1e-2


def test_a_part_goes_to_other_processes_with_its_numbers(tiny: Any, tmp_path: Path) -> None:
    plan = _plan(tiny, operation="noise").take([3, 1])
    folder = _folder(plan, tmp_path / "run")
    assert Worker(folder).work() == 0
    found, whole = distributed.merged(folder.path), ns.run(plan, tiny, progress=False)
    assert found.asked == whole.asked
    assert found.table.prompts.tolist() == [3, 1]
    np.testing.assert_allclose(found.table.values, whole.table.values, rtol=1e-4, atol=1e-5)
