"""What each operator does to a state, as laws that need no second implementation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nnsplice as ns
from nnsplice.steering.operators import OPERATORS, rotation
from steering.vectors import PROMPTS, ids, precise, vector

numbers = st.floats(-4, 4).filter(lambda c: abs(c) > 1e-3)
seeds = st.integers(0, 10_000)


def drawn(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States, a vector and its direction."""
    source = torch.Generator().manual_seed(seed)
    h = torch.randn(3, 4, 6, dtype=torch.float64, generator=source)
    v = torch.randn(1, 1, 6, dtype=torch.float64, generator=source) * 3
    return h, v, v / v.norm()


def along(h: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    return (h * u).sum(-1)


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@given(seeds, numbers)
def test_every_operator_leaves_what_is_across_the_vector_in_its_direction(seed: int, c: float) -> None:
    """A change within the plane of state and vector: what is orthogonal to the vector keeps its direction."""
    h, v, u = drawn(seed)
    across = h - along(h, u)[..., None] * u
    for name, operator in OPERATORS.items():
        new = operator(h, v, c)
        rest = new - along(new, u)[..., None] * u
        if name in ("add", "project_out", "clamp"):
            close(rest, across)
        else:
            cosine = torch.nn.functional.cosine_similarity(rest, across, dim=-1)
            close(cosine.abs(), torch.ones_like(cosine))


@given(seeds, numbers)
def test_add_project_out_and_clamp_along_the_vector(seed: int, c: float) -> None:
    h, v, u = drawn(seed)
    length = v.norm().item()
    close(along(OPERATORS["add"](h, v, c), u), along(h, u) + c * length)
    close(along(OPERATORS["project_out"](h, v, c), u), (1 - c) * along(h, u))
    close(along(OPERATORS["clamp"](h, v, c), u), torch.full((3, 4), c * length, dtype=torch.float64))
    # Whatever the vector's length, all of it goes; and what is out stays out.
    once = OPERATORS["project_out"](h, v, 1.0)
    close(OPERATORS["project_out"](once, 7 * v, 1.0), once)


@given(seeds, numbers)
def test_scale_and_rotate_keep_the_norm(seed: int, c: float) -> None:
    h, v, u = drawn(seed)
    for name in ("scale", "rotate"):
        close(OPERATORS[name](h, v, c).norm(dim=-1), h.norm(dim=-1))
    added = h + c * v
    cosine = torch.nn.functional.cosine_similarity(OPERATORS["scale"](h, v, c), added, dim=-1)
    close(cosine, torch.ones_like(cosine))
    turned = OPERATORS["rotate"](h, v, c)
    cosine = torch.nn.functional.cosine_similarity(turned, h, dim=-1)
    close(cosine, torch.full_like(cosine, math.cos(c)))
    right = OPERATORS["rotate"](h, v, math.acos(torch.nn.functional.cosine_similarity(h[:1, :1], u, dim=-1).item()))
    close(right[0, 0], h[0, 0].norm() * u[0, 0])  # turned by the angle between them, a state lies on the vector


@given(seeds, numbers, numbers)
def test_turning_in_a_plane_is_a_rotation(seed: int, c: float, d: float) -> None:
    h, v, _ = drawn(seed)
    plane = drawn(seed + 1)[1][0, 0]
    rotate = rotation(plane)
    new = rotate(h, v, c)
    close(new.norm(dim=-1), h.norm(dim=-1))
    basis = torch.linalg.qr(torch.stack([v[0, 0], plane]).T)[0]
    close((new - h) - (new - h) @ basis @ basis.T, torch.zeros_like(h))  # nothing outside the plane
    close(rotate(new, v, d), rotate(h, v, c + d))
    close(rotate(v.expand(1, 1, 6), v, 0.1)[0, 0] @ v[0, 0], v.norm() ** 2 * math.cos(0.1))
    assert rotate(v, v, 0.1)[0, 0] @ plane > v[0, 0] @ plane or v[0, 0] @ plane > 0.99 * v.norm() * plane.norm()


def test_states_that_an_operator_has_no_answer_for_stay_and_are_never_nan() -> None:
    zero, v = torch.zeros(1, 1, 6, dtype=torch.float64), drawn(0)[1]
    for operator in OPERATORS.values():
        assert torch.isfinite(operator(zero, v, 1.0)).all() and torch.isfinite(operator(v, v, -1.0)).all()
    assert torch.equal(OPERATORS["rotate"](zero, v, 1.0), zero)
    assert torch.equal(OPERATORS["rotate"](v, v, 1.0), v)


def test_rows_have_coefficients_of_their_own() -> None:
    h, v, _ = drawn(0)
    each = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    for operator in (*OPERATORS.values(), rotation(drawn(1)[1][0, 0])):
        together = operator(h, v, each[:, None, None])
        for row, c in enumerate(each.tolist()):
            close(together[row], operator(h[row : row + 1], v, c)[0])


@pytest.mark.parametrize("name", [*OPERATORS, "plane", "own"])
def test_in_a_model_they_do_to_the_stream_what_they_do_to_states(name: str) -> None:
    model, direction = precise("llama"), vector(1)
    v = direction["layers[1].output[-1]"][None]
    other = vector(1, seed=5)
    options: dict[str, Any] = {"operator": name}
    operator: Any = OPERATORS.get(name)
    if name == "plane":
        options, operator = {"operator": "rotate", "plane": other}, rotation(other["layers[1].output[-1]"][0])
    if name == "own":
        operator = options["operator"] = lambda h, v, c: h * 0.5 + c * v.abs()
    before = ns.capture(model, PROMPTS[0], "layers[1].output[:]")
    states = torch.stack([before[key] for key in before], dim=1)
    with ns.steering.steer(model, direction, 0.7, where=ns.steering.from_token(2), **options):
        found = ns.capture(model, PROMPTS[0], "layers[1].output[:]")
    expected = torch.cat([states[:, :2], operator(states, v, 0.7)[:, 2:]], dim=1)
    torch.testing.assert_close(torch.stack([found[k] for k in found], dim=1), expected, rtol=0, atol=1e-12)


def test_half_precision_is_computed_in_full_and_rounded_once() -> None:
    from zoo import wrap

    model = wrap("llama")
    model._module.bfloat16()
    before = ns.capture(model, PROMPTS[0], "layers[1].output[-1]")["layers[1].output[-1]"]
    v = vector(1)["layers[1].output[-1]"].float()
    for name, operator in OPERATORS.items():
        with ns.steering.steer(model, vector(1), 0.7, operator=name, where=ns.steering.from_token(5)):
            found = ns.capture(model, PROMPTS[0], "layers[1].output[-1]")["layers[1].output[-1]"]
        if name != "add":
            assert torch.equal(found, operator(before.float()[None], v[None], 0.7)[0].bfloat16())


def test_a_function_of_the_users_is_what_it_does_whatever_it_is_called() -> None:
    def add(h: torch.Tensor, v: torch.Tensor, c: Any) -> torch.Tensor:
        return h + (c + 1) * v

    def rotate(h: torch.Tensor, v: torch.Tensor, c: Any) -> torch.Tensor:
        return h + 2 * c * v

    model, direction = precise(), vector(1)

    def logits(coefficient: float, operator: Any, **options: Any) -> torch.Tensor:
        with ns.steering.steer(model, direction, coefficient, operator=operator, **options), torch.no_grad():
            return model._module(torch.tensor(ids(model, PROMPTS[:1]))).logits

    close(logits(1.0, add), logits(2.0, "add"))
    metric = ns.logit_diff("w7", "w8")
    for operator, same in ((add, [1.0, 2.0]), (rotate, [0.0, 2.0])):
        found = ns.steering.sweep(model, PROMPTS, direction, [0.0, 1.0], metric, operator=operator, progress=False)
        expected = ns.steering.sweep(model, PROMPTS, direction, same, metric, progress=False)
        close(torch.tensor(found.values), torch.tensor(expected.values))
    with pytest.raises(ns.errors.BadArgument, match="turns nothing"):
        logits(1.0, rotate, plane=vector(1, seed=1))
    with pytest.raises(ns.errors.BadArgument, match="adds control vectors"):
        ns.steering.to_gguf(ns.steering.steer(model, direction, operator=add), "never.gguf")
