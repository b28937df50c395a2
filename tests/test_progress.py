"""The bar of long work."""

from __future__ import annotations

import inspect
import time

import pytest

import nnsplice as ns
from nnsplice.progress import bar


def test_a_bar_shows_what_is_done_and_of_how_much(capsys: pytest.CaptureFixture[str]) -> None:
    with bar("sweep", 4, "cell", done=1, delay=0) as shown:
        shown.update(3)
    told = capsys.readouterr().err
    assert "sweep" in told and "4/4" in told and "cell" in told


def test_short_work_shows_no_bar_and_long_work_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with bar("capture", 2, "prompt") as shown:
        shown.update(2)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("nnsplice.progress.DELAY", 0.05)
    with bar("capture", 2, "prompt") as shown:
        time.sleep(0.2)
        shown.update(2)
    assert "2/2" in capsys.readouterr().err


def test_every_public_function_with_a_bar_shows_it_by_default() -> None:
    rooms = (ns, ns.steering, ns.adapters, ns.weights, ns.checkpoints, ns.tasks.Task)
    defaults = {
        f"{room.__name__}.{name}": parameter.default
        for room in rooms
        for name in dir(room)
        if not name.startswith("_") and inspect.isfunction(function := getattr(room, name))
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name in ("progress", "show_progress")
    }
    assert len(defaults) > 10 and set(defaults.values()) == {True}, defaults


def test_a_bar_that_is_not_shown_is_silent_and_counts(capsys: pytest.CaptureFixture[str]) -> None:
    with bar("sweep", 4, "cell", show=False) as shown:
        shown.update(3)
    captured = capsys.readouterr()
    assert captured.err == captured.out == ""


def test_where_nobody_said_a_bar_is_for_terminals_only(capsys: pytest.CaptureFixture[str]) -> None:
    with bar("checking", 2, "check", None) as shown:
        shown.update(2)
    assert capsys.readouterr().err == ""
