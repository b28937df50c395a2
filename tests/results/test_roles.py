"""Means by role: the same kind of token in every prompt, whatever its number."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest

import nnsplice as ns
from nnsplice.errors import BadArgument, BadType, SpanError
from nnsplice.results import Cell, SweepResult
from nnsplice.results.roles import OF_SUBJECT, of_subject
from results.tables import HEAD, LAYERS, STREAM, head_cells, table

mpl.use("agg")

#: Seven tokens with a subject of three, and six with a subject of one.
LENGTHS, SUBJECTS = (7, 6), ((1, 4), (2, 3))


def _table(spans: dict[str, Any] | None = None, cells: list[Cell] | None = None) -> Any:
    tokens = tuple(tuple(f" {p}{n}" for n in range(length)) for p, length in enumerate(LENGTHS))
    stream = [
        Cell(f"layers[{layer}].output[{position}]", STREAM, layer=layer, position=position)
        for layer in range(LAYERS)
        for position in range(7)
    ]
    made = table(cells or stream, tokens)
    told = {**made.asked, "corrupted": {"spans": {"subject": SUBJECTS} if spans is None else spans}}
    return replace(made, asked=told)


def _value(result: SweepResult, prompt: int, layer: int, tokens: list[int]) -> float:
    """The mean of the raw values at these tokens, cell by cell."""
    found = [
        result.table.values[prompt, number]
        for number, cell in enumerate(result.cells)
        if cell.layer == layer and cell.position in tokens
    ]
    assert len(found) == len(tokens)
    return float(np.mean(found))


def test_every_token_from_the_subject_on_has_one_role() -> None:
    for length in range(1, 7):
        for start in range(length):
            for stop in range(start + 1, length + 1):
                roles = of_subject(start, stop, length)
                assert sorted(t for tokens in roles.values() for t in tokens) == list(range(start, length))
                assert tuple(roles) == OF_SUBJECT


def test_a_role_is_the_mean_of_its_tokens_in_each_prompt() -> None:
    result = SweepResult(_table())
    found = result.by_role()
    grid = found.grid()
    assert grid.dims == ("prompt", "layer", "role") and grid.role.values.tolist() == list(OF_SUBJECT)
    expected = {
        "subject first": ([1], None), "subject middle": ([2], None), "subject last": ([3], [2]),
        "first after": ([4], [3]), "further": ([5], [4]), "last": ([6], [5]),
    }  # fmt: skip
    for role, each in expected.items():
        for prompt, tokens in enumerate(each):
            for layer in range(LAYERS):
                value = float(grid.sel(prompt=prompt, layer=layer, role=role))
                assert (
                    np.isnan(value) if tokens is None else value == pytest.approx(_value(result, prompt, layer, tokens))
                )
    assert found.clean.tolist() == result.clean.tolist()
    frame = found.frame()
    assert frame["n"].tolist() == [1] * len(frame) and len(frame) == LAYERS * (6 + 4)
    assert frame["path"].tolist()[0] == 'layers[0].output["subject first"]'
    assert set(found.best(3)["role"]) <= set(OF_SUBJECT)  # no refusal: roles are alike in prompts of any length
    drawn = found.plot()
    assert [tick.get_text() for tick in drawn.get_xticklabels()] == list(OF_SUBJECT)
    assert drawn.get_xlabel() == "role"
    pooled = found.change().values.copy()
    total = np.where(np.isnan(pooled), np.nan, found.total_effect[:, None, None])
    np.testing.assert_allclose(
        np.asarray(drawn.images[0].get_array()), np.nanmean(pooled, 0) / np.nanmean(total, 0), atol=1e-12
    )


def test_names_of_ones_own() -> None:
    result = SweepResult(_table({"subject": SUBJECTS, "verb": ((4, 6), (3, 5))}))
    assert result.by_role().grid().role.values.tolist() == [*OF_SUBJECT, "verb"]
    found = result.by_role({"end": -1, "pair": [0, 1], "each": [[2, 3, 4], []], "s": "subject[-1]", "verb": '"verb"'})
    grid = found.grid()
    assert grid.role.values.tolist() == ["end", "pair", "each", "s", "verb"]
    for role, tokens in {"end": [6], "pair": [0, 1], "each": [2, 3, 4], "s": [3], "verb": [4, 5]}.items():
        assert float(grid.sel(prompt=0, layer=1, role=role)) == pytest.approx(_value(result, 0, 1, tokens))
    assert np.isnan(grid.sel(prompt=1, role="each")).all()
    assert float(grid.sel(prompt=1, layer=0, role="end")) == pytest.approx(_value(result, 1, 0, [5]))
    counted = dict(found.frame()[["role", "n"]].itertuples(index=False, name=None))
    assert counted == {"end": 1, "pair": 2, "each": 3, "s": 1, "verb": 2}


def test_a_part_of_the_tokens_has_a_part_of_the_roles() -> None:
    cells = [
        Cell(f"layers[{n}].output[{text}]", STREAM, layer=n, position=p)
        for n in range(LAYERS)
        for p, text in (('"subject"[-1]', '"subject"][-1'), (-1, "-1"))
    ]
    result = SweepResult(_table(cells=cells))
    found = result.by_role()
    assert found.grid().role.values.tolist() == ["subject last", "last"]
    np.testing.assert_array_equal(found.table.values, result.table.values)
    heads = SweepResult(_table(cells=head_cells((-1,)))).by_role()
    assert heads.grid().dims == ("prompt", "layer", "head", "role") and heads.components == (HEAD,)
    assert heads.plot().get_xlabel() == "head"


def test_a_role_with_a_token_that_was_not_measured_has_no_value() -> None:
    whole = _table()
    done = whole.done.copy()
    done[0, [2, 3]] = False
    found = SweepResult(replace(whole, done=done)).by_role({"all": [1, 2, 3, 4], "late": [4]})
    assert not found.is_complete and np.isnan(found.grid().sel(prompt=0, layer=0, role="all"))
    assert np.isfinite(found.grid().sel(prompt=0, layer=0, role="late"))


def test_roles_are_kept_in_files_and_pages(tmp_path: Path) -> None:
    found = SweepResult(_table()).by_role()
    found.to_file(tmp_path / "r.safetensors")
    again = SweepResult.from_file(tmp_path / "r.safetensors")
    assert again == found and again.frame().equals(found.frame())
    found.to_html(tmp_path / "r.html")
    assert "subject last" in (tmp_path / "r.html").read_text()
    assert found != SweepResult(_table())


@pytest.mark.parametrize(
    ("ask", "kind", "message"),
    [
        (lambda: SweepResult(_table({})).by_role(), SpanError, r"of these prompts is not given[\s\S]*last"),
        (lambda: SweepResult(_table()).by_role({}), BadType, "names with tokens"),
        (lambda: SweepResult(_table()).by_role({"v": "verb"}), SpanError, r"'verb', and that is no span[\s\S]*subject"),
        (lambda: SweepResult(_table()).by_role({"v": 6}), BadArgument, r"\[6\] in prompt 1, which has 6 tokens"),
        (lambda: SweepResult(_table()).by_role({"v": [[1]]}), BadArgument, "for 2 prompts"),
        (
            lambda: SweepResult(_table(cells=[Cell("layers[0].output[:]", STREAM, layer=0)])).by_role(),
            BadArgument,
            "no cell stands for a single token",
        ),
    ],
)
def test_what_has_no_roles_is_refused(ask: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        ask()


def test_grids_and_figures_by_role_are_those_of_by_role(model) -> None:
    import matplotlib.pyplot as plt

    prompts, subjects = ["w3 w4 w5 w6", "w3 w4 w6 w7 w9"], ["w4 w5", "w4"]
    result = ns.causal_trace(model, prompts, subjects, samples=2, answer="w7", progress=False)
    whole = result.by_role()
    assert result.grid(by="role").equals(whole.grid()) and result.grid(by="role").dims == ("prompt", "layer", "role")
    assert result.effect(by="role").equals(whole.effect()) and result.change(by="role").equals(whole.change())
    roles = {"end": -1, "start": 0}
    assert result.grid(by=roles).equals(result.by_role(roles).grid())
    ax, expected = result.plot(by="role"), whole.plot()
    np.testing.assert_array_equal(ax.images[0].get_array(), expected.images[0].get_array())
    assert [tick.get_text() for tick in ax.get_xticklabels()] == whole.grid().role.values.tolist()
    assert result.grid().dims == ("prompt", "layer", "position")  # the result itself stays what it is
    for call in (lambda: result.grid(by="position"), lambda: result.plot(by="token")):
        with pytest.raises(BadArgument, match='"role"'):
            call()
    plt.close("all")
