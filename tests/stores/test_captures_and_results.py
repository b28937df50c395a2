"""Captures and results in an object store: the same numbers as in a folder, and only what is asked for is fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nnsplice as ns
from buckets import bucket, server  # noqa: F401  (fixtures)
from nnsplice.activations import capture_folder
from nnsplice.errors import FileError, UnknownPath
from nnsplice.stores import cloud
from zoo import wrap

PROMPTS = [[3, 4, 5], [6, 7], [8, 9, 10, 11], [12], [13, 14]]


@pytest.fixture(scope="module")
def model() -> Any:
    return wrap("gpt2")


def test_a_capture_comes_back_and_places_are_read_alone(
    bucket: str,  # noqa: F811
    model: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = ns.capture(model, PROMPTS[0], "layers[:].output[:]")
    path = f"{bucket}/a/one.safetensors"
    whole.to_file(path)
    assert ns.SavedActivation.from_file(path) == whole
    fetched: list[int] = []
    fetch = cloud.Ranged.fetch
    monkeypatch.setattr(cloud.Ranged, "fetch", lambda self, start, n: (fetched.append(n), fetch(self, start, n))[1])
    part = ns.SavedActivation.from_file(path, "layers[1].output[:]")
    assert torch.equal(part.get("layers[1].output[:]"), whole.get("layers[1].output[:]"))
    place = whole.get("layers[1].output[:]")
    assert fetched[2:] == [place.numel() * place.element_size()]  # behind the length of the header, and the header
    with pytest.raises(UnknownPath):
        ns.SavedActivation.from_file(path, "layers[1].mlp.output[0]")
    with pytest.raises(FileNotFoundError, match="there is no s3://"):
        ns.SavedActivation.from_file(f"{bucket}/a/two.safetensors")


def test_damage_in_an_object_store_is_told(bucket: str, model: Any) -> None:  # noqa: F811
    from nnsplice.stores import store_of

    store = store_of(bucket)
    ns.capture(model, PROMPTS[0], "layers[:].output[:]").to_file(store.at("a"))
    raw = store.read("a")
    for broken in (raw[:40], raw[:-8], raw[:-1] + bytes([raw[-1] ^ 1]), b"\x80\x02" + raw[2:], b""):
        store.write("a", broken)
        with pytest.raises(FileError, match="s3://"):
            ns.SavedActivation.from_file(store.at("a"))


def test_captures_of_many_prompts(
    bucket: str,  # noqa: F811
    model: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paths = ["layers[:].output[-1]", "layers[1].output[0]"]
    here = ns.capture_to(tmp_path / "a", model, PROMPTS, paths, chunk=2, progress=False)
    captured, taken = capture_folder.captured_within, []

    def stops(*args: Any, **options: Any) -> Any:
        if len(taken) == 2:
            raise KeyboardInterrupt
        taken.append(1)
        return captured(*args, **options)

    monkeypatch.setattr(capture_folder, "captured_within", stops)
    with pytest.raises(KeyboardInterrupt):
        ns.capture_to(f"{bucket}/a", model, PROMPTS, paths, chunk=2, progress=False)
    part = ns.SavedActivation.open(f"{bucket}/a")
    assert (part.rows, part.is_complete) == (4, False)
    taken[:] = [1]
    there = ns.capture_to(f"{bucket}/a", model, PROMPTS, paths, chunk=2, progress=False)
    assert len(taken) == 2  # the last chunk alone
    assert (there.rows, there.is_complete, there.paths) == (5, True, here.paths)
    for path in ("layers[2].output[-1]", "layers[1].output[0]"):
        assert torch.equal(there.get(path), here.get(path))
    ours, theirs = (torch.cat(list(held.tokens("layers[1].output", 3, seed=1))) for held in (here, there))
    assert torch.equal(ours, theirs)
    with pytest.raises(FileError, match="other prompts: chunk 0"):
        ns.capture_to(f"{bucket}/a", model, PROMPTS[1:], paths, chunk=2, progress=False)
    with pytest.raises(FileError, match="holds no captures"):
        ns.SavedActivation.open(f"{bucket}/b")


def test_results_as_files_stores_and_rows(bucket: str, model: Any, tmp_path: Path) -> None:  # noqa: F811
    result = ns.sweep(
        model, ["w3 w4 w5", "w3 w4"], ["w3 w6 w5", "w9 w4"], "layers[:].output[:]", ns.rank("w7"), progress=False
    )
    result.to_file(f"{bucket}/r.safetensors")
    assert ns.SweepResult.from_file(f"{bucket}/r.safetensors") == result
    pytest.importorskip("zarr")
    result.to_zarr(f"{bucket}/r.zarr")
    assert ns.SweepResult.from_zarr(f"{bucket}/r.zarr") == result
    found = ns.SweepResult.open_zarr(f"{bucket}/r.zarr")
    np.testing.assert_array_equal(found["values"].sel(prompt=1).values, result.table.values[1])
    with pytest.raises(FileError, match="exists"):
        result.to_zarr(f"{bucket}/r.zarr")
    pytest.importorskip("pyarrow")
    import io

    import pandas as pd

    from nnsplice.stores import store_of

    result.to_parquet(f"{bucket}/r.parquet")
    result.to_parquet(tmp_path / "r.parquet")
    rows = pd.read_parquet(io.BytesIO(store_of(bucket).read("r.parquet")))
    pd.testing.assert_frame_equal(rows, pd.read_parquet(tmp_path / "r.parquet"))


def test_a_store_that_was_not_finished_is_none(
    bucket: str,  # noqa: F811
    model: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    zarr = pytest.importorskip("zarr")
    from nnsplice.stores import store_of

    result = ns.sweep(model, "w3 w4", "w3 w5", "layers[:].output[:]", ns.rank("w7"), progress=False)
    zarr.create_group(zarr.storage.ObjectStore(store_of(f"{bucket}/half.zarr").inner), zarr_format=3)
    with pytest.raises(FileError, match="is not finished"):
        ns.SweepResult.from_zarr(f"{bucket}/half.zarr")
    monkeypatch.setattr("nnsplice.results.zarr_files.files.canonical", lambda told: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        result.to_zarr(f"{bucket}/r.zarr")
    assert store_of(f"{bucket}/r.zarr").names() == []
