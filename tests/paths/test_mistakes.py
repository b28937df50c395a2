"""Each common mistake gets its own answer, and what an answer suggests is a path."""

from __future__ import annotations

import pytest

from nnsplice import errors
from nnsplice.paths import parse_path, reads
from nnsplice.paths.mistake import Mistake
from nnsplice.paths.mistakes import MISTAKES, find

SAMPLES = [pytest.param(row, sample, id=sample) for row in MISTAKES for sample in row.samples]


def message(text: str) -> str:
    with pytest.raises(errors.PathError) as caught:
        parse_path(text)
    return str(caught.value)


def written(text: str) -> list[str]:
    """The lines that the error for a text says to write."""
    found = [line.removeprefix("  write: ") for line in message(text).splitlines() if line.startswith("  write: ")]
    return [line for one in found for line in one.split(" or ")]


@pytest.mark.parametrize(("row", "sample"), SAMPLES)
def test_a_sample_is_answered_by_its_own_row(row: Mistake, sample: str) -> None:
    found = find(sample)
    assert found is not None
    assert found[0] is row
    assert message(sample).splitlines()[0] == row.message.format_map(found[1].groupdict(""))
    with pytest.raises(row.kind):
        parse_path(sample)


@pytest.mark.parametrize(("row", "sample"), SAMPLES)
def test_what_a_row_says_to_write_is_a_path(row: Mistake, sample: str) -> None:
    lines = written(sample)
    assert bool(lines) == (row.write is not None)
    assert all(map(reads, lines))


@pytest.mark.parametrize(("row", "sample"), SAMPLES)
def test_the_caret_stands_under_the_text(row: Mistake, sample: str) -> None:
    _, shown, caret, *_ = message(sample).splitlines()
    assert shown == f"    {sample}"
    assert caret.strip() == "^"
    assert 4 <= caret.index("^") <= 4 + len(sample)


def test_every_row_has_a_sample_and_a_message_of_its_own() -> None:
    assert all(row.samples for row in MISTAKES)
    assert len({row.message for row in MISTAKES}) == len(MISTAKES)


@pytest.mark.parametrize(
    ("text", "suggestion"),
    [
        ("model.h.3.output", "model.h[3].output"),
        ("model.transformer.h[2][10]", "model.transformer.h[2].output[10]"),
        ("model.lm_head.inputs", "model.lm_head.input"),
        ("model.transformer.wte.weight[3]", "model.transformer.wte.weight"),
        ("layers[5].attn.o.heads[3]", "layers[5].heads[3].output"),
        ("layers[5].heads", "layers[5].heads[:]"),
        ("layer[5].output", "layers[5].output"),
        ("layers[5].head[0].q", "layers[5].heads[0].q"),
        ("layers[5].output[0][-1]", "layers[5].output[-1]"),
        # two and three mistakes in one text
        ("blocks.5.attn", "layers[5].attn"),
        ("layer.5.self_attn.q_proj", "layers[5].attn.q"),
        ("transformer.h.2.mlp.0[-1]", "model.transformer.h[2].mlp[0].output[-1]"),
        # no row, but a close name
        ("layesr[5].output", "layers[5].output"),
        ("layers[5].outputs[-1]", "layers[5].output[-1]"),
    ],
)
def test_a_wrong_text_is_answered_with_the_line_to_write(text: str, suggestion: str) -> None:
    assert written(text) == [suggestion]


@pytest.mark.parametrize(
    ("text", "found", "expected", "column"),
    [
        ("layers[5]/attn", "/ cannot stand here", "a dot and a name", 9),
        ("layers[5].atn", "atn is not known here", "attn", 10),
        ("model.x y", "y cannot stand here", "the end of the path", 8),
        ("l5 h3 g0", "g0 cannot stand here", "the end of the path", 6),
        ("layers[5].output[+1]", "+ cannot stand here", "a number", 17),
        ("layers[5].output[1 2]", "2 cannot stand here", "a comma", 19),
        ("foo", "foo is not known here", "layers", 0),
    ],
)
def test_a_mistake_without_a_row_names_what_was_found_and_expected(
    text: str, found: str, expected: str, column: int
) -> None:
    first, shown, caret, wanted, *_ = message(text).splitlines()
    assert first == found
    assert shown == f"    {text}"
    assert caret == "    " + " " * column + "^"
    assert wanted.startswith("  expected: ")
    assert expected in wanted


@pytest.mark.parametrize(
    "text", ["foo", "layers[5].o[", "layers[", "model.", "l5h3h4", "layers[5].output[1,,2]", "x" * 2000]
)
def test_no_name_of_the_grammar_and_no_inner_error_reaches_the_user(text: str) -> None:
    with pytest.raises(errors.PathError) as caught:
        parse_path(text)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    for name in ("LSQB", "$END", "SHORT_LAYER", "QKVO", "Token", "lark"):
        assert name not in str(caught.value)


@pytest.mark.parametrize("text", ["", "  ", "\n"])
def test_an_empty_text_is_no_path(text: str) -> None:
    assert "an empty text is no path" in message(text)
