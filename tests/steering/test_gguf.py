"""Control vectors for llama.cpp: an independent reader reads what is written, and what cannot be said is refused."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nnsplice as ns
from nnsplice.errors import FileError, NnspliceError
from nnsplice.gguf import read_file, write_file
from steering.vectors import precise, vector


def test_another_reader_finds_direction_n_for_block_n(tmp_path: Path) -> None:
    """The number is the block's, counted from 0: neighbours correlate, so a shift by one would be silent."""
    gguf = pytest.importorskip("gguf")
    found = vector(1, 2, 7)
    ns.steering.to_gguf(found, tmp_path / "v.gguf", coefficient=0.5, model_hint="llama")
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert list(tensors) == ["direction.1", "direction.2", "direction.7"]
    for layer in (1, 2, 7):
        tensor = tensors[f"direction.{layer}"]
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32 and list(tensor.shape) == [16]
        expected = (0.5 * found[f"layers[{layer}].output[-1]"][0]).float().numpy()
        np.testing.assert_array_equal(tensor.data, expected)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    assert facts["general.architecture"] == "controlvector"
    assert facts["controlvector.model_hint"] == "llama"
    assert facts["controlvector.layer_count"] == 3
    assert facts["nnsplice.coefficient"] == 0.5


def test_what_another_writer_wrote_is_read(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "controlvector")
    writer.add_string("controlvector.model_hint", "qwen2")
    writer.add_uint32("controlvector.layer_count", 2)
    writer.add_array("tokens", ["a", "b"])
    writer.add_bool("flag", True)
    directions = {layer: np.random.default_rng(layer).normal(size=8).astype(np.float32) for layer in (5, 1)}
    for layer, direction in directions.items():
        writer.add_tensor(f"direction.{layer}", direction)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = ns.steering.from_gguf(tmp_path / "v.gguf")
    assert found.layers == [1, 5] and found.about.model_type == "qwen2"
    for layer, direction in directions.items():
        np.testing.assert_array_equal(found[f"layers[{layer}].output[-1]"][0].numpy(), direction)
    facts, _ = read_file(tmp_path / "v.gguf")
    assert (facts["tokens"], facts["flag"]) == (["a", "b"], True)


def test_there_and_back_steers_the_same(tmp_path: Path) -> None:
    model = precise("llama")
    ns.steering.to_gguf(vector(1, 2), tmp_path / "v.gguf", coefficient=3.0)
    back = ns.steering.from_gguf(tmp_path / "v.gguf")
    ids = torch.tensor([[3, 4, 5]])
    with ns.steering.steer(model, vector(1, 2), 3.0):
        expected = model._module(ids).logits
    with ns.steering.steer(model, back):
        found = model._module(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    # A steering can be written too: what its rules add to one block is one direction.
    steering = ns.steering.steer(model, vector(1), 2.0) + ns.steering.steer(model, vector(1), 1.0)
    ns.steering.to_gguf(steering + ns.steering.steer(model, vector(1, 2).at(2), 3.0), tmp_path / "w.gguf")
    assert ns.steering.from_gguf(tmp_path / "w.gguf").allclose(back, atol=1e-6)
    assert ns.steering.from_gguf(tmp_path / "w.gguf").about.model_type == "llama"


def test_what_llama_cpp_cannot_express_is_refused_with_the_reason(tmp_path: Path) -> None:
    model, path = precise("llama"), tmp_path / "v.gguf"
    steer = ns.steering.steer
    refused: list[tuple[Any, str]] = [
        (vector(0, 1), "begin with block 1"),
        (vector(1, site="attn.output"), "no such output"),
        (vector(1, site="input"), "no such output"),
        (vector(1, site="mid"), "no such output"),
        (ns.SavedActivation.from_pairs(("final_norm.output[-1]", torch.ones(1, 4))), "no such output"),
        (ns.SavedActivation.from_pairs(("encoder.layers[1].output[-1]", torch.ones(1, 4))), "no such output"),
        (ns.SavedActivation.from_pairs(("layers[1].heads[0].output[-1]", torch.ones(1, 4))), "no such output"),
        (ns.SavedActivation.from_pairs(("layers[1].output[-1]", torch.ones(2, 4))), "2 rows"),
        (steer(model, vector(1), operator="project_out"), "project_out"),
        (steer(model, vector(1), where="generated"), "every position"),
        (steer(model, vector(1), [1.0, 2.0]), "one strength"),
        (steer(model, vector(1), when=ns.steering.similar(vector(1), "layers[1].output", above=0.1)), "condition"),
        ("vector", "no vector"),
    ]
    for what, text in refused:
        with pytest.raises(NnspliceError, match=text):
            ns.steering.to_gguf(what, path)
    with pytest.raises(ValueError, match="own coefficient"):
        ns.steering.to_gguf(steer(model, vector(1)), path, coefficient=2.0)
    with pytest.raises(ValueError, match="coefficient=nan"):
        ns.steering.to_gguf(vector(1), path, coefficient=float("nan"))
    assert not list(tmp_path.iterdir())


def test_a_models_own_names_are_understood_where_a_model_told_them(tmp_path: Path) -> None:
    model = precise("llama")
    acts = ns.capture(model, ["w3 w4", "w5 w6"], "model.model.layers[1:3].output[-1]")
    found = ns.steering.fit(acts.slice[0], acts.slice[1])
    ns.steering.to_gguf(found, tmp_path / "v.gguf")
    assert ns.steering.from_gguf(tmp_path / "v.gguf").layers == [1, 2]
    inner = ns.capture(model, ["w3 w4", "w5 w6"], "model.model.layers[1].mlp.output[-1]")
    with pytest.raises(NnspliceError, match="no such output"):
        ns.steering.to_gguf(ns.steering.fit(inner.slice[0], inner.slice[1]), tmp_path / "w.gguf")


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    write_file(path, {"general.architecture": "llama"}, {"direction.1": np.ones(4)})
    with pytest.raises(FileError, match="GGUF file of a llama"):
        ns.steering.from_gguf(path)
    for name in ("direction.0", "direction.x", "token_embd.weight"):
        write_file(path, {"general.architecture": "controlvector"}, {name: np.ones(4)})
        with pytest.raises(FileError, match="has a tensor"):
            ns.steering.from_gguf(path)
    write_file(path, {"general.architecture": "controlvector"}, {})
    with pytest.raises(FileError, match="no direction"):
        ns.steering.from_gguf(path)
    path.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(FileError, match="no GGUF"):
        ns.steering.from_gguf(path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 9, 0, 0))
    with pytest.raises(FileError, match="version 9"):
        ns.steering.from_gguf(path)


@given(st.integers(0, 400), st.integers(0, 255))
def test_damage_is_an_error_and_never_a_crash(at: int, byte: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "v.gguf"
        ns.steering.to_gguf(vector(1, 2), path)
        raw = bytearray(path.read_bytes())
        raw[at % len(raw)] = byte
        path.write_bytes(bytes(raw))
        try:
            found = ns.steering.from_gguf(path)
        except FileError:
            pass
        else:
            assert len(found) >= 1
        path.write_bytes(bytes(raw[: at % len(raw)]))
        with pytest.raises(FileError):
            ns.steering.from_gguf(path)
