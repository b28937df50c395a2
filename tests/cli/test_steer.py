"""`nnsplice steer`: fit, sweep and generate from a shell, and mistakes answered with what to write."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

import nnsplice as ns
from nnsplice.cli import app

PROMPT = "I thought the film was"


def _run(*args: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["steer", *map(str, args)])
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout if code == 0 else result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("steer")
    reviews = ns.models.toy_prompts().reviews[:40]
    good = [r.text if r.mood == "good" else r.opposite for r in reviews]
    bad = [r.opposite if r.mood == "good" else r.text for r in reviews]
    (found / "good.txt").write_text("\n".join(good) + "\n\n")
    (found / "bad.txt").write_text("\n".join(bad))
    said = _run(
        "fit", "--model", "toy", "--positive", f"@{found}/good.txt", "--negative", f"@{found}/bad.txt",
        "--out", found / "mood.safetensors",
    )  # fmt: skip
    assert "layers[3].output[-1]" in said and "1.000" in said and "40 and 40 prompts" in said
    return found


def test_a_fit_is_the_vector_of_python(folder: Path) -> None:
    toy = ns.load("toy")
    good, bad = ((folder / name).read_text().split("\n") for name in ("good.txt", "bad.txt"))
    expected = ns.steering.fit_from_prompts(toy, [t for t in good if t], bad).in_residual_norms()
    found = ns.steering.SteeringVector.from_file(folder / "mood.safetensors")
    assert found.allclose(expected) and found.quality == expected.quality


def test_a_fit_for_llama_cpp_leaves_out_what_it_cannot_have(folder: Path) -> None:
    arguments = ("--positive", f"@{folder}/good.txt", "--negative", f"@{folder}/bad.txt", "--method", "pca")
    _run("fit", "--model", "toy", *arguments, "--unit", "means", "--out", folder / "mood.gguf")
    assert ns.steering.from_gguf(folder / "mood.gguf").layers == [1, 2, 3, 4, 5]


def test_a_sweep_writes_numbers_and_a_figure(folder: Path) -> None:
    said = _run(
        "sweep", "--model", "toy", "--vector", folder / "mood.safetensors", "--prompt", PROMPT, "--answer", "great",
        "--wrong", "awful", "--coefficients", "0.25,0.5", "--limit", "2", "--out", folder / "swept",
    )  # fmt: skip
    grid = ns.steering.SteeringSweep.from_file(folder / "swept" / "sweep.safetensors")
    chosen = grid.choose(limit=2)
    assert f"layer {chosen.layer}, coefficient {chosen.coefficient:g}" in said and "KL" in said
    assert (folder / "swept" / "figure.png").read_bytes().startswith(b"\x89PNG")
    again = _run(
        "sweep", "--model", "toy", "--vector", folder / "mood.safetensors", "--prompt", PROMPT, "--answer", "great",
        "--wrong", "awful", "--out", folder / "swept", code=1,
    )  # fmt: skip
    assert "holds sweep.safetensors and figure.png of an earlier run" in again and "another --out" in again


def test_generation_is_shown_beside_the_unsteered_text(folder: Path) -> None:
    arguments = ("--model", "toy", "--prompt", PROMPT, "--layer", 3, "--coefficient", 0.5, "--max-new-tokens", 8)
    said = _run("generate", "--vector", folder / "mood.safetensors", *arguments).splitlines()
    vector = ns.steering.SteeringVector.from_file(folder / "mood.safetensors").at(3)
    toy = ns.load("toy")
    plain = ns.steering.generate(toy, PROMPT, max_new_tokens=8)[0]
    steered = ns.steering.generate(toy, PROMPT, vector, 0.5, max_new_tokens=8)[0]
    assert said == [PROMPT, f"  without  {' '.join(plain.split())}", f"  0.5      {' '.join(steered.split())}"]
    later = _run("generate", "--vector", folder / "mood.safetensors", *arguments, "--where", "-1")
    assert later.splitlines()[1] == said[1]


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("fit", "--model", "toy", "--out", "x.gguf"), 2, "--positive and --negative, or --evals"),
        (("fit", "--model", "toy", "--positive", "a", "--negative", "b", "--out", "no/x"), 1, "no folder"),
        (("fit", "--model", "toy", "--positive", "a", "--negative", "b", "--out", "s3://b/x"), 1, "object store"),
        (("fit", "--model", "toy", "--positive", "@none", "--negative", "b", "--out", "x.gguf"), 1, "cannot be read"),
        (("fit", "--model", "toy", "--evals", "e", "--out", "x", "--unit", "cm"), 1, "no unit 'cm'"),
        (("generate", "--model", "toy", "--vector", "none", "--prompt", "a"), 1, "no file none"),
        (("generate", "--model", "toy", "--prompt", "a"), 2, "--vector"),
    ],
)
def test_a_mistake_is_answered(arguments: tuple, code: int, text: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert text in _run(*arguments, code=code)
    assert not list(tmp_path.iterdir())


def test_numbers_that_are_none(folder: Path) -> None:
    said = _run(
        "sweep", "--model", "toy", "--vector", folder / "mood.safetensors", "--prompt", PROMPT, "--answer", "great",
        "--wrong", "awful", "--coefficients", "1;2", "--out", folder / "x", code=1,
    )  # fmt: skip
    assert "commas between" in said


def test_more_new_tokens_than_the_model_has_positions_say_how_many_fit(folder: Path) -> None:
    said = _run("generate", "--model", "toy", "--vector", folder / "mood.safetensors", "--prompt", PROMPT, code=1)
    assert "write: --max-new-tokens " in said


@pytest.mark.filterwarnings("default:this vector comes from")
def test_a_vector_of_another_model_is_pointed_out(folder: Path) -> None:
    asked = ("--vector", folder / "mood.safetensors", "--prompt", PROMPT, "--layer", 3, "--max-new-tokens", 2)
    for model, noted in (("toy", False), ("toy-llama", True)):
        ran = CliRunner().invoke(app, ["steer", "generate", "--model", model, *map(str, asked)])
        assert ran.exit_code == 0 and ran.stderr.count("comes from toy;") == noted


def test_a_sweep_without_matplotlib_still_shows_its_table(folder: Path, tmp_path: Path, monkeypatch) -> None:
    def missing(*args: object, **options: object) -> None:
        raise ns.errors.MissingPackage("no matplotlib", write='pip install "nnsplice[plots]"')

    monkeypatch.setattr(ns.plots, "save", missing)
    said = _run(
        "sweep", "--model", "toy", "--vector", folder / "mood.safetensors", "--prompt", PROMPT, "--answer", "great",
        "--wrong", "awful", "--coefficients", "0.5", "--out", tmp_path / "mood",
    )  # fmt: skip
    assert "coefficient" in said and "sweep.safetensors" in said and "figure.png" not in said
