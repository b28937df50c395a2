"""Reading and writing folders: formats, ties, types, order, memory."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from safetensors import safe_open
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn

from mappers import Pipeline, pipelines
from nnsplice import checkpoints as ck
from nnsplice.errors import BadArgument, BadType, FileError, MapperError, MissingCheckpoint

KB = 1 / 1024**2  # in the gigabytes of shard_size_gb


def read(folder: Path, mapper: ck.ModelStateMapper | None = None) -> dict[str, Tensor]:
    mapper = mapper or ck.Parallel([ck.Identity(name) for name in ck.Checkpoint.open(folder)])
    return dict(ck.read_model_state(folder, mapper, "cpu", show_progress=False))


def write(folder: Path, state: dict[str, Tensor], shard_size_gb: float = 4.0, **options) -> Path:
    mapper = ck.Parallel([ck.Identity(name) for name in state])
    ck.write_model_state_local(folder, mapper, state.items(), shard_size_gb, show_progress=False, **options)
    return folder


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def index(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "model.safetensors.index.json").read_text())


@pytest.fixture
def state() -> dict[str, Tensor]:
    return {f"layers.{i}.w": torch.randn(8, 16) for i in range(6)} | {
        "bias": torch.randn(3),
        "scalar": torch.tensor(2.5),
    }


# -- formats -----------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_by_safetensors(tmp_path: Path, state: dict[str, Tensor]):
    write(tmp_path / "ck", state, 1 * KB)
    told = index(tmp_path / "ck")
    assert told["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
    assert told["weight_map"].keys() == state.keys()
    shards = sorted(set(told["weight_map"].values()))
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    assert files(tmp_path / "ck") == [*shards, "model.safetensors.index.json"]
    found: dict[str, Tensor] = {}
    for shard in shards:
        with safe_open(tmp_path / "ck" / shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
        found |= load_file(tmp_path / "ck" / shard)
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


def test_a_single_file_and_an_index_without_metadata_are_read(tmp_path: Path, state: dict[str, Tensor]):
    (tmp_path / "one").mkdir()
    save_file(state, tmp_path / "one" / "model.safetensors")
    (tmp_path / "two" / "inner").mkdir(parents=True)
    half = len(state) // 2
    parts = [dict(list(state.items())[:half]), dict(list(state.items())[half:])]
    save_file(parts[0], tmp_path / "two" / "a.safetensors")
    save_file(parts[1], tmp_path / "two" / "inner" / "b.safetensors")
    weight_map = dict.fromkeys(parts[0], "a.safetensors") | dict.fromkeys(parts[1], "inner/b.safetensors")
    (tmp_path / "two" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for folder in ("one", "two"):
        found = read(tmp_path / folder)
        assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


def test_folders_are_made_on_the_way(tmp_path: Path, state: dict[str, Tensor]):
    write(tmp_path / "a" / "b" / "c", state)
    assert read(tmp_path / "a" / "b" / "c").keys() == state.keys()


@settings(max_examples=15)
@given(pipelines())
def test_a_pipeline_through_files_is_the_pipeline(tmp_path_factory, pipeline: Pipeline):
    folder = tmp_path_factory.mktemp("pipeline")
    write(folder / "src", pipeline.state, 0.2 * KB)
    chain = ck.Sequential(pipeline.stages)
    touched = {name for group in chain.state_dependency_groups() for name in group.outputs}
    expected = {name: tensor for name, tensor in pipeline.by_hand().items() if name in touched}
    found = read(folder / "src", chain)
    needed = {name for group in chain.state_dependency_groups() for name in group.inputs}
    states = [(name, tensor) for name, tensor in pipeline.state.items() if name in needed]
    ck.write_model_state_local(folder / "dst", chain, states, 0.2 * KB, show_progress=False)
    for made in (found, read(folder / "dst")):
        assert made.keys() == expected.keys()
        assert all(torch.equal(made[name], expected[name]) for name in expected)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "x.ckpt"])
def test_pickles_are_left_closed_and_the_text_says_how_to_convert(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"never read")
    with pytest.raises(FileError, match="pickle") as caught:
        ck.Checkpoint.open(tmp_path)
    assert "save_pretrained" in str(caught.value)


def test_nothing_there(tmp_path: Path, state: dict[str, Tensor]):
    for where in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError):
            ck.read_model_state(where, ck.Identity("a"))
    write(tmp_path / "inside", state)
    with pytest.raises(MissingCheckpoint, match=f'write: "{tmp_path / "inside"}"'):
        ck.read_model_state(tmp_path, ck.Identity("a"))


def test_a_missing_input_is_told_before_anything_is_read(tmp_path: Path, state: dict[str, Tensor]):
    write(tmp_path / "ck", state)
    with pytest.raises(ValueError, match=r"missing inputs: layers\.9\.w") as caught:
        ck.read_model_state(tmp_path / "ck", ck.Parallel([ck.Identity("bias"), ck.Identity("layers.9.w")]))
    assert "like layers.9.w are layers." in str(caught.value)


def test_a_missing_input_of_a_write(tmp_path: Path):
    mapper = ck.Parallel([ck.Identity("a"), ck.Identity("b")])
    with pytest.raises(ValueError, match="missing inputs: b"):
        ck.write_model_state_local(tmp_path / "ck", mapper, [("a", torch.ones(1))], show_progress=False)
    assert files(tmp_path) == []


def test_what_is_offered_twice_or_for_nothing(tmp_path: Path):
    one = ("a", torch.ones(1))
    with pytest.raises(ValueError, match="a is offered twice"):
        ck.write_model_state_local(tmp_path / "ck", ck.Identity("a"), [one, one], show_progress=False)
    states = [one, ("b", torch.ones(1)), ("c", torch.ones(1))]
    with pytest.warns(UserWarning, match="used by no mapper: b, c"):
        ck.write_model_state_local(tmp_path / "ck", ck.Identity("a"), states, show_progress=False)
    assert files(tmp_path) == ["ck"]


def test_what_cannot_be_written(tmp_path: Path):
    for wrong in (torch.ones(2, device="meta"), torch.eye(2).to_sparse(), torch.ones(2, dtype=torch.complex128)):
        with pytest.raises(BadType, match=r"^a is "):
            write(tmp_path / "ck", {"a": wrong})
    with pytest.raises(BadArgument):
        write(tmp_path / "ck", {"a": torch.ones(1)}, 0)
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="is a file"):
        write(tmp_path / "file", {"a": torch.ones(1)})
    assert files(tmp_path) == ["file"]


@pytest.mark.parametrize("bad", ["/etc/passwd.safetensors", "../x.safetensors"])
def test_an_index_does_not_lead_out_of_its_folder(tmp_path: Path, bad: str):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": bad}}))
    with pytest.raises(FileError, match="inside the folder"):
        ck.Checkpoint.open(tmp_path)


def test_two_checkpoints_in_one_folder_are_refused(tmp_path: Path, state: dict[str, Tensor]):
    write(tmp_path / "ck", state)
    save_file(state, tmp_path / "ck" / "model.safetensors")
    with pytest.raises(FileError, match="one of them is left"):
        read(tmp_path / "ck")


# -- shards ------------------------------------------------------------------------------------------------------------


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path: Path):
    state = {"a": torch.ones(10), "big": torch.ones(1000), "b": torch.ones(10), "c": torch.ones(10)}
    told = index(write(tmp_path / "ck", state, 0.1 * KB))["weight_map"]
    assert [name for name, file in told.items() if file == told["big"]] == ["big"]
    assert told["b"] == told["c"] != told["a"]


def test_shards_of_an_earlier_save_are_gone_and_other_files_stay(tmp_path: Path, state: dict[str, Tensor]):
    folder = write(tmp_path / "ck", state, 0.5 * KB)
    assert len(files(folder)) > 3
    (folder / "config.json").write_text("{}")
    (folder / "logs").mkdir()
    (folder / "logs" / "a.txt").write_text("hello")
    (folder / "link").symlink_to("config.json")
    write(folder, {"new": torch.ones(2)})
    assert files(folder) == [
        "config.json", "link", "logs", "model-00001-of-00001.safetensors", "model.safetensors.index.json",
    ]  # fmt: skip
    assert (folder / "logs" / "a.txt").read_text() == "hello" and (folder / "link").is_symlink()
    assert files(tmp_path) == ["ck"]


def test_a_single_file_of_an_earlier_save_is_gone(tmp_path: Path, state: dict[str, Tensor]):
    (tmp_path / "ck").mkdir()
    save_file(state, tmp_path / "ck" / "model.safetensors")
    assert read(write(tmp_path / "ck", {"new": torch.ones(2)})).keys() == {"new"}


def test_a_link_to_a_folder_stays_one(tmp_path: Path):
    write(tmp_path / "real", {"a": torch.zeros(1)})
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", {"a": torch.ones(1)})
    assert (tmp_path / "link").is_symlink() and read(tmp_path / "real")["a"] == 1


def test_a_checkpoint_can_be_converted_where_it_is(tmp_path: Path, state: dict[str, Tensor]):
    folder = write(tmp_path / "ck", state, 0.5 * KB)
    mapper = ck.Parallel([ck.Rename(name, f"new.{name}") for name in state])
    ck.write_model_state_local(
        folder, ck.Parallel([ck.Identity(f"new.{name}") for name in state]),
        ck.read_model_state(folder, mapper, "cpu", show_progress=False), show_progress=False,
    )  # fmt: skip
    found = read(folder)
    assert all(torch.equal(found[f"new.{name}"], state[name]) for name in state)


def test_many_names_do_not_outgrow_the_header(tmp_path: Path):
    state = {f"{'long.' * 30}{i}.é": torch.ones(1, 1, 1, 1, 1, 1) * i for i in range(500)}
    found = read(write(tmp_path / "ck", state))
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    load_file(tmp_path / "ck" / "model-00001-of-00001.safetensors")


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


# -- streaming ---------------------------------------------------------------------------------------------------------


class Live:
    """Counts the bytes of all tensors that are alive, large and made since, whoever holds them."""

    def __init__(self) -> None:
        self.most = 0
        # Held, so that no tensor made since can lie where one of these was.
        self.before = _large()

    def look(self) -> None:
        gc.collect()
        made = {at: storage.nbytes() for at, storage in _large().items() if at not in self.before}
        self.most = max(self.most, sum(made.values()))


def _large() -> dict[int, torch.UntypedStorage]:
    """Where the numbers of every large tensor lie."""
    tensors = [thing for thing in gc.get_objects() if type(thing) is Tensor]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.nbytes >= 40_000 and not tensor.is_meta]
    return {storage.data_ptr(): storage for storage in storages}


def test_no_more_than_one_group_is_alive(tmp_path: Path):
    each, count = 40_000, 12
    state = {f"e.{i}": torch.randn(each // 4) for i in range(count)}
    write(tmp_path / "src", state, 100 * KB)
    del state
    mapper = ck.Parallel(
        [ck.StackTensors([f"e.{i + j}" for j in range(3)], f"s.{i}", 0) for i in range(0, count // 2, 3)]
        + [ck.Rename(f"e.{i}", f"r.{i}") for i in range(count // 2, count)]
    )
    gc.collect()
    live = Live()

    def watched():
        for name, tensor in ck.read_model_state(tmp_path / "src", mapper, "cpu", show_progress=False):
            live.look()
            yield name, tensor
            del tensor
            live.look()

    ck.write_model_state_local(
        tmp_path / "dst", ck.identity_mapper_from_mapper_outputs(mapper), watched(), 500 * KB, show_progress=False
    )
    assert live.most <= 2 * 3 * each  # what is stacked and what it is stacked of
    assert len(read(tmp_path / "dst")) == count // 2 // 3 + count // 2


def test_groups_come_in_the_order_of_the_files(tmp_path: Path):
    names = [f"t{(i * 7) % 10}" for i in range(10)]
    write(tmp_path / "ck", {name: torch.ones(30) for name in names}, 0.3 * KB)
    assert list(read(tmp_path / "ck")) == names


def test_what_is_read_may_be_changed_and_the_file_stays(tmp_path: Path):
    write(tmp_path / "ck", {"big": torch.zeros(100_000), "small": torch.zeros(3)})
    for tensor in read(tmp_path / "ck").values():
        tensor.add_(1)
    assert all((tensor == 0).all() for tensor in read(tmp_path / "ck").values())


def test_more_tensors_than_descriptors(tmp_path: Path):
    import resource

    state = {f"t{i}": torch.full((20_000,), float(i)) for i in range(80)}
    write(tmp_path / "ck", state)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, hard))
    try:
        found = read(tmp_path / "ck")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_a_block_is_read_and_nothing_else(tmp_path: Path):
    tensor = torch.randn(40, 6, 50)
    write(tmp_path / "ck", {"other": torch.ones(5000), "x": tensor})
    checkpoint = ck.Checkpoint.open(tmp_path / "ck")
    checkpoint.entry("x")

    def rchar() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    cost = -(rchar() - rchar())  # of looking
    for ranges in (
        [(3, 9), (0, 6), (0, 50)],
        [(0, 40), (2, 4), (0, 50)],
        [(1, 5), (2, 3), (10, 20)],
        [(0, 40), (0, 6), (0, 50)],
        [(2, 2), (0, 6), (0, 50)],
    ):
        before = rchar()
        block = checkpoint.block("x", ranges)
        read_bytes = rchar() - before - cost
        assert torch.equal(block, tensor[tuple(slice(*pair) for pair in ranges)])
        assert read_bytes == block.nbytes
    with pytest.raises(MapperError, match="has no block"):
        checkpoint.block("x", [(0, 41), (0, 6), (0, 50)])


# -- explain -----------------------------------------------------------------------------------------------------------


def test_a_dry_run_tells_what_will_be_done(tmp_path: Path, state: dict[str, Tensor]):
    write(tmp_path / "ck", state, 1 * KB)
    stack = ck.StackTensors([f"layers.{i}.w" for i in range(6)], "w", 0)
    told = ck.Parallel([stack, ck.Copy("bias", ["b1", "b2"])]).explain(tmp_path / "ck")
    assert told.read_bytes == 6 * 8 * 16 * 4 + 12 and told.made_bytes == told.read_bytes
    assert told.peak_bytes == 2 * 6 * 8 * 16 * 4 and told.unused == ("scalar",)
    assert set(told.files) == {file for name, file in index(tmp_path / "ck")["weight_map"].items() if name != "scalar"}
    text = repr(told)
    assert "layers.*.w (6)  ->  w" in text and "not read: scalar" in text and "holds at most 6.1 kB at once" in text


def test_a_dry_run_finds_shapes_that_do_not_fit(tmp_path: Path, state: dict[str, Tensor]):
    write(tmp_path / "ck", state)
    with pytest.raises(MapperError, match=r"bias \[3\]"):
        ck.StackTensors(["bias", "layers.0.w"], "x", 0).explain(tmp_path / "ck")


# -- into a model ------------------------------------------------------------------------------------------------------


def test_a_model_is_loaded_and_other_states_stay(tmp_path: Path):
    model: Any = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    before = model[1].weight.detach().clone()
    parameter = model[0].weight
    write(tmp_path / "ck", {"w": torch.randn(3, 4), "b": torch.randn(4)})
    mapper = ck.Parallel(
        [ck.Sequential([ck.Transpose("w", (0, 1)), ck.Rename("w", "0.weight")]), ck.Rename("b", "0.bias")]
    )
    ck.load_model_state(tmp_path / "ck", mapper, "cpu", model, show_progress=False)
    assert model[0].weight is parameter and parameter.requires_grad
    assert torch.equal(parameter, read(tmp_path / "ck")["w"].T) and torch.equal(model[1].weight, before)


def test_a_model_without_memory_gets_it(tmp_path: Path):
    from zoo import build

    model = build("gpt2")
    mapper = ck.identity_mapper_from_module(model)
    ck.save_model_state(tmp_path / "ck", mapper, model, show_progress=False)
    with torch.device("meta"):
        blank: Any = type(model)(model.config)
    ck.load_model_state(tmp_path / "ck", mapper, "cpu", blank, show_progress=False)
    assert blank.lm_head.weight is blank.transformer.wte.weight
    ids = torch.arange(6)[None]
    assert torch.equal(blank.eval()(ids).logits, model(ids).logits)


def test_a_model_that_does_not_fit_is_left_as_it_was(tmp_path: Path):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    write(tmp_path / "ck", {"w": torch.randn(4, 3), "b": torch.randn(5), "i": torch.ones(4, dtype=torch.int32)})
    for wrong, said in [
        (ck.Rename("b", "0.bias"), r"\[5\] in the checkpoint and \[4\]"),
        (ck.Rename("b", "7.bias"), "no state 7.bias"),
        (ck.Rename("i", "0.bias"), "int32 in the checkpoint"),
    ]:
        with pytest.raises(MapperError, match=said):
            ck.load_model_state(
                tmp_path / "ck", ck.Parallel([ck.Rename("w", "0.weight"), wrong]), "cpu", model, show_progress=False
            )
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_bar_counts_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    state = {f"t{i}": torch.ones(500_000) for i in range(3)}
    write(tmp_path / "ck", state)
    assert capsys.readouterr().err == ""
    mapper = ck.Parallel([ck.Identity(name) for name in state])
    assert len(dict(ck.read_model_state(tmp_path / "ck", mapper, "cpu"))) == 3
    assert "6.00M/6.00M" in capsys.readouterr().err
    ck.write_model_state_local(tmp_path / "ck", mapper, state.items())
    assert "writing: 6.00MB" in capsys.readouterr().err
