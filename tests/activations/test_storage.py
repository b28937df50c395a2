"""Captures on disk: what is written is read again, and only what is asked for is read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

import nnsplice as ns
from activations.captures import captures, hand, same
from nnsplice.errors import FileError, UnknownPath
from nnsplice.paths import parse_path

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
KEYS = ("layers[0].output[0]", "layers[0].output[-1]", "layers[1].output[3]")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A capture on disk."""
    hand(*KEYS).to_file(tmp_path / "saved.safetensors")
    return tmp_path / "saved.safetensors"


# --------------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    bits = torch.randint(0, 256, (3, 5 * dtype.itemsize), dtype=torch.uint8)
    entry = bits > 127 if dtype == torch.bool else bits.view(dtype)  # NaN and infinity among them
    entry = entry[:, :5].contiguous()
    ns.SavedActivation.from_pairs(("layers[0].output[-1]", entry)).to_file(tmp_path / "x")
    again = ns.SavedActivation.from_file(tmp_path / "x")["layers[0].output[-1]"]
    assert again.dtype == dtype and torch.equal(again.contiguous().view(torch.uint8), entry.view(torch.uint8))


@given(captures())
def test_keys_order_and_values_come_back(tmp_path_factory: pytest.TempPathFactory, saved: ns.SavedActivation) -> None:
    file = tmp_path_factory.mktemp("files") / "saved.safetensors"
    saved.to_file(file)
    again = ns.SavedActivation.from_file(file)
    assert again.keys() == saved.keys() and same(again, saved) and again.rows == saved.rows


def test_names_and_keys_of_every_kind_come_back(tmp_path: Path) -> None:
    saved = hand(
        'layers[0].output["a \\"quoted\\" größe\\n"][-1]',
        "model.transformer.h[2].attn.output[0][-1]",
        "encoder.layers[1].heads[3].q[0]",
    ).mean("position") | hand("unembed.output[-1]")
    saved.to_file(str(tmp_path / "größe and spaces"))
    assert same(ns.SavedActivation.from_file(str(tmp_path / "größe and spaces")), saved)


def test_provenance_comes_back(model, tmp_path: Path) -> None:
    saved = ns.capture(
        model, ["w3 w4 w5", "w6 w7"], ['layers[0].output["s"][-1]', "embed.output[0]"], spans={"s": ["w4", "w6"]}
    )
    saved.to_file(tmp_path / "x")
    again = ns.SavedActivation.from_file(tmp_path / "x")
    assert same(again, saved)
    assert (again.model, again.prompts, again.tokens) == (saved.model, saved.prompts, saved.tokens)
    assert again.positions == saved.positions == {'layers[0].output["s"][-1]': [1, 0], "embed.output[0]": [0, 0]}
    assert again.slice[1].prompts == ("w6 w7",)


def test_a_file_keeps_a_place_under_both_of_its_names(model, tmp_path: Path) -> None:
    saved = ns.capture(model, "w3 w4 w5", ["layers[0].output[0]", "model.transformer.h[0].output[2]"])
    saved.to_file(tmp_path / "x")
    again = ns.SavedActivation.from_file(tmp_path / "x")
    assert same(again, saved) and again.keys() == saved.keys()
    for name in ("layers[0].output[:]", "model.transformer.h[0].output[:]"):
        assert again[name].shape == ns.SavedActivation.from_file(tmp_path / "x", name)[name].shape == (1, 2, 16)


def test_an_empty_capture_is_a_file_too(tmp_path: Path) -> None:
    ns.SavedActivation().to_file(tmp_path / "x")
    assert ns.SavedActivation.from_file(tmp_path / "x").keys() == []


def test_a_captured_graph_is_left_behind(tmp_path: Path) -> None:
    leaf = torch.ones(1, 4, requires_grad=True)
    ns.SavedActivation.from_pairs(("layers[0].output[0]", leaf)).to_file(tmp_path / "x")
    assert not ns.SavedActivation.from_file(tmp_path / "x")["layers[0].output[0]"].requires_grad


def test_a_view_is_stored_without_the_tensor_it_is_a_view_of(tmp_path: Path) -> None:
    large = hand(*KEYS, rows=500, width=100)
    large.slice[3:5].to_file(tmp_path / "rows")
    large.subset(KEYS[1]).slice[7].map(lambda tensor: tensor[..., 5:9]).to_file(tmp_path / "columns")
    assert (tmp_path / "rows").stat().st_size < 3 * 2 * 100 * 8 + 2000
    assert (tmp_path / "columns").stat().st_size < 2000
    assert same(ns.SavedActivation.from_file(tmp_path / "rows"), large.slice[3:5])


def test_strided_and_expanded_tensors_are_stored(tmp_path: Path) -> None:
    saved = hand(*KEYS, width=6).map(lambda tensor: tensor[..., ::2].expand(2, -1, -1).flip(-1))
    one_row_twice = hand(*KEYS, rows=1).map(lambda tensor: tensor.expand(3, -1, -1))
    for made in (saved, one_row_twice):
        made.to_file(tmp_path / "x")
        assert same(ns.SavedActivation.from_file(tmp_path / "x"), made)


def test_a_file_is_read_in_another_process_without_unpickling(tmp_path: Path) -> None:
    saved = hand(*KEYS, dtype=torch.bfloat16)
    saved.to_file(tmp_path / "x")
    program = (
        "import pickle, sys\n"
        "pickle.Unpickler = pickle.load = pickle.loads = None\n"
        "import nnsplice as ns\n"
        "saved = ns.SavedActivation.from_file(sys.argv[1])\n"
        "(saved * 2).to_file(sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "x"), str(tmp_path / "y")], check=True)
    assert same(ns.SavedActivation.from_file(tmp_path / "y"), saved * 2)


# ------------------------------------------------------------------------------------------------------- partial reads


@given(captures(), st.data())
def test_a_partial_read_is_the_subset(
    tmp_path_factory: pytest.TempPathFactory, saved: ns.SavedActivation, data: st.DataObject
) -> None:
    file = tmp_path_factory.mktemp("files") / "saved.safetensors"
    saved.to_file(file)
    wanted = data.draw(st.lists(st.sampled_from(saved.keys())))
    again = ns.SavedActivation.from_file(file, wanted)
    assert again.keys() == saved.subset(wanted).keys() and same(again, saved.subset(wanted))


@pytest.mark.parametrize(
    ("paths", "keys"),
    [
        ("layers[:].output[3]", ["layers[1].output[3]"]),
        ("layers[0].output[:]", ["layers[0].output[0]", "layers[0].output[-1]"]),
        (["L1", "l0[-1,0]"], list(KEYS)),
        (parse_path("layers[0].output[-1]"), ["layers[0].output[-1]"]),
        ([], []),
    ],
)
def test_slices_lists_and_short_forms_say_what_to_read(file: Path, paths: Any, keys: list[str]) -> None:
    assert ns.SavedActivation.from_file(file, paths).keys() == keys


def test_a_slice_from_the_end_is_counted_by_the_prompts_tokens(model, tmp_path: Path) -> None:
    ns.capture(model, "w3 w4 w5 w6", "layers[0].output[0:3]").to_file(tmp_path / "x")
    part = ns.SavedActivation.from_file(tmp_path / "x", "layers[0].output[-2:]")
    assert part.keys() == ["layers[0].output[2]"]


def test_an_unknown_path_names_the_keys_of_the_file(file: Path) -> None:
    with pytest.raises(UnknownPath, match=r"layers\[1\]\.output\[3\]"):
        ns.SavedActivation.from_file(file, "layers[1].output[4]")


def test_a_partial_read_reads_no_other_tensor(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[str, Any]] = []
    opened = safetensors.safe_open

    class Counting:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.inner = opened(*args, **kwargs)

        def __enter__(self) -> Counting:
            self.file = self.inner.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.inner.__exit__(*error)

        def keys(self) -> list[str]:
            return self.file.keys()

        def metadata(self) -> dict[str, str]:
            return self.file.metadata()

        def get_slice(self, name: str) -> Any:
            part = self.file.get_slice(name)

            class Slice:
                get_shape = staticmethod(part.get_shape)

                def __getitem__(self, index: Any) -> torch.Tensor:
                    read.append((name, index))
                    return part[index]

            return Slice()

    monkeypatch.setattr(safetensors, "safe_open", Counting)
    ns.SavedActivation.from_file(file, "layers[0].output[-1]")
    assert read == [("layers[0].output", (slice(None), slice(1, 2)))]
    read.clear()
    ns.SavedActivation.from_file(file, [])
    assert read == []


def test_other_tensors_may_be_damaged_under_a_partial_read(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-2 * 4 * 8 :] = b"\xff" * (2 * 4 * 8)  # layers[1], written last
    file.write_bytes(content)
    expected = hand(*KEYS)
    assert same(ns.SavedActivation.from_file(file, "layers[0]"), expected.subset("layers[0]"))
    with pytest.raises(FileError, match=r"layers\[1\]\.output has the checksum"):
        ns.SavedActivation.from_file(file)


def test_saving_with_a_path_names_to_file(tmp_path: Path) -> None:
    saved = hand("layers[0].output[0]")
    with pytest.raises(TypeError, match=r"writes no file[\s\S]*to_file\('run.safetensors'\)"):
        saved.save("run.safetensors")
    assert saved.save() is not None and not list(tmp_path.iterdir())
