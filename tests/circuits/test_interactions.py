"""Interactions, against runs of the bare module with hooks at one site and at two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import nnsplice as ns
from attribution.oracle import NAMES, Point, bare, ends, hooked, ids, kept, logit_diff
from attribution.test_nodes import linear
from zoo import double

CLEAN, CORRUPTED = "w3 w4 w5 w6 w8", "w3 w9 w5 w16 w7"
METRIC = ns.logit_diff("w7", "w8")


def measured(family: str, sites: dict[str, Point]) -> tuple[Any, float, float]:
    """The metric of a run of one prompt with these sites of the other: `(base, other, names)` -> that."""
    module = bare(family)
    values = {text: kept(module, ids(text), list(sites.values())) for text in (CLEAN, CORRUPTED)}

    def run(base: str, other: str, names: tuple[str, ...]) -> float:
        def write(point: Point) -> Any:
            def change(tensor: Tensor) -> Tensor:
                tensor = tensor.clone()
                point.part(tensor).copy_(point.part(values[other][point]))
                return tensor

            return change

        with torch.no_grad(), hooked(module, [(sites[name], write(sites[name])) for name in names]):
            return float(logit_diff(module, ids(base)))

    return run, ends(module, ids(CLEAN)), ends(module, ids(CORRUPTED))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_pairs_are_what_two_do_beyond_what_each_does(family: str) -> None:
    names = NAMES[family]
    sites = {
        "layers[0].heads[1].output": names.z(0, 1),
        "layers[1].heads[3].output": names.z(1, 3),
        "layers[1].mlp.output": Point(names.mlp.format(1)),
    }
    run, clean, corrupted = measured(family, sites)
    result = ns.interactions(double(family), CLEAN, CORRUPTED, list(sites), METRIC, progress=False)
    change = result.change().sel(prompt=0)
    order = list(sites)
    for name in order:
        up, down = run(CORRUPTED, CLEAN, (name,)), run(CLEAN, CORRUPTED, (name,))
        near(change.sel(set=name, metric="sufficiency"), up - corrupted)
        near(change.sel(set=name, metric="necessity"), clean - down)
    sizes: list[float] = []
    for a, b in ((0, 1), (0, 2), (1, 2)):
        pair = order[a], order[b]
        alone = [[run(CORRUPTED, CLEAN, (one,)) for one in pair], [run(CLEAN, CORRUPTED, (one,)) for one in pair]]
        expected = run(CORRUPTED, CLEAN, pair) - sum(alone[0]) + corrupted
        near(change.sel(set=" + ".join(pair), metric="sufficiency"), expected)
        around = run(CLEAN, CORRUPTED, pair) - sum(alone[1]) + clean
        near(change.sel(set=" + ".join(pair), metric="necessity"), around)
        sizes += [abs(expected), abs(around)]
    assert max(sizes) > 1e-3


def near(found: Any, expected: float) -> None:
    np.testing.assert_allclose(float(found), expected, atol=1e-7)


def test_in_a_straight_line_what_does_not_read_each_other_adds_up() -> None:
    sites = "layers[1].heads[:]"  # of which none reads another
    result = ns.interactions(linear(), CLEAN, CORRUPTED, sites, METRIC, progress=False)
    change = result.change().sel(prompt=0)
    pairs = [name for name in change.coords["set"].values if " + " in str(name)]
    assert len(pairs) == 4 * 3 // 2
    np.testing.assert_allclose(change.sel(set=pairs), 0.0, atol=1e-11)
    assert abs(change).max() > 1e-2


def test_a_place_that_backs_up_another_shows_in_necessity_below_zero() -> None:
    """A clipped sum: one of two is enough, so that only without both something is lost."""
    model = linear()
    last = model._module.transformer
    last.ln_f = Clipped().eval()
    sites = ["layers[1].mlp", "layers[2].mlp"]
    change = ns.interactions(model, CLEAN, CORRUPTED, sites, METRIC, progress=False).change().sel(prompt=0)
    singles, pair = [f"{site}.output" for site in sites], " + ".join(f"{site}.output" for site in sites)

    def lost(sets: list[list[str]]) -> np.ndarray:
        swept = ns.sweep(model, CORRUPTED, CLEAN, sets, METRIC, progress=False)
        return swept.corrupted[0] - swept.table.values[0]

    alone, both = lost([[site] for site in sites]), lost([sites])
    near(change.sel(set=pair, metric="necessity"), -(both[0] - alone.sum()))
    np.testing.assert_allclose(change.sel(set=singles, metric="necessity"), alone, atol=1e-10)


class Clipped(torch.nn.Module):
    """What is left of the stream where it is bounded."""

    def forward(self, states: Tensor) -> Tensor:
        return torch.tanh(states)


def test_chosen_pairs_alone() -> None:
    sites = ["layers[0].mlp", "layers[1].mlp", "layers[2].mlp"]
    chosen = [("layers[2].mlp", "layers[0].mlp")]
    model = double("gpt2")
    result = ns.interactions(model, CLEAN, CORRUPTED, sites, METRIC, pairs=chosen, progress=False)
    assert [cell.path for cell in result.cells] == [
        *(f"layers[{n}].mlp.output" for n in range(3)), "layers[0].mlp.output + layers[2].mlp.output",
    ]  # fmt: skip
    whole = ns.interactions(model, CLEAN, CORRUPTED, sites, METRIC, progress=False)
    name = "layers[0].mlp.output + layers[2].mlp.output"
    np.testing.assert_allclose(result.change().sel(set=name), whole.change().sel(set=name), atol=1e-12)
    assert result != whole


def test_the_figure_is_a_square_of_places_with_one_number_on_each_side(tmp_path: Path) -> None:
    model = double("gpt2")
    sites = ["layers[0].heads[1]", "layers[1].heads[3]", "layers[1].mlp", "layers[2].mlp"]
    chosen = [(sites[0], sites[1]), (sites[0], sites[3]), (sites[2], sites[1])]
    pairs = [CLEAN, "w3 w4 w7 w6 w8"], [CORRUPTED, "w3 w4 w9 w6 w8"]
    result = ns.interactions(model, *pairs, sites, METRIC, pairs=chosen, progress=False)
    result.to_file(tmp_path / "r.safetensors")
    change, names = result.change().mean("prompt"), [f"{site}.output" for site in sites]
    for one in (result, ns.SweepResult.from_file(tmp_path / "r.safetensors")):
        axes = one.plot()
        shown = np.ma.filled(np.ma.asarray(axes.images[0].get_array()), np.nan)
        labels = [label.get_text() for label in axes.get_xticklabels()]
        assert labels == [label.get_text() for label in axes.get_yticklabels()] == ["L0H1", "L1H3", "L1 mlp", "L2 mlp"]
        assert shown.shape == (4, 4) and np.isnan(shown).sum() == 16 - 6
        for a, b in ((0, 1), (0, 3), (1, 2)):
            pair = change.sel(set=f"{names[a]} + {names[b]}")
            np.testing.assert_allclose(shown[a, b], float(pair.sel(metric="sufficiency")), atol=1e-12)
            np.testing.assert_allclose(shown[b, a], float(pair.sel(metric="necessity")), atol=1e-12)
        assert "mean of 2 prompts" in axes.get_title()
    alone = np.ma.filled(np.ma.asarray(result.only("necessity").plot(prompt=1).images[0].get_array()), np.nan)
    necessity = result.change().sel(prompt=1, metric="necessity", set=f"{names[0]} + {names[1]}")
    np.testing.assert_allclose([alone[0, 1], alone[1, 0]], float(necessity), atol=1e-12)
    with pytest.raises(ns.errors.BadArgument, match="of='effect'"):
        result.plot(of="effect")
    with pytest.raises(ns.errors.BadArgument, match="prompt=7"):
        result.plot(prompt=7)


def test_a_table_has_both_places_of_a_pair() -> None:
    sites = ["layers[0].mlp", "layers[1].mlp", "layers[2].mlp"]
    frame = ns.interactions(double("gpt2"), CLEAN, CORRUPTED, sites, METRIC, progress=False).frame()
    rows: Any = frame[frame["metric"] == "necessity"]
    singles, pairs = rows[rows["second"].isna()], rows[rows["second"].notna()]
    assert singles["first"].tolist() == [f"{site}.output" for site in sites] and len(pairs) == 3
    assert (pairs["first"] + " + " + pairs["second"]).tolist() == pairs["set"].tolist()


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"sites": ["layers[0].mlp"]}, "two are needed"),
        ({"pairs": "some"}, "pairs='some'"),
        ({"pairs": []}, "no pairs"),
        ({"pairs": [("layers[0].mlp",)]}, "is no pair"),
        ({"pairs": [("layers[0].mlp", "layers[2].mlp")]}, "none of the sites"),
        ({"pairs": [("layers[0].mlp", "layers[0].mlp")]}, "with itself"),
        ({"metric": [METRIC, ns.probability("w7")]}, "one metric"),
        ({"operation": "zero"}, "no option operation="),
        ({"journal": "x.jsonl"}, "no journal="),
    ],
)
def test_mistakes_are_answered(given: dict[str, Any], match: str) -> None:
    asked = {"sites": ["layers[0].mlp", "layers[1].mlp"], "metric": METRIC, "progress": False, **given}
    with pytest.raises(ns.errors.NnspliceError, match=match):
        ns.interactions(double("gpt2"), CLEAN, CORRUPTED, asked.pop("sites"), asked.pop("metric"), **asked)
