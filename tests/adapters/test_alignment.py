"""Cosine and subspace share against the large product, at every scale, type and orientation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nnsplice as ns
import zoo
from nnsplice.adapters import ExpertManifoldAligner, LoRAMatrices
from nnsplice.errors import BadArgument, ShapeError


@pytest.fixture(scope="module")
def aligner():
    return ExpertManifoldAligner(zoo.build("gpt2"))


def pair(rank=3, out=7, width=5, seed=0, scale=1.0, **more):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64) * scale  # noqa: E731
    return LoRAMatrices(draw(rank, width), draw(out, rank), **more)


def brute(lora, update):
    product, update = lora.lora_B.double() @ lora.lora_A.double(), update.double()
    return float((product * update).sum() / (product.norm() * update.norm()))


def brute_share(lora, update):
    """Least squares instead of projections: what no combination of columns and rows reaches is outside."""
    b, a = lora.lora_B.double(), lora.lora_A.double()
    inner = torch.linalg.pinv(b) @ update.double() @ torch.linalg.pinv(a)
    return float((b @ inner @ a).square().sum() / update.double().square().sum())


SIZES = st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)


@given(*SIZES, st.integers(0, 10**6), st.sampled_from([1e-150, 1e-6, 1, 1e6]))
def test_the_product_is_never_needed(rank, out, width, seed, scale):
    aligner = ExpertManifoldAligner(torch.nn.Linear(1, 1))
    lora = pair(rank, out, width, seed)
    update = torch.randn(out, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    cosine = aligner.compute_subspace_alignment(lora, update * scale)
    assert math.isclose(cosine, brute(lora, update), abs_tol=1e-12) and -1 <= cosine <= 1
    share = aligner.compute_subspace_alignment(lora, update * scale, mode="subspace")
    assert math.isclose(share, brute_share(lora, update), abs_tol=1e-9) and cosine**2 <= share + 1e-12 and share <= 1
    small = pair(rank, out, width, seed, scale=scale if scale > 1e-100 else 1e-60)
    assert math.isclose(aligner.compute_subspace_alignment(small, update), cosine, abs_tol=1e-12)


def test_an_update_is_read_some_rows_at_a_time(aligner, monkeypatch):
    lora, update = pair(), torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    monkeypatch.setattr("nnsplice.adapters.alignment.BLOCK", 10)  # two rows, and one that is left
    for mode, expected in (("cosine", brute(lora, update)), ("subspace", brute_share(lora, update))):
        assert math.isclose(aligner.compute_subspace_alignment(lora, update, mode=mode), expected, abs_tol=1e-12)


def test_factors_that_depend_on_each_other_reach_no_more_than_their_rank(aligner):
    """Rows of A that are one row: an orthonormal basis of three would reach what A does not."""
    a = torch.tensor([[1.0, 2.0, 0.0, 0.0, 0.0]], dtype=torch.float64).expand(3, -1).contiguous()
    lora = LoRAMatrices(a, pair().lora_B)
    update = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    found = aligner.compute_subspace_alignment(lora, update, mode="subspace")
    assert math.isclose(found, brute_share(lora, update), abs_tol=1e-12) and found < 0.5


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_direction_is_wholly_its_own(aligner, scale, dtype):
    lora = pair(scale=scale**0.5)
    lora = LoRAMatrices(lora.lora_A.to(dtype), lora.lora_B.to(dtype))
    assert aligner.compute_subspace_alignment(lora, lora.delta()) == 1.0
    assert aligner.compute_subspace_alignment(lora, -3 * lora.delta()) == pytest.approx(-1.0, abs=1e-12)
    assert aligner.compute_subspace_alignment(lora, lora.delta(), mode="subspace") == pytest.approx(1.0, abs=1e-12)


def test_factors_that_nearly_cancel(aligner):
    """B A is a millionth of what its factors are, so that a norm from their Gram matrices would be noise."""
    a = torch.randn(1, 6, dtype=torch.float64)
    b = torch.randn(4, 1, dtype=torch.float64)
    lora = LoRAMatrices(torch.cat([a, a]), torch.cat([b, -b * (1 - 1e-9)], dim=1))
    assert aligner.compute_subspace_alignment(lora, lora.delta()) == pytest.approx(1.0, abs=1e-9)


def test_inside_and_outside(aligner):
    lora = pair()
    qb, qa = torch.linalg.qr(lora.lora_B)[0], torch.linalg.qr(lora.lora_A.mT)[0]
    inside = lora.lora_B @ torch.randn(3, 3, dtype=torch.float64) @ lora.lora_A
    any_ = torch.randn(7, 5, dtype=torch.float64)
    outside = any_ - qb @ qb.mT @ any_
    other_rows = inside @ (torch.eye(5) - qa @ qa.mT).double() + qb @ torch.randn(3, 5).double() @ (
        torch.eye(5) - qa @ qa.mT
    )
    share = lambda update: aligner.compute_subspace_alignment(lora, update, mode="subspace")  # noqa: E731
    assert share(inside) == pytest.approx(1.0, abs=1e-12)
    assert share(outside) == pytest.approx(0.0, abs=1e-12) and share(other_rows) == pytest.approx(0.0, abs=1e-12)
    assert share(3 * inside / inside.norm() + 4 * outside / outside.norm()) == pytest.approx(9 / 25, abs=1e-12)
    assert abs(aligner.compute_subspace_alignment(lora, inside)) < 0.999  # inside, and another direction


def test_a_rank_that_is_not_used_spans_nothing(aligner):
    lora = LoRAMatrices(torch.tensor([[1.0, 0, 0], [0, 0, 0]]), torch.tensor([[1.0, 0], [0, 0]]))
    update = torch.tensor([[1.0, 0, 0], [1.0, 1.0, 0]])
    assert aligner.compute_subspace_alignment(lora, update, mode="subspace") == pytest.approx(1 / 3)


def test_other_shapes_and_zero(aligner):
    lora, zero = pair(), torch.zeros(7, 5)
    for mode in ("cosine", "subspace"):
        assert aligner.compute_subspace_alignment(lora, torch.randn(5, 7), mode=mode) == 0.0
        assert aligner.compute_subspace_alignment(lora, torch.randn(7), mode=mode) == 0.0
        assert aligner.compute_subspace_alignment(lora, zero, mode=mode) == 0.0
        nothing = LoRAMatrices(lora.lora_A, torch.zeros(7, 3).double())
        assert aligner.compute_subspace_alignment(nothing, torch.randn(7, 5), mode=mode) == 0.0


@pytest.mark.parametrize("types", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.half,) * 2])
def test_mixed_types(aligner, types):
    lora = pair()
    lora = LoRAMatrices(lora.lora_A.to(types[0]), lora.lora_B.to(torch.float32))
    update = torch.randn(7, 5).to(types[1])
    assert aligner.compute_subspace_alignment(lora, update) == pytest.approx(brute(lora, update), abs=1e-12)


def test_weights_that_are_stored_the_other_way(aligner):
    lora = pair(out=48, width=16, transposed=True)
    stored = lora.delta().mT
    assert aligner.compute_subspace_alignment(lora, stored) == 1.0
    # A square matrix fits both ways round; only the flag, or the weight's name, tells.
    square = pair(out=16, width=16)
    name = "transformer.h.0.attn.c_proj.weight"
    assert aligner.compute_subspace_alignment(square, square.delta().mT, name=name) == 1.0
    assert aligner.compute_subspace_alignment(square, square.delta().mT) < 0.9


def test_what_is_refused(aligner):
    with pytest.raises(ShapeError, match="one expert"):
        aligner.compute_subspace_alignment(pair(), torch.randn(4, 7, 5))
    with pytest.raises(BadArgument, match="cosine or subspace"):
        aligner.compute_subspace_alignment(pair(), torch.randn(7, 5), mode="angle")
    with pytest.raises(BadArgument, match="not finite"):
        aligner.compute_subspace_alignment(pair(), torch.full((7, 5), torch.nan))
    with pytest.raises(ShapeError, match=r"lora_A \[r, in\]"):
        LoRAMatrices(torch.randn(3, 5), torch.randn(7, 2))


@given(*SIZES, st.integers(0, 10**6))
def test_singular_values_are_those_of_the_product(rank, out, width, seed):
    lora = pair(rank, out, width, seed)
    expected = torch.linalg.svdvals(lora.delta())[: len(lora.singular_values)]
    torch.testing.assert_close(lora.singular_values, expected, atol=1e-10, rtol=1e-10)
    assert float(lora.energy) == pytest.approx(float(lora.delta().square().sum()), rel=1e-10)


# -- steps of a run ----------------------------------------------------------------------------------------------------


def test_a_step_is_what_changed():
    model = zoo.build("llama")
    aligner = ExpertManifoldAligner(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    steps = aligner.track_step(model)
    assert set(steps) == {name for name, p in model.named_parameters() if p.ndim >= 2}
    for name, step in steps.items():
        torch.testing.assert_close(step, model.get_parameter(name).detach() - before[name], rtol=0, atol=0)
    assert all(not step.any() for step in aligner.track_step(model).values())


def test_frozen_parameters_are_passed_over_and_new_ones_remembered():
    model = zoo.build("llama")
    model.requires_grad_(False)
    aligner = ExpertManifoldAligner(model)
    assert aligner.track_step(model) == {}
    weight = model.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    assert aligner.track_step(model) == {}  # seen now
    with torch.no_grad():
        weight.add_(2.0)
    (step,) = aligner.track_step(model).values()
    assert torch.allclose(step, torch.full_like(step, 2.0), atol=1e-6)


def test_snapshots_are_copies():
    model = torch.nn.Linear(3, 2)
    aligner = ExpertManifoldAligner(model)
    with torch.no_grad():
        model.weight.add_(1.0)
    first = aligner.track_step(model)["weight"]
    kept = first.clone()
    with torch.no_grad():
        model.weight.add_(5.0)
    assert torch.equal(first, kept)
    assert torch.allclose(aligner.track_step(model)["weight"], torch.full((2, 3), 5.0), atol=1e-5)


def test_a_matrix_that_grew_is_new():
    model = zoo.build("llama")
    aligner = ExpertManifoldAligner(model)
    model.resize_token_embeddings(70)
    assert "model.embed_tokens.weight" not in aligner.track_step(model)
    assert "model.embed_tokens.weight" in aligner.track_step(model)


def test_an_nnsight_model_has_its_own_names():
    model = ns.load("toy")
    aligner = ExpertManifoldAligner(model)
    assert aligner.total_layers == 6
    assert "transformer.h.0.attn.c_attn.weight" in aligner.track_step(model)
