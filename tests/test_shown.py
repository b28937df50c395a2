"""A name out of a file does not reach the terminal as the terminal's own commands."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import nnsplice as ns
from nnsplice import checkpoints as ck
from nnsplice.cli import app
from nnsplice.errors import BadArgument, NnspliceError, closest
from nnsplice.shown import counted, printable, shown

#: Red, the window's title, a line that is written over, words from right to left, a second line.
EVIL = "a\x1b[31m\x1b]0;title\x07\rb\x9b2J\u202egnp\u2066\x7f"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@given(st.text())
def test_what_is_shown_obeys_nobody_and_plain_text_stays(text: str):
    assert not OBEYED.search(printable(text)) and "\n" not in shown(text)
    printable(text).encode()
    plain = "".join(letter for letter in text if letter.isprintable())
    assert printable(plain) == plain


def test_half_a_pair_can_be_printed():
    printable("\ud800").encode()
    assert str(BadArgument("\ud800")) == r"\ud800"


def test_errors_and_lists_of_names():
    for text in (str(BadArgument(EVIL, path=EVIL, expected=EVIL, write=EVIL)), closest("b", [EVIL])):
        assert not OBEYED.search(text) and r"\x1b[31m" in text
    with pytest.raises(NnspliceError) as caught, ns.errors.circumstances(EVIL):
        raise BadArgument("x")
    assert not OBEYED.search(str(caught.value))


def run(*arguments: str | Path, code: int) -> str:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == code, done.output
    assert not OBEYED.search(done.output), done.output
    return done.output


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """The toy model with a tensor of such a name."""
    shutil.copytree(ns.models.embedded("toy"), tmp_path / "toy")
    state = load_file(tmp_path / "toy" / "model.safetensors")
    save_file({**state, f"transformer.{EVIL}\nx": torch.ones(2)}, tmp_path / "toy" / "model.safetensors")
    return tmp_path / "toy"


def test_convert_shows_names_as_text(evil: Path, tmp_path: Path):
    text = run("convert", evil, "--rename", "transformer=t", "--explain", code=0)
    assert r"\x1b[31m" in text and r"\nx" in text
    assert r"\x1b" in run("convert", evil, tmp_path / "new", "--to", "tl", "--quiet", code=1)
    assert r"\x1b" in run("convert", evil, tmp_path / "new", "--rename", f"{EVIL}=t", "--quiet", code=1)
    run("convert", evil, tmp_path / "new", "--rename", "transformer=t", "--quiet", code=0)
    assert f"t.{EVIL}\nx" in ck.Checkpoint.open(tmp_path / "new").files  # the file has the name itself


def test_mappers_show_names_as_text(evil: Path):
    for shown_one in (ck.renaming(evil, ["transformer=t"]).explain(), ck.mapper_between(evil, evil)):
        assert not OBEYED.search(repr(shown_one))
    with pytest.raises(NnspliceError) as caught:
        ck.read_model_state(evil, ck.Identity(f"transformer.{EVIL}\n"))
    assert not OBEYED.search(str(caught.value))


def adapter(folder: Path, name: str) -> Path:
    folder.mkdir()
    factors = {
        f"base_model.model.layers.0.{name}.lora_A.weight": torch.ones(2, 4),
        f"base_model.model.layers.0.{name}.lora_B.weight": torch.ones(4, 2),
        f"base_model.model.layers.0.{name}.more.weight": torch.ones(4),
    }
    save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    return folder


def test_adapter_shows_names_as_text(tmp_path: Path):
    folder = adapter(tmp_path / "evil", EVIL)
    assert r"\x1b[31m" in run("adapter", folder, "--each", code=0)
    run("adapter", folder, code=0)
    one = ns.adapters.ExpertAdapter.from_peft(folder)
    assert not OBEYED.search(repr(one)) and not OBEYED.search(repr(ns.adapters.profile(one)))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ('{"peft_type": "LORA", "r": "2", "lora_alpha": 2}', "r is 2"),
        ('{"peft_type": "LORA", "r": 0, "lora_alpha": 2}', "r is 0"),
        ('{"peft_type": "LORA", "r": 2, "lora_alpha": NaN}', "lora_alpha is nan"),
        ('{"peft_type": "LORA", "r": 2}', "does not say lora_alpha"),
        ('{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "rank_pattern": {"(": 2}}', "rank_pattern"),
        ('{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "rank_pattern": 3}', "rank_pattern is 3"),
        ('{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "alpha_pattern": {"q": "x"}}', "alpha_pattern"),
        ('{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_parameters": 5}', "target_parameters is 5"),
        ('{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "modules_to_save": [5]}', "modules_to_save"),
        ('{"peft_type": {"\\u001b": 1}, "r": 2, "lora_alpha": 2}', "adapter"),
        ("[" * 200_000, "nested"),
        ("[1]", "an object in JSON"),
    ],
)
def test_an_adapter_with_an_odd_config_is_refused(tmp_path: Path, config: str, said: str):
    folder = adapter(tmp_path / "odd", "q_proj")
    (folder / "adapter_config.json").write_text(config)
    with pytest.raises(NnspliceError) as caught:
        ns.adapters.ExpertAdapter.from_peft(folder)
    assert said in str(caught.value) and len(str(caught.value)) < 1000 and not OBEYED.search(str(caught.value))


def test_one_cell_is_no_plural(model):
    assert [counted(n, "cell") for n in (0, 1, 2)] == ["0 cells", "1 cell", "2 cells"]
    metric = ns.logit_diff("w7", "w8")
    result = ns.sweep(model, "w3 w4 w5", "w3 w6 w5", "layers[1].output[-1]", metric, progress=False)
    plan = ns.plan_sweep(model, "w3 w4 w5", "w3 w6 w5", "layers[1].output[-1]", metric)
    assert repr(result).startswith("SweepResult: 1 cell, 1 prompt, logit_diff")
    assert plan.preview().startswith("1 cell to compute, 0 known without; 1 prompt, patch")
