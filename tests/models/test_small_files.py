"""A folder whose config or tokenizer holds odd things says which file it is, at every door that reads it."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import nnsplice as ns
from nnsplice import checkpoints as ck
from nnsplice.errors import FileError, MapperError

DEEP = "[" * 200_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(ns.models.embedded("toy"), tmp_path / "toy")
    return tmp_path / "toy"


def with_config(folder: Path, **more: Any) -> None:
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**told, **more}))


@pytest.mark.parametrize(
    "more",
    [
        {"model_type": 5}, {"model_type": ["gpt2"]}, {"architectures": 5}, {"architectures": [5]},
        {"architectures": "GPT2LMHeadModel"}, {"n_layer": "x"}, {"n_layer": 2.5}, {"n_layer": None}, {"dtype": "x"},
    ],
)  # fmt: skip
def test_a_config_of_odd_types_is_refused(folder: Path, more: dict[str, Any]):
    with_config(folder, **more)
    with pytest.raises(FileError, match=r"config\.json"):
        ns.load(str(folder))
    if "dtype" in more or more.get("architectures") == "GPT2LMHeadModel":
        return  # nothing to a model without numbers
    with pytest.raises(FileError, match=r"config\.json"):
        ck.mapper_between(folder, "tl")
    with pytest.raises((FileError, MapperError), match=r"config\.json"):
        ck.adapted_config((folder / "config.json").read_text(), layers=2)


@pytest.mark.parametrize("content", ["[]", DEEP, "", "{", b"\xff\xfe{"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_file_that_is_no_object_is_named(folder: Path, name: str, content: str | bytes):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FileError, match=name.replace(".", r"\.")) as caught:
        ns.load(str(folder))
    assert len(str(caught.value)) < 1000
    if name == "config.json":
        for door in (lambda: ck.mapper_between(folder, "tl"), lambda: ck.read(folder, "layers[0].heads[0]")):
            with pytest.raises(FileError, match=r"config\.json"):
                door()


def test_a_class_of_another_kind_is_not_called(folder: Path):
    for name in ("AutoConfig", "logging", "pipeline"):
        with_config(folder, architectures=[name])
        assert not ck.mapper_between(folder, "tl").underived


def test_a_model_with_code_of_its_own_is_not_loaded_nor_asked_about(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_config(folder, model_type="mine", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked"))
    with pytest.raises(FileError, match=r"brings code of its own.*\n.*\n.*trust_remote_code=True"):
        ns.load(folder)


def test_code_in_a_folder_is_never_run_nor_asked_about(folder: Path, monkeypatch: pytest.MonkeyPatch):
    with_config(folder, model_type="mine", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked"))
    for door in (lambda: ck.mapper_between(folder, "tl"), lambda: ck.read(folder, "layers[0].heads[0]")):
        with pytest.raises(FileError, match=r"makes no model of .*config\.json"):
            door()


@pytest.fixture
def own_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose model is transformers' own, and whose tokenizer is code."""
    folder = tmp_path / "own"
    shutil.copytree(ns.models.embedded("toy-llama"), folder)
    told = json.loads((folder / "tokenizer_config.json").read_text())
    told |= {"auto_map": {"AutoTokenizer": ["evil.T", None]}, "tokenizer_class": "T"}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked"))
    return folder


def test_a_tokenizer_with_code_of_its_own_is_not_run_nor_asked_about(own_tokenizer: Path) -> None:
    import transformers

    module: Any = transformers.AutoModelForCausalLM.from_pretrained(own_tokenizer)
    refused = r"brings code of its own.*\n.*\n.*trust_remote_code=True"
    for door in (
        lambda: ns.load(own_tokenizer),
        lambda: ns.load(module),
        lambda: ns.load(module, str(own_tokenizer)),
        lambda: ns.load(module, own_tokenizer),
        lambda: ns.load("toy", str(own_tokenizer)),
    ):
        with pytest.raises(FileError, match=refused):
            door()
    assert ns.load(module, tokenizer=False)._module is module


def test_a_tokenizer_may_be_a_folder(folder: Path) -> None:
    module = ns.models.unwrap(ns.load("toy"))
    for tokenizer in (folder, str(folder), "toy"):
        model = ns.load(module, tokenizer)
        assert ns.capture(model, "The film was", "layers[0].output[-1]").rows == 1
