"""The contents page: what a user meets first is there, explained and shown, and nothing else is."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from types import GenericAlias

import pytest

import nnsplice as ns
from nnsplice.checkpoints.mapper import long_names

#: The rooms that a user enters.
ROOMS = (
    "adapters",
    "atlas",
    "checkpoints",
    "checks",
    "errors",
    "lens",
    "models",
    "plots",
    "steering",
    "tasks",
    "weights",
)
#: A disk that is full, a process that dies and a package that is gone are not to be had in an example.
NOT_SHOWN = {"MissingPackage", "TeamError", "WriteFailed"}

pages = pytest.mark.parametrize("page", ["nnsplice", *(f"nnsplice.{room}" for room in ROOMS)])


def names_of(page: str) -> list[str]:
    return importlib.import_module(page).__all__


def docstrings_of(page: str) -> dict[str, str]:
    """What each public function, class and room of a page says; a type alias has only what it stands for."""
    values = {name: getattr(importlib.import_module(page), name) for name in names_of(page)}
    return {
        name: inspect.getdoc(value) or ""
        for name, value in values.items()
        if inspect.ismodule(value) or (callable(value) and not isinstance(value, GenericAlias))
    }


@pages
def test_every_public_name_says_what_it_is(page: str) -> None:
    assert [name for name, text in docstrings_of(page).items() if len(text.split("\n")[0]) <= 10] == []


@pages
def test_every_public_name_is_shown_at_work(page: str) -> None:
    module = importlib.import_module(page)
    shown = {
        name: text
        for name, text in docstrings_of(page).items()
        if name not in NOT_SHOWN and not inspect.ismodule(getattr(module, name))
    }
    assert shown
    assert [name for name, text in shown.items() if ">>>" not in text] == []


@pages
def test_completion_shows_the_contents_and_no_more(page: str) -> None:
    names = names_of(page)
    assert dir(importlib.import_module(page)) == sorted(names)
    assert len(set(names)) == len(names)


def test_a_name_that_the_contents_do_not_have_is_an_error_as_in_any_module() -> None:
    assert not hasattr(ns, "sweeep")
    with pytest.raises(ImportError, match="sweeep"):
        exec("from nnsplice import sweeep")


def test_the_version_is_that_of_the_package() -> None:
    from importlib.metadata import version

    assert ns.__version__ == version("nnsplice")


def test_the_help_is_shown_without_the_libraries_that_take_seconds_to_import() -> None:
    heavy = ("torch", "nnsight", "transformers", "numpy", "pandas", "xarray", "matplotlib")
    code = f"""
import sys
from nnsplice.cli import app
try:
    app(["trace", "--help"])
except SystemExit:
    pass
print([name for name in {heavy} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--sites" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_rooms_behind_the_contents_are_not_offered() -> None:
    assert not {"engine", "cli"} & set(dir(ns))


def test_mappers_can_be_imported_by_their_long_names_and_are_listed_by_the_short_ones() -> None:
    room, names = ns.checkpoints, long_names.__all__
    assert len(names) == 28
    for name in names:
        assert getattr(room, name) is getattr(room, name.removeprefix("ModelStateMapper"))
        assert name not in dir(room)
        assert name.removeprefix("ModelStateMapper") in room.__all__
