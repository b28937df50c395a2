"""Sweeps with `out="....zarr"`: the numbers of a run folder, a chunk for each prompt that one unit writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nnsplice as ns
import sweep_functions
from buckets import bucket, server  # noqa: F401  (fixtures)
from nnsplice.errors import BadArgument, FileError, MissingPackage
from nnsplice.results import zarr_files
from nnsplice.sweeps import stored
from nnsplice.work import RunFolder, Worker

ROOT = Path(__file__).parents[2]
CLEAN = ["w3 w4 w5 w6", "w3 w4 w8", "w5 w9 w3 w7 w8", "w4 w4"]
CORRUPTED = ["w3 w9 w5 w6", "w3 w9 w8", "w5 w4 w3 w7 w8", "w5 w4"]
OPTIONS: dict[str, Any] = {"size": 200, "progress": False}
LOAD = "sweep_functions:tiny"


@pytest.fixture(autouse=True)
def _found_by_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "tests"), str(ROOT / "src"), *sys.path])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="module")
def tiny() -> Any:
    return sweep_functions.tiny()


def _plan(model: Any, metric: Any = None, **more: Any) -> Any:
    return ns.plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output[:]", metric or ns.rank("w7"), **more)


def _written(plan: Any, path: Any, **more: Any) -> RunFolder:
    """A run of this plan that nobody has begun to work on."""
    with pytest.raises(FileError, match="no unit of"):
        ns.run(plan, LOAD, on="folder", out=path, **{**OPTIONS, **more})
    return RunFolder.open(f"{path}.run")


def _same(a: Any, b: Any) -> bool:
    return a.table.values.tobytes() == b.table.values.tobytes() and a == b


@pytest.fixture
def _zarr() -> None:
    pytest.importorskip("zarr", reason="zarr is an extra: `make ray` runs this")


@pytest.mark.usefixtures("_zarr")
@pytest.mark.parametrize("several", [False, True])
def test_the_numbers_are_those_of_a_run_folder(tiny: Any, tmp_path: Path, several: bool) -> None:
    metric = [ns.logit_diff("w7", "w8"), ns.rank("w7")] if several else ns.logit_diff("w7", "w8")
    plan = _plan(tiny, metric)
    found = ns.run(plan, LOAD, on="local:1", out=tmp_path / "r.zarr", **OPTIONS)
    assert "table" not in vars(found)  # nothing is read before it is asked for
    here = ns.run(plan, LOAD, on="local:1", out=tmp_path / "run", **OPTIONS)
    assert _same(found, here)
    assert (found.table.run.forwards, found.table.run.tokens) == (here.table.run.forwards, here.table.run.tokens)
    assert _same(ns.SweepResult.from_zarr(tmp_path / "r.zarr"), here)
    lazy = ns.SweepResult.open_zarr(tmp_path / "r.zarr")
    np.testing.assert_array_equal(lazy["values"].sel(prompt=2).values, here.table.values[2])
    np.testing.assert_array_equal(lazy["exists"].values, here.table.exists)
    again = ns.run(plan, LOAD, on="local:1", out=tmp_path / "r.zarr", **OPTIONS)
    assert _same(again, here)
    if not several:
        import zarr  # pyright: ignore[reportMissingImports]

        array = zarr.open_group(tmp_path / "r.zarr", mode="r+")["clean"]
        array[2] = float(array[2]) + 1
        with pytest.raises(FileError, match="not what was written"):
            ns.SweepResult.from_zarr(tmp_path / "r.zarr")


@pytest.mark.usefixtures("_zarr")
def test_each_chunk_is_written_by_one_unit_and_stays(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, path = _plan(tiny), tmp_path / "r.zarr"
    folder = _written(plan, path, size=60)
    assert folder.units > 1
    written: list[tuple[int, int]] = []
    write, run = zarr_files.Growing.write, stored.StoredUnits.run
    now: list[int] = []

    def noted(self: Any, prompt: int, *cells: Any) -> str:
        written.append((now[-1], prompt))
        return write(self, prompt, *cells)

    monkeypatch.setattr(zarr_files.Growing, "write", noted)
    monkeypatch.setattr(stored.StoredUnits, "run", lambda self, number: (now.append(number), run(self, number))[1])
    first = Worker(folder)
    first.stopping = True  # leaves after one unit
    first.work()
    assert folder.done() == {0}
    chunks = sorted(int(one.name) for one in (path / "values" / "c").iterdir())
    assert chunks == sorted(prompt for _, prompt in written)
    with pytest.raises(FileError, match="is not finished"):
        ns.SweepResult.from_zarr(path)
    part = ns.run(plan, LOAD, on="folder", out=path, **{**OPTIONS, "size": 60})
    assert not part.is_complete
    assert set(np.flatnonzero(part.table.done.any(1))) == set(chunks)
    assert Worker(folder).work() == 0
    assert sorted(prompt for _, prompt in written) == [0, 1, 2, 3]  # each once
    whole = ns.run(plan, LOAD, on="folder", out=path, **{**OPTIONS, "size": 60})
    assert _same(whole, ns.run(plan, LOAD, on="local:1", out=tmp_path / "run", **{**OPTIONS, "size": 60}))


@pytest.mark.usefixtures("_zarr")
def test_a_prompt_in_several_units_is_refused_with_the_size_that_would_do(tiny: Any, tmp_path: Path) -> None:
    plan = _plan(tiny)
    with pytest.raises(BadArgument, match=r"cut into several units[\s\S]*size=\d+") as told:
        ns.run(plan, LOAD, on="local:1", out=tmp_path / "r.zarr", **{**OPTIONS, "size": 10})
    assert list(tmp_path.iterdir()) == []
    size = int(str(told.value).partition("size=")[2].partition(",")[0])
    _written(plan, tmp_path / "r.zarr", size=size)
    with pytest.raises(BadArgument, match="cut into several units"):
        ns.run(plan, LOAD, on="local:1", out=tmp_path / "s.zarr", **{**OPTIONS, "size": size - 1})


@pytest.mark.usefixtures("_zarr")
def test_other_runs_and_other_things_are_refused(tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "r.zarr"
    folder = _written(_plan(tiny), path)
    with pytest.raises(FileError, match="another run"):
        ns.run(_plan(tiny, ns.rank("w8")), LOAD, on="local:1", out=path, **OPTIONS)
    (folder.path / "run.json").unlink()  # a driver that was killed before it wrote this
    (folder.path / ".begun").touch()
    assert _written(_plan(tiny), path).units == folder.units
    for name in ("full.zarr", "other.zarr"):
        (tmp_path / name).mkdir()
    (tmp_path / "full.zarr" / "notes").write_text("mine")
    with pytest.raises(FileError, match="exists, and is of no run"):
        ns.run(_plan(tiny), LOAD, on="local:1", out=tmp_path / "full.zarr", **OPTIONS)
    assert (tmp_path / "full.zarr" / "notes").read_text() == "mine"


@pytest.mark.usefixtures("_zarr")
def test_damage_is_found_by_the_sum_of_each_prompt(tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "r.zarr"
    assert ns.run(_plan(tiny), LOAD, on="local:1", out=path, **OPTIONS).is_complete
    (path / "values" / "c" / "1" / "0").unlink()
    with pytest.raises(FileError, match="what it holds is not what was written"):
        ns.SweepResult.from_zarr(path)


@pytest.mark.usefixtures("_zarr")
def test_a_store_that_has_no_checksum_of_the_unedited_runs_is_read(tiny: Any, tmp_path: Path) -> None:
    import zarr  # pyright: ignore[reportMissingImports]

    path = tmp_path / "r.zarr"
    result = ns.run(_plan(tiny), LOAD, on="local:1", out=path, **OPTIONS)
    group = zarr.open_group(path, mode="r+")
    header = json.loads(group.attrs[zarr_files.ATTRIBUTE])
    assert header.pop("ends")
    group.attrs[zarr_files.ATTRIBUTE] = json.dumps(header)
    assert _same(ns.SweepResult.from_zarr(path), result)


@pytest.mark.usefixtures("_zarr")
def test_a_store_in_an_object_store(tiny: Any, bucket: str, tmp_path: Path) -> None:  # noqa: F811
    plan = _plan(tiny)
    found = ns.run(plan, LOAD, on="local:1", out=f"{bucket}/r.zarr", **OPTIONS)
    assert _same(found, ns.run(plan, LOAD, on="local:1", out=tmp_path / "run", **OPTIONS))
    lazy = ns.SweepResult.open_zarr(f"{bucket}/r.zarr")
    np.testing.assert_array_equal(lazy["values"].sel(prompt=2).values, found.table.values[2])


def test_without_the_extra_it_is_named(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(MissingPackage, match=r"nnsplice\[zarr\]"):
        ns.run(_plan(tiny), LOAD, on="local:1", out=tmp_path / "r.zarr", **OPTIONS)
    assert list(tmp_path.iterdir()) == []
