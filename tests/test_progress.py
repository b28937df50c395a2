"""The bar of long work."""

from __future__ import annotations

import pytest

from nnsplice.progress import bar


def test_a_bar_shows_what_is_done_and_of_how_much(capsys: pytest.CaptureFixture[str]) -> None:
    with bar("sweep", 4, "cell", done=1) as shown:
        shown.update(3)
    told = capsys.readouterr().err
    assert "sweep" in told and "4/4" in told and "cell" in told


def test_a_bar_that_is_not_shown_is_silent_and_counts(capsys: pytest.CaptureFixture[str]) -> None:
    with bar("sweep", 4, "cell", show=False) as shown:
        shown.update(3)
    captured = capsys.readouterr()
    assert captured.err == captured.out == ""


def test_where_nobody_said_a_bar_is_for_terminals_only(capsys: pytest.CaptureFixture[str]) -> None:
    with bar("checking", 2, "check", None) as shown:
        shown.update(2)
    assert capsys.readouterr().err == ""
