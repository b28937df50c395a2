"""`nnsplice circuit`: find, run and show from a shell, and mistakes answered with what to write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import nnsplice as ns
from nnsplice.cli import app

PAIRS = ns.models.toy_prompts().ioi[:3]
ASKED = ["--model", "toy"]
for pair in PAIRS:
    ASKED += ["--clean", pair.clean, "--corrupted", pair.corrupted, "--answer", pair.answer, "--wrong", pair.wrong]
CLEAN, CORRUPTED = [pair.clean for pair in PAIRS], [pair.corrupted for pair in PAIRS]


def _run(*args: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["circuit", *map(str, args)])
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout if code == 0 else result.stderr


def _metric() -> ns.Metric:
    return ns.logit_diff([pair.answer for pair in PAIRS], [pair.wrong for pair in PAIRS])


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("circuit") / "ioi.json"
    said = _run("find", *ASKED, "--method", "eap", "--edges", 40, "--out", path)
    assert "Circuit of 40 edges" in said and "of the metric" in said and f"written to {path}" in said
    return path


def test_a_found_circuit_is_that_of_python(file: Path) -> None:
    toy = ns.load("toy")
    sites = ["embed", "layers[:].heads[:]", "layers[:].mlp"]
    scores = ns.attribute(toy, CLEAN, CORRUPTED, sites, _metric(), method="eap", progress=False)
    found = ns.Circuit.from_file(file)
    assert found == ns.Circuit.top(scores, 40) and found.provenance["method"] == "eap"


def test_growing_backwards_and_a_share(tmp_path: Path) -> None:
    said = _run("find", *ASKED, "--method", "eap", "--share", 0.01, "--greedy", "--out", tmp_path / "c.json")
    found = ns.Circuit.from_file(tmp_path / "c.json")
    assert found.provenance["chosen"] == "greedy" and repr(found) in said


def test_a_run_shows_each_prompt_beside_the_whole_model(file: Path) -> None:
    said = _run("run", file, *ASKED)
    values = ns.Circuit.from_file(file).run(ns.load("toy"), CLEAN, CORRUPTED, _metric())
    for value in values:
        assert f"{value: .4g}" in said
    assert "keeps" in said and "95%" in said
    zero = _run("run", file, *ASKED, "--ablation", "zero")
    assert zero != said


def test_prompts_are_the_lines_of_files(file: Path, tmp_path: Path) -> None:
    (tmp_path / "clean.txt").write_text("\n".join(CLEAN))
    (tmp_path / "corrupted.txt").write_text("\n".join(CORRUPTED))
    asked = ["--model", "toy", "--clean", f"@{tmp_path}/clean.txt", "--corrupted", f"@{tmp_path}/corrupted.txt"]
    for pair in PAIRS:
        asked += ["--answer", pair.answer, "--wrong", pair.wrong]
    assert _run("run", file, *asked) == _run("run", file, *ASKED)
    _run("find", *asked, "--method", "eap", "--edges", 40, "--out", tmp_path / "c.json")
    assert ns.Circuit.from_file(tmp_path / "c.json") == ns.Circuit.from_file(file)
    assert "cannot be read" in _run("run", file, "--model", "toy", "--clean", "@no.txt", *asked[6:], code=1)


def test_a_circuit_is_shown_and_drawn(file: Path, tmp_path: Path) -> None:
    said = _run("show", file, "--edges", 3, "--html", tmp_path / "ioi.html")
    assert len([line for line in said.splitlines() if "layers[" in line or "embed " in line]) == 3
    assert (tmp_path / "ioi.html").read_text().startswith("<!doctype html>")
    ns.Circuit.from_file(file).to_json(tmp_path / "graph.json")
    assert "Circuit of 40 edges" in _run("show", tmp_path / "graph.json")


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (["find", *ASKED, "--method", "guess", "--out", "c.json"], "There is no method 'guess'"),
        (["find", *ASKED, "--method", "acdc", "--out", "c.json"], "--threshold belongs"),
        (["find", *ASKED, "--threshold", "0.1", "--out", "c.json"], "--threshold belongs"),
        (["find", *ASKED, "--edges", "3", "--share", "0.1", "--out", "c.json"], "--edges or --share"),
        (["find", *ASKED, "--edges", "3", "--out", "nowhere/c.json"], "there is no folder"),
        (["find", *ASKED, "--edges", "100000", "--method", "eap", "--out", "c.json"], "scored edges"),
        (["run", "nowhere.json", *ASKED], "there is no file"),
        (["show", "nowhere.json"], "there is no file"),
    ],
)
def test_mistakes_are_answered(given: list[str], match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["circuit", *given])
    assert result.exit_code != 0 and match in result.stderr, result.output
    assert list(tmp_path.iterdir()) == []


def test_scores_are_not_rounded_in_json(file: Path) -> None:
    one = ns.Circuit.from_file(file)
    scores = {(str(a), str(b)): score for (a, b), score in zip(one.edges, one.scores or (), strict=True)}
    rows = json.loads(_run("show", file, "--edges", 40, "--json"))
    assert {(row["sender"], row["receiver"]): row["score"] for row in rows} == scores
    for row in json.loads(_run("run", file, *ASKED, "--json")):
        assert row["circuit"] != float(f"{row['circuit']:.4g}")
