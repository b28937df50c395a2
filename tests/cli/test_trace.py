"""`nnsplice trace`: a sweep from a shell, from options and from a file, stopped and gone on with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import nnsplice as ns
from nnsplice import plots
from nnsplice.cli import app

CLEAN, CORRUPTED = "The Velmar Tower is located in the city of", "The Ostrin Bridge is located in the city of"
FACT = ("--model", "toy", "--clean", CLEAN, "--corrupted", CORRUPTED, "--answer", "Athens", "--wrong", "Dublin")
SITES = ("--sites", "layers[:].output[3]", "--sites", "layers[:].output[-1]")
FILES = {"result.safetensors", "figure.png", "page.html", "journal.jsonl"}
TOML = f"""\
model = "toy"
clean = "{CLEAN}"
corrupted = "{CORRUPTED}"
sites = ["layers[:].output[3]", "layers[:].output[-1]"]
answer = "Athens"
wrong = "Dublin"
"""


def _invoke(*args: object) -> Result:
    return CliRunner().invoke(app, ["trace", *map(str, args)])


def _run(*args: object, code: int = 0) -> str:
    result = _invoke(*args)
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout if code == 0 else result.stderr


def _written(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    file = tmp_path / "sweep.toml"
    file.write_text(TOML)
    return file


# -- what a run shows and writes ---------------------------------------------------------------------------------------


def test_a_trace_is_the_sweep(tmp_path: Path) -> None:
    said = _run(*FACT, "--sites", "layers[:].output", "--out", tmp_path)
    expected = ns.sweep(
        ns.load("toy"), [CLEAN], [CORRUPTED], "layers[:].output", ns.logit_diff("Athens", "Dublin"), progress=False
    )
    assert ns.SweepResult.from_file(tmp_path / "result.safetensors") == expected
    assert _written(tmp_path) == FILES
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert "layers[2].output[3]" in (tmp_path / "page.html").read_text()

    first, ends, ran, _, head, *rows = said.splitlines()
    assert first == "41 cells to compute, 19 known without; 1 prompt, patch, logit_diff"
    assert ends == f"logit_diff: clean {expected.clean[0]:.4g}, corrupted {expected.corrupted[0]:.4g}"
    assert ran.startswith("packed, ")
    assert head.split() == ["site", "token", "logit_diff", "effect"]
    assert rows[0].split()[:2] == ["layers[2].output[3]", "Bridge"] and rows[0].endswith(" 1.000")
    assert [row.split()[0] for row in rows[:10]] == list(expected.best(10)["path"])
    assert {Path(row.split()[0]).name for row in rows[11:]} == FILES


def test_plan_only_writes_nothing(tmp_path: Path) -> None:
    said = _run(*FACT, *SITES, "--out", tmp_path / "out", "--plan-only")
    assert "cells to compute" in said and "prompt 0  layers[0].output[3]" in said
    assert not (tmp_path / "out").exists()
    assert _run(*FACT, *SITES, "--plan-only") == said


def test_an_ablation_edits_the_clean_run_and_shows_the_change(tmp_path: Path) -> None:
    said = _run(
        "--model", "toy", "--clean", CLEAN, "--sites", "layers[:].heads[:].output[-1]", "--answer", "Athens",
        "--metric", "probability", "--operation", "zero", "--out", tmp_path,
    )  # fmt: skip
    assert said.splitlines()[4].split() == ["site", "token", "probability", "change"]
    assert _written(tmp_path) == FILES


def test_what_the_metric_does_not_ask_is_not_needed(tmp_path: Path) -> None:
    pair = ("--model", "toy", "--clean", CLEAN, "--corrupted", CORRUPTED)
    said = _run(*pair, "--sites", "layers[:].output[3]", "--metric", "kl_divergence", "--out", tmp_path)
    assert "kl_divergence: clean 0, " in said
    assert "--wrong says nothing to rank" in _run(*FACT, *SITES, "--metric", "rank", "--plan-only", code=2)


def test_values_of_a_reference(tmp_path: Path) -> None:
    saved = ns.capture(ns.load("toy"), [CLEAN, CORRUPTED], "layers[2].output[:]")
    saved.to_file(tmp_path / "saved.safetensors")
    args = (*FACT, "--sites", "layers[2].output", "--operation", "mean", "--out", tmp_path / "out")
    assert "takes its values from a reference" in _run(*args, code=1)
    assert "mean, logit_diff" in _run(*args, "--reference", tmp_path / "saved.safetensors")


def test_several_kinds_of_place_are_several_figures(tmp_path: Path) -> None:
    _run(*FACT, "--sites", "layers[0:2].attn.output", "--sites", "layers[0:2].mlp.output", "--out", tmp_path)
    figures = {"figure.layers.attn.output.png", "figure.layers.mlp.output.png"}
    assert _written(tmp_path) == FILES - {"figure.png"} | figures


def test_a_figure_that_cannot_be_drawn_is_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ns.errors.MissingPackage("no matplotlib", write="pip install nnsplice[plots]")

    monkeypatch.setattr(plots, "heatmap", refuse)
    result = _invoke(*FACT, *SITES, "--out", tmp_path)
    assert result.exit_code == 0 and "no figure of layers[:].output: no matplotlib" in result.stderr
    assert _written(tmp_path) == FILES - {"figure.png"} and "figure.png" not in result.stdout


# -- stopped and gone on with ------------------------------------------------------------------------------------------


def test_a_folder_of_an_earlier_run_is_not_written_over(tmp_path: Path) -> None:
    _run(*FACT, *SITES, "--out", tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    said = _run(*FACT, *SITES, "--out", tmp_path, code=1)
    assert "holds journal.jsonl" in said and "--resume" in said
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    args = (*FACT, *SITES, "--max-tokens", 20, "--executor", "batched")
    _run(*args, "--out", whole)
    lines = (whole / "journal.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) > 3
    cut.mkdir()
    (cut / "journal.jsonl").write_text("".join(lines[:3]) + lines[3][:9])  # the last line as a kill leaves it
    _run(*args, "--out", cut, "--resume")
    results = [ns.SweepResult.from_file(folder / "result.safetensors") for folder in (whole, cut)]
    assert results[0] == results[1] and results[1].run.forwards < results[0].run.forwards


def test_a_stop_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ns, "run", stopped)
    said = _run(*FACT, *SITES, "--out", tmp_path, code=130)
    assert said.startswith("stopped; what is finished") and "--resume goes on" in said


def test_a_finished_one_is_shown_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _run(*FACT, *SITES, "--out", tmp_path).splitlines()
    (tmp_path / "page.html").unlink()
    monkeypatch.setattr(ns, "run", None)  # nothing is run
    plan, note, *again = _run(*FACT, *SITES, "--out", tmp_path, "--resume").splitlines()
    assert "finished already" in note and [plan, *again] == first
    assert _written(tmp_path) == FILES


def test_another_sweep_does_not_go_on_here(tmp_path: Path) -> None:
    _run(*FACT, *SITES, "--out", tmp_path)
    before = (tmp_path / "result.safetensors").read_bytes()
    said = _run(*FACT, "--sites", "layers[:].mlp.output", "--out", tmp_path, "--resume", code=1)
    assert "is the journal of another sweep" in said
    assert (tmp_path / "result.safetensors").read_bytes() == before
    (tmp_path / "journal.jsonl").unlink()
    assert "no journal.jsonl to go on from" in _run(*FACT, *SITES, "--out", tmp_path, "--resume", code=1)


# -- a file ------------------------------------------------------------------------------------------------------------


def test_a_file_says_what_options_say(sweep: Path, tmp_path: Path) -> None:
    _run(sweep, "--out", tmp_path / "file")
    _run(*FACT, *SITES, "--out", tmp_path / "options")
    a, b = (ns.SweepResult.from_file(tmp_path / name / "result.safetensors") for name in ("file", "options"))
    assert a == b


def test_options_win_over_the_file(sweep: Path, tmp_path: Path) -> None:
    sweep.write_text(f'{TOML}max_tokens = 64\nwindow = 2\nout = "{(tmp_path / "there").as_posix()}"\n')
    _run(sweep, "--out", tmp_path / "here", "--window", 3, "--sites", "layers[:].output[-1]")
    assert not (tmp_path / "there").exists()
    result = ns.SweepResult.from_file(tmp_path / "here" / "result.safetensors")
    assert result.asked["window"] == 3 and {cell.position for cell in result.cells} == {-1}
    _run(sweep, "--metric", "probability")  # that asks nothing about the file's wrong token
    assert ns.SweepResult.from_file(tmp_path / "there" / "result.safetensors").metric == "probability"


def test_sites_joined_by_a_plus_sign_are_changed_together(tmp_path: Path) -> None:
    pair = ["layers[0].heads[1].output[-1]", "layers[2].output[3]"]
    _run(*FACT, "--sites", " + ".join(pair), "--sites", pair[0], "--out", tmp_path)
    result = ns.SweepResult.from_file(tmp_path / "result.safetensors")
    metric = ns.logit_diff("Athens", "Dublin")
    expected = ns.sweep(ns.load("toy"), [CLEAN], [CORRUPTED], [pair, pair[0]], metric, progress=False)
    assert result == expected and result.table.values.shape == (1, 2)
    assert abs(result.table.values[0, 0] - result.table.values[0, 1]) > 1e-3


def test_prompts_are_the_lines_of_files(sweep: Path, tmp_path: Path) -> None:
    facts = ns.models.toy_prompts().facts[:2]
    clean, corrupted = [fact.clean for fact in facts], [fact.corrupted for fact in facts]
    (tmp_path / "clean.txt").write_text("\n\n".join(clean))
    (tmp_path / "corrupted.txt").write_text("\n".join(corrupted))
    files = f"@{tmp_path / 'clean.txt'}", f"@{tmp_path / 'corrupted.txt'}"
    _run(sweep, "--clean", files[0], "--corrupted", files[1], "--out", tmp_path / "options")
    sweep.write_text(TOML.replace(CLEAN, files[0]).replace(CORRUPTED, files[1]))
    _run(sweep, "--out", tmp_path / "keys")
    sites = ["layers[:].output[3]", "layers[:].output[-1]"]
    metric = ns.logit_diff("Athens", "Dublin")
    expected = ns.sweep(ns.load("toy"), clean, corrupted, sites, metric, progress=False)
    for name in ("options", "keys"):
        assert ns.SweepResult.from_file(tmp_path / name / "result.safetensors") == expected


def test_several_prompts_are_lists(tmp_path: Path) -> None:
    facts = ns.models.toy_prompts().facts[:3]
    tokens = ns.load("toy").tokenizer.convert_tokens_to_ids
    keys = {
        "model": "toy", "sites": "layers[:].output[3]", "clean": [f.clean for f in facts],
        "corrupted": [f.corrupted for f in facts], "answer": [tokens(f.answer) for f in facts],
        "wrong": [f.wrong for f in facts],
    }  # fmt: skip
    (tmp_path / "sweep.toml").write_text("".join(f"{key} = {value!r}\n" for key, value in keys.items()))
    said = _run(tmp_path / "sweep.toml", "--out", tmp_path / "a")
    assert "in the mean of 3 prompts" in said
    many = [
        part
        for fact in facts
        for part in (
            "--clean",
            fact.clean,
            "--corrupted",
            fact.corrupted,
            "--answer",
            fact.answer,
            "--wrong",
            fact.wrong,
        )
    ]
    _run("--model", "toy", "--sites", "layers[:].output[3]", *many, "--out", tmp_path / "b")
    a, b = (ns.SweepResult.from_file(tmp_path / name / "result.safetensors") for name in "ab")
    assert a == b and len(a.clean) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('site = "layers[:].output"\n', "expected: sites"),
        ("[sweep]\n", "no option of trace"),
        ("model =\n", "is no TOML"),
        ('window = "2"\n', "expected: a whole number"),
        ("window = true\n", "expected: a whole number"),
        ("out = 3\n", "expected: a text"),
        ("sites = []\n", "a list of texts"),
        ("clean = [[1, 2]]\n", "a list of texts"),
        ("answer = [0.5]\n", "a token's text or id"),
        ('metric = "logitdiff"\n', "expected: logit_diff, probability"),
        ("max-tokens = 0\n", "expected: at least 1"),
    ],
)
def test_a_mistake_in_a_file(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text(text)
    said = _run(file, "--plan-only", code=1)
    assert message in said and "Traceback" not in said and "Usage" not in said


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert "No such file" in _run(tmp_path / "none.toml", code=1)
    (tmp_path / "sweep.toml").write_bytes(b"\xff\xfe\x00")
    assert "it is not text" in _run(tmp_path / "sweep.toml", code=1)


# -- wrong input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((*FACT, "--sites", "layers[9].output"), "past the last layer"),
        ((*FACT, "--sites", "layers[0].outptu"), "outptu"),
        ((*FACT, *SITES, "--operation", "pach"), "expected: patch"),
        ((*FACT, *SITES, "--executor", "fast"), "expected: auto, packed"),
        ((*FACT, *SITES, "--window", "0"), "expected: at least 1"),
        ((*FACT, *SITES, "--clean", "The Velmar Tower"), "2 clean prompts and 1 corrupted"),
        ((*FACT[:4], *SITES, *FACT[6:], "--corrupted", "The Bridge is"), "--align end"),
        ((*FACT[:-1], "no-such-word", *SITES), "no-such-word"),
        ((*FACT[:2], "--model", "./nowhere", *FACT[2:], *SITES), "there is no such folder"),
    ],
)
def test_a_mistake_is_answered_on_stderr(args: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = _invoke(*args, "--out", tmp_path / "out")
    assert result.exit_code == 1 and message in result.stderr, (result.output, result.exception)
    assert not result.stdout and "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "Missing: --model, --clean, --corrupted, --sites, --answer, --wrong, --out"),
        ((*FACT, *SITES), "Missing: --out"),
        ((*FACT[:4], *SITES, "--plan-only", "--operation", "zero", *FACT[6:8]), "Missing: --wrong;"),
        ((*FACT, *SITES, "--window", "x"), "valid integer"),
        ((*FACT, *SITES, "--outt", "x"), "No such option"),
    ],
)
def test_wrong_usage_shows_the_help(args: tuple[str, ...], message: str) -> None:
    said = _run(*args, code=2)
    assert "Help: nnsplice trace --help" in said and message in said


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "is a file" in _run(*FACT, *SITES, "--out", tmp_path / "file", code=1)
    assert "cannot be made" in _run(*FACT, *SITES, "--out", tmp_path / "file" / "below", code=1)


def test_help_has_an_example() -> None:
    said = _run("--help")
    assert "nnsplice trace --model toy" in said and "nnsplice trace sweep.toml" in said
    assert all(f"--{name}" in said for name in ("resume", "plan-only", "max-tokens", "align"))


def test_in_a_process_of_its_own(sweep: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nnsplice", "trace", "sweep.toml", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "layers[2].output[3]" in done.stdout
    assert _written(tmp_path / "out") == FILES
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 1 and "--resume" in again.stderr and "Traceback" not in again.stderr


# -- estimates ---------------------------------------------------------------------------------------------------------


def test_estimates_are_those_of_attribute_and_say_so(tmp_path: Path) -> None:
    args = (*FACT, "--sites", "layers[:].heads[:]", "--method", "atp*", "--verify", 5)
    said = _run(*args, "--out", tmp_path)
    expected = ns.attribute(
        ns.load("toy"), [CLEAN], [CORRUPTED], ["layers[:].heads[:]"], ns.logit_diff("Athens", "Dublin"),
        method="atp*", verify=5, progress=False,
    )  # fmt: skip
    assert ns.SweepResult.from_file(tmp_path / "result.safetensors") == expected
    assert _written(tmp_path) == FILES
    lines = said.splitlines()
    assert lines[0].startswith("164 cells to estimate by atp*, 76 known")
    assert lines[3] == "estimated by atp*, not measured" and lines[4] == str(expected.verification)
    assert lines[6].split() == ["site", "token", "logit_diff", "effect", "exact"]
    assert [line.split()[0] for line in lines[7:17]] == list(expected.best(10)["path"])
    # The same again is what was found; another question is refused.
    assert "finished already" in _run(*args, "--out", tmp_path, "--resume")
    said = _run(*args[:-1], 6, "--out", tmp_path, "--resume", code=1)
    assert "another question: verify differ" in said


def test_the_method_may_be_chosen_by_measuring(tmp_path: Path) -> None:
    args = (*FACT, "--sites", "layers[:].heads[:]", "--method", "auto")
    said = _run(*args, "--out", tmp_path)
    assert "estimate by auto" in said and "auto took" in said
    assert "finished already" in _run(*args, "--out", tmp_path, "--resume")
    assert "seed differ" in _run(*args, "--seed", 1, "--out", tmp_path, "--resume", code=1)


def test_edges_are_a_table_of_senders_and_receivers(tmp_path: Path) -> None:
    args = (*FACT, "--sites", "layers[:].heads[:]", "--method", "eap", "--receivers", "unembed")
    said = _run(*args, "--out", tmp_path)
    assert _written(tmp_path) == FILES - {"journal.jsonl"} and "journal.jsonl" not in said
    rows = said.splitlines()[5:]
    assert rows[0].split() == ["sender", "receiver", "score"]
    assert rows[1].split()[:2] == ["layers[3].heads[1].output", "unembed.output"]
    assert "finished already" in _run(*args, "--out", tmp_path, "--resume")


def test_options_that_would_do_nothing_are_refused() -> None:
    said = _run(*FACT, *SITES, "--verify", 3, "--plan-only", code=1)
    assert "--verify says nothing to an exact sweep" in said
    assert "--window says nothing to ig" in _run(*FACT, *SITES, "--method", "ig", "--window", 2, "--plan-only", code=1)
    assert "there is no method" in _run(*FACT, *SITES, "--method", "atp-star", "--plan-only", code=1)


@pytest.mark.parametrize("method", [(), ("--method", "atp", "--verify", "2"), ("--method", "eap")])
def test_numbers_are_not_rounded_in_json(tmp_path: Path, method: tuple[str, ...]) -> None:
    sites = ("--sites", "layers[4:].heads[:]") if method else SITES
    rows = json.loads(_run(*FACT, *sites, *method, "--out", tmp_path, "--json"))
    result = ns.SweepResult.from_file(tmp_path / "result.safetensors")
    if "eap" in method:
        assert [row["score"] for row in rows] == result.edges().head(10)["score"].tolist()
    else:
        assert [row["logit_diff"] for row in rows] == result.best(10)["value"].tolist()
