"""A kind of site by any of its names, and what a result promises about its arrays."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest

import nnsplice as ns
from nnsplice.errors import BadArgument, BadType, UnknownPath
from nnsplice.results import Cell, Journal, SweepResult
from results.tables import table

RESID, MLP, ATTN = "layers[:].output", "layers[:].mlp.output", "layers[:].attn.output"


@pytest.fixture
def three() -> SweepResult:
    kinds = (RESID, MLP, ATTN)
    return SweepResult(
        table([Cell(k.replace(":", str(n)) + "[1]", k, layer=n, position=1) for k in kinds for n in (0, 1)])
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (MLP, MLP),
        ("mlp", MLP),
        ("layers[0].mlp", MLP),
        ("layers[7].mlp.output[3]", MLP),
        ("l1 attn", ATTN),
        ("attn.output", ATTN),
        ("layers[:].output[-1]", RESID),
        ("L0", RESID),
        (ns.parse_path("layers[1].attn"), ATTN),
    ],
)
def test_any_name_of_a_kind(three: SweepResult, name: Any, kind: str) -> None:
    assert three.grid(name).attrs["component"] == kind
    assert three.effect(name).attrs["component"] == kind


def test_a_native_path_is_found_by_its_own_cells() -> None:
    cells = [Cell(f"model.h[{n}].output[0][-1]", "model.h[:].output[0]", layer=n, position=-1) for n in (0, 1)]
    cells += [Cell("embed.output[-1]", "embed.output", position=-1)]
    assert SweepResult(table(cells)).grid("model.h[1].output[0][-1]").attrs["component"] == "model.h[:].output[0]"
    assert SweepResult(table(cells)).grid("embed").dims == ("prompt", "position")


def test_a_name_of_several_or_of_none(three: SweepResult) -> None:
    with pytest.raises(BadArgument, match="could be any of"):
        three.grid("output")
    for name in ("layers[:].heads[:].output", "nothing like it", ""):
        with pytest.raises(UnknownPath, match=r"expected: one of layers\[:\]\.output, layers\[:\]\.mlp"):
            three.grid(name)
    with pytest.raises(BadArgument, match="no cells"):
        SweepResult(table([])).grid()


def test_where_a_kind_has_to_be_named_both_calls_are_written(three: SweepResult) -> None:
    pytest.importorskip("matplotlib")
    for call in (three.grid, three.plot):
        with pytest.raises(BadArgument, match=r"write: result\.grid\('layers.*'\), or result\.plot\('layers"):
            call()


def test_a_result_does_not_change() -> None:
    made = table()
    result = SweepResult(made)
    before = result.digest
    made.values[:] = 0
    made.clean[:] = 0
    result.asked["seed"] = 99  # type: ignore[index]  # a copy
    with pytest.raises(ValueError, match="read-only"):
        result.clean[0] = 1
    with pytest.raises(FrozenInstanceError):
        result.table = made  # type: ignore[misc]
    assert SweepResult(result.table).digest == before and result.asked["seed"] == 0


@pytest.mark.parametrize("name", ["values", "done", "exists", "corrupted", "clean"])
def test_arrays_that_do_not_fit_are_refused(name: str) -> None:
    made = table()
    with pytest.raises(BadArgument, match="shape"):
        SweepResult(replace(made, **{name: getattr(made, name)[..., :1]}))


def test_what_is_no_table_is_refused() -> None:
    with pytest.raises(BadType):
        SweepResult({})  # type: ignore[arg-type]
    with pytest.raises(BadType, match="list of results"):
        SweepResult.merge(SweepResult(table()))  # type: ignore[arg-type]


def test_the_best_are_those_whose_mean_is_largest_whichever_its_sign() -> None:
    cells = [Cell(f"layers[{n}].output[0]", RESID, layer=n, position=0) for n in (0, 1, 2)]
    made = table(cells, clean=np.ones(2), corrupted=np.zeros(2))
    values = np.array([[0.9, 0.1, -0.2], [-0.9, 0.1, -0.2]])
    best = SweepResult(replace(made, values=values)).best(2)
    assert best["layer"].tolist() == [2, 1]  # the first cancels out in the mean, which is what the table shows
    np.testing.assert_allclose(best["effect"], [-0.2, 0.1], atol=1e-12)
    for n in (0, -1, 1.5, True):
        with pytest.raises(BadArgument, match="at least 1"):
            SweepResult(made).best(n)  # type: ignore[arg-type]


def test_a_journal_takes_no_second_opinion(tmp_path: Any) -> None:
    with Journal.open(tmp_path / "run.jsonl", {}, 2) as journal:
        journal.append([0], [0], [float("nan")])
        journal.append([0], [0], [float("nan")])  # the same again
        with pytest.raises(BadArgument, match=r"cell 0 of prompt 0 is there with nan, and now with 1\.0"):
            journal.append([0], [0], [1.0])
        with pytest.raises(BadArgument, match="2 prompts, 1 cell, "):
            journal.append([0, 1], [0], [1.0])
        assert len(journal) == 1
    with pytest.raises(BadArgument, match="closed"):
        journal.append([0], [1], [1.0])
    with pytest.raises(FileNotFoundError, match="no folder"):
        Journal.open(tmp_path / "none" / "run.jsonl", {}, 2)
