"""Recordings: prompts of several lengths in one padded pass, or in a pass for each length, hold the same numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import nnsplice as ns
from nnsplice.activations.encoding import encode
from nnsplice.atlas import unwrap
from nnsplice.packed import BaseRuns
from nnsplice.packed.recording import Recording, record, ways
from nnsplice.sweeps import choosing, plan_sweep, run
from zoo import double

PROMPTS = ["w3 w9", "w13 w24 w15 w5 w6 w7", "w3 w4 w5", "w8 w4 w5 w26 w17 w62", "w7 w6 w3 w3"]
METRIC = ns.logit_diff("w7", "w8")


def _recorded(model: Any, way: str) -> Recording:
    prompts = encode(model, PROMPTS)
    return record(BaseRuns(model, prompts, memo={"way": way}), range(len(PROMPTS)))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "gpt_neox", "opt", "gpt_oss"])
def test_a_padded_pass_records_what_a_pass_for_each_length_does(family: str) -> None:
    model = double(family)
    padded, single = _recorded(model, "padded"), _recorded(model, "exchanged")
    assert (padded.cost.forwards, single.cost.forwards) == (1, 4)
    assert padded.total == single.total == sum(len(prompt.split()) for prompt in PROMPTS)
    for number, prompt in enumerate(PROMPTS):
        mine, other = (slice(r.bases[number], r.bases[number] + len(prompt.split())) for r in (padded, single))
        for a, b in zip(padded.entering, single.entering, strict=True):
            assert torch.allclose(a[mine], b[other], rtol=0, atol=1e-12)
        for module, (keys, values) in padded.attended.items():
            for a, b in zip((keys, values), single.attended[module], strict=True):
                assert torch.allclose(a[:, mine], b[:, other], rtol=0, atol=1e-12)


def test_prompts_run_together_as_long_as_no_more_padding_than_tokens_runs() -> None:
    model = double("llama")
    texts = [" ".join(["w3"] * length) for length in (20, 2, 2, 3, 19)]
    recording = record(BaseRuns(model, encode(model, texts), memo={"way": "padded"}), range(len(texts)))
    assert list(recording.bases) == [0, 4, 3, 1, 2]  # by length, and 36 of 80 tokens are padding before the last
    assert recording.cost.forwards == 2
    assert recording.cost.tokens == 3 * (4 * 20 + 2)  # at three layers, padding too


def test_padding_is_a_way_only_where_lengths_differ() -> None:
    assert ways([3, 3]) == ("exchanged", "whole")
    assert ways([3, 4]) == ("padded", "exchanged", "whole")


def test_a_model_that_reads_the_length_of_its_batch_is_recorded_length_by_length() -> None:
    # Dynamic scaling of rotary angles looks at the longest prompt of a batch: padding would change the short ones.
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = double("llama", rope_parameters=rope, max_position_embeddings=4)
    clean, corrupted = ["w3 w4 w5", "w13 w14 w15 w4 w8 w7"], ["w3 w9 w5", "w13 w24 w15 w4 w8 w7"]
    padded, single = (_short(model, way) for way in ("padded", "exchanged"))
    assert not torch.allclose(padded, single, rtol=0, atol=1e-6)  # it would be wrong here
    plan = plan_sweep(model, clean, corrupted, "layers[:].output", METRIC)
    fast = run(plan, model, executor="packed", progress=False).table.values
    assert np.nanmax(np.abs(fast - run(plan, model, executor="reference", progress=False).table.values)) < 1e-12
    (answer,) = choosing._trusted[unwrap(model)].values()
    assert answer.way == "exchanged"


def _short(model: Any, way: str) -> torch.Tensor:
    """What the last layer makes of the shortest prompt."""
    recording = _recorded(model, way)
    return recording.entering[-1][recording.bases[0] : recording.bases[0] + 2]
