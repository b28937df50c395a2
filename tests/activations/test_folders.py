"""Captures of many prompts in a folder: the numbers of single captures, a chunk at a time, going on after a stop."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import nnsplice as ns
import seeing
from nnsplice.activations import capture_folder
from nnsplice.errors import BadArgument, FileError, MissingPackage, MissingPosition, UnknownPath
from zoo import wrap


@pytest.fixture(scope="module")
def model() -> Any:
    return wrap("gpt2")


def _prompts(count: int = 11) -> list[list[int]]:
    chosen = random.Random(0)
    return [[chosen.randrange(3, 60) for _ in range(chosen.randrange(2, 6))] for _ in range(count)]


def test_one_place_of_all_prompts(model: Any, tmp_path: Path) -> None:
    prompts = _prompts()
    held = ns.capture_to(
        tmp_path, model, iter(prompts), ["layers[:].output[-1]", "layers[0].heads[1].output[0]"], chunk=4
    )
    assert (held.rows, held.is_complete, len(held.files)) == (11, True, 3)
    for path in ("layers[2].output[-1]", "layers[0].heads[1].output[0]"):
        each = torch.cat([ns.capture(model, row, path).get(path) for row in prompts])
        torch.testing.assert_close(held.get(path), each)
    with pytest.raises(UnknownPath):
        held.get("layers[0].mlp.output[-1]")


def test_all_tokens_of_prompts_of_any_length(model: Any, tmp_path: Path) -> None:
    prompts = _prompts()
    held = ns.capture_to(tmp_path, model, prompts, "layers[1:].output[:]", chunk=4)
    oracle = torch.cat([ns.capture(model, row, "layers[1].output[:]").get("layers[1].output[:]")[0] for row in prompts])
    batches = list(held.tokens("layers[1].output", batch_size=7))
    assert {len(batch) for batch in batches[:-1]} == {7}
    found = torch.cat(batches)
    assert found.shape == oracle.shape
    order = [rows.argsort(dim=0)[:, 0] for rows in (found, oracle)]
    torch.testing.assert_close(found[order[0]], oracle[order[1]])
    mixed = torch.cat(list(held.tokens("layers[1].output", batch_size=7, seed=1)))
    assert not torch.equal(mixed, found)
    torch.testing.assert_close(mixed[mixed.argsort(dim=0)[:, 0]], found[order[0]])
    with pytest.raises(BadArgument, match=r"for batch in captures\.tokens"):
        held.get("layers[1].output[:]")
    rows = [row for some, _ in held.parts("layers[2].output") for row in some]
    assert sorted(rows) == list(range(11))


def test_a_capture_that_was_stopped_goes_on(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, taken = _prompts(), []
    captured = capture_folder.captured_within

    def stops(*args: Any, **options: Any) -> Any:
        if len(taken) == 2:
            raise KeyboardInterrupt
        taken.append(1)
        return captured(*args, **options)

    whole = ns.capture_to(tmp_path / "whole", model, prompts, "layers[:].output[-1]", chunk=4)
    monkeypatch.setattr(capture_folder, "captured_within", stops)
    with pytest.raises(KeyboardInterrupt):
        ns.capture_to(tmp_path / "part", model, prompts, "layers[:].output[-1]", chunk=4)
    part = ns.SavedActivation.open(tmp_path / "part")
    assert (part.rows, part.is_complete) == (8, False)
    taken.clear()
    taken.append(1)
    held = ns.capture_to(tmp_path / "part", model, prompts, "layers[:].output[-1]", chunk=4)
    assert len(taken) == 2  # the last chunk alone
    assert torch.equal(held.get("layers[1].output[-1]"), whole.get("layers[1].output[-1]"))


KILLED = """
import sys, time
import nnsplice as ns
import seeing
from nnsplice.activations import capture_folder
from test_folders import _prompts, wrap
captured = capture_folder.captured_within
def slow(*args, **options):
    time.sleep(0.05)
    return captured(*args, **options)
capture_folder.captured_within = slow
ns.capture_to(sys.argv[1], wrap("gpt2"), _prompts(60), "layers[:].output[-1]", chunk=1, progress=False)
"""


def test_a_capture_whose_process_was_killed_goes_on(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, sites, part = _prompts(60), "layers[:].output[-1]", tmp_path / "part"
    paths = [str(Path(__file__).parent), *(path for path in sys.path if path)]
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(part)], env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    )
    try:
        deadline = time.monotonic() + 120
        while len(list(part.glob("*.safetensors"))) < 5:
            assert child.poll() is None and time.monotonic() < deadline, "it did not get so far"
            time.sleep(0.01)
    finally:
        child.kill()
        child.wait()
    there = ns.SavedActivation.open(part)
    assert not there.is_complete and 4 <= there.rows < 60
    taken, captured = [], capture_folder.captured_within
    monkeypatch.setattr(capture_folder, "captured_within", lambda *a, **o: (taken.append(1), captured(*a, **o))[1])
    held = ns.capture_to(part, model, prompts, sites, chunk=1, progress=False)
    assert held.is_complete and 0 <= 60 - there.rows - len(taken) <= 1  # a chunk may be there before the list of them
    whole = ns.capture_to(tmp_path / "whole", model, prompts, sites, chunk=1, progress=False)
    for layer in range(3):
        assert torch.equal(held.get(f"layers[{layer}].output[-1]"), whole.get(f"layers[{layer}].output[-1]"))


def test_another_capture_is_refused(model: Any, tmp_path: Path) -> None:
    prompts = _prompts()
    ns.capture_to(tmp_path, model, prompts, "layers[:].output[-1]", chunk=4)
    with pytest.raises(FileError, match="paths: "):
        ns.capture_to(tmp_path, model, prompts, "layers[0].output[-1]", chunk=4)
    with pytest.raises(FileError, match="weights: "):
        ns.capture_to(tmp_path, wrap("gpt2", seed=3), prompts, "layers[:].output[-1]", chunk=4)
    with pytest.raises(FileError, match="other prompts: chunk 1"):
        ns.capture_to(tmp_path, model, [*prompts[:4], *prompts[:4]], "layers[:].output[-1]", chunk=4)
    with pytest.raises(FileError, match="more prompts than these 4"):
        ns.capture_to(tmp_path, model, prompts[:4], "layers[:].output[-1]", chunk=4)


def test_rows_of_a_data_set_and_spans(model: Any, tmp_path: Path) -> None:
    texts = ["w3 w4 w5", "w6 w7 w8", "w9 w10 w11"]
    spans = {"subject": [(0, 1), (1, 2), (2, 3)]}
    rows = [{"text": text, "label": 0} for text in texts]
    held = ns.capture_to(tmp_path, model, rows, 'layers[1].output["subject"][-1]', spans=spans, chunk=2)
    path = 'layers[1].output["subject"][-1]'
    torch.testing.assert_close(held.get(path), ns.capture(model, texts, path, spans=spans).get(path))
    assert torch.equal(held[path], held.get(path))


def test_one_chunk_is_in_memory(model: Any, tmp_path: Path) -> None:
    """Prompts are taken as they are needed, and none is asked for before the chunk in front of it is written."""
    seen: list[int] = []

    def stream() -> Any:
        for number, row in enumerate(_prompts()):
            seen.append(len(list(tmp_path.glob("chunk-*.json"))) * 4 - number)
            yield row

    ns.capture_to(tmp_path, model, stream(), "layers[1].output[-1]", chunk=4)
    assert all(-4 < ahead <= 0 for ahead in seen)


def test_one_bar_counts_all_prompts(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The captures of single chunks show none: they did, also with `progress=False`."""
    capturing = sys.modules["nnsplice.activations.capture"]
    captured, shown = capturing.capture, []

    def noted(*args: Any, **options: Any) -> Any:
        shown.append(options.get("progress", True))
        return captured(*args, **options)

    monkeypatch.setattr(capturing, "capture", noted)
    ns.capture_to(tmp_path, model, _prompts(), "layers[1].output[-1]", chunk=4)
    assert shown == [False] * 3


def test_mistakes_are_told(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingPosition):
        ns.capture_to("a", model, _prompts(), "layers[0].output")
    with pytest.raises(BadArgument, match="folder is for many"):
        ns.capture_to("a", model, "w3 w4", "layers[0].output[-1]")
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(MissingPackage, match=r"nnsplice\[cloud\]"):
        ns.capture_to("s3://bucket/a", model, _prompts(), "layers[0].output[-1]")
    with pytest.raises(BadArgument, match="at least 1"):
        ns.capture_to("a", model, _prompts(), "layers[0].output[-1]", chunk=0)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileError, match="holds no captures"):
        ns.SavedActivation.open(tmp_path)
    with pytest.raises(BadArgument, match="no prompts"):
        ns.capture_to("a", model, [], "layers[0].output[-1]")


@pytest.mark.parametrize("form", ["encoding", "tensor"])
def test_token_ids_in_one_object_are_the_prompts_that_they_hold(model: Any, tmp_path: Path, form: str) -> None:
    ids = torch.tensor([[3, 4, 5], [6, 7, 0]])
    given = {"encoding": {"input_ids": ids, "attention_mask": ids != 0}, "tensor": ids[:, :2]}[form]
    held = ns.capture_to(tmp_path, model, given, "layers[1].output[-1]")
    rows = [[3, 4, 5], [6, 7]] if form == "encoding" else [[3, 4], [6, 7]]
    each = [ns.capture(model, row, "layers[1].output[-1]").get("layers[1].output[-1]") for row in rows]
    torch.testing.assert_close(held.get("layers[1].output[-1]"), torch.cat(each))


def test_one_prompt_of_token_ids_is_refused(model: Any, tmp_path: Path) -> None:
    with pytest.raises(BadArgument, match="one prompt of token ids"):
        ns.capture_to(tmp_path, model, [3, 4, 5], "layers[1].output[-1]")


def test_texts_with_images_are_refused_by_name_and_not_run_without_them(tmp_path: Path) -> None:
    shown = ns.load(seeing.build(), processor=seeing.processor())
    prompts = {"text": ["w3 <image> w4"], "images": [seeing.picture(1)]}
    rows = [{"text": "w3 <image> w4", "images": seeing.picture(1)}]
    for number, given in enumerate((prompts, rows)):
        with pytest.raises(BadArgument, match="these prompts hold images"):
            ns.capture_to(tmp_path / str(number), shown, given, "layers[1].output[-1]")


def test_a_folder_prints_in_a_few_lines_however_many_prompts_it_has(model: Any, tmp_path: Path) -> None:
    held = ns.capture_to(tmp_path, model, ["w3 w4"] * 50, "layers[:].output[-1]", chunk=20, progress=False)
    assert repr(held) == (
        f"ActivationFolder: 3 sites, 50 prompts of {held.manifest['model']}\n"
        f"  layers[0].output[-1], layers[1].output[-1], layers[2].output[-1]\n  {tmp_path}"
    )
