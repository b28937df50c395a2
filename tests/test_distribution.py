"""What would be uploaded: a wheel that works by itself, an sdist, and metadata that an index accepts."""

from __future__ import annotations

import email
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


def _wheel(built: Path) -> Path:
    (wheel,) = built.glob("*.whl")
    return wheel


def test_an_index_accepts_both_files(built: Path) -> None:
    files = sorted(map(str, built.iterdir()))
    assert len(files) == 2
    done = subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2


def test_the_metadata_say_what_it_is_and_what_it_needs(built: Path) -> None:
    with zipfile.ZipFile(_wheel(built)) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith("/METADATA")]
        told = email.message_from_bytes(wheel.read(name))
    assert told["Name"] == "nnsplice"
    assert "activation patching" in told["Summary"].lower()
    assert told["Description-Content-Type"] == "text/markdown"
    assert told["License-Expression"] == "MIT"
    assert {"plots", "peft", "gguf", "all"} <= set(told.get_all("Provides-Extra") or [])
    needed = [line.split(";")[0] for line in told.get_all("Requires-Dist") or [] if "extra ==" not in line]
    assert any(line.startswith("nnsight") and "<0.9" in line for line in needed)
    # transformers reads GGUF files with accelerate only, and nothing else that is needed brings it.
    of_gguf = [line for line in told.get_all("Requires-Dist") or [] if "'gguf'" in line]
    assert {"accelerate", "gguf"} <= {line.split(">")[0] for line in of_gguf}


def test_the_sdist_holds_what_the_tests_need_and_nothing_that_was_made(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    for needed in (
        "README.md",
        "LICENSE",
        "CITATION.cff",
        "conftest.py",
        "docs/conf.py",
        "tests/zoo.py",
        "src/nnsplice/py.typed",
    ):
        assert needed in names
    assert not [name for name in names if "_build" in name or "/made/" in name or "__pycache__" in name]


def test_the_wheel_works_by_itself(built: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(_wheel(built)) as wheel:
        names = wheel.namelist()
        wheel.extractall(tmp_path / "site")
    assert "nnsplice/py.typed" in names
    assert not [name for name in names if name.startswith(("tests/", "docs/", "bench/"))]
    code = """
import nnsplice as ns
from pathlib import Path
assert Path(ns.__file__).is_relative_to(Path.cwd() / "site"), ns.__file__
model = ns.load("toy")
fact = ns.models.toy_prompts().facts[0]
metric = ns.logit_diff(fact.answer, fact.wrong)
result = ns.sweep(model, fact.clean, fact.corrupted, "layers[:].output[3]", metric, progress=False)
result.to_html("page.html")
print(result.best(1).path[0])
"""
    # Before what is installed: an editable installation of this very folder would otherwise be found.
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "layers[2].output[3]"
    assert (tmp_path / "page.html").stat().st_size > 10_000
