"""The contents page: what a user meets first is there, explained, and nothing else is."""

from __future__ import annotations

import inspect

import pytest

import nnsplice as ns

ROOMS = ("adapters", "checkpoints", "models", "steering", "weights")


@pytest.mark.parametrize("name", ns.__all__)
def test_every_public_name_is_shown_at_work(name: str) -> None:
    value = getattr(ns, name)
    text = inspect.getdoc(value) or ""
    assert len(text.splitlines()[0]) > 10
    assert inspect.ismodule(value) or ">>>" in text


def test_completion_shows_the_contents_and_no_more() -> None:
    assert dir(ns) == sorted(ns.__all__)
    assert "engine" not in dir(ns)


@pytest.mark.parametrize("room", ROOMS)
def test_every_name_of_a_room_says_what_it_is(room: str) -> None:
    module = getattr(ns, room)
    names = [name for name in getattr(module, "__all__", dir(module)) if not name.startswith("_")]
    told = [name for name in names if not inspect.ismodule(getattr(module, name))]
    assert told
    for name in told:
        value = getattr(module, name)
        assert not callable(value) or inspect.getdoc(value), name
        assert name in vars(module)
