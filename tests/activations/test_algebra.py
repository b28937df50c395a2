"""Captures are added, scaled, averaged and projected entry by entry, as torch would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nnsplice as ns
from activations.captures import captures, hand, keys, pairs_of_captures, random_tensor, same
from nnsplice.errors import BadArgument, ShapeError, UnknownPath

KEY = "layers[0].output[0]"
factors = st.floats(-1e3, 1e3).filter(lambda x: abs(x) > 1e-3)

# ---------------------------------------------------------------------------------------------------------------- laws


@given(pairs_of_captures())
def test_what_is_added_can_be_taken_away(pair: tuple[ns.SavedActivation, ns.SavedActivation]) -> None:
    a, b = pair
    assert (a + b - b).allclose(a, atol=1e-12)
    assert (a + b).allclose(b + a)
    assert (a - b).allclose(-(b - a))
    assert not (a + b).allclose(a)


@given(captures(), factors)
def test_scaling_is_undone_by_dividing(a: ns.SavedActivation, factor: float) -> None:
    assert (a * factor / factor).allclose(a, rtol=1e-12)
    assert same(factor * a, a * factor)
    negative = -a
    assert same(-negative, a) and same(negative, a * -1.0)


@given(pairs_of_captures(), factors)
def test_the_mean_is_linear_and_keeps_one_row(pair: tuple[ns.SavedActivation, ns.SavedActivation], k: float) -> None:
    a, b = pair
    assert (a * k + b).mean().allclose(a.mean() * k + b.mean(), atol=1e-9)
    assert a.mean().rows == 1
    assert all(torch.equal(a.mean()[key], a[key].mean(0, keepdim=True)) for key in a)


@given(captures(rows=3), st.data())
def test_one_row_serves_every_prompt_on_either_side(a: ns.SavedActivation, data: st.DataObject) -> None:
    one = data.draw(captures(1, a.keys()))
    for made, key in ((made, key) for made in (a - one, -(one - a)) for key in a):
        assert torch.equal(made[key], a[key] - one[key]), key
    assert (a - one).rows == (one - a).rows == 3


@given(pairs_of_captures())
def test_the_keys_of_the_left_one_give_the_order(pair: tuple[ns.SavedActivation, ns.SavedActivation]) -> None:
    a, b = pair
    assert (a + b).keys() == a.keys()
    assert all(torch.equal((a + b)[key], a[key] + b[key]) for key in a)


@given(captures(), st.data())
def test_a_capture_falls_into_parts_and_is_put_together_again(a: ns.SavedActivation, data: st.DataObject) -> None:
    part = data.draw(st.lists(st.sampled_from(a.keys()), unique=True))
    rest = [key for key in a if key not in part]
    first, second = a.subset(part), a.subset(rest)
    assert first.keys() == [key for key in a if key in part]  # the capture's own order, not that of the list
    assert same(first | second, a) and same(second.union(first), a)


@given(captures(), st.data())
def test_a_repeated_path_is_taken_once(a: ns.SavedActivation, data: st.DataObject) -> None:
    wanted = data.draw(st.lists(st.sampled_from(a.keys()), min_size=1))
    assert set(a.subset(wanted)) == set(wanted) and len(a.subset(wanted)) == len(set(wanted))


@given(captures())
def test_nothing_changes_the_capture_it_is_asked_of(a: ns.SavedActivation) -> None:
    before = {key: tensor.clone() for key, tensor in a.items()}
    for made in (a + a, a - a, -a, a * 2, a / 2, a.mean(), a.mean("position"), a.clone(), a.project_out(a * 2)):
        for _, tensor in made.items():
            tensor.zero_()
    assert all(torch.equal(a[key], tensor) for key, tensor in before.items())


# ------------------------------------------------------------------------------------------------- against plain torch


@given(pairs_of_captures())
def test_norm_dot_cosine_and_projection_are_those_of_torch(
    pair: tuple[ns.SavedActivation, ns.SavedActivation],
) -> None:
    a, b = pair
    norm, dot, cosine, rest = a.norm(), a.dot(b), a.cosine(b), a.project_out(b)
    for key, x in a.items():
        y = b[key]
        assert norm[key].shape == dot[key].shape == cosine[key].shape == (a.rows,)
        assert torch.allclose(norm[key], torch.linalg.vector_norm(x, dim=-1))
        assert torch.allclose(dot[key], torch.einsum("rw,rw->r", x, y))
        assert torch.allclose(cosine[key], torch.cosine_similarity(x, y))
        onto = torch.stack([torch.outer(v, v) @ u / (v @ v) for u, v in zip(x, y, strict=True)])
        assert torch.allclose(rest[key], x - onto)
    assert list(norm) == list(dot) == list(cosine) == a.keys()


@given(captures(rows=3), st.data())
def test_nothing_is_left_along_a_direction_that_was_taken_out(a: ns.SavedActivation, data: st.DataObject) -> None:
    direction = data.draw(captures(1, a.keys()))
    rest = a.project_out(direction)
    assert all(tensor.abs().max() < 1e-9 for tensor in rest.dot(direction).values())
    assert rest.project_out(direction).allclose(rest, atol=1e-9)
    assert rest.allclose(a.project_out(direction * -7.0), atol=1e-9)


def test_a_direction_of_zero_length_shows_as_nan() -> None:
    a, zero = hand(KEY), hand(KEY, rows=1) * 0
    assert a.project_out(zero)[KEY].isnan().all() and a.cosine(zero)[KEY].isnan().all()


def test_half_precision_does_not_overflow_on_the_way() -> None:
    a = hand(KEY, rows=1, dtype=torch.float16) * 100
    assert a.dot(a)[KEY].isinf()  # what the numbers of this dtype cannot hold
    assert a.cosine(a)[KEY].item() == pytest.approx(1, abs=2e-3)
    assert a.project_out(a)[KEY].abs().max() < 1
    assert a.project_out(hand(KEY, rows=1))[KEY].dtype == torch.float16


@given(keys().filter(lambda chosen: len(chosen) > 1), st.integers(1, 3))
def test_the_mean_over_positions_leaves_one_entry_for_each_site(chosen: list[str], rows: int) -> None:
    a = ns.SavedActivation.from_pairs(*((key, random_tensor(rows, 4, n)) for n, key in enumerate(chosen)))
    mean = a.mean("position")
    places = list(dict.fromkeys(str(ns.parse_path(key).place) for key in a))
    assert mean.keys() == [f'{place}["mean"]' for place in places]
    for place in places:
        assert torch.allclose(mean[f'{place}["mean"]'], a[f"{place}[:]"].mean(1))
    assert mean.rows == rows and same(mean.mean("position"), mean)


def test_a_mean_over_anything_else_is_refused() -> None:
    with pytest.raises(BadArgument, match='"prompt" or "position"'):
        hand(KEY).mean("row")


def test_a_mean_of_integers_is_refused_as_torch_does() -> None:
    counts = hand(KEY).map(torch.Tensor.long)
    with pytest.raises(RuntimeError, match="floating point"):
        counts.mean()
    assert torch.equal(counts.to(torch.float64).mean()[KEY], hand(KEY).mean()[KEY])


def test_map_is_called_once_for_each_site_with_all_its_positions() -> None:
    seen: list[tuple[int, ...]] = []

    def relu(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(tensor.shape))
        return tensor.relu()

    made = hand("layers[0].output[0]", "layers[1].output[3]", "layers[0].output[1]").map(relu)
    assert seen == [(2, 2, 4), (2, 1, 4)]
    assert made.keys() == ["layers[0].output[0]", "layers[0].output[1]", "layers[1].output[3]"]


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda tensor: None, r"made a NoneType of \[2, 1, 4\]"),
        (lambda tensor: tensor[:, 0], r"made shape \[2, 4\]"),
        (lambda tensor: tensor.repeat(1, 2, 1), r"made shape \[2, 2, 4\]"),
        (lambda tensor: tensor[: 1 + (tensor.max() > 100)], "2 rows here and 1 of the sites before"),
    ],
)
def test_what_map_makes_has_to_be_a_capture_again(fn: Callable[[torch.Tensor], Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        hand(KEY, "layers[1].output[0]").map(fn)


def test_map_may_change_the_width() -> None:
    assert hand(KEY).map(lambda tensor: tensor[..., :2])[KEY].shape == (2, 2)


# --------------------------------------------------------------------------------------------------------------- stack


def test_a_stack_is_in_the_order_of_the_layers() -> None:
    a = hand(*(f"layers[{n}].mlp.output[-1]" for n in (2, 0, 10)))
    expected = torch.stack([a[f"layers[{n}].mlp.output[-1]"] for n in (0, 2, 10)])
    assert torch.equal(a.stack(), expected) and torch.equal(a.stack("layers"), expected)
    several = hand("layers[1].output[0]", "layers[1].output[1]", "layers[0].output[0]", "layers[0].output[1]")
    assert several.stack("layer").shape == (2, 2, 2, 4)
    assert torch.equal(several.stack("layer")[1, :, 0], several["layers[1].output[0]"])


def test_a_stack_goes_along_heads_and_along_native_indices() -> None:
    heads = hand(*(f"layers[3].heads[{n}].output[-1]" for n in range(3)))
    assert heads.stack("head").shape == (3, 2, 4)
    assert hand(*(f"model.transformer.h[{n}].output[-1]" for n in range(3))).stack("h").shape == (3, 2, 4)


@pytest.mark.parametrize(
    ("chosen", "axis", "message"),
    [
        ((), "layer", "empty"),
        (("embed.output[0]",), "layer", "expected: an axis of the keys: none"),
        (("layers[0].heads[1].output[0]",), "group", "an axis of the keys: layer, head"),
        (("layers[0].output[0]", "layers[0].mlp.output[0]"), "layer", r"2 kinds of site[\s\S]*subset"),
        (("layers[0].heads[1].output[0]", "layers[0].heads[2].output[0]"), "layer", "2 kinds of site"),
        (("layers[0].output[0]", "layers[1].output[0]", "layers[1].output[1]"), "layer", "different shape"),
        (("layers[0].output[0]", "layers[1].output[1]"), "layer", "different positions"),
    ],
)
def test_what_cannot_be_stacked_says_why(chosen: tuple[str, ...], axis: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hand(*chosen).stack(axis)


# ------------------------------------------------------------------------------------------------------ as torch does


@given(pairs_of_captures())
def test_allclose_compares_all_values_in_any_order(pair: tuple[ns.SavedActivation, ns.SavedActivation]) -> None:
    a, b = pair
    reordered = ns.SavedActivation.from_pairs(*reversed(a.items()))
    assert a.allclose(reordered) and reordered.allclose(a)
    assert a.allclose(b, atol=1e9)
    assert not a.allclose(a + b * 1e-3)


def test_allclose_is_the_same_from_both_sides() -> None:
    a = hand(KEY) / 3
    for other, close in ((a.to(torch.bfloat16), False), (a.to(torch.float32), True), (a.slice[0], False)):
        assert a.allclose(other) is other.allclose(a) is close
    nan = a * float("nan")
    assert not nan.allclose(nan) and nan.allclose(nan, equal_nan=True)


def test_to_moves_every_entry() -> None:
    a = hand(KEY, "layers[1].output[0]").to(torch.bfloat16)
    assert {tensor.dtype for _, tensor in a.items()} == {torch.bfloat16}
    assert {tensor.device.type for _, tensor in a.to("meta").items()} == {"meta"}
    assert a.to(torch.device("cpu")).keys() == a.keys()


def test_a_clone_has_memory_of_its_own() -> None:
    a = hand(KEY)
    own = a.clone()
    a[KEY].zero_()
    assert own[KEY].all()


def test_values_that_keep_the_graph_keep_it_through_the_algebra(model) -> None:
    saved = ns.capture(model, ["w3 w4 w5", "w6 w7 w8"], "layers[0:2].output[0:2]", keep_graph=True)
    other = saved.clone().detach()
    weight = model._module.transformer.wte.weight
    made = ((saved - other) * 2 + saved / 3).slice[0:1].subset("layers[1].output").mean("position")
    (gradient,) = torch.autograd.grad(made['layers[1].output["mean"]'].sum(), weight, retain_graph=True)
    assert gradient.abs().sum() > 0
    for part in (saved.norm(), saved.dot(other), saved.cosine(other)):
        assert all(tensor.requires_grad for tensor in part.values())
    both = saved.subset("layers[0].output") | saved.subset("layers[1].output")
    assert all(tensor.requires_grad for _, tensor in both.project_out(other).items())
    assert not any(tensor.requires_grad for _, tensor in saved.detach().items())


def test_entries_by_hand_keep_their_graph() -> None:
    leaf = torch.ones(1, 4, requires_grad=True)
    (ns.SavedActivation.from_pairs((KEY, leaf)) * 3.0).stack().sum().backward()
    assert torch.equal(leaf.grad, torch.full((1, 4), 3.0))  # type: ignore[arg-type]


def test_saving_outside_a_trace_returns_the_capture() -> None:
    a = hand(KEY)
    assert a.save() is a
    with pytest.raises(UnknownPath):
        a.subset("layers[9].output[0]")


def test_equal_are_captures_of_the_same_values() -> None:
    a = hand(KEY, "layers[1].output[0]")
    turned = ns.SavedActivation.from_pairs(*reversed(a.items()))
    assert a == a.clone() and a == turned
    assert a != a + a and a != a.subset(KEY) and a != a.slice[0] and a != hand(KEY, "layers[1].output[1]")
    assert a == a.to(torch.float32)  # whole numbers, which both dtypes hold exactly
    tiny = a.map(lambda tensor: tensor + 1e-12)
    assert a != tiny and a.allclose(tiny)
    assert (a == "a capture") is False and a != dict(a.items())
    with pytest.raises(TypeError, match="unhashable"):
        hash(a)
    assert hand(KEY).map(lambda tensor: tensor * torch.nan) != hand(KEY).map(lambda tensor: tensor * torch.nan)
