"""The options of all commands: one text for one option, and a default that is said."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import typer

from nnsplice.cli import app

#: Options that mean the same in every command that has them.
SHARED = (
    "--device",
    "--dtype",
    "--json",
    "--max-tokens",
    "--no-cache",
    "--operator",
    "--prompt",
    "--vector",
    "--where",
)


def _options(command: Any, name: str = "nnsplice") -> Iterator[tuple[str, Any]]:
    for word, inner in getattr(command, "commands", {}).items():
        yield from _options(inner, f"{name} {word}")
    if not hasattr(command, "commands"):
        yield from ((name, one) for one in command.params if one.param_type_name == "option")


OPTIONS = list(_options(typer.main.get_command(app)))


def test_options_are_found() -> None:
    assert len(OPTIONS) > 100 and {"nnsplice lens logit", "nnsplice check"} <= {name for name, _ in OPTIONS}


@pytest.mark.parametrize("option", SHARED)
def test_a_shared_option_has_one_text(option: str) -> None:
    # `convert` casts with --dtype, which is another question than the type that a model is loaded with.
    texts = {one.help for name, one in OPTIONS if option in one.opts and name != "nnsplice convert"}
    assert len(texts) == 1


def test_every_option_says_its_form_and_default() -> None:
    silent = [
        (name, one.opts[0])
        for name, one in OPTIONS
        if not one.help
        or not (one.required or one.is_flag or one.default is not None or "Default: " in one.help)
        or not (one.is_flag or one.metavar or one.opts[0] == "--tower")  # a choice, whose names are its form
    ]
    # Either --evals, or --positive and --negative.
    assert [pair for pair in silent if pair[1] not in ("--evals", "--positive", "--negative")] == []
