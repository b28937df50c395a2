"""Folder to folder: with transformers on both sides, by names, layers and types, and from the command line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from typer.testing import CliRunner

from nnsplice import checkpoints as ck
from nnsplice.checkpoints.config import layer_of
from nnsplice.cli import app
from nnsplice.errors import BadArgument, FileError, MapperError, MissingCheckpoint, OutOfRange
from zoo import FAMILIES, MASKED, SEQ2SEQ, build, inputs


def load(name: str, folder: Path) -> Any:
    kind = hf.AutoModelForMaskedLM if name in MASKED else hf.AutoModelForCausalLM
    kind = hf.AutoModelForSeq2SeqLM if name in SEQ2SEQ else kind
    return kind.from_pretrained(folder, experts_implementation="eager").eval()


def logits(name: str, model: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs(name)).logits


def names(folder: Path) -> set[str]:
    return set(ck.Checkpoint.open(folder))


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    build("gpt2").save_pretrained(tmp_path / "gpt2", max_shard_size="10KB")
    return tmp_path / "gpt2"


def convert(source: Path, dest: Path, *renames: str, **options: Any) -> Path:
    ck.convert(source, dest, ck.renaming(source, renames, **options), show_progress=False)
    return dest


# -- transformers on both sides ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_what_transformers_writes_we_read_and_it_reads_what_we_write(name: str, tmp_path: Path):
    model = build(name)
    model.save_pretrained(tmp_path / "hf", max_shard_size="10KB")
    convert(tmp_path / "hf", tmp_path / "ours")
    assert names(tmp_path / "ours") == names(tmp_path / "hf")
    assert torch.equal(logits(name, load(name, tmp_path / "ours")), logits(name, model))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gpt_neox", "bloom", "t5", "bert"])
def test_a_model_saved_by_us_is_read_by_transformers(name: str, tmp_path: Path):
    model = build(name)
    ck.save_model_state(tmp_path / "ours", ck.identity_mapper_from_module(model), model, 1e-5, show_progress=False)
    model.config.save_pretrained(tmp_path / "ours")
    assert torch.equal(logits(name, load(name, tmp_path / "ours")), logits(name, model))


def test_ties_stay_ties(tmp_path: Path):
    model = build("gpt2")
    mapper = ck.identity_mapper_from_module(model)
    ck.save_model_state(tmp_path / "one", mapper, model, show_progress=False)
    convert(tmp_path / "one", tmp_path / "two", "transformer.wte=embed", dtype=torch.bfloat16)
    for folder, kept in (("one", "transformer.wte.weight"), ("two", "embed.weight")):
        assert ck.Checkpoint.open(tmp_path / folder).tied == {"lm_head.weight": kept}
    told = json.loads((tmp_path / "two" / "model.safetensors.index.json").read_text())
    assert "lm_head.weight" not in told["weight_map"]


# -- names, layers, types ----------------------------------------------------------------------------------------------


def test_renames_go_one_after_the_other(gpt2: Path, tmp_path: Path):
    made = names(
        convert(gpt2, tmp_path / "new", "transformer.h.*.attn=layers.*.attention", "transformer=", "wte=embed")
    )
    assert {"layers.0.attention.c_attn.weight", "h.0.mlp.c_fc.bias", "embed.weight", "ln_f.weight"} <= made
    assert not any("transformer" in name for name in made) and len(made) == len(names(gpt2))


def test_a_rename_takes_whole_names(gpt2: Path):
    mapper = ck.renaming(gpt2, ["h.1=x"])
    made = {name for group in mapper.state_dependency_groups() for name in group.outputs}
    assert "transformer.x.ln_1.weight" in made and "transformer.h.2.ln_1.weight" in made
    with pytest.raises(BadArgument, match="concerns no tensor"):
        ck.renaming(gpt2, ["transform=x"])


def test_a_table_of_names_is_no_mapper(gpt2: Path, tmp_path: Path):
    with pytest.raises(TypeError, match=r"(?s)a dict is no mapper.*renaming"):
        ck.convert(gpt2, tmp_path / "new", {"wte": "embed"})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("wrong", ["wte", "=x", "h=layers.*", "h.*=*.*"])
def test_what_is_no_rename(gpt2: Path, wrong: str):
    with pytest.raises(BadArgument, match="is no rename"):
        ck.renaming(gpt2, [wrong])


def test_one_rename_is_no_list_of_letters(gpt2: Path):
    assert ck.renaming(gpt2, "h=x") == ck.renaming(gpt2, ["h=x"])


def test_a_rename_leaves_a_name(gpt2: Path):
    with pytest.raises(BadArgument, match=r"leaves nothing of the name transformer\.wte\.weight"):
        ck.renaming(gpt2, ["transformer.wte.weight="])


def test_renames_that_collide(gpt2: Path):
    with pytest.raises(MapperError, match="colliding output"):
        ck.renaming(gpt2, ["transformer.h.*=transformer.h"])


def test_a_type_is_for_plain_numbers_only(tmp_path: Path):
    state = {
        "w": torch.randn(4, 4), "half": torch.randn(4).half(), "qweight": torch.ones(4, dtype=torch.int32),
        "fp8": torch.randn(4).to(torch.float8_e4m3fn),
    }  # fmt: skip
    mapper = ck.Parallel([ck.Identity(name) for name in state])
    ck.write_model_state_local(tmp_path / "ck", mapper, state.items(), show_progress=False)
    convert(tmp_path / "ck", tmp_path / "new", dtype=torch.bfloat16)
    made = dict(ck.read_model_state(tmp_path / "new", mapper, "cpu", show_progress=False))
    assert torch.equal(made["w"], state["w"].bfloat16()) and made["half"].dtype == torch.bfloat16
    assert torch.equal(made["qweight"], state["qweight"])
    assert made["fp8"].dtype == torch.float8_e4m3fn
    assert torch.equal(made["fp8"].view(torch.uint8), state["fp8"].view(torch.uint8))


def test_layers_are_chosen_and_the_rest_stays(gpt2: Path, tmp_path: Path):
    for layers, kept in ((slice(0, 2), {0, 1}), (slice(-1, None), {2}), ([0, -1], {0, 2})):
        made = names(convert(gpt2, tmp_path / "new", layers=layers))
        assert {layer for name in made if (layer := layer_of(name)) is not None} == kept
        assert {"transformer.wte.weight", "transformer.ln_f.bias"} <= made
    for layers in (slice(5, 9), [7]):
        with pytest.raises(OutOfRange):
            ck.renaming(gpt2, layers=layers)


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_are_counted_as_the_atlas_counts_them(name: str):
    from nnsplice import Atlas

    atlas = Atlas.of(build(name))
    for parameter in atlas.tree.params:
        place = atlas.locate(parameter)
        layer = place.steps[0].index if not place.native and place.steps[0].name == "layers" else None
        if layer is not None:
            assert layer_of(parameter) == layer


def test_going_on_with_a_conversion(gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mapper = ck.renaming(gpt2, ["transformer="])
    real, calls = ck.Checkpoint.tensor, []

    def failing(self: ck.Checkpoint, name: str) -> Tensor:
        calls.append(name)
        if len(calls) == 20:
            raise OSError("the cable was pulled")
        return real(self, name)

    monkeypatch.setattr(ck.Checkpoint, "tensor", failing)
    options = {"shard_size_gb": 1e-5, "show_progress": False, "resume": True}
    with pytest.raises(OSError, match="cable"):
        ck.convert(gpt2, tmp_path / "new", mapper, **options)
    assert not (tmp_path / "new").exists()
    ck.convert(gpt2, tmp_path / "new", mapper, **options)
    ck.convert(gpt2, tmp_path / "straight", mapper, shard_size_gb=1e-5, show_progress=False)
    same = ck.Parallel([ck.Identity(name) for name in names(tmp_path / "straight")])
    one, other = (dict(ck.read_model_state(tmp_path / n, same, "cpu", False)) for n in ("new", "straight"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# -- the command -------------------------------------------------------------------------------------------------------


def run(*arguments: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["convert", *map(str, arguments)])
    return done.exit_code, done.output


def test_the_command_converts(gpt2: Path, tmp_path: Path):
    code, text = run(gpt2, tmp_path / "new", "--rename", "transformer.h=layers", "--dtype", "bf16", "--quiet")
    assert code == 0 and "tensors" in text
    checkpoint = ck.Checkpoint.open(tmp_path / "new")
    assert checkpoint.entry("layers.2.ln_1.weight").dtype == torch.bfloat16
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (gpt2, tmp_path / "new"))
    assert new == {**old, "dtype": "bfloat16"}


def test_the_command_explains(gpt2: Path):
    code, text = run(gpt2, "--rename", "transformer.h=layers", "--layers", "0", "--explain")
    assert code == 0 and "transformer.h.*.attn.c_attn.bias" in text and "not read: transformer.h.1.attn" in text


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--dtype", "int4"], 2, "no type"), (["--layers", "a"], 2, "no index"), ([], 2, "Missing: DST"),
        (["new", "--rename", "nothing=x"], 1, "concerns no tensor"),
        (["new", "--layers", "9"], 1, "layer 9 is not there"),
    ],
)  # fmt: skip
def test_the_command_says_what_is_wrong(gpt2: Path, arguments: list[str], code: int, said: str):
    found, text = run(gpt2, *arguments)
    assert found == code and said in text, text
    assert not Path("new").exists()


@pytest.mark.parametrize(("name", "lost"), [("mixtral", "experts"), ("mpt", "norm_1"), ("opt", "embed_positions")])
def test_a_tensor_that_has_no_place_is_refused_and_left_out_when_asked(name: str, lost: str, tmp_path: Path):
    build(name).save_pretrained(tmp_path / "hf")
    between = ck.mapper_between(tmp_path / "hf", "tl")
    with pytest.raises(MapperError, match=rf"no site for .*{lost}(.|\n)*\.mapper"):
        ck.convert(tmp_path / "hf", tmp_path / "tl", between, show_progress=False)
    assert not (tmp_path / "tl").exists()
    ck.convert(tmp_path / "hf", tmp_path / "tl", between.mapper, show_progress=False)
    assert names(tmp_path / "tl") and not any(lost in name for name in names(tmp_path / "tl"))


def test_going_on_with_a_conversion_into_a_folder_of_its_source(gpt2: Path, monkeypatch: pytest.MonkeyPatch):
    mapper = ck.renaming(gpt2, ["transformer="])
    real, calls = ck.Checkpoint.tensor, []

    def failing(self: ck.Checkpoint, name: str) -> Tensor:
        calls.append(name)
        if len(calls) == 20:
            raise OSError("the cable was pulled")
        return real(self, name)

    options: dict[str, Any] = {"shard_size_gb": 1e-5, "show_progress": False, "resume": True}
    with monkeypatch.context() as patch:
        patch.setattr(ck.Checkpoint, "tensor", failing)
        with pytest.raises(OSError, match="cable"):
            ck.convert(gpt2, gpt2 / "new", mapper, **options)
    staged = sorted(path.name for path in (gpt2 / ".new.part" / "weights").iterdir())
    assert staged
    ck.convert(gpt2, gpt2 / "new", mapper, **options)
    assert names(gpt2 / "new") == {name.removeprefix("transformer.") for name in names(gpt2)}
    # A source that changed is another job, as before.
    with monkeypatch.context() as patch:
        calls.clear()
        patch.setattr(ck.Checkpoint, "tensor", failing)
        with pytest.raises(OSError, match="cable"):
            ck.convert(gpt2, gpt2 / "again", mapper, **options)
    next(gpt2.glob("model*.safetensors")).touch()
    with pytest.raises(FileError, match="asked for something else"):
        ck.convert(gpt2, gpt2 / "again", mapper, **options)


def test_a_source_that_is_not_there_says_so(gpt2: Path, tmp_path: Path):
    with pytest.raises(MissingCheckpoint, match="is not there"):
        ck.convert(tmp_path / "nowhere", tmp_path / "new", ck.renaming(gpt2))


# -- who may read it ---------------------------------------------------------------------------------------------------


def modes(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): oct(p.stat().st_mode & 0o777) for p in sorted(folder.rglob("*"))}


@pytest.fixture
def usual():
    """A mask as most have it, with which new files are read by all."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.usefixtures("usual")
@pytest.mark.skipif(os.name != "posix", reason="modes of files are a matter of POSIX")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_private_file_stays_private(gpt2: Path, tmp_path: Path, workers: int):
    for path in gpt2.iterdir():
        path.chmod(0o600 if path.suffix == ".safetensors" else 0o640)
    mapper = ck.renaming(gpt2, ["transformer="])
    ck.convert(gpt2, tmp_path / "new", mapper, show_progress=False, carry={"note": "x"}, workers=workers)
    found = modes(tmp_path / "new")
    assert {mode for name, mode in found.items() if "model" in name or name == "note"} == {"0o600"}
    assert found["config.json"] == "0o640"
    # A public one is as new files are here.
    for path in gpt2.iterdir():
        path.chmod(0o644)
    ck.convert(gpt2, tmp_path / "public", mapper, show_progress=False, carry={"note": "x"}, workers=workers)
    assert set(modes(tmp_path / "public").values()) == {"0o644"}
    assert (tmp_path / "public").stat().st_mode & 0o777 == 0o755


@pytest.mark.usefixtures("usual")
@pytest.mark.skipif(os.name != "posix", reason="modes of files are a matter of POSIX")
def test_a_private_folder_and_what_it_held_stay_private(gpt2: Path, tmp_path: Path):
    gpt2.chmod(0o700)
    mapper = ck.renaming(gpt2, ["transformer="])
    ck.convert(gpt2, tmp_path / "new", mapper, show_progress=False)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    gpt2.chmod(0o755)
    for inside, mode in (("keys", 0o700), ("keys/inner", 0o500), ("shared", 0o775)):
        (tmp_path / "new" / inside).mkdir()
        (tmp_path / "new" / inside / "a").write_text("a")
        (tmp_path / "new" / inside / "a").chmod(0o640)
        (tmp_path / "new" / inside).chmod(mode)
    for path in (tmp_path / "new").glob("*.safetensors"):
        path.chmod(0o600)
    before = modes(tmp_path / "new")
    ck.convert(gpt2, tmp_path / "new", mapper, show_progress=False)
    after = modes(tmp_path / "new")
    assert {name: after[name] for name in before if "model" not in name} == {
        name: mode for name, mode in before.items() if "model" not in name
    }
    assert {mode for name, mode in after.items() if name.endswith(".safetensors")} == {"0o600"}
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    (tmp_path / "new" / "keys" / "inner").chmod(0o700)


@pytest.mark.usefixtures("usual")
@pytest.mark.skipif(os.name != "posix", reason="modes of files are a matter of POSIX")
def test_nobody_else_reads_what_is_being_made(gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[int] = []
    real = ck.Checkpoint.tensor

    def looking(self: ck.Checkpoint, name: str) -> Tensor:
        seen.append((tmp_path / ".new.part").stat().st_mode & 0o777)
        return real(self, name)

    monkeypatch.setattr(ck.Checkpoint, "tensor", looking)
    convert(gpt2, tmp_path / "new")
    assert set(seen) == {0o700}
