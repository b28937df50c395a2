"""What tensors keep on their way through files: every type bit for bit, views, and ties."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_model
from torch import Tensor, nn

from checkpoints.folders import KB, index, read, write
from nnsplice import checkpoints as ck
from nnsplice.errors import MapperError

# -- types -------------------------------------------------------------------------------------------------------------


def every_type() -> dict[str, Tensor]:
    raw = torch.randint(0, 256, (5, 16), dtype=torch.uint8)
    names = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "complex64"]
    names += [
        "float8_e4m3fn",
        "float8_e5m2",
        "float8_e4m3fnuz",
        "float8_e5m2fnuz",
        "float8_e8m0fnu",
        "uint16",
        "uint32",
    ]
    names += ["uint64", "float4_e2m1fn_x2"]
    state = {name: raw.view(getattr(torch, name)) for name in names if hasattr(torch, name)}
    packed = {"qweight": torch.randint(-(2**31), 2**31, (4, 8), dtype=torch.int32), "odd": raw[:1, :3].contiguous()}
    return (
        state | packed | {"bool": raw > 127, "empty": torch.zeros(0, 3), "odd bf16": raw.view(torch.bfloat16)[:3, :3]}
    )


def same_bits(one: Tensor, other: Tensor) -> bool:
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)


def test_every_type_passes_bit_for_bit(tmp_path: Path):
    state = every_type()
    write(tmp_path / "ck", state)
    found = read(tmp_path / "ck")
    peer = load_file(tmp_path / "ck" / "model-00001-of-00001.safetensors")
    for name, tensor in state.items():
        assert same_bits(found[name], tensor) and same_bits(peer[name], tensor), name


def test_every_type_passes_through_stacks_and_splits(tmp_path: Path):
    for name, tensor in every_type().items():
        if tensor.dim() < 2 or not tensor.numel() or tensor.shape[0] < 2:
            continue
        rows = [f"r{i}" for i in range(tensor.shape[0])]
        chain = ck.Sequential([ck.UnstackTensors("x", rows, 0), ck.StackTensors(rows, "x", 0)])
        assert same_bits(chain.apply({"x": tensor})["x"], tensor), name
        chain = ck.Sequential(
            [ck.Split("x", ["a", "b"], [1, len(rows) - 1], 0), ck.ConcatenateTensors(["a", "b"], "x", 0)]
        )
        assert same_bits(chain.apply({"x": tensor})["x"], tensor), name


def test_tensors_lie_where_processors_like_them(tmp_path: Path):
    state = {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(5, dtype=torch.bfloat16), "c": torch.ones(7)}
    checkpoint = ck.Checkpoint.open(write(tmp_path / "ck", state | {"d": torch.ones(4, dtype=torch.float64)}))
    for name in checkpoint:
        assert checkpoint.entry(name).start % checkpoint.entry(name).dtype.itemsize == 0


def test_a_file_whose_numbers_lie_anywhere_is_read(tmp_path: Path):
    big = torch.randn(40_000)
    header = json.dumps(
        {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
         "big": {"dtype": "F32", "shape": [40_000], "data_offsets": [1, 160_001]}}
    ).encode()  # fmt: skip
    content = len(header).to_bytes(8, "little") + header + b"\7" + big.numpy().tobytes()
    (tmp_path / "model.safetensors").write_bytes(content)
    found = read(tmp_path)
    assert torch.equal(found["big"], big) and found["a"] == 7


def test_views_are_written_as_what_they_show(tmp_path: Path):
    base = torch.randn(6, 8)
    state = {
        "t": base.T,
        "row": base[2],
        "every second": base[::2, ::2],
        "conj": torch.view_as_complex(base.view(6, 4, 2)).conj(),
    }
    found = read(write(tmp_path / "ck", state))
    assert all(torch.equal(found[name], state[name]) for name in state)


# -- ties --------------------------------------------------------------------------------------------------------------


def test_a_copy_is_stored_once_recorded_and_read_by_both_names(tmp_path: Path):
    weight = torch.randn(50, 4)
    mapper = ck.Parallel([ck.Copy("w", ["embed", "head"]), ck.Identity("b")])
    ck.write_model_state_local(tmp_path / "ck", mapper, [("w", weight), ("b", torch.ones(1))], show_progress=False)
    told = index(tmp_path / "ck")
    assert told["metadata"] == {"total_size": weight.nbytes + 4, "tied": {"head": "embed"}}
    assert told["weight_map"].keys() == {"embed", "b"}
    found = read(tmp_path / "ck")
    assert torch.equal(found["embed"], weight) and torch.equal(found["head"], weight)


def test_ties_of_a_module_are_found_across_files(tmp_path: Path):
    module: Any = nn.ModuleDict({"a": nn.Linear(20, 20), "b": nn.Linear(20, 20), "c": nn.Linear(20, 20)})
    module["c"].weight = module["a"].weight
    mapper = ck.identity_mapper_from_module(module)
    ck.save_model_state(tmp_path / "ck", mapper, module, 0.5 * KB, show_progress=False)
    assert index(tmp_path / "ck")["metadata"]["tied"] == {"c.weight": "a.weight"}
    fresh: Any = nn.ModuleDict({"a": nn.Linear(20, 20), "b": nn.Linear(20, 20), "c": nn.Linear(20, 20)})
    ck.load_model_state(tmp_path / "ck", mapper, "cpu", fresh, show_progress=False)
    assert torch.equal(fresh["c"].weight, module["a"].weight) and torch.equal(fresh["b"].bias, module["b"].bias)


def test_two_tensors_are_not_loaded_as_one(tmp_path: Path):
    apart: Any = nn.ModuleDict({"a": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    tied: Any = nn.ModuleDict({"a": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    tied["c"].weight = tied["a"].weight
    mapper, before = ck.identity_mapper_from_module(tied), tied["a"].weight.detach().clone()
    ck.save_model_state(tmp_path / "ck", mapper, apart, show_progress=False)
    with pytest.raises(MapperError, match=r"a\.weight and c\.weight are one tensor in the model, and two"):
        ck.load_model_state(tmp_path / "ck", mapper, "cpu", tied, show_progress=False)
    assert torch.equal(tied["a"].weight, before)
    with torch.no_grad():  # written twice, but the same, whatever it is
        apart["c"].weight.copy_(apart["a"].weight.fill_(torch.nan))
    ck.save_model_state(tmp_path / "ck", mapper, apart, show_progress=False)
    ck.load_model_state(tmp_path / "ck", mapper, "cpu", tied, show_progress=False)
    assert tied["a"].weight.isnan().all()


def test_ties_that_safetensors_recorded_are_read(tmp_path: Path):
    module = nn.ModuleDict({"a": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    module["c"].weight = module["a"].weight
    save_model(module, str(tmp_path / "model.safetensors"))
    found = read(tmp_path)
    assert torch.equal(found["a.weight"], found["c.weight"]) and len(found) == 4


@pytest.mark.parametrize("size", [3, 100_000])
def test_a_buffer_that_is_filled_again_and_again_is_no_tie(tmp_path: Path, size: int):
    buffer = torch.zeros(size)
    memory = buffer.numpy()  # writing through it, torch does not notice

    def states():
        for i in range(4):
            memory[:] = i
            yield f"t{i}", buffer

    mapper = ck.Parallel([ck.Identity(f"t{i}") for i in range(4)])
    ck.write_model_state_local(tmp_path / "ck", mapper, states(), show_progress=False)
    assert "tied" not in index(tmp_path / "ck")["metadata"]
    assert all((tensor == int(name[1:])).all() for name, tensor in read(tmp_path / "ck").items())


def test_equal_numbers_in_other_memory_are_no_tie(tmp_path: Path):
    write(tmp_path / "ck", {"a": torch.ones(100), "b": torch.ones(100)})
    assert "tied" not in index(tmp_path / "ck")["metadata"]


def test_the_one_name_that_a_header_has_for_itself_is_refused(tmp_path: Path):
    with pytest.raises(MapperError, match="can be called __metadata__"):
        ck.write_model_state_local(
            tmp_path / "new", ck.Rename("a", "__metadata__"), [("a", torch.ones(2))], show_progress=False
        )
