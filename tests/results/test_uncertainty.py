"""How sure averages are: against plain numpy, and on effects that were planted."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from nnsplice.errors import BadArgument
from nnsplice.results import Cell, SweepResult
from results.tables import HEAD, STREAM, TOKENS, head_cells, stream_cells, table


def _made(prompts: int, cells: int, planted: float = 0.0, seed: int = 0) -> SweepResult:
    """Noise of size 1 around 0, and one cell that moves by so much; total effects around 5."""
    generator = np.random.default_rng(seed)
    total = 5 + generator.normal(size=prompts)
    moved = generator.normal(size=(prompts, cells))
    moved[:, 0] += planted
    made = [Cell(f"layers[{n}].output[0]", STREAM, layer=n, position=0) for n in range(cells)]
    corrupted = generator.normal(size=prompts)
    ends = {"clean": total + corrupted, "corrupted": corrupted}
    return SweepResult(table(made, (("a",),) * prompts, values=moved + corrupted[:, None], **ends))


def test_an_interval_is_that_of_a_bootstrap_by_hand() -> None:
    result = _made(9, 4)
    moved, total = result.change().values[..., 0], result.total_effect
    chosen = np.random.default_rng(3).integers(9, size=(500, 9))
    drawn = np.array([moved[rows].mean(0) / total[rows].mean() for rows in chosen])
    expected = np.quantile(drawn, [0.05, 0.95], axis=0).T
    found = result.ci(0.9, draws=500, seed=3)
    assert found.dims == ("layer", "position", "end") and found.end.values.tolist() == ["low", "high"]
    np.testing.assert_allclose(found.values[:, 0], expected, atol=1e-12)
    assert not np.allclose(result.ci(0.9, draws=500, seed=4).values, found.values)
    assert result.ci(0.9, draws=500, seed=3).equals(found)
    pooled = result.effect().mean("prompt").values[:, 0]
    assert (expected[:, 0] < pooled).all() and (pooled < expected[:, 1]).all()
    # Without a way from corrupted to clean it is the mean change that has an interval.
    flat = SweepResult(replace(result.table, clean=result.corrupted))
    means = np.array([moved[rows].mean(0) for rows in chosen])
    np.testing.assert_allclose(
        flat.ci(0.9, draws=500, seed=3).values[:, 0], np.quantile(means, [0.05, 0.95], axis=0).T, atol=1e-12
    )


@pytest.mark.parametrize("prompts", [2, 5, 8])
def test_a_p_of_few_prompts_tries_every_pattern_of_signs(prompts: int) -> None:
    result = _made(prompts, 6, planted=1.0)
    moved = result.change().values[..., 0]
    patterns = np.array(list(product([1.0, -1.0], repeat=prompts)))
    expected = (np.abs(patterns @ moved) >= np.abs(moved.sum(0)) * (1 - 1e-12)).mean(0)
    np.testing.assert_allclose(result.pvalue().values[:, 0], expected, atol=1e-15)
    assert (expected >= 2 / 2**prompts).all()
    assert result.pvalue().dims == ("layer", "position")


def test_a_planted_effect_is_found_and_chance_is_not() -> None:
    cells = 400
    result = _made(40, cells, planted=2.0)
    p = result.pvalue(draws=4000).values[:, 0]
    assert p[0] == pytest.approx(1 / 4001) and p.argmin() == 0
    # Of cells that do nothing, p is spread evenly, and an interval of 95% leaves 0 out in about one of twenty.
    assert 0.02 < (p[1:] < 0.05).mean() < 0.09 and abs(p[1:].mean() - 0.5) < 0.05
    low, high = np.moveaxis(result.ci().values[:, 0], -1, 0)
    assert low[0] > 0.3 and high[0] < 0.5  # 2 of 5 was planted
    assert 0.02 < ((low[1:] > 0) | (high[1:] < 0)).mean() < 0.1
    assert result.stability(1, draws=200) == 1.0
    assert result.stability(20, draws=200) < 0.6
    assert result.stability(cells, draws=20) == 1.0
    assert result.stability(20, draws=200, seed=1) != result.stability(20, draws=200)


def test_the_stability_is_that_of_draws_by_hand() -> None:
    result = _made(7, 9)
    moved = result.change().values[..., 0]
    total = result.total_effect
    chosen = np.random.default_rng(0).integers(7, size=(60, 7))

    def first(rows: np.ndarray) -> set[int]:
        return set(np.argsort(-np.abs(moved[rows].mean(0) / total[rows].mean()), kind="stable")[:3].tolist())

    whole = first(np.arange(7))
    assert whole == set(result.best(3)["layer"])
    expected = np.mean([len(whole & first(rows)) / len(whole | first(rows)) for rows in chosen])
    assert result.stability(3, draws=60) == pytest.approx(expected)


def test_what_a_prompt_lacks_is_left_out_and_one_alone_says_nothing() -> None:
    made = table(stream_cells(), TOKENS)
    spans = {"subject": [(0, 2), (0, 1)]}
    roles = SweepResult(replace(made, asked={**made.asked, "corrupted": {"spans": spans}})).by_role()
    found = roles.ci(draws=100)
    assert found.dims == ("layer", "role", "end")
    assert np.isnan(found.sel(role="subject first")).all()  # of the first prompt alone
    assert np.isfinite(found.sel(role="subject last")).all()
    assert np.isnan(roles.pvalue().sel(role="subject first")).all()
    heads = SweepResult(table(head_cells(), TOKENS)).ci(draws=50)
    assert heads.sizes == {"layer": 2, "head": 3, "position": 1, "end": 2} and "token" not in heads.coords
    both = SweepResult(table(tokens=(TOKENS[0],) * 3))
    assert both.pvalue(HEAD).dims == ("layer", "head", "position")
    assert both.ci(component=STREAM, draws=50).coords["token"].values.tolist() == list(TOKENS[0])


def test_what_cannot_be_said_is_refused() -> None:
    ragged, result = SweepResult(table(stream_cells(), TOKENS)), _made(5, 3)
    for ask in (ragged.ci, ragged.pvalue, lambda: ragged.stability(1)):
        with pytest.raises(BadArgument, match=r"3 and 4 tokens[\s\S]*by_role"):
            ask()
    for level in (0, 1, 95):
        with pytest.raises(BadArgument, match="a share between 0 and 1"):
            result.ci(level)
    with pytest.raises(BadArgument, match="draws=0"):
        result.ci(draws=0)
    for k in (0, 4, True):
        with pytest.raises(BadArgument, match="1 to 3"):
            result.stability(k)
    with pytest.raises(BadArgument, match="one prompt"):
        _made(1, 3).stability(1)


def test_where_total_effects_cancel_no_draw_has_an_effect() -> None:
    cells = [Cell(f"layers[{n}].output[0]", STREAM, layer=n, position=0) for n in range(2)]
    ends = {"clean": np.array([1.1, -0.9, 1.1, -0.9]), "corrupted": np.full(4, 0.1)}  # effects of 1, -1, 1, -1
    values = np.random.default_rng(0).normal(size=(4, 2))
    largest = int(np.abs((values - 0.1).mean(0)).argmax())
    result = SweepResult(table(cells, (("a",),) * 4, values=values, **ends))
    with pytest.warns(UserWarning, match="the same in the mean"):
        assert np.isnan(result.effect()).all() and result.best(1)["layer"].tolist() == [largest]
    assert np.isnan(result.ci(draws=100)).all()
    drawn = np.random.default_rng(0).integers(4, size=(200, 4))
    as_first = [np.abs((values[rows] - 0.1).mean(0)).argmax() == largest for rows in drawn]
    assert result.stability(1, draws=200) == pytest.approx(np.mean(as_first))
    # With a fifth prompt there is an effect, and none in the draws where those four cancel to 1e-17.
    more = {"clean": np.append(ends["clean"], 3.1), "corrupted": np.full(5, 0.1)}
    more |= {"values": np.vstack([values, values[:1]])}
    ends = SweepResult(table(cells, (("a",),) * 5, **more)).ci(draws=2000)
    assert np.isfinite(ends).all() and (np.abs(ends) < 1e6).all()


def test_cells_without_any_number_have_neither_interval_nor_p() -> None:
    result = _made(3, 2)
    empty = SweepResult(replace(result.table, values=np.full((3, 2), np.nan)))
    assert np.isnan(empty.ci(draws=20)).all() and np.isnan(empty.pvalue()).all()


@pytest.mark.parametrize(("first", "expected"), [(0.1, 1.0), (np.inf, np.nan)])
def test_a_mean_change_of_nearly_nothing_has_a_p_of_one_and_an_infinite_one_none(first: float, expected: float) -> None:
    cells = [Cell("layers[0].output[0]", STREAM, layer=0, position=0)]
    changes = np.array([[first], [0.2], [-0.3]])  # of 0.1 the sum is 5e-17, or 0, as they are added
    made = table(cells, (("a",),) * 3, values=changes, clean=np.ones(3), corrupted=np.zeros(3))
    np.testing.assert_equal(SweepResult(made).pvalue().item(), expected)
