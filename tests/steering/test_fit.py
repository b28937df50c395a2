"""Fits against what they are by definition, and quality that was really measured on rows that were held out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nnsplice as ns
import seeing
from nnsplice.errors import NnspliceError
from nnsplice.steering.quality import auc

KEY = "layers[1].output[-1]"
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("mean_difference", {}),
    ("pca", {"centring": "pair"}),
    ("pca", {"centring": "global"}),
    ("logistic", {}),
    ("lda", {}),
]


def capture(rows: torch.Tensor) -> Any:
    return ns.SavedActivation.from_pairs((KEY, rows))


def groups(n: int = 40, width: int = 12, gap: float = 2.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two clouds that lie apart along the first axis, and vary most along the second."""
    drawn = torch.Generator().manual_seed(seed)
    rows = torch.randn(2, n, width, dtype=torch.float64, generator=drawn)
    rows[..., 1] *= 4
    rows[0, :, 0] += gap
    rows += 5
    return rows[0], rows[1]


def found(method: str, a: torch.Tensor, b: torch.Tensor, **options: Any) -> torch.Tensor:
    return ns.steering.fit(capture(a), capture(b), method=method, **options)[KEY][0]


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()


def test_mean_difference() -> None:
    a, b = groups()
    torch.testing.assert_close(found("mean_difference", a, b), a.mean(0) - b.mean(0), rtol=1e-12, atol=0)


def test_pca_is_the_axis_that_its_centring_says() -> None:
    a, b = groups()
    paired = np.linalg.svd((a - b).numpy(), full_matrices=False)[2][0]
    both = torch.cat([a, b])
    common = np.linalg.svd((both - both.mean(0)).numpy(), full_matrices=False)[2][0]
    each = torch.cat([a - (a + b) / 2, b - (a + b) / 2])  # each pair about its own mean, written out
    alike = np.linalg.svd(each.numpy(), full_matrices=False)[2][0]
    assert abs(cosine(found("pca", a, b), torch.tensor(paired))) == pytest.approx(1, abs=1e-9)
    assert abs(cosine(found("pca", a, b, centring="pair"), torch.tensor(alike))) == pytest.approx(1, abs=1e-9)
    assert abs(cosine(found("pca", a, b, centring="global"), torch.tensor(common))) == pytest.approx(1, abs=1e-9)
    assert abs(cosine(torch.tensor(paired), torch.tensor(common))) < 1 - 1e-4  # the two really differ


def test_lda_is_fishers_discriminant() -> None:
    a, b = groups()
    within = torch.cat([a - a.mean(0), b - b.mean(0)])
    covariance = within.T @ within / (len(within) - 2)
    for shrinkage in (0.1, 0.7):
        target = torch.eye(12, dtype=torch.float64) * covariance.trace() / 12
        mixed = (1 - shrinkage) * covariance + shrinkage * target
        expected = torch.linalg.solve(mixed, a.mean(0) - b.mean(0))
        assert cosine(found("lda", a, b, shrinkage=shrinkage), expected) == pytest.approx(1, abs=1e-10)
    assert cosine(found("lda", a, b, shrinkage=1.0), a.mean(0) - b.mean(0)) == pytest.approx(1, abs=1e-12)


def test_logistic_regression_is_at_its_optimum() -> None:
    """Autograd, in the full width, with no shortcut: the gradient of the penalised loss is zero there."""
    a, b = groups(gap=1.0)
    rows = torch.cat([a, b])
    rows = (rows - rows.mean(0)) / ((rows - rows.mean(0)) ** 2).sum(-1).mean().sqrt()
    labels = torch.cat([torch.ones(40), torch.zeros(40)]).double()
    weights = torch.zeros(13, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weights], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        scores = rows @ weights[:12] + weights[12]
        fit = torch.nn.functional.binary_cross_entropy_with_logits(scores, labels, reduction="sum")
        value = fit + 0.01 * (weights[:12] ** 2).sum() / 2
        value.backward()
        return value

    optimiser.step(loss)  # pyright: ignore[reportArgumentType]
    assert cosine(found("logistic", a, b), weights[:12].detach()) == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize(("method", "options"), METHODS)
def test_a_coefficient_of_one_goes_from_one_mean_to_the_other(method: str, options: dict) -> None:
    a, b = groups(gap=3.0)
    vector = found(method, a, b, **options)
    unit = vector / vector.norm()
    torch.testing.assert_close((b.mean(0) + vector) @ unit, a.mean(0) @ unit, rtol=1e-9, atol=0)
    torch.testing.assert_close(found(method, b, a, **options), -vector, rtol=1e-6, atol=1e-9)
    # More rows than width, and far fewer.
    few = found(method, a[:3], b[:3], **options)
    assert few.norm() > 0 and torch.isfinite(few).all()


@pytest.mark.parametrize(("method", "options"), METHODS)
def test_the_quality_is_measured_on_rows_that_were_held_out(method: str, options: dict) -> None:
    """In a width larger than the rows every fit is perfect on its own rows; on others it knows nothing of noise."""
    noise = torch.randn(2, 20, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    vector = ns.steering.fit(capture(noise[0]), capture(noise[1]), method=method, **options)
    own = auc(noise[0] @ vector[KEY][0], noise[1] @ vector[KEY][0])
    if method != "pca":  # which does not look for what tells the groups apart
        assert own > 0.75
    assert 0.2 < vector.quality[KEY] < 0.8
    a, b = groups(gap=30.0)
    assert ns.steering.fit(capture(a), capture(b), method=method, **options).quality == {KEY: 1.0}


def test_the_held_out_quality_is_that_of_folds_done_by_hand() -> None:
    a, b = groups(n=10, gap=1.0)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3))
    scores = []
    for fold in range(5):
        out = order[fold::5]
        rest = torch.tensor([n for n in range(10) if n not in out.tolist()])
        direction = a[rest].mean(0) - b[rest].mean(0)
        pairs = [(float(x @ direction > y @ direction)) for x in a[out] for y in b[out]]
        scores.append(sum(pairs) / len(pairs))
    vector = ns.steering.fit(capture(a), capture(b), folds=5, seed=3)
    assert vector.quality[KEY] == pytest.approx(sum(scores) / 5)
    assert not ns.steering.fit(capture(a[:1]), capture(b[:1])).quality  # one pair leaves nothing to hold out


def test_a_vector_is_tried_on_other_states() -> None:
    vector = ns.steering.fit(*map(capture, groups()))
    a, b = groups(n=30, seed=1)
    assert vector.auc(capture(a), capture(b)) == {KEY: auc(a @ vector[KEY][0], b @ vector[KEY][0])}
    assert 0.6 < vector.auc(capture(a), capture(b))[KEY] < 1
    assert vector.auc(capture(b), capture(a))[KEY] == pytest.approx(1 - vector.auc(capture(a), capture(b))[KEY])


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_auc_is_the_chance_of_being_higher(a: list[int], b: list[int]) -> None:
    expected = sum((x > y) + 0.5 * (x == y) for x in a for y in b) / (len(a) * len(b))
    assert auc(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected)
    assert auc(torch.tensor(b), torch.tensor(a)) == pytest.approx(1 - expected)


def test_groups_need_not_be_pairs_nor_in_one_order() -> None:
    a, b = groups()
    one = ns.SavedActivation.from_pairs((KEY, a), ("layers[0].output[-1]", 2 * a))
    other = ns.SavedActivation.from_pairs(("layers[0].output[-1]", 2 * b[:30]), (KEY, b[:30]))
    vector = ns.steering.fit(one, other)
    assert vector.about.rows == (40, 30) and set(vector.quality) == {KEY, "layers[0].output[-1]"}
    torch.testing.assert_close(vector["layers[0].output[-1]"], 2 * vector[KEY], rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="no pairs"):
        ns.steering.fit(one, other, method="pca")
    assert ns.steering.fit(one, other, method="pca", centring="global").rows == 1


def test_norms_are_the_mean_norm_of_the_states() -> None:
    a, b = groups()
    vector = ns.steering.fit(capture(a), capture(b))
    assert vector.norms[KEY] == pytest.approx(torch.cat([a, b]).norm(dim=-1).mean().item())
    unit = vector.in_residual_norms()
    assert unit[KEY].norm().item() == pytest.approx(vector.norms[KEY])
    assert cosine(unit[KEY][0], vector[KEY][0]) == pytest.approx(1)


def test_half_precision_states_are_fitted_in_full() -> None:
    a, b = (rows.bfloat16() for rows in groups())
    vector = ns.steering.fit(capture(a), capture(b))
    assert vector[KEY].dtype == torch.float32
    torch.testing.assert_close(vector[KEY][0].double(), a.double().mean(0) - b.double().mean(0), rtol=1e-6, atol=1e-6)


def test_prompts_of_any_padding_and_batch_give_the_same_vector(model) -> None:
    good = ["w3 w4 w5 w6", "w7 w8", "w9 w10 w11"]
    bad = ["w13 w4 w5 w16", "w17 w8", "w19 w10 w11"]
    whole = ns.steering.fit_from_prompts(model, good, bad)
    model.tokenizer.padding_side = "right"
    try:
        right = ns.steering.fit_from_prompts(model, good, bad, batch_size=1)
    finally:
        model.tokenizer.padding_side = "left"
    assert whole.allclose(right, atol=1e-6)
    acts = [ns.capture(model, text, "layers[:].output[-1]") for text in (*good, *bad)]
    expected = sum(float(acts[n][KEY][0, 0]) - float(acts[n + 3][KEY][0, 0]) for n in range(3)) / 3
    assert whole[KEY][0, 0].item() == pytest.approx(expected, abs=1e-6)
    assert whole.about.model_type == "gpt2" and whole.model == whole.model


def test_a_chat_template_is_applied_once_and_remembered(model) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        ns.steering.fit_from_prompts(model, ["w3"], ["w4"], chat=True)
    tokenizer = model.tokenizer
    tokenizer.chat_template = "{% for m in messages %}w60 {{ m['content'] }} w61{% endfor %}{{ ' w62' }}"
    try:
        chat = ns.steering.fit_from_prompts(model, ["w3 w4", "w5"], ["w6 w7", "w8"], chat=True)
    finally:
        tokenizer.chat_template = None
    plain = ns.steering.fit_from_prompts(
        model, ["w60 w3 w4 w61 w62", "w60 w5 w61 w62"], ["w60 w6 w7 w61 w62", "w60 w8 w61 w62"]
    )
    assert chat.allclose(plain) and chat.about.template and plain.about.template is None


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"method": "mean"}, "no method 'mean'"),
        ({"shrinkage": 0.1}, "mean_difference has no option shrinkage"),
        ({"method": "pca", "center": "pair"}, "pca has no option center"),
        ({"method": "pca", "centring": "pairs"}, '"pair" or "global"'),
        ({"method": "lda", "shrinkage": 0.0}, "above 0"),
        ({"method": "logistic", "ridge": -1.0}, "above 0"),
        ({"folds": 1}, "2 or more"),
    ],
)
def test_an_option_without_effect_is_an_error(options: dict, text: str) -> None:
    a, b = groups()
    with pytest.raises(NnspliceError, match=text):
        ns.steering.fit(capture(a), capture(b), **options)


def test_prompts_that_are_none_are_an_error(model) -> None:
    nothing: Any = None
    with pytest.raises(TypeError, match="negative is a NoneType"):
        ns.steering.fit_from_prompts(model, "w3", nothing, "layers[1].output[-1]")


def test_states_that_cannot_be_told_apart_are_an_error(model) -> None:
    a, _ = groups()
    with pytest.raises(ValueError, match="same mean"):
        ns.steering.fit(capture(a), capture(a))
    with pytest.raises(ValueError, match="not a number"):
        ns.steering.fit(capture(a), capture(a * float("nan")))
    with pytest.raises(ValueError, match="only in the"):
        ns.steering.fit(capture(a), ns.SavedActivation.from_pairs(("layers[0].output[-1]", a)))
    with pytest.raises(TypeError, match="fit_from_prompts"):
        ns.steering.fit(["w3"], ["w4"])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="no prompts"):
        ns.steering.fit_from_prompts(model, [], ["w4"])


@pytest.mark.parametrize("form", ["encodings", "tensors", "lists", "one list"])
def test_prompts_of_token_ids_in_any_form_give_what_lists_of_them_give(model, form: str) -> None:
    good, bad = torch.tensor([[3, 4, 5], [6, 7, 8]]), torch.tensor([[9, 10, 11], [12, 13, 14]])
    make = {
        "encodings": lambda ids: {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        "tensors": lambda ids: ids,
        "lists": lambda ids: ids.tolist(),
        "one list": lambda ids: ids[0].tolist(),
    }[form]
    kept = slice(0, 1) if form == "one list" else slice(None)
    states = [ns.capture(model, ids[kept], KEY).get(KEY) for ids in (good, bad)]
    found = ns.steering.fit_from_prompts(model, make(good), make(bad), KEY)
    direction = states[0].mean(0) - states[1].mean(0)
    torch.testing.assert_close(found.get(KEY)[0].double(), direction.double(), rtol=1e-5, atol=1e-7)


def test_prompts_with_images_are_fitted_on_what_the_model_makes_of_the_images() -> None:
    shown = ns.load(seeing.build(), processor=seeing.processor())

    def prompts(*seeds: int) -> dict[str, Any]:
        return {"text": ["w3 <image> w4"] * len(seeds), "images": list(map(seeing.picture, seeds))}

    states = [ns.capture(shown, prompts(*seeds), KEY).get(KEY).mean(0) for seeds in ((1, 2), (3, 4))]
    found = ns.steering.fit_from_prompts(shown, prompts(1, 2), prompts(3, 4), KEY)
    torch.testing.assert_close(found.get(KEY)[0], states[0] - states[1])
    assert found.get(KEY).abs().max() > 1e-4
