"""Answers of several tokens: the sum of their log-probabilities, each behind those before it, against plain hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import nnsplice as ns
from nnsplice.errors import BadArgument
from nnsplice.results import SweepResult
from zoo import LAYERS, build, double, wrap

CLEAN, CORRUPTED = ["w3 w4 w5 w6", "w13 w14 w15"], ["w3 w9 w5 w6", "w13 w24 w15"]
ANSWERS = ["w7 w8 w9", "w20"]


def _ids(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


def _run(
    module: Any, prompt: str, answer: str, patch: tuple[int, slice, Any] | None = None
) -> tuple[list[Tensor], float]:
    """One pass over prompt and answer: what each layer gives, and the sum over the answer's tokens."""
    ids = _ids(prompt) + _ids(answer)
    kept: list[Tensor] = []

    def hook(_module: Any, _args: Any, out: Any) -> Any:
        stream = (out[0] if isinstance(out, tuple) else out).clone()
        if patch is not None and patch[0] == len(kept):
            stream[0, patch[1]] = patch[2]
        kept.append(stream)
        return (stream, *out[1:]) if isinstance(out, tuple) else stream

    blocks = module.transformer.h if hasattr(module, "transformer") else module.model.layers
    handles = [block.register_forward_hook(hook) for block in blocks]
    try:
        with torch.no_grad():
            logs = module(torch.tensor([ids])).logits[0].log_softmax(-1)
    finally:
        for handle in handles:
            handle.remove()
    start = len(_ids(prompt))
    return kept, float(sum(logs[start - 1 + n, token] for n, token in enumerate(_ids(answer))))


@pytest.mark.parametrize("executor", ["auto", "packed", "batched", "reference"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_sweep_sums_over_the_answers_tokens(family: str, executor: str) -> None:
    module = build(family).double()
    metric = ns.sequence_log_probability(ANSWERS)
    sites = ["layers[:].output[:]", "layers[:].output[-1]"]
    result = ns.sweep(double(family), CLEAN, CORRUPTED, sites, metric, executor=executor, progress=False)
    assert result.tokens == tuple(tuple(text.split()) for text in CORRUPTED)
    grid = result.grid()
    assert grid.position.values.tolist() == [0, 1, 2, 3, -1]
    for row, (clean, corrupted, answer) in enumerate(zip(CLEAN, CORRUPTED, ANSWERS, strict=True)):
        states, high = _run(module, clean, answer)
        assert result.clean[row] == pytest.approx(high, abs=1e-11)
        assert result.corrupted[row] == pytest.approx(_run(module, corrupted, answer)[1], abs=1e-11)
        length = len(_ids(clean))
        for layer in range(LAYERS):
            for position in (*range(length), -1):
                at = position % length
                value = _run(module, corrupted, answer, (layer, slice(at, at + 1), states[layer][0, at]))[1]
                assert float(grid.sel(prompt=row, layer=layer, position=position)) == pytest.approx(value, abs=1e-10)
    assert np.isnan(grid.sel(prompt=1, position=3)).all()
    assert result.metric == "sequence_log_probability" and result.asked["metric"]["ids"]["answer"] == [[7, 8, 9], [20]]


def test_an_ablation_takes_a_layer_out_at_the_answers_tokens_too() -> None:
    module = build("gpt2").double()
    result = ns.ablate(double("gpt2"), CLEAN, "layers[:].output", ns.sequence_log_probability(ANSWERS), progress=False)
    for row, (prompt, answer) in enumerate(zip(CLEAN, ANSWERS, strict=True)):
        for layer in range(LAYERS):
            value = _run(module, prompt, answer, (layer, slice(None), 0.0))[1]
            assert float(result.grid().sel(prompt=row, layer=layer)) == pytest.approx(value, abs=1e-10)


def test_a_shorter_pair_is_aligned_at_its_prompts_end() -> None:
    module, answer = build("gpt2").double(), "w7 w8"
    clean, corrupted = "w4 w5 w6", "w3 w9 w5 w6"
    metric = ns.sequence_log_probability(answer)
    result = ns.sweep(double("gpt2"), clean, corrupted, "layers[:].output[:]", metric, align="end", progress=False)
    states, _ = _run(module, clean, answer)
    for layer in range(LAYERS):
        for here in (1, 2, 3):
            value = _run(module, corrupted, answer, (layer, slice(here, here + 1), states[layer][0, here - 1]))[1]
            assert float(result.grid().sel(prompt=0, layer=layer, position=here)) == pytest.approx(value, abs=1e-10)
    assert np.isnan(result.grid().sel(position=0)).all()


def test_one_token_is_its_log_probability_and_ids_are_texts() -> None:
    model = double("gpt2")
    options: Any = {"progress": False}
    one = ns.sweep(model, CLEAN, CORRUPTED, "layers[:].output", ns.sequence_log_probability("w7"), **options)
    plain = ns.sweep(model, CLEAN, CORRUPTED, "layers[:].output", ns.log_probability("w7"), **options)
    np.testing.assert_allclose(one.table.values, plain.table.values, atol=1e-12)
    texts, ids = (
        ns.sweep(model, CLEAN, CORRUPTED, "layers[:].output", ns.sequence_log_probability(answer), **options)
        for answer in ("w7 w8", [7, 8])
    )
    assert texts == ids


def test_shards_and_journals(tmp_path: Path) -> None:
    model = double("gpt2")
    plan = ns.plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", ns.sequence_log_probability(ANSWERS))
    assert "2 prompts, patch, sequence_log_probability" in plan.preview()
    options: Any = {"executor": "batched", "progress": False, "max_tokens": 20}
    whole = ns.run(plan, model, **options)
    merged = SweepResult.merge([ns.run(plan.shard(n, 3), model, **options) for n in range(3)])
    assert merged.is_complete
    np.testing.assert_allclose(merged.table.values, whole.table.values, atol=1e-12)
    assert sum(len(plan.shard(n, 3)) for n in range(3)) == len(plan)
    journal = tmp_path / "run.jsonl"
    assert ns.run(plan, model, journal=journal, **options) == whole
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[: len(lines) // 2]))
    assert ns.run(plan, model, journal=journal, **options) == whole


@pytest.mark.parametrize(
    ("family", "answer", "message"),
    [
        ("bert", "w7 w8", "does not read forwards only"),
        ("t5", "w7 w8", "does not read forwards only"),
        ("gpt2", ["w7", "w8", "w9"], "there are 2 prompts"),
        ("gpt2", [[7], []], "empty answer for prompt 1"),
        ("gpt2", "", "empty answer"),
    ],
)
def test_what_makes_no_sense_is_refused(family: str, answer: Any, message: str) -> None:
    with pytest.raises(BadArgument, match=message):
        ns.sweep(wrap(family), CLEAN, CORRUPTED, "layers[:].output", ns.sequence_log_probability(answer))


def test_estimates_and_paths_read_one_position() -> None:
    model, metric = wrap("gpt2"), ns.sequence_log_probability("w7 w8")
    with pytest.raises(BadArgument, match="gradient of one metric at one position"):
        ns.attribute(model, CLEAN, CORRUPTED, "layers[:].output", metric, progress=False)
    with pytest.raises(BadArgument, match="path_patch reads one position"):
        ns.path_patch(model, CLEAN, CORRUPTED, "layers[0].heads[:]", "unembed", metric, progress=False)
