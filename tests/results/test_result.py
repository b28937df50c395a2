"""A result is one set of numbers in many forms: grids, shares, frames; and it is known by them."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from nnsplice.errors import BadArgument, UnknownPath
from nnsplice.results import Cell, Run, SweepResult
from results.tables import HEAD, HEADS, LAYERS, STREAM, TOKENS, head_cells, part, stream_cells, table


@pytest.fixture
def result() -> SweepResult:
    return SweepResult(table())


# --- grids


def test_a_grid_has_its_axes_in_order_and_every_value_at_its_place(result: SweepResult) -> None:
    grid = result.grid(STREAM)
    assert grid.dims == ("prompt", "layer", "position")
    assert grid.name == "logit_diff" and grid.attrs == {"component": STREAM}
    for axis, size in (("prompt", 2), ("layer", 2), ("position", 4)):
        assert grid.coords[axis].values.tolist() == list(range(size))
        assert np.issubdtype(grid.coords[axis].dtype, np.integer)
    for number, cell in enumerate(result.cells[: LAYERS * 4]):
        found = grid.sel(layer=cell.layer, position=cell.position).values
        np.testing.assert_array_equal(found, result.table.values[:, number])
    assert np.isnan(grid.sel(prompt=1, position=3)).all()


def test_heads_stand_between_layer_and_position() -> None:
    cells = head_cells((2, 0, -1))
    grid = SweepResult(table(cells)).grid()
    assert grid.dims == ("prompt", "layer", "head", "position")
    assert grid.shape == (2, LAYERS, HEADS, 3)
    # From the start in order, then from the end, however they were asked.
    assert grid.coords["position"].values.tolist() == [0, 2, -1]
    for number, cell in enumerate(cells):
        found = grid.sel(layer=cell.layer, head=cell.head, position=cell.position).values
        np.testing.assert_array_equal(found, table(cells).values[:, number])


def test_cells_in_any_order_make_the_same_grid(result: SweepResult) -> None:
    order = np.random.default_rng(1).permutation(len(result.cells))
    shuffled = replace(
        result.table,
        cells=tuple(result.cells[n] for n in order),
        values=result.table.values[:, order],
        done=result.table.done[:, order],
        exists=result.table.exists[:, order],
    )
    for kind in (STREAM, HEAD):
        assert SweepResult(shuffled).grid(kind).equals(result.grid(kind))


def test_two_cells_at_one_place_of_a_grid_are_refused() -> None:
    cells = [Cell(f"model.h[0].experts[{n}].w1.output[0]", "model.h[:].experts[:].w1.output", layer=0) for n in (0, 1)]
    with pytest.raises(BadArgument, match=r"experts\[0\][\s\S]*experts\[1\][\s\S]*frame"):
        SweepResult(table(cells)).grid()


def test_tokens_are_a_coordinate_of_the_positions(result: SweepResult) -> None:
    token = result.grid(STREAM).coords["token"]
    assert token.dims == ("prompt", "position")
    assert token.values.tolist() == [["the", " cat", "the", " sat"], ["the", " dog", " ran", ""]]
    for tokens in (TOKENS[:1], (TOKENS[0], TOKENS[0])):
        alone = SweepResult(table(stream_cells(), tokens)).grid()
        assert alone.coords["token"].dims == ("position",)
        assert alone.coords["token"].values.tolist() == list(TOKENS[0])
    # A token that comes twice is two columns.
    assert alone.sel(position=2, prompt=0).values.tolist() == table(stream_cells(), tokens).values[0, [2, 6]].tolist()
    none = SweepResult(replace(table(stream_cells()), tokens=())).grid()
    assert "token" not in none.coords
    last = result.grid(HEAD).coords["token"]
    assert last.values.tolist() == [[" sat"], [" ran"]]


def test_spans_are_positions_by_name() -> None:
    cells = [
        Cell(f"layers[{n}].output[{p}]", STREAM, layer=n, position=p) for n in (0, 1) for p in ('"subject"', '"end"')
    ]
    result = SweepResult(table(cells))
    assert result.grid().coords["position"].values.tolist() == ['"subject"', '"end"']
    assert result.grid().coords["token"].values.tolist() == ['"subject"', '"end"']
    frame = result.frame()
    assert frame["position"].tolist() == ['"subject"', '"end"'] * 4
    assert result.best(1)["position"].tolist()[0] in ('"subject"', '"end"')
    result.plot()


def test_all_tokens_at_once_have_no_position_axis() -> None:
    cells = [Cell(f"layers[{n}].output[:]", STREAM, layer=n) for n in (0, 1)]
    result = SweepResult(table(cells))
    assert result.grid().dims == ("prompt", "layer")
    assert bool(result.frame()["position"].isna().to_numpy().all())
    ax = result.plot()
    assert (len(ax.patches), ax.get_ylabel()) == (2, "layer")  # one column is drawn as bars


def test_a_grid_is_of_one_kind_of_place(result: SweepResult) -> None:
    with pytest.raises(BadArgument, match=r"2 kinds of site[\s\S]*result\.grid"):
        result.grid()
    with pytest.raises(UnknownPath, match=r"no such kind of site[\s\S]*expected"):
        result.grid("layers[:].mlp.output")
    assert result.components == (STREAM, HEAD)
    # Named by one of its sites, too.
    assert result.grid("layers[1].heads[0].output").equals(result.grid(HEAD))
    assert SweepResult(table(head_cells())).grid().attrs["component"] == HEAD


# --- shares


def test_the_effect_of_a_prompt_on_request_is_the_share_of_its_own_way_back(result: SweepResult) -> None:
    t = result.table
    expected = (t.values - t.corrupted[:, None]) / (t.clean - t.corrupted)[:, None]
    np.testing.assert_array_equal(result.effect(STREAM, per_prompt=True).values, expected[:, :8].reshape(2, 2, 4))
    np.testing.assert_array_equal(result.effect(HEAD, per_prompt=True).values[..., 0], expected[:, 8:].reshape(2, 2, 3))
    np.testing.assert_array_equal(
        result.change(STREAM).values, (t.values - t.corrupted[:, None])[:, :8].reshape(2, 2, 4)
    )
    assert (result.effect(STREAM).name, result.change(STREAM).name) == ("effect", "change of logit_diff")
    np.testing.assert_array_equal(result.total_effect, [4.0, 6.0])
    alone = SweepResult(table(stream_cells(), TOKENS[:1]))
    assert alone.effect().equals(alone.effect(per_prompt=True))


def _two_ways() -> SweepResult:
    """Cell 0 restores a tenth of the usual effect, and much of one that is nearly nothing; cell 1 half of the usual."""
    cells = [Cell(f"layers[{n}].output[0]", STREAM, layer=n, position=0) for n in (0, 1)]
    tokens = (("a",),) * 4
    corrupted = np.zeros(4)
    clean = np.array([1.0, 1.0, 1.0, 0.003])
    values = np.array([[0.1, 0.5], [0.1, 0.5], [0.1, 0.5], [0.1437, 0.0]])
    return SweepResult(table(cells, tokens, values=values, clean=clean, corrupted=corrupted))


def test_differences_are_averaged_and_then_divided() -> None:
    """By ratios of single prompts the wrong cell would come first: 0.1437 / 0.003 is 4790%."""
    result = _two_ways()
    change, total = result.change().values[..., 0], result.total_effect
    pooled = change.mean(0) / total.mean()
    with pytest.warns(UserWarning, match=r"small in prompt 3 \(below 10% of the usual 0\.751\)[\s\S]*pools"):
        ratios = result.effect(per_prompt=True).values[..., 0]
    assert ratios[3, 0] == pytest.approx(47.9)
    assert ratios.mean(0).argmax() == 0 and pooled.argmax() == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(result.effect().mean("prompt").values[:, 0], pooled, atol=1e-15)
        best = result.best()
        bars: Any = result.plot().patches
        drawn = np.array([bar.get_width() for bar in bars])
    assert best["layer"].tolist() == [1, 0]
    np.testing.assert_allclose(best["effect"], pooled[::-1], atol=1e-15)
    np.testing.assert_allclose(drawn, pooled, atol=1e-15)
    frame = result.frame()
    np.testing.assert_allclose(np.asarray(frame.groupby("layer")["effect"].mean()), pooled, atol=1e-15)
    assert result.best(prompt=0)["effect"].tolist() == [0.5, 0.1]
    with pytest.warns(UserWarning, match="small in prompt 3"):
        assert result.best(prompt=3)["effect"].tolist() == pytest.approx([47.9, 0.0])
    with pytest.warns(UserWarning, match="small in prompt 3"):
        result.plot(prompt=3)


def test_the_best_come_by_the_size_of_their_mean_and_not_by_the_mean_of_their_sizes() -> None:
    cells = [Cell(f"layers[{n}].output[0]", STREAM, layer=n, position=0) for n in (0, 1)]
    values = np.array([[0.9, 0.3], [-0.9, 0.3]])
    both = table(cells, (("a",),) * 2, values=values, clean=np.ones(2), corrupted=np.zeros(2))
    assert SweepResult(both).best()["layer"].tolist() == [1, 0]


def test_total_effects_that_cancel_are_told() -> None:
    cells = [Cell("layers[0].output[0]", STREAM, layer=0, position=0)]
    ends = {"clean": np.array([1.0, -0.9]), "corrupted": np.zeros(2)}
    result = SweepResult(table(cells, (("a",),) * 2, values=np.array([[0.5], [0.2]]), **ends))
    with pytest.warns(UserWarning, match=r"both signs and cancel: 0\.05 in the mean, of 0\.95 in size"):
        assert float(result.effect().mean()) == pytest.approx(0.35 / 0.05)
    with pytest.warns(UserWarning, match="cancel"):
        result.best()


@pytest.mark.parametrize("end", [0.0, -2.5, 1e6])
def test_where_clean_and_corrupted_are_the_same_there_is_no_share(end: float) -> None:
    flat = SweepResult(table(stream_cells(), clean=np.array([end, 3.0]), corrupted=np.array([end, 1.0])))
    with pytest.warns(UserWarning, match=r"the same for prompt 0[\s\S]*change\(\)"):
        effect = flat.effect(per_prompt=True)
    assert np.isnan(effect[0]).all() and np.isfinite(effect[1, :, :3]).all()
    if end < 1e6:  # beside a size of a million, a difference of one is nothing
        np.testing.assert_allclose(flat.effect()[0, :, :3], flat.change()[0, :, :3])
    same = np.array([end, 3.0])
    none = SweepResult(table(stream_cells(), clean=same, corrupted=same))
    with pytest.warns(UserWarning, match="the same for prompt 0, 1"):
        assert np.isnan(none.effect()).all()


def test_a_total_effect_without_an_end_is_no_part_of_the_mean() -> None:
    result = SweepResult(table(stream_cells(), clean=np.array([np.inf, 3.0]), corrupted=np.array([0.0, 1.0])))
    effect = result.effect()
    assert np.isnan(effect[0]).all()
    np.testing.assert_allclose(effect[1, :, :3], result.change()[1, :, :3] / 2.0)


def test_small_scales_are_no_tiny_differences() -> None:
    small = SweepResult(table(stream_cells(), clean=np.array([2e-9, 1.0]), corrupted=np.array([1e-9, 0.0])))
    assert np.isfinite(small.effect()[0]).all()
    alone = SweepResult(table(stream_cells(), TOKENS[:1], clean=np.array([2e-9]), corrupted=np.array([1e-9])))
    assert np.isfinite(alone.effect()).all()


# --- frames


def test_a_frame_has_a_row_for_each_cell_that_was_measured(result: SweepResult) -> None:
    frame = result.frame()
    assert len(frame) == int(result.table.done.sum())
    assert frame.columns.tolist() == [
        "prompt", "component", "layer", "head", "group", "neuron", "expert", "position", "token", "value", "effect",
        "clean", "corrupted", "path",
    ]  # fmt: skip
    for axis in ("layer", "head", "group", "position"):
        assert frame[axis].dtype == pd.Int64Dtype()
    assert frame["value"].dtype == frame["clean"].dtype == np.float64
    assert [int(frame[axis].isna().to_numpy().sum()) for axis in ("head", "group")] == [8 + 6, len(frame)]
    row = frame[(frame["prompt"] == 1) & (frame["path"] == "layers[1].output[2]")].iloc[0]
    assert (row["layer"], row["position"], row["token"]) == (1, 2, " ran")
    assert (row["clean"], row["corrupted"]) == (4.0, -2.0)
    assert row["effect"] == pytest.approx((row["value"] + 2) / 5)  # the mean of 4 and 6


def test_what_was_not_measured_is_in_no_frame(result: SweepResult) -> None:
    mine = np.zeros_like(result.table.done)
    mine[0, 3] = True
    shard = part(result.table, mine)
    assert shard.frame()["path"].tolist() == ["layers[0].output[3]"]
    assert (shard.is_complete, result.is_complete) == (False, True)


def test_the_best_cells_come_first() -> None:
    result = SweepResult(table(tokens=(TOKENS[0], TOKENS[0])))
    best = result.best(4)
    t = result.table
    share = (t.values - t.corrupted[:, None]).mean(0) / (t.clean - t.corrupted).mean()
    order = np.argsort(-np.abs(share), kind="stable")[:4]
    assert best["path"].tolist() == [result.cells[n].path for n in order]
    np.testing.assert_allclose(best["effect"], share[order])
    assert "group" not in best.columns and "head" in best.columns
    flat = SweepResult(replace(t, corrupted=t.clean))
    change = (t.values - t.clean[:, None]).mean(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert flat.best(1)["path"].tolist()[0] == result.cells[int(np.argmax(np.abs(change)))].path


def test_the_best_of_prompts_of_unlike_length_are_no_mean(result: SweepResult) -> None:
    with pytest.raises(BadArgument, match=r"3 and 4 tokens[\s\S]*best\(prompt=0\), or by_role"):
        result.best(4)
    t = result.table
    share = (t.values[1] - t.corrupted[1]) / (t.clean[1] - t.corrupted[1])
    first = int(np.nanargmax(np.abs(share)))
    best = result.best(1, prompt=1)
    assert best["path"].tolist() == [result.cells[first].path]
    np.testing.assert_allclose(best["effect"], share[first])
    assert len(SweepResult(table(head_cells())).best(2)) == 2  # the last token is in all of them
    with pytest.raises(BadArgument, match="prompt=2"):
        result.best(prompt=2)


# --- identity


def test_what_running_cost_is_no_part_of_the_identity(result: SweepResult) -> None:
    assert SweepResult(replace(result.table, run=Run("batched", 99.0))) == result
    values = result.table.values.copy()
    values[0, 0] = np.nextafter(values[0, 0], 9)
    others: list[dict[str, Any]] = [
        {"values": values},
        {"asked": {**result.asked, "seed": 1}},
        {"clean": result.clean + 1},
        {"tokens": (TOKENS[0], TOKENS[0][:3])},
        {"done": ~result.table.done},
    ]
    assert len({SweepResult(replace(result.table, **other)) for other in [{}, *others]}) == len(others) + 1
    assert result != 3


def test_not_a_number_is_one_thing_however_it_was_made(result: SweepResult) -> None:
    values = result.table.values.copy()
    values[np.isnan(values)] = -np.float64("nan")
    assert values.tobytes() != result.table.values.tobytes()
    assert SweepResult(replace(result.table, values=values)) == result


# --- display


def test_the_repr_says_what_there_is(result: SweepResult) -> None:
    assert repr(result) == (
        "SweepResult: 26 cells, 2 prompts, logit_diff\n  layers[:].output\n  layers[:].heads[:].output\n"
        "  clean 3.5 in the mean, corrupted -1.5 in the mean\n  packed, 1.50 s, 2 known without"
    )
    one = SweepResult(table(stream_cells(), TOKENS[:1], run=Run("batched", 0.25, note="not packed: why")))
    assert "1 prompt, logit_diff\n" in repr(one)
    assert "clean 3, corrupted -1\n  batched, 0.25 s\n  not packed: why" in repr(one)
    assert "(a part)" in repr(part(result.table, np.zeros_like(result.table.done)))
