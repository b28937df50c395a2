"""Results as Zarr stores and Parquet files; `make ray` installs what they need, and runs these."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nnsplice as ns
from nnsplice.errors import FileError, MissingPackage
from nnsplice.results import Cell, SweepResult
from results.tables import table
from zoo import wrap

needs_zarr = pytest.mark.skipif(
    __import__("importlib").util.find_spec("zarr") is None, reason="zarr is an extra: `make ray` runs this"
)
needs_parquet = pytest.mark.skipif(
    __import__("importlib").util.find_spec("pyarrow") is None, reason="pyarrow is an extra: `make ray` runs this"
)


@pytest.fixture(scope="module")
def result() -> SweepResult:
    metrics = [ns.logit_diff("w7", "w8"), ns.rank("w7")]
    model = wrap("gpt2")
    pairs = ["w3 w4 w5", "w3 w4"], ["w3 w6 w5", "w9 w4"]
    return ns.sweep(model, *pairs, ["layers[:].output[:]", "layers[:].heads[:].output[-1]"], metrics, progress=False)


@needs_zarr
@pytest.mark.parametrize("several", [True, False])
def test_a_store_comes_back_to_the_bit(result: SweepResult, tmp_path: Path, several: bool) -> None:
    result = result if several else result.only("logit_diff")
    result.to_zarr(tmp_path / "r.zarr")
    again = SweepResult.from_zarr(tmp_path / "r.zarr")
    assert again == result
    assert again.run == result.run
    assert [path.name for path in tmp_path.iterdir()] == ["r.zarr"]


@needs_zarr
def test_a_store_is_opened_without_reading_it(result: SweepResult, tmp_path: Path) -> None:
    result.to_zarr(tmp_path / "r.zarr")
    found = SweepResult.open_zarr(tmp_path / "r.zarr")
    assert dict(found.sizes) == {"prompt": 2, "cell": len(result.cells), "metric": 2}
    (tmp_path / "r.zarr" / "values" / "c" / "1" / "0" / "0").unlink()  # the second prompt's numbers are gone
    one = found["values"].sel(prompt=0, metric="rank").values
    np.testing.assert_array_equal(one, result.only("rank").table.values[0])
    assert np.isnan(found["values"].sel(prompt=1).values).all()  # ... and no other number stands for them
    layers = found["values"].where(found.layer == 1, drop=True).sel(prompt=0)
    assert set(layers.path.values) == {cell.path for cell in result.cells if cell.layer == 1}


@needs_zarr
def test_a_part_keeps_the_numbers_of_its_prompts(result: SweepResult, tmp_path: Path) -> None:
    model = wrap("gpt2")
    plan = ns.plan_sweep(model, ["w3", "w4"], ["w5", "w6"], "layers[:].output[0]", ns.rank("w7"))
    ns.run(plan.take([1]), model, progress=False).to_zarr(tmp_path / "r.zarr")
    assert SweepResult.open_zarr(tmp_path / "r.zarr").prompt.values.tolist() == [1]


@needs_zarr
def test_damage_and_other_things_are_told(result: SweepResult, tmp_path: Path) -> None:
    result.to_zarr(tmp_path / "r.zarr")
    with pytest.raises(FileError, match="exists"):
        result.to_zarr(tmp_path / "r.zarr")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match="no store of a result"):
        SweepResult.from_zarr(tmp_path / "empty")
    (tmp_path / "r.zarr" / "values" / "c" / "0" / "0" / "0").unlink()
    with pytest.raises(FileError, match="damaged"):
        SweepResult.from_zarr(tmp_path / "r.zarr")
    beside = tmp_path / "r.zarr" / "zarr.json"
    told = json.loads(beside.read_text())
    beside.write_text(json.dumps({**told, "attributes": {}, "consolidated_metadata": None}))
    with pytest.raises(FileError, match="something else"):
        SweepResult.from_zarr(tmp_path / "r.zarr")


@needs_zarr
def test_edges_go_to_a_file(result: SweepResult, tmp_path: Path) -> None:
    one = result.only("rank")
    checked = SweepResult(replace(one.table, exact=one.table.values))
    with pytest.raises(FileError, match="to_file"):
        checked.to_zarr(tmp_path / "r.zarr")
    assert list(tmp_path.iterdir()) == []


@needs_parquet
@pytest.mark.parametrize("several", [True, False])
def test_rows_go_to_parquet_a_prompt_at_a_time(result: SweepResult, tmp_path: Path, several: bool) -> None:
    import pandas as pd
    import pyarrow.parquet as pq  # pyright: ignore[reportMissingImports]

    result = result if several else result.only("rank")
    result.to_parquet(tmp_path / "r.parquet")
    assert pq.ParquetFile(tmp_path / "r.parquet").num_row_groups == 2
    found, rows = pd.read_parquet(tmp_path / "r.parquet"), pd.concat(result.frames(), ignore_index=True)
    pd.testing.assert_frame_equal(found, rows, check_dtype=False)


def test_frames_are_the_rows_of_the_frame(result: SweepResult) -> None:
    import pandas as pd

    one = result.only("logit_diff")
    pd.testing.assert_frame_equal(pd.concat(one.frames(), ignore_index=True), one.frame())
    both = pd.concat(result.frames(), ignore_index=True).sort_values(["metric", "prompt"], kind="stable")
    whole = result.frame().sort_values(["metric", "prompt"], kind="stable")
    pd.testing.assert_frame_equal(both.reset_index(drop=True), whole.reset_index(drop=True))


@pytest.mark.parametrize(("write", "package"), [("to_zarr", "zarr"), ("to_parquet", "pyarrow")])
def test_without_the_extra_it_is_named(
    result: SweepResult, tmp_path: Path, monkeypatch: Any, write: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackage, match=r'pip install "nnsplice'):
        getattr(result, write)(tmp_path / "r")


@needs_zarr
def test_without_obstore_an_address_is_refused(result: SweepResult, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(MissingPackage, match=r"nnsplice\[cloud\]"):
        result.to_zarr("s3://bucket/r.zarr")
    assert list(tmp_path.iterdir()) == []


@needs_zarr
def test_parts_of_a_sum_keep_their_rest(tmp_path: Path) -> None:
    parts = ns.lens.direct(wrap("gpt2"), ["w3 w4 w5", "w3 w4"], ns.logit_diff("w7", "w8"), progress=False)
    parts.to_zarr(tmp_path / "r.zarr")
    again = SweepResult.from_zarr(tmp_path / "r.zarr")
    assert again == parts
    np.testing.assert_array_equal(again.rest, parts.rest)


def _unlike() -> SweepResult:
    """Positions and spans of one kind of site, features, and a first prompt of which nothing was measured."""
    sae = 'layers[0].output.sae["s"]'
    cells = [
        *(Cell(f"layers[0].output[{n}]", "layers[:].output", layer=0, position=n) for n in range(2)),
        Cell('layers[0].output["subject"]', "layers[:].output", layer=0, position="subject"),
        *(Cell(f"{sae}.features[{n}][0]", f"{sae}.features[:]", layer=0, feature=n, position=0) for n in range(2)),
        Cell("layers[0].heads[0].pattern[1][0]", "layers[:].heads[:].pattern", layer=0, head=0, position=1, key=0),
    ]  # fmt: skip
    made = table(cells, (("a", "b"),) * 3)
    done = np.ones((3, 6), dtype=bool)
    done[0], done[1, 3:] = False, False  # prompt 1 has no features and no edges
    return SweepResult(replace(made, done=done))


def test_columns_have_one_type_in_all_prompts() -> None:
    result = _unlike()
    frames = list(result.frames())
    assert [len(frame) for frame in frames] == [0, 3, 6]
    whole = result.frame()
    for frame in frames:
        assert frame.dtypes.to_dict() == whole.dtypes.to_dict()
    assert str(whole.dtypes["key"]) == "Int64"
    assert list(whole["key"].dropna()) == [0]


@needs_parquet
def test_rows_of_unlike_prompts_go_to_parquet(tmp_path: Path) -> None:
    import pandas as pd

    result = _unlike()
    result.to_parquet(tmp_path / "r.parquet")
    found, rows = pd.read_parquet(tmp_path / "r.parquet"), result.frame()
    assert list(found) == list(rows)
    assert found["position"].tolist() == ["0", "1", "subject", "0", "1", "subject", "0", "0", "1"]
    assert [None if pd.isna(n) else int(n) for n in found["feature"]] == [None] * 6 + [0, 1] + [None]
    np.testing.assert_array_equal(found["value"], rows["value"])
    nothing = SweepResult(replace(result.table, done=np.zeros((3, 6), dtype=bool)))
    nothing.to_parquet(tmp_path / "none.parquet")
    assert list(pd.read_parquet(tmp_path / "none.parquet")) == list(rows)
