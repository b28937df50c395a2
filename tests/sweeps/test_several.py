"""Several metrics of one sweep: the numbers of as many sweeps, at the price of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest

import nnsplice as ns
from nnsplice.errors import BadArgument, BadType
from nnsplice.results import SweepResult
from zoo import double, wrap

mpl.use("agg")
CLEAN = ["w3 w4 w5 w6", "w13 w14 w15"]
CORRUPTED = ["w3 w9 w5 w6", "w13 w24 w15"]
SITES = ["layers[:].output", "layers[:].mlp.output"]
METRICS: dict[str, Any] = {
    "diff": ns.logit_diff("w7", {"w8", "w9"}),
    "p": ns.probability(["w7", "w10"]),
    "kl": ns.kl_divergence(),
    "top": lambda logits: logits.max(-1).values,
}
LOCAL: dict[str, Any] = {"diff": ns.logit_diff("w7", {"w8", "w9"}), "other": ns.logit_diff(["w7", "w10"], "w11")}


def _sweep(model: Any, metric: Any, **options: Any) -> SweepResult:
    return ns.sweep(model, CLEAN, CORRUPTED, SITES, metric, **{"progress": False, **options})


@pytest.mark.parametrize("metrics", [METRICS, LOCAL], ids=["any", "local"])
@pytest.mark.parametrize("executor", ["auto", "packed", "batched", "reference"])
def test_they_are_what_as_many_sweeps_measure_at_the_price_of_one(executor: str, metrics: dict[str, Any]) -> None:
    model = double("gpt2")
    for asked in (metrics, *metrics.values()):
        _sweep(model, asked, executor=executor)  # the first call also pays for the choice of an executor
    together = _sweep(model, metrics, executor=executor)
    assert together.metrics == tuple(metrics)
    for name, metric in metrics.items():
        alone, one = _sweep(model, metric, executor=executor), together.only(name)
        np.testing.assert_allclose(one.table.values, alone.table.values, atol=1e-12, rtol=0)
        np.testing.assert_allclose(one.clean, alone.clean, atol=1e-12)
        np.testing.assert_allclose(one.corrupted, alone.corrupted, atol=1e-12)
        assert one.asked == alone.asked and one.metric == alone.metric
        for count in ("forwards", "block_calls", "tokens", "known", "executor"):
            assert getattr(together.run, count) == getattr(alone.run, count)


def test_the_grid_has_an_axis_of_them_in_their_order() -> None:
    result = _sweep(double("gpt2"), METRICS)
    grid = result.grid("layers[:].output")
    assert grid.dims == ("prompt", "metric", "layer", "position")
    assert grid.metric.values.tolist() == list(METRICS) and grid.attrs == {"component": "layers[:].output"}
    for name in METRICS:
        one = result.only(name)
        np.testing.assert_array_equal(grid.sel(metric=name).values, one.grid("layers[:].output").values)
        for measure in ("effect", "change"):
            found = getattr(result, measure)("layers[:].output").sel(metric=name)
            np.testing.assert_array_equal(found.values, getattr(one, measure)("layers[:].output").values)
    frame = result.frame()
    assert frame.columns[:2].tolist() == ["prompt", "metric"] and len(frame) == len(METRICS) * int(
        result.table.done.sum()
    )
    for name, rows in frame.groupby("metric", sort=False):
        expected = result.only(str(name)).frame()
        assert rows.drop(columns="metric").reset_index(drop=True).equals(expected)
    assert frame["metric"].drop_duplicates().tolist() == list(METRICS)
    assert "diff: clean" in repr(result) and "kl: clean" in repr(result)
    listed = _sweep(double("gpt2"), [ns.logit_diff("w7", "w8"), ns.rank("w7")])
    assert listed.grid("layers[0].mlp").metric.values.tolist() == ["logit_diff", "rank"]


def test_what_shows_one_asks_for_it(tmp_path: Path) -> None:
    result = ns.sweep(double("gpt2"), CLEAN[:1], CORRUPTED[:1], SITES[0], METRICS, progress=False)
    for what in ("plot", "best"):
        with pytest.raises(BadArgument, match=rf"4 metrics were measured[\s\S]*result\.only\('diff'\)\.{what}\(\)"):
            getattr(result, what)()
    result.only("p").plot()
    assert len(result.only("p").best(2)) == 2
    with pytest.raises(BadArgument, match=r"no metric 'q'[\s\S]*diff, p, kl, top"):
        result.only("q")
    result.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert all(f'"metric":"{name}"' in page for name in METRICS)


def test_files_shards_and_journals_hold_all_of_them(tmp_path: Path) -> None:
    model = double("gpt2")
    plan = ns.plan_sweep(model, CLEAN, CORRUPTED, SITES, METRICS)
    options: Any = {"executor": "batched", "progress": False, "max_tokens": 20}
    whole = ns.run(plan, model, **options)
    whole.to_file(tmp_path / "r.safetensors")
    assert SweepResult.from_file(tmp_path / "r.safetensors") == whole
    parts = [ns.run(plan.shard(n, 3), model, **options) for n in range(3)]
    merged = SweepResult.merge(parts)
    assert not parts[0].is_complete and merged.is_complete and merged.metrics == tuple(METRICS)
    np.testing.assert_allclose(merged.table.values, whole.table.values, atol=1e-12)
    journal = tmp_path / "run.jsonl"
    assert ns.run(plan, model, journal=journal, **options) == whole
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[: len(lines) // 2]))
    again = ns.run(plan, model, journal=journal, **options)
    assert again == whole and again.run.forwards < whole.run.forwards
    with pytest.raises(ns.errors.FileError, match="another sweep"):
        _sweep(model, METRICS["diff"], journal=journal)


def test_ablations_traces_by_role_and_paths_take_several() -> None:
    model = double("gpt2")
    ablated = ns.ablate(model, CLEAN, "layers[:].heads[:]", LOCAL, progress=False)
    assert ablated.grid().dims == ("prompt", "metric", "layer", "head")
    sent = ns.path_patch(model, CLEAN, CORRUPTED, "layers[0].heads[:]", "unembed", LOCAL, progress=False)
    alone = ns.path_patch(model, CLEAN, CORRUPTED, "layers[0].heads[:]", "unembed", LOCAL["other"], progress=False)
    np.testing.assert_allclose(sent.only("other").table.values, alone.table.values, atol=1e-12)
    spans = {"subject": [(1, 3), (1, 2)]}
    roles = _sweep(model, LOCAL, spans=spans).by_role()
    expected = _sweep(model, LOCAL["diff"], spans=spans).by_role()
    np.testing.assert_allclose(roles.only("diff").table.values, expected.table.values, atol=1e-12)


@pytest.mark.parametrize(
    ("metric", "kind", "message"),
    [
        ([ns.rank("w7"), ns.rank("w8")], BadArgument, r"2 of these metrics are called rank[\s\S]*metric=\{"),
        ([ns.rank("w7"), ns.probability("w7", position=0)], BadArgument, r"rank \[-1\], probability \[0\]"),
        ([], BadType, "no metric"),
        ([3], BadType, "no metric"),
        ("rank", BadType, "no metric"),
        ([ns.rank("w7"), ns.sequence_log_probability("w7 w8")], BadArgument, "have to stand in the prompts"),
    ],
)
def test_what_makes_no_sense_is_refused(metric: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        _sweep(wrap("gpt2"), metric)


def test_an_estimate_is_of_one_metric() -> None:
    several: Any = LOCAL
    with pytest.raises(BadArgument, match="gradient of one metric"):
        ns.attribute(wrap("gpt2"), CLEAN, CORRUPTED, SITES, several, progress=False)
