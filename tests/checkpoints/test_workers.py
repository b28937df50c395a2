"""Several processes of one machine write one checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from typer.testing import CliRunner

from checkpoints.folders import KB, files, read
from nnsplice import checkpoints as ck
from nnsplice.cli import app
from nnsplice.errors import BadArgument, MapperError, TeamError, WriteFailed
from zoo import build, inputs


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    build("gpt2").save_pretrained(tmp_path / "gpt2", max_shard_size="10KB")
    return tmp_path / "gpt2"


def test_workers_write_what_one_process_writes(gpt2: Path, tmp_path: Path) -> None:
    mapper = ck.renaming(gpt2, ["transformer.wte=lm_head.other"], dtype=torch.bfloat16)
    options: dict[str, Any] = {"shard_size_gb": 30 * KB, "show_progress": False}
    ck.convert(gpt2, tmp_path / "one", mapper, **options)
    ck.convert(gpt2, tmp_path / "many", mapper, workers=3, **options)
    one, many = read(tmp_path / "one"), read(tmp_path / "many")
    assert list(one) == list(many) and all(torch.equal(one[name], many[name]) for name in one)
    assert ck.Checkpoint.open(tmp_path / "one").tied == ck.Checkpoint.open(tmp_path / "many").tied
    assert (tmp_path / "many" / "config.json").is_file()
    assert files(tmp_path) == ["gpt2", "many", "one"]


def test_transformers_reads_what_the_command_writes_with_workers(gpt2: Path, tmp_path: Path) -> None:
    dest = tmp_path / "new"
    ran = CliRunner().invoke(app, ["convert", str(gpt2), str(dest), "--workers", "2", "--quiet"])
    assert ran.exit_code == 0, ran.output
    model = hf.AutoModelForCausalLM.from_pretrained(dest).eval()
    with torch.no_grad():
        assert torch.equal(model(**inputs("gpt2")).logits, build("gpt2")(**inputs("gpt2")).logits)


def test_an_error_of_one_worker_is_raised_and_leaves_what_was_there(gpt2: Path, tmp_path: Path) -> None:
    before = read(gpt2)
    names = list(before)
    broken = ck.GatherFullTensor(names[-1])  # an ordinary tensor is nothing that could be gathered
    mapper = ck.Parallel([*(ck.Identity(name) for name in names[:-1]), broken])
    with pytest.raises(MapperError, match=rf"{names[-1]}(.|\n)*with 2 workers"):
        ck.convert(gpt2, gpt2, mapper, workers=2, show_progress=False)
    after = read(gpt2)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert files(tmp_path) == ["gpt2"]


class Ends(ck.Rename):
    """A mapper whose process ends when it gets it."""

    def __reduce__(self) -> Any:
        return os._exit, (3,)


def test_a_worker_that_ends_without_a_word_is_an_error_that_says_what_to_do(gpt2: Path, tmp_path: Path) -> None:
    name = next(iter(ck.Checkpoint.open(gpt2)))
    with pytest.raises(TeamError, match=r"without an error(.|\n)*workers=1"):
        ck.convert(gpt2, tmp_path / "new", Ends(name, "other"), workers=2, show_progress=False)
    assert files(tmp_path) == ["gpt2"]


def test_a_stopped_call_goes_on_with_the_same_number_of_workers(gpt2: Path, tmp_path: Path) -> None:
    names = list(ck.Checkpoint.open(gpt2))
    mapper = ck.Parallel([ck.Identity(name) for name in names])
    options: dict[str, Any] = {"shard_size_gb": 5 * KB, "show_progress": False, "resume": True}
    folder = tmp_path / ".new.part"
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "keep.txt").write_text("mine")
    with pytest.raises(WriteFailed):  # when all the work was done, for a file that is not there
        ck.convert(gpt2, tmp_path / "new", mapper, workers=2, carry={"note": tmp_path / "none"}, **options)
    written = {path: path.stat().st_ino for path in (folder / "weights").iterdir()}
    assert len(written) > 2
    ck.convert(gpt2, tmp_path / "new", mapper, workers=2, **options)
    assert {path.stat().st_ino for path in (tmp_path / "new").iterdir()} >= set(written.values())
    assert list(read(tmp_path / "new")) and (tmp_path / "new" / "keep.txt").read_text() == "mine"


def test_a_number_of_workers_is_at_least_one(gpt2: Path, tmp_path: Path) -> None:
    with pytest.raises(BadArgument, match="workers=0"):
        ck.convert(gpt2, tmp_path / "new", ck.renaming(gpt2), workers=0, show_progress=False)
