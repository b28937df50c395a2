"""What a capture can be combined with: numbers as factors, captures of the same sites; the rest is refused by name."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import nnsplice as ns
from activations.captures import hand, same
from nnsplice.errors import BadType, DuplicatePath, KeyMismatch, ShapeError

KEY = "layers[0].output[0]"

# -------------------------------------------------------------------------------------------------------- other types

BINARY = (operator.add, operator.sub, operator.mul, operator.truediv, operator.or_, operator.matmul, operator.pow)
OTHERS: tuple[Any, ...] = (
    "text",
    None,
    [1.0],
    {KEY: 1},
    2j,
    True,
    torch.ones(2, 4),
    torch.tensor(2.0),
    np.ones(3),
    np.array(2.0),
    object(),
)


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: type(other).__name__)
@pytest.mark.parametrize("operation", BINARY, ids=lambda operation: operation.__name__)
def test_other_types_are_not_implemented_on_either_side(operation: Callable[[Any, Any], Any], other: Any) -> None:
    a = hand(KEY)
    for left, right in ((a, other), (other, a)):
        with pytest.raises(TypeError):
            operation(left, right)
    name = f"__{operation.__name__.strip('_')}__"
    if hasattr(a, name):
        assert getattr(a, name)(other) is NotImplemented


@pytest.mark.parametrize("operation", [operator.add, operator.sub, operator.or_])
def test_a_number_is_only_a_factor_or_a_divisor(operation: Callable[[Any, Any], Any]) -> None:
    for left, right in ((hand(KEY), 1), (1, hand(KEY))):
        with pytest.raises(TypeError):
            operation(left, right)
    with pytest.raises(TypeError):
        2 / hand(KEY)  # type: ignore[operator]
    with pytest.raises(TypeError):
        hand(KEY) * hand(KEY)  # type: ignore[operator]


@pytest.mark.parametrize("factor", [2, 0.5, np.float32(0.5), np.float64(0.5), np.int64(3)])
def test_numbers_of_python_and_numpy_scale_from_both_sides(factor: Any) -> None:
    a = hand(KEY, dtype=torch.float32)
    for made in (a * factor, factor * a):
        assert isinstance(made, ns.SavedActivation)
        assert torch.equal(made[KEY], a[KEY] * float(factor)) and made[KEY].dtype == torch.float32
    assert torch.equal((a / factor)[KEY], a[KEY] / float(factor))


def test_the_other_type_may_know_better() -> None:
    class Other:
        def __radd__(self, left: object) -> str:
            return "mine"

    assert hand(KEY) + Other() == "mine"  # type: ignore[operator]


@pytest.mark.parametrize("method", ["union", "dot", "cosine", "project_out", "allclose"])
def test_methods_name_the_type_they_cannot_take(method: str) -> None:
    with pytest.raises(BadType, match="dict is no capture"):
        getattr(hand(KEY), method)({KEY: torch.zeros(2, 4)})


# ------------------------------------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize("operation", [operator.add, operator.sub, ns.SavedActivation.dot, ns.SavedActivation.allclose])
def test_captures_of_different_places_say_which_differ(operation: Callable[[Any, Any], Any]) -> None:
    a, b = hand(KEY, "layers[1].output[0]"), hand(KEY, "layers[2].output[0]", "layers[0].output[-1]")
    with pytest.raises(ValueError) as raised:
        operation(a, b)
    assert isinstance(raised.value, KeyMismatch)
    lines = str(raised.value).splitlines()
    assert "  only in the left: layers[1].output[0]" in lines
    assert "  only in the right: layers[0].output[-1], layers[2].output[0]" in lines
    shared = [key for key in a if key in b]  # what the message says to write
    assert (a.subset(shared) - b.subset(shared)).keys() == [KEY]


def test_many_different_places_are_cut_short() -> None:
    with pytest.raises(KeyMismatch) as raised:
        _ = hand(*(f"layers[{n}].output[0]" for n in range(20))) + ns.SavedActivation()
    assert "layers[4].output[0], ..." in str(raised.value) and "layers[5]" not in str(raised.value)


def test_rows_and_widths_have_to_fit() -> None:
    with pytest.raises(ShapeError, match="one capture has 2 rows, the other 3"):
        _ = hand(KEY) - hand(KEY, rows=3)
    for width in (1, 3):  # one column would be broadcast over all the others
        with pytest.raises(ShapeError, match=rf"4 wide here, the other {width}[\s\S]*layers\[0\]\.output"):
            _ = hand(KEY) - hand(KEY, width=width)
    with pytest.raises(ShapeError, match="4 wide here, the other 1"):
        hand(KEY).project_out(hand(KEY, width=1))


def test_a_union_of_the_same_places_lists_them() -> None:
    a, b = hand(KEY, "layers[1].output[0]"), hand("layers[2].output[0]", "layers[1].output[0]")
    with pytest.raises(DuplicatePath, match=r"1 path in both captures: layers\[1\]\.output\[0\]\n"):
        _ = a | b
    many = hand(*(f"layers[{n}].output[0]" for n in range(9)))
    with pytest.raises(ValueError, match=r"9 paths in both captures: .*layers\[4\]\.output\[0\], \.\.\.\n"):
        many.union(many)


def test_a_union_is_of_the_same_prompts() -> None:
    with pytest.raises(ShapeError, match="2 rows, the other 1"):
        _ = hand(KEY) | hand("layers[1].output[0]", rows=1)
    with pytest.raises(ShapeError, match=r"widths \[4, 5\]"):
        _ = hand(KEY) | hand("layers[0].output[1]", width=5)


def test_a_union_brings_positions_of_one_place_together() -> None:
    a, b = hand("layers[0].output[2]", "layers[1].output[0]"), hand("layers[0].output[0]", "embed.output[0]")
    assert (a | b).keys() == ["layers[0].output[2]", "layers[0].output[0]", "layers[1].output[0]", "embed.output[0]"]
    assert (a | b)["layers[0].output[0,2]"].shape == (2, 2, 4)


def test_a_union_loses_no_precision() -> None:
    a, b = hand(KEY, dtype=torch.bfloat16), hand("layers[0].output[1]", "layers[1].output[0]") / 3
    both = a | b
    assert same(both.subset(b.keys()), b)
    assert torch.equal(both[KEY], a[KEY].double())
    assert (b | a)["layers[1].output[0]"].dtype == torch.float64


def test_a_ranked_capture_and_one_by_hand_meet_in_every_spelling(model) -> None:
    saved = ns.capture(model, "w3 w4 w5", ["layers[:].output[0]"])
    native = ns.SavedActivation.from_pairs(
        *((f"model.transformer.h[{n}].output[0]", torch.ones(1, 16)) for n in (2, 0, -2))
    )
    for made in (saved - native, -(native - saved)):
        assert all(torch.equal(made[key], saved[key] - 1) for key in saved)
    with pytest.raises(DuplicatePath, match=r"model\.transformer\.h\[2\]\.output\[0\]"):
        _ = saved | native
    last = ns.SavedActivation.from_pairs(("model.transformer.h[1].output[2]", torch.ones(1, 16)))
    for both in (saved | last, last | saved):
        assert both.keys() == [
            "layers[0].output[0]",
            "layers[1].output[0]",
            "model.transformer.h[1].output[2]",
            "layers[2].output[0]",
        ]
        assert both["layers[1].output[:]"].shape == (1, 2, 16)
        assert "layers[-2].output[2]" in both
