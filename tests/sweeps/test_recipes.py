"""Recipes against runs that plain torch hooks edit: causal tracing with noise, and ablation."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nnsplice as ns
from nnsplice.errors import BadArgument, FileError, ShapeError
from nnsplice.sweeps import plan_sweep
from nnsplice.sweeps.unedited import clean_run
from zoo import HEADS, LAYERS, build, double, wrap

TEXT, SUBJECT, START, STOP = "w3 w4 w5 w6 w7", "w4 w5", 1, 3
#: Family -> its blocks.
BLOCKS: dict[str, Callable[[Any], Sequence[nn.Module]]] = {
    "gpt2": lambda m: m.transformer.h,
    "llama": lambda m: m.model.layers,
    "gemma2": lambda m: m.model.layers,
    "opt": lambda m: m.model.decoder.layers,
    "bloom": lambda m: m.transformer.h,
    "falcon": lambda m: m.transformer.h,
    "bert": lambda m: m.bert.encoder.layer,
    "t5": lambda m: m.encoder.block,
    "bart": lambda m: m.model.encoder.layers,
}


def _ids(text: str) -> Tensor:
    return torch.tensor([[int(word[1:]) for word in text.split()]])


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _with(out: Any, new: Tensor) -> Any:
    return (new, *out[1:]) if isinstance(out, tuple) else new


@contextmanager
def _hooked(*hooks: tuple[nn.Module, Any, bool]) -> Iterator[None]:
    """Hooks, before their modules where the last says so."""
    handles = [
        module.register_forward_pre_hook(hook, with_kwargs=True) if before else module.register_forward_hook(hook)
        for module, hook, before in hooks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _noisy(noise: Tensor) -> Any:
    """Noise at the subject of what enters the first block."""

    def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key = None if args else "hidden_states"
        stream = (args[0] if key is None else kwargs[key]).clone()
        stream[:, START:STOP] = stream[:, START:STOP] + noise
        return ((stream, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: stream})

    return hook


def _probabilities(module: Any, family: str, text: str = TEXT) -> Tensor:
    inputs = {"input_ids": _ids(text)}
    if family in ("t5", "bart"):
        inputs["decoder_input_ids"] = torch.tensor([[module.config.decoder_start_token_id]])
    with torch.no_grad():
        return module(**inputs).logits[0, -1].softmax(-1)


def _part(block: Any, kind: str) -> nn.Module:
    """What a kind of trace restores, in a block of the families that the test of kinds uses."""
    names = {"mlp": ("mlp",), "attn": ("attn", "self_attn")}
    return block if kind == "residual" else next(getattr(block, n) for n in names[kind] if hasattr(block, n))


def _traced(
    family: str,
    noise: Tensor,
    answer: int,
    kind: str = "residual",
    window: int = 1,
    read: Callable[[Tensor], Tensor] | None = None,
) -> tuple[np.ndarray, float, float]:
    """The oracle: `[layer, position]`, and the ends; of the answer's probability, or of what is read of all."""
    module = build(family).double()
    blocks = BLOCKS[family](module)
    parts = [_part(block, kind) for block in blocks]
    kept: dict[int, Tensor] = {}

    def measured() -> float:
        found = _probabilities(module, family)
        return float(found[answer] if read is None else read(found))

    def keep(n: int) -> Any:
        return lambda _m, _a, out: kept.__setitem__(n, _first(out).clone())

    def restore(n: int, position: int) -> Any:
        def hook(_module: Any, _args: Any, out: Any) -> Any:
            new = _first(out).clone()
            new[:, position] = kept[n][:, position]
            return _with(out, new)

        return hook

    with _hooked(*((part, keep(n), False) for n, part in enumerate(parts))):
        high = measured()
    found = np.zeros((len(parts), STOP + 2, len(noise)))
    low = []
    for number, sample in enumerate(noise):
        first = (blocks[0], _noisy(sample), True)
        with _hooked(first):
            low.append(measured())
        for layer in range(len(parts)):
            layers = range(max(layer - window // 2, 0), min(layer + (window + 1) // 2, len(parts)))
            for position in range(STOP + 2):
                with _hooked(first, *((parts[n], restore(n, position), False) for n in layers)):
                    found[layer, position, number] = measured()
    return found.mean(-1), high, float(np.mean(low))


def _noise(samples: int = 3, width: int = 16) -> Tensor:
    return torch.randn(samples, STOP - START, width, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def _trace(model: Any, text: Any = TEXT, subject: Any = SUBJECT, **options: Any) -> ns.SweepResult:
    return ns.causal_trace(model, text, subject, **{"progress": False, **options})


# --- causal tracing against hooks


@pytest.mark.parametrize("executor", ["auto", "batched", "reference"])
@pytest.mark.parametrize("family", list(BLOCKS))
def test_a_trace_is_what_hooks_make(family: str, executor: str) -> None:
    model = double(family)
    result = _trace(model, noise=_noise(), answer="w7", executor=executor)
    expected, high, low = _traced(family, _noise(), answer=7)
    grid = result.grid()
    assert grid.dims == ("prompt", "layer", "position") and grid.shape == (1, LAYERS, 5)
    np.testing.assert_allclose(grid.values[0], expected, atol=1e-10, rtol=0)
    assert abs(result.clean[0] - high) < 1e-10 and abs(result.corrupted[0] - low) < 1e-10
    assert abs(result.total_effect[0] - (high - low)) < 1e-10
    effect = (expected - low) / (high - low)
    np.testing.assert_allclose(result.effect().values[0], effect, atol=1e-8, rtol=1e-6)
    assert np.std(expected) > 1e-5


@pytest.mark.parametrize("window", [1, 2, 10])
@pytest.mark.parametrize("kind", ["residual", "mlp", "attn"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_kinds_and_windows(family: str, kind: str, window: int) -> None:
    result = _trace(double(family), noise=_noise(2), answer=7, kind=kind, window=window)
    expected, high, low = _traced(family, _noise(2), 7, kind, window)
    np.testing.assert_allclose(result.grid().values[0], expected, atol=1e-10, rtol=0)
    assert (result.clean[0], result.corrupted[0]) == (pytest.approx(high, abs=1e-10), pytest.approx(low, abs=1e-10))
    assert (result.run.executor, result.run.note) == ("packed", "")


def test_a_trace_measures_any_metric_of_the_noised_runs() -> None:
    """Differences of logits, and divergences from the run without noise."""
    model, clean = double("llama"), _probabilities(build("llama").double(), "llama")
    read = {
        "difference": lambda found: found[7].log() - found[8].log(),
        "divergence": lambda found: (clean * (clean / found).log()).sum(),
        "rank": lambda found: (found > found[7]).sum(),
    }
    metrics = {"difference": ns.logit_diff("w7", "w8"), "divergence": ns.kl_divergence(), "rank": ns.rank(7)}
    several = _trace(model, noise=_noise(), metric=metrics)
    for name, metric in metrics.items():
        expected, high, low = _traced("llama", _noise(), 7, read=read[name])
        for result in (several.only(name), _trace(model, noise=_noise(), metric=metric, executor="reference")):
            np.testing.assert_allclose(result.grid().values[0], expected, atol=1e-9, rtol=0)
            ends = result.clean[0], result.corrupted[0]
            np.testing.assert_allclose(ends, (high, low), atol=1e-9)


def test_answers_of_a_metric_are_those_of_their_own_prompts() -> None:
    model, texts, subjects = double("gpt2"), [TEXT, "w13 w14 w15 w16"], ["w4 w5", "w14"]
    pairs = [("w7", "w8"), ({"w9", "w10"}, "w11")]
    both = _trace(model, texts, subjects, samples=2, metric=ns.logit_diff(*map(list, zip(*pairs, strict=True))))
    for row, (text, subject, pair) in enumerate(zip(texts, subjects, pairs, strict=True)):
        alone = _trace(model, text, subject, samples=2, metric=ns.logit_diff(*pair))
        length = len(text.split())
        np.testing.assert_allclose(both.grid().values[row, :, :length], alone.grid().values[0], atol=1e-12, rtol=0)
        assert both.clean[row] == pytest.approx(alone.clean[0], abs=1e-12)


#: The token embedding's module, as ROME's experiments name it, of the families that the next test is about.
EMBEDDINGS: dict[str, Callable[[Any], nn.Module]] = {
    "gpt2": lambda m: m.transformer.wte,
    "llama": lambda m: m.model.embed_tokens,
    "opt": lambda m: m.model.decoder.embed_tokens,
    "bloom": lambda m: m.transformer.word_embeddings,
}


def _rome(family: str, noise: Tensor, answer: int, replace: bool) -> tuple[np.ndarray, float]:
    """As ROME's own experiment does it: one batch, whose first row is clean and whose others are corrupted at the
    token embedding's output; states of the first row are restored in all others. `[layer, position]`, and the low end.
    """
    module = build(family).double()
    blocks, inputs = BLOCKS[family](module), {"input_ids": _ids(TEXT).repeat(len(noise) + 1, 1)}

    def embed(_module: Any, _args: Any, out: Tensor) -> Tensor:
        new = out.clone()
        new[1:, START:STOP] = noise if replace else new[1:, START:STOP] + noise
        return new

    def restore(position: int) -> Any:
        def hook(_module: Any, _args: Any, out: Any) -> Any:
            new = _first(out).clone()
            new[1:, position] = new[:1, position]
            return _with(out, new)

        return hook

    def mean() -> float:
        with torch.no_grad():
            return float(module(**inputs).logits[1:, -1].softmax(-1).mean(0)[answer])

    found = np.zeros((len(blocks), STOP + 2))
    with _hooked((EMBEDDINGS[family](module), embed, False)):
        low = mean()
        for layer, block in enumerate(blocks):
            for position in range(STOP + 2):
                with _hooked((block, restore(position), False)):
                    found[layer, position] = mean()
    return found, low


@pytest.mark.parametrize("executor", ["packed", "batched", "reference"])
@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_trace_is_that_of_romes_own_experiment(family: str, replace: bool, executor: str) -> None:
    result = _trace(double(family), noise=_noise(), answer=7, replace=replace, executor=executor)
    expected, low = _rome(family, _noise(), 7, replace)
    np.testing.assert_allclose(result.grid().values[0], expected, atol=1e-10, rtol=0)
    assert abs(result.corrupted[0] - low) < 1e-10


def test_the_samples_of_a_trace_share_their_clean_run() -> None:
    model = double("llama")
    one, ten = (
        plan_sweep(model, [TEXT] * samples, ["w3 w4 w5 w6 w9"] * samples, "layers[:].output[:]", ns.logit_diff(7, 8))
        for samples in (1, 10)
    )
    alone, many = (clean_run(model, plan, 10_000) for plan in (one, ten))
    assert (many[2].forwards, many[2].tokens) == (alone[2].forwards, alone[2].tokens)
    assert (many[0] == alone[0]).all() and len(many[0]) == 10
    assert many[1].clean is not None
    assert [len(rows) for rows in many[1].clean.values.values()] == [1, 1, 1]  # what is kept of it, in each layer


@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom"])
def test_noise_can_take_the_place_of_the_embeddings_and_leaves_positions(family: str) -> None:
    model = double(family)
    result = _trace(model, noise=_noise(2), answer=7, replace=True)
    expected, low = _rome(family, _noise(2), 7, replace=True)
    np.testing.assert_allclose(result.grid().values[0], expected, atol=1e-10, rtol=0)
    assert result.corrupted[0] == pytest.approx(low, abs=1e-10)
    assert result != _trace(model, noise=_noise(2), answer=7)
    if family == "gpt2":  # written into the sum instead, positions would be lost
        module = build(family).double()
        positions = module.transformer.wpe.weight.detach()[START:STOP]
        lost, _ = _rome(family, _noise(2) - positions, 7, replace=True)
        assert abs(lost - expected).max() > 1e-4


# --- arguments of a trace


def test_the_answer_is_what_the_clean_run_puts_first() -> None:
    model = double("gpt2")
    texts = [TEXT, "w13 w14 w15 w16"]
    module = build("gpt2").double()
    top = [int(_probabilities(module, "gpt2", text).argmax()) for text in texts]
    result = _trace(model, texts, ["w4 w5", "w14"], samples=2)
    assert result.asked["metric"]["ids"] == {"answer": [top[0], top[0], top[1], top[1]]}
    best = [float(_probabilities(module, "gpt2", text).max()) for text in texts]
    np.testing.assert_allclose(result.clean, best, atol=1e-12)
    np.testing.assert_array_equal(
        _trace(model, texts, ["w4 w5", "w14"], samples=2, answer=top).table.values, result.table.values
    )


def test_a_subject_is_a_text_or_the_bounds_of_its_tokens() -> None:
    model = double("gpt2")
    by_text = _trace(model, samples=2)
    assert _trace(model, TEXT, (START, STOP), samples=2) == by_text
    other = _trace(model, TEXT, (START, STOP + 1), samples=2)
    assert abs(other.corrupted - by_text.corrupted).max() > 1e-6


def test_the_noise_of_a_prompt_is_its_own() -> None:
    """What a prompt's numbers are depends on no other prompt, and on the seed."""
    model = double("gpt2")
    texts, subjects = ["w13 w14 w15 w16", TEXT, "w23 w24 w25 w26 w27"], ["w14", "w4 w5", "w25 w26"]
    many = _trace(model, texts, subjects, samples=3)
    for row, (text, subject) in enumerate(zip(texts, subjects, strict=True)):
        alone = _trace(model, text, subject, samples=3)
        length = len(text.split())
        np.testing.assert_allclose(many.grid().values[row, :, :length], alone.grid().values[0], atol=1e-12, rtol=0)
        np.testing.assert_allclose(many.corrupted[row], alone.corrupted[0], atol=1e-12)
        assert np.isnan(many.grid().values[row, :, length:]).all()
    assert _trace(model, samples=3) == _trace(model, samples=3)
    assert abs(_trace(model, samples=3, seed=2).corrupted - _trace(model, samples=3).corrupted) > 1e-6


def test_noise_is_in_the_spread_of_the_subjects_embeddings() -> None:
    model = double("gpt2")
    embeddings = build("gpt2").double().transformer.wte.weight.detach()[[4, 5]]
    drawn: list[Tensor] = []
    for noise in (1.0, 3.0):
        drawn.append(_corruption(model, noise))
        assert float(drawn[-1].std()) == pytest.approx(noise * float(embeddings.std()), rel=0.03)
    torch.testing.assert_close(drawn[1], drawn[0] * 3)
    silent = _trace(model, samples=2, noise=0.0)
    np.testing.assert_allclose(silent.corrupted, silent.clean, atol=1e-12)


def _corruption(model: Any, noise: float) -> Tensor:
    """The noise of a trace, as it lands in the stream."""
    recipes: Any = importlib.import_module("nnsplice.sweeps.recipes")
    kept: list[Any] = []
    plan = recipes.plan_sweep

    def planned(*args: Any, **options: Any) -> Any:
        kept.append(options["corruption"])
        return plan(*args, **options)

    recipes.plan_sweep = planned
    try:
        _trace(model, samples=200, noise=noise, window=10)
    finally:
        recipes.plan_sweep = plan
    return torch.stack(kept[0].values)


def test_the_prompts_of_a_result_are_those_that_were_given() -> None:
    result = _trace(double("gpt2"), [TEXT, "w13 w14 w15"], ["w4 w5", "w14"], samples=4)
    assert result.table.values.shape == (2, LAYERS * 5) and result.is_complete
    assert result.tokens == (tuple(TEXT.split()), ("w13", "w14", "w15"))
    assert result.metric == "probability"
    assert result.grid().coords["token"].dims == ("prompt", "position")


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"kind": "stream"}, BadArgument, r"kind='stream'[\s\S]*'residual', 'mlp', 'attn'"),
        ({"samples": 0}, BadArgument, "samples=0"),
        ({"noise": torch.zeros(2, 2, 15)}, ShapeError, r"noise of shape \[2, 2, 15\][\s\S]*\[sample, 2, 16\]"),
        ({"noise": torch.zeros(2, 16)}, ShapeError, r"noise of shape \[2, 16\]"),
        ({"noise": torch.zeros(0, 2, 16)}, BadArgument, "samples=0"),
        ({"noise": torch.tensor(3.0)}, ShapeError, r"noise of shape \[\]"),
        ({"noise": float("nan")}, BadArgument, "noise=nan"),
        ({"noise": "3"}, ns.errors.BadType, "noise='3'"),
        ({"subject": None}, ns.errors.BadType, 'span "subject" is None'),
        ({"answer": [["w7"], ["w8"]]}, BadArgument, "2 tokens as answer=, and there are 1 prompts"),
        ({"metric": ns.rank([["w7"], ["w8"]])}, BadArgument, "2 tokens as answer=, and there are 1 prompts"),
        ({"metric": ns.rank("w7"), "answer": "w7"}, BadArgument, "answer= beside metric="),
        ({"metric": ns.sequence_log_probability("w7 w8")}, BadArgument, "one after the other"),
        ({"answer": "w7 w8"}, BadArgument, "is 2 tokens"),
        ({"subject": "w9"}, ns.errors.SpanError, "w9"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        _trace(wrap("gpt2"), **options)


def test_a_toy_fact_has_an_early_and_a_late_site() -> None:
    model = ns.load("toy")
    facts = ns.models.toy_prompts().facts
    chosen = [facts[n] for n in range(0, 400, 100)]
    for fact in chosen:
        start, stop = fact.subject_span
        result = _trace(model, fact.clean, (start, stop), samples=6)
        effect = result.effect()[0]
        assert result.total_effect[0] > 0.3
        # Early, at the subject's last token; late, at the prompt's last one; nothing of it the other way round.
        last = effect.sizes["position"] - 1
        early, late = effect[0], effect[-1]
        assert float(early.isel(position=slice(start, stop)).max()) > 0.2
        assert float(late.isel(position=last)) > 0.9
        assert float(early.isel(position=last)) < 0.1
        assert float(abs(late.isel(position=slice(start, stop))).max()) < 0.1


# --- ablation


def _ablated(family: str, layer: int, head: int, value: Tensor | None = None, token: int | None = None) -> Tensor:
    """The last logits with a head's part of the stream changed, by hooks on the weights' own terms."""
    module = build(family).double()
    block: Any = BLOCKS[family](module)[layer]
    projection = block.attn.c_proj if family == "gpt2" else block.self_attn.o_proj
    width = projection.weight.shape[0 if family == "gpt2" else 1] // HEADS
    columns = slice(head * width, (head + 1) * width)

    def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        z = args[0].clone()
        tokens = slice(None) if token is None else slice(token, token + 1)
        z[:, tokens, columns] = 0 if value is None else value
        return (z, *args[1:]), kwargs

    with _hooked((projection, hook, True)), torch.no_grad():
        return module(_ids(TEXT)).logits[0, -1]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_head_is_taken_out_at_every_token_as_hooks_do_it(family: str) -> None:
    result = ns.ablate(
        double(family), TEXT, "layers[:].heads[:].output", ns.logit_diff("w7", "w8"), progress=False, operation="zero"
    )
    expected = [[float(_d(_ablated(family, n, h))) for h in range(HEADS)] for n in range(LAYERS)]
    assert result.grid().dims == ("prompt", "layer", "head")
    np.testing.assert_allclose(result.grid().values[0], expected, atol=1e-10, rtol=0)
    same = ns.ablate(double(family), TEXT, "layers[:].heads[:]", ns.logit_diff("w7", "w8"), progress=False)
    np.testing.assert_allclose(same.grid().values[0], expected, atol=1e-10, rtol=0)


def _d(logits: Tensor) -> Tensor:
    return logits[7] - logits[8]


def test_an_ablation_has_one_baseline_and_shows_changes() -> None:
    result = ns.ablate(double("gpt2"), TEXT, "layers[:].heads[:]", ns.logit_diff("w7", "w8"), progress=False)
    with torch.no_grad():
        whole = float(_d(build("gpt2").double()(_ids(TEXT)).logits[0, -1]))
    assert result.clean[0] == result.corrupted[0] == pytest.approx(whole, abs=1e-12)
    with pytest.warns(UserWarning, match=r"the same[\s\S]*prompt 0"):
        assert np.isnan(result.effect()).all()
    assert (abs(result.change()) > 1e-6).all()
    assert str(result.best(1)["path"][0]).startswith("layers[")


def test_sites_without_positions_are_one_cell_and_those_with_are_one_each() -> None:
    model, metric = double("gpt2"), ns.logit_diff("w7", "w8")
    together = ns.ablate(model, TEXT, "layers[1].heads[2].output", metric, progress=False)
    apart = ns.ablate(model, TEXT, "layers[1].heads[2].output[:]", metric, progress=False)
    assert (len(together.cells), len(apart.cells)) == (1, 5)
    expected = [float(_d(_ablated("gpt2", 1, 2, token=token))) for token in range(5)]
    np.testing.assert_allclose(apart.grid().values.ravel(), expected, atol=1e-10, rtol=0)
    assert together.cells[0].position is None


def test_the_mean_of_other_prompts_takes_a_value_out() -> None:
    model, metric = double("gpt2"), ns.logit_diff("w7", "w8")
    site = "layers[:].heads[:].output"
    others = ["w20 w21 w22", "w30 w31 w32"]
    reference = ns.capture(model, others, "layers[:].heads[:].output[:]")
    result = ns.ablate(model, TEXT, site, metric, operation="mean", reference=reference, progress=False)
    for layer, head in ((0, 1), (2, 3)):
        # Of the same position; of all positions where the other prompts have no such one.
        held = reference.get(f"layers[{layer}].heads[{head}].output[:]")
        mean = torch.cat([held.mean(0), held.mean((0, 1)).expand(2, -1)])
        value = float(result.grid().sel(prompt=0, layer=layer, head=head))
        assert value == pytest.approx(float(_d(_ablated("gpt2", layer, head, mean))), abs=1e-10)


def test_without_a_reference_the_prompts_are_their_own() -> None:
    model, metric = double("gpt2"), ns.logit_diff("w7", "w8")
    texts = [TEXT, "w13 w14 w15"]
    result = ns.ablate(model, texts, "layers[:].heads[:].output", metric, operation="mean", progress=False)
    site = "layers[1].heads[0].output[:]"
    rows = [ns.capture(model, text, site).get(site) for text in texts]
    mean = torch.stack([row[0].mean(0) for row in rows]).mean(0)
    value = float(result.grid().sel(prompt=0, layer=1, head=0))
    assert value == pytest.approx(float(_d(_ablated("gpt2", 1, 0, mean))), abs=1e-10)


def test_resampling_draws_one_of_the_reference_by_its_seed() -> None:
    model, metric = double("gpt2"), ns.logit_diff("w7", "w8")
    reference = ns.capture(model, [f"w{n} w{n + 1}" for n in range(20, 28)], "layers[:].heads[:].output[-1]")
    site = "layers[:].heads[:].output[-1]"
    options: dict[str, Any] = {"operation": "resample", "reference": reference, "progress": False}
    ask = lambda seed: ns.ablate(model, TEXT, site, metric, seed=seed, **options)  # noqa: E731
    result = ask(0)
    assert result == ask(0) and abs(result.grid() - ask(1).grid()).max() > 1e-6
    rows = reference.get("layers[1].heads[2].output[-1]").flatten(0, -2)
    possible = [float(_d(_ablated("gpt2", 1, 2, row, token=4))) for row in rows]
    assert min(abs(float(result.grid().sel(layer=1, head=2).squeeze()) - value) for value in possible) < 1e-10


def test_an_ablation_by_a_function() -> None:
    model, metric = double("gpt2"), ns.logit_diff("w7", "w8")
    by_name = ns.ablate(model, TEXT, "layers[:].heads[:].output", metric, progress=False)
    by_function = ns.ablate(model, TEXT, "layers[:].heads[:].output", metric, operation=lambda v: v * 0, progress=False)
    np.testing.assert_allclose(by_name.grid(), by_function.grid(), atol=1e-12)
    assert by_name != by_function  # another question
    with pytest.raises(BadArgument, match="no operation 'nothing'"):
        ns.ablate(model, TEXT, "layers[:].heads[:].output", metric, operation="nothing", progress=False)


def test_a_mistyped_option_is_told_by_the_name_of_what_was_called() -> None:
    model, metric = wrap("gpt2"), ns.logit_diff("w7", "w8")
    asked: dict[str, Callable[[], Any]] = {
        "ns.ablate": lambda: ns.ablate(model, "w3 w4", "layers[:].mlp", metric, progres=False),
        "ns.causal_trace": lambda: ns.causal_trace(model, "w3 w4", "w4", progres=False),
        "ns.path_patch": lambda: ns.path_patch(
            model, "w3 w4", "w5 w4", "layers[0].mlp", "layers[1].mlp", metric, progres=False
        ),
    }
    for name, call in asked.items():
        with pytest.raises(TypeError, match=rf"{name} has no option progres=\n  expected: progress\b"):
            call()
    whole: tuple[Any, ...] = (ns.sweep, ns.plan_sweep, ns.attribute)  # these have all options of their own
    for call in whole:
        with pytest.raises(TypeError, match=rf"^{call.__name__}\(\) got an unexpected keyword argument 'windw'"):
            call(model, "w3 w4", "w5 w4", "layers[:]", metric, windw=2)


@pytest.mark.parametrize("name", ["zero", "patch", "noise", "knockout"])
def test_a_function_of_the_users_may_be_called_as_an_operation_is(name: str, tmp_path: Path) -> None:
    def halved(value: torch.Tensor) -> torch.Tensor:
        return value / 2

    def doubled(value: torch.Tensor) -> torch.Tensor:
        return value * 2

    model, metric = wrap("gpt2"), ns.logit_diff("w7", "w8")

    def swept(operation: Any, journal: str | None = None) -> Any:
        path = None if journal is None else tmp_path / journal
        return ns.ablate(model, "w3 w4 w5", "layers[:].mlp", metric, operation=operation, journal=path, progress=False)

    expected = swept(halved).table.values
    halved.__name__ = doubled.__name__ = name
    found = swept(halved, "journal.jsonl")
    assert np.array_equal(found.table.values, expected)
    assert found.asked["operation"] != name
    with pytest.raises(FileError, match="another sweep"):
        swept(doubled, "journal.jsonl")
