"""`nnsplice mask`, as a shell sees it."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

import nnsplice as ns
from nnsplice.cli import app


def run(*arguments: str, code: int = 0) -> tuple[str, str]:
    result = CliRunner().invoke(app, ["mask", *arguments])
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


def test_a_tree_of_what_belongs_to_a_place() -> None:
    out, error = run("toy", "l1h0")
    assert out.splitlines() == [
        "transformer.h.1.attn",
        "├── c_attn",
        "│   ├── weight     ██████░░░░░░░░░░░░░░░░░░   25.0%  (3,072 of 12,288)",
        "│   └── bias       ██████░░░░░░░░░░░░░░░░░░   25.0%  (48 of 192)",
        "└── c_proj.weight  ██████░░░░░░░░░░░░░░░░░░   25.0%  (1,024 of 4,096)",
        "3 parameters  (4,144 of 16,576)",
    ]
    assert error == ""


@pytest.mark.parametrize("places", [["l1h0"], ["l1 mlp", "l2h3"], ["layers[0:3].attn.q"], ["full"]])
def test_plain_names_are_those_of_the_masks(places: list[str]) -> None:
    masks = ns.weights.create_param_masks(ns.load("toy-llama"), places if len(places) > 1 else places[0])
    out, _ = run("toy-llama", *places, "--plain")
    assert sorted(out.splitlines()) == sorted(masks)


def test_a_warning_is_a_line_of_its_own() -> None:
    out, error = run("toy", "unembed", "--plain")
    assert out == "transformer.wte.weight\n" and error.startswith("'unembed' is tied") and "weights.py" not in error


@pytest.mark.parametrize(
    ("place", "said"),
    [("l1 mpl", "Unknown restriction 'l1 mpl'"), ("l9h0", "out of range"), ("l0h9", "layer 0 has 4")],
)
def test_a_mistake_is_answered_without_a_traceback(place: str, said: str) -> None:
    out, error = run("toy", place, code=1)
    assert out == "" and said in error and "Traceback" not in error


def test_a_place_is_needed() -> None:
    assert "PLACE" in run("toy", code=2)[1]


def test_two_forms_of_output_are_one_too_many() -> None:
    assert "--plain or --json" in run("toy", "l1h0", "--plain", "--json", code=2)[1]
