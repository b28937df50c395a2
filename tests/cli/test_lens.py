"""`nnsplice lens`: from a shell what Python gives, and mistakes answered with what to write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import nnsplice as ns
from nnsplice.cli import app

PAIR = ns.models.toy_prompts().ioi[0]
FACT = ns.models.toy_prompts().facts[0]


def _run(*args: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["lens", *map(str, args)])
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout if code == 0 else result.stderr


def test_what_states_say(tmp_path: Path) -> None:
    page = tmp_path / "lens.html"
    said = _run("logit", "--model", "toy", "--prompt", FACT.clean, "--answer", FACT.answer, "--k", 2, "--page", page)
    lens = ns.lens.logit(ns.load("toy"), FACT.clean, "layers[:].output[-1]", FACT.answer, 2)
    for number, cell in enumerate(lens.results.cells):
        line = next(line for line in said.splitlines() if cell.path in line)
        assert repr(lens.texts[int(lens.ids[0, number, 0])]) in line
        assert f"{lens.result.table.values[0, number]:.3f}" in line
    assert "<html" in page.read_text(encoding="utf-8")


def test_what_parts_say() -> None:
    asked = ["--model", "toy", "--prompt", PAIR.clean, "--answer", PAIR.answer, "--wrong", PAIR.wrong]
    said = _run("direct", *asked)
    parts = ns.lens.direct(ns.load("toy"), PAIR.clean, ns.logit_diff(PAIR.answer, PAIR.wrong))
    assert f"together {parts.clean.mean():.4g}" in said
    assert parts.best(1)["path"].iloc[0] in said.splitlines()[1]
    assert "layers[0].mlp.output" in _run("direct", *asked[:6], "--sites", "layers[:].mlp")


def test_prompts_are_lines_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(f"{FACT.clean}\n\n{FACT.corrupted}\n", encoding="utf-8")
    prompts = ("--prompt", FACT.clean, "--prompt", FACT.corrupted)
    said = _run("logit", "--model", "toy", *prompts, "--sites", "layers[3].output[-1]")
    assert said.count("\n") == 3
    assert said == _run(
        "logit", "--model", "toy", "--prompt", f"@{tmp_path / 'prompts.txt'}", "--sites", "layers[3].output[-1]"
    )


@pytest.mark.parametrize("kind", ["tuned", "jacobian"])
def test_a_lens_is_fitted_and_read_with(tmp_path: Path, kind: str) -> None:
    file, out = tmp_path / "prompts.txt", tmp_path / "lens.safetensors"
    file.write_text("\n".join(one.clean for one in ns.models.toy_prompts().facts[:6]), encoding="utf-8")
    said = _run("fit", file, "--model", "toy", "--kind", kind, "--steps", 5, "--out", out)
    assert ("held-out KL" in said) == (kind == "tuned") and f"written to {out}" in said
    assert ns.lens.FittedLens.from_file(out).kind == kind
    assert _run("logit", "--model", "toy", "--prompt", FACT.clean, "--lens", out) != _run(
        "logit", "--model", "toy", "--prompt", FACT.clean
    )


def test_mistakes_are_answered(tmp_path: Path) -> None:
    assert "no state of the stream" in _run(
        "logit", "--model", "toy", "--prompt", "a", "--sites", "layers[0].mlp", code=1
    )
    file = tmp_path / "prompts.txt"
    file.write_text("a\nb\n", encoding="utf-8")
    assert "tuned or jacobian" in _run("fit", file, "--model", "toy", "--kind", "best", "--out", "x.st", code=2)
    assert "no folder" in _run("fit", file, "--model", "toy", "--out", tmp_path / "no" / "x", code=1)


@pytest.mark.parametrize("out", ["lens.txt", "lens"])
def test_a_file_with_another_ending_is_refused_before_anything_runs(tmp_path: Path, out: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a\nb\n", encoding="utf-8")
    said = _run("fit", file, "--model", "nowhere", "--out", tmp_path / out, code=1)
    assert f"write: --out {tmp_path / 'lens.safetensors'}" in said
    asked = ("--model", "nowhere", "--prompt", FACT.clean, "--page", tmp_path / "page.png")
    for command in ("logit", "direct"):
        more = ("--answer", "x") if command == "direct" else ()
        assert "page.html" in _run(command, *asked, *more, code=1)
    assert "is a folder" in _run("fit", file, "--model", "nowhere", "--out", tmp_path, code=1)


def test_a_file_of_prompts_that_cannot_be_read_says_what_is_expected(tmp_path: Path) -> None:
    out = tmp_path / "lens.safetensors"
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "empty.txt").touch()
    for name, why in (("none.txt", "No such file"), ("picture.png", "not text"), ("empty.txt", "no prompt")):
        for asked in (("fit", tmp_path / name, "--out", out), ("logit", "--prompt", f"@{tmp_path / name}")):
            said = _run(*asked, "--model", "toy", code=1)
            assert why in said and "a prompt on each line" in said and "Errno" not in said


def test_tokens_are_a_list_in_json() -> None:
    asked = ("logit", "--model", "toy", "--prompt", FACT.clean, "--answer", FACT.answer, "--k", 2, "--json")
    rows = json.loads(_run(*asked))
    assert all(len(row["tokens"]) == 2 for row in rows) and rows[-1]["tokens"][0] == FACT.answer.strip()
    assert rows[-1]["rank"] == 0 and 0.99 < rows[-1]["answer"] < 1


def test_errors_speak_of_options() -> None:
    asked = ("--model", "toy", "--prompt", FACT.clean)
    said = _run("logit", *asked, "--sites", "layers[0].attn.output[-1]", code=1)
    assert "write: nnsplice lens direct" in said and "in: ns." not in said
