"""Reading and writing folders: formats, shards, what is refused, a dry run, and into a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from checkpoints.folders import KB, files, index, read, write
from mappers import Pipeline, pipelines
from nnsplice import checkpoints as ck
from nnsplice.errors import BadArgument, BadType, FileError, MapperError, MissingCheckpoint


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


def test_the_bar_counts_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("nnsplice.progress.DELAY", 0)
    state = {f"t{i}": torch.ones(500_000) for i in range(3)}
    write(tmp_path / "ck", state)
    assert capsys.readouterr().err == ""
    mapper = ck.Parallel([ck.Identity(name) for name in state])
    assert len(dict(ck.read_model_state(tmp_path / "ck", mapper, "cpu"))) == 3
    assert "6.00M/6.00M" in capsys.readouterr().err
    ck.write_model_state_local(tmp_path / "ck", mapper, state.items())
    assert "writing: 6.00MB" in capsys.readouterr().err
