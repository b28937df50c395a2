"""A result is one set of numbers in many forms: grids, shares, frames, figures, files and shards."""

from __future__ import annotations

import json
import pickle
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from nnsplice.errors import BadArgument, FileError, KeyMismatch, UnknownPath
from nnsplice.results import Cell, Run, SweepResult
from results.tables import HEAD, HEADS, LAYERS, STREAM, TOKENS, head_cells, part, stream_cells, table

mpl.use("agg")


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
    assert (ax.images[0].get_array().shape, ax.get_ylabel()) == ((2, 1), "layer")


def test_a_grid_is_of_one_kind_of_place(result: SweepResult) -> None:
    with pytest.raises(BadArgument, match=r"2 kinds of place[\s\S]*result\.grid"):
        result.grid()
    with pytest.raises(UnknownPath, match=r"no such kind of place[\s\S]*expected"):
        result.grid("layers[:].mlp.output")
    assert result.components == (STREAM, HEAD)
    # Named by one of its places, too.
    assert result.grid("layers[1].heads[0].output").equals(result.grid(HEAD))
    assert SweepResult(table(head_cells())).grid().attrs["component"] == HEAD


# --- shares


def test_the_effect_is_the_share_of_the_way_back(result: SweepResult) -> None:
    t = result.table
    expected = (t.values - t.corrupted[:, None]) / (t.clean - t.corrupted)[:, None]
    np.testing.assert_array_equal(result.effect(STREAM).values, expected[:, :8].reshape(2, 2, 4))
    np.testing.assert_array_equal(result.effect(HEAD).values[..., 0], expected[:, 8:].reshape(2, 2, 3))
    np.testing.assert_array_equal(
        result.change(STREAM).values, (t.values - t.corrupted[:, None])[:, :8].reshape(2, 2, 4)
    )
    assert (result.effect(STREAM).name, result.change(STREAM).name) == ("effect", "change of logit_diff")
    np.testing.assert_array_equal(result.total_effect, [4.0, 6.0])


@pytest.mark.parametrize("end", [0.0, -2.5, 1e6])
def test_where_clean_and_corrupted_are_the_same_there_is_no_share(end: float) -> None:
    flat = SweepResult(table(stream_cells(), clean=np.array([end, 3.0]), corrupted=np.array([end, 1.0])))
    with pytest.warns(UserWarning, match=r"the same for prompt 0[\s\S]*change\(\)"):
        effect = flat.effect()
    assert np.isnan(effect[0]).all() and np.isfinite(effect[1, :, :3]).all()
    assert flat.frame().loc[lambda f: f["prompt"] == 0, "effect"].isna().all()


def test_small_scales_are_no_tiny_differences() -> None:
    small = SweepResult(table(stream_cells(), clean=np.array([2e-9, 1.0]), corrupted=np.array([1e-9, 0.0])))
    assert np.isfinite(small.effect()[0]).all()


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
    assert row["effect"] == pytest.approx((row["value"] + 2) / 6)


def test_what_was_not_measured_is_in_no_frame(result: SweepResult) -> None:
    mine = np.zeros_like(result.table.done)
    mine[0, 3] = True
    shard = part(result.table, mine)
    assert shard.frame()["path"].tolist() == ["layers[0].output[3]"]
    assert (shard.is_complete, result.is_complete) == (False, True)


def test_the_best_cells_come_first(result: SweepResult) -> None:
    best = result.best(4)
    t = result.table
    share = np.nanmean((t.values - t.corrupted[:, None]) / (t.clean - t.corrupted)[:, None], axis=0)
    order = np.argsort(-np.abs(share), kind="stable")[:4]
    assert best["path"].tolist() == [result.cells[n].path for n in order]
    np.testing.assert_allclose(best["effect"], share[order])
    assert "group" not in best.columns and "head" in best.columns
    flat = SweepResult(replace(t, corrupted=t.clean))
    change = np.nanmean(t.values - t.clean[:, None], axis=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert flat.best(1)["path"].tolist()[0] == result.cells[int(np.argmax(np.abs(change)))].path


# --- figures


def test_a_plot_is_labelled_and_can_be_drawn_into_axes(result: SweepResult) -> None:
    import matplotlib.pyplot as plt

    ax = result.plot(STREAM, prompt=0)
    assert (ax.get_ylabel(), ax.get_xlabel(), ax.get_title()) == (
        "layer", "position", f"{STREAM}, prompt 0",
    )  # fmt: skip
    assert [tick.get_text() for tick in ax.get_xticklabels()] == list(TOKENS[0])
    np.testing.assert_allclose(ax.images[0].get_array(), result.effect(STREAM)[0].values)
    plt.close(ax.figure)
    figure, given_ax = plt.subplots()
    assert result.plot(HEAD, of="value", ax=given_ax) is given_ax
    assert (given_ax.get_ylabel(), given_ax.get_xlabel()) == ("layer", "head")
    np.testing.assert_allclose(
        np.asarray(given_ax.images[0].get_array()), result.grid(HEAD).mean("prompt").values[..., 0]
    )
    plt.close(figure)
    # In the mean over prompts of other tokens, positions are numbers.
    other = (("a", "b", "c", "d"), ("e", "f", "g", "h"))
    ax = SweepResult(table(stream_cells(), other)).plot(of="change")
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0", "1", "2", "3"]
    plt.close(ax.figure)


def test_a_plot_of_an_ablation_shows_the_change(result: SweepResult) -> None:
    flat = SweepResult(replace(result.table, corrupted=result.clean))
    ax = flat.plot(HEAD)
    np.testing.assert_allclose(ax.images[0].get_array(), flat.change(HEAD).mean("prompt").values[..., 0])


def test_heads_at_several_tokens_are_rows_of_their_own() -> None:
    result = SweepResult(table(head_cells((0, 1))))
    ax = result.plot(of="value", prompt=1)
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("layer.head", "position")
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["0.0", "0.1", "0.2", "1.0", "1.1", "1.2"]
    np.testing.assert_array_equal(ax.images[0].get_array(), result.grid()[1].values.reshape(6, 2))


def test_a_mean_over_prompts_of_unlike_length_is_refused(result: SweepResult) -> None:
    with pytest.raises(BadArgument, match=r"3 and 4 tokens[\s\S]*prompt=0"):
        result.plot(STREAM)
    result.plot(HEAD)  # the last token is in all of them
    with pytest.raises(BadArgument, match="prompt=2"):
        result.plot(STREAM, prompt=2)
    with pytest.raises(BadArgument, match="of='share'"):
        result.plot(STREAM, of="share")


# --- files


@pytest.mark.parametrize("number", [-0.0, float("inf"), 5e-324, 0.1 + 0.2, float("nan")])
def test_a_file_gives_everything_back_to_the_bit(tmp_path: Path, number: float) -> None:
    whole = table()
    whole.values[0, 0] = number
    result = SweepResult(whole)
    result.to_file(tmp_path / "one.safetensors")
    again = SweepResult.from_file(tmp_path / "one.safetensors")
    for name in ("values", "done", "exists", "clean", "corrupted"):
        mine, other = getattr(whole, name), getattr(again.table, name)
        assert mine.dtype == other.dtype and mine.tobytes() == other.tobytes()
    assert again == result and hash(again) == hash(result)
    assert (again.cells, again.tokens, again.run) == (result.cells, result.tokens, result.run)
    assert dict(again.asked) == dict(result.asked)
    assert [p.name for p in tmp_path.iterdir()] == ["one.safetensors"]


def _written(folder: Path) -> Path:
    SweepResult(table()).to_file(folder / "whole")
    return folder / "whole"


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, 0.5, 0.9, -1])
def test_a_cut_file_is_refused(tmp_path: Path, keep: float) -> None:
    raw = _written(tmp_path).read_bytes()
    at = int(keep * len(raw)) if isinstance(keep, float) else keep
    (tmp_path / "cut").write_bytes(raw[:at])
    with pytest.raises(FileError, match="damaged"):
        SweepResult.from_file(tmp_path / "cut")


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other"
    for protocol in (2, 4, 5):
        path.write_bytes(pickle.dumps({"values": 1}, protocol))
        with pytest.raises(FileError, match="pickle"):
            SweepResult.from_file(path)
    path.write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(FileError, match="pickle"):
        SweepResult.from_file(path)
    path.write_text("something else altogether")
    with pytest.raises(FileError, match="damaged"):
        SweepResult.from_file(path)
    save_file({"values": np.zeros(3)}, path)
    with pytest.raises(FileError, match="no result of a sweep"):
        SweepResult.from_file(path)
    with pytest.raises(FileNotFoundError):
        SweepResult.from_file(tmp_path / "none")


def _changed(path: Path, arrays: dict[str, Any] | None = None, **header: Any) -> None:
    """The same file with another header or other arrays."""
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        told = json.loads(file.metadata()["nnsplice"])
    there = load_file(path)
    told = {key: value for key, value in {**told, **header}.items() if value is not ...}
    save_file({**there, **(arrays or {})}, path, metadata={"nnsplice": json.dumps(told)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "format 99"),
        ({"format": "one"}, "damaged"),
        ({"kind": "SavedActivation"}, "no result"),
        ({"cells": ...}, "damaged"),
        ({"cells": [{"route": "x"}]}, "damaged"),
        ({"cells": []}, "damaged"),
        ({"tokens": 3}, "damaged"),
        ({"asked": 3}, "damaged"),
        ({"run": {"speed": 1}}, "damaged"),
        ({"arrays": {"values": np.zeros((2, 3))}}, "damaged"),
        ({"arrays": {"corrupted": np.zeros(5)}}, "damaged"),
        ({"arrays": {"exists": np.zeros(5, dtype=bool)}}, "damaged"),
        ({"arrays": {"values": np.zeros((2, 14), dtype=np.float32)}}, "damaged"),
    ],
)
def test_a_file_whose_parts_do_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = _written(tmp_path)
    _changed(path, **change)
    with pytest.raises(FileError, match=message):
        SweepResult.from_file(path)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _written(tmp_path)
    before = path.read_bytes()

    def fails(*_: Any, **__: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("safetensors.numpy.save_file", fails)
    with pytest.raises(OSError, match="full"):
        SweepResult(replace(table(), clean=np.zeros(2))).to_file(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["whole"]


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


# --- shards


@settings(max_examples=40, deadline=None)
@given(
    owner=st.lists(st.sets(st.integers(0, 3), min_size=1), min_size=28, max_size=28), order=st.permutations(range(4))
)
def test_any_parts_make_the_whole(owner: list[set[int]], order: list[int]) -> None:
    whole = table()
    owners = np.array([sum(1 << n for n in each) for each in owner]).reshape(2, 14)
    shards = [part(whole, owners >> n & 1 == 1) for n in order]
    merged = SweepResult.merge(iter(shards))
    assert merged == SweepResult(whole) and merged.is_complete
    assert SweepResult.merge([SweepResult.merge(shards[:2]), SweepResult.merge(shards[2:])]) == merged
    assert (merged.run.executor, merged.run.seconds, merged.run.tokens) == ("packed", 6.0, 160)


def test_merging_changes_none_of_the_parts(result: SweepResult) -> None:
    half = np.arange(28).reshape(2, 14) % 2 == 0
    shards = [part(result.table, half), part(result.table, ~half)]
    before = [shard.digest for shard in shards]
    assert SweepResult.merge(shards) == result
    assert [shard.digest for shard in shards] == before
    assert not SweepResult.merge(shards[:1]).is_complete


def test_shards_that_disagree_or_are_foreign_are_refused(result: SweepResult) -> None:
    with pytest.raises(BadArgument, match="nothing to merge"):
        SweepResult.merge([])
    values = result.table.values.copy()
    values[1, 2] += 1
    with pytest.raises(KeyMismatch, match=r"prompt 1 was measured differently[\s\S]*layers\[0\]\.output\[2\]"):
        SweepResult.merge([result, SweepResult(replace(result.table, values=values))])
    values[1, 2] = np.nan
    with pytest.raises(KeyMismatch, match="measured differently"):
        SweepResult.merge([result, SweepResult(replace(result.table, values=values))])
    with pytest.raises(KeyMismatch, match=r"different sweeps: seed differ"):
        SweepResult.merge([result, SweepResult(replace(result.table, asked={**result.asked, "seed": 1}))])
    cells = (replace(result.cells[0], layer=7), *result.cells[1:])
    with pytest.raises(KeyMismatch, match="different cells"):
        SweepResult.merge([result, SweepResult(replace(result.table, cells=cells))])


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
