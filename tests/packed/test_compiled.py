"""Blocks that torch compiled: packed rows come in chunks of every size, and the blocks are not compiled for each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as hf
from packaging.version import Version
from torch._dynamo.utils import counters

import nnsplice as ns
import zoo

METRIC = ns.logit_diff(7, 8)
SITES = ["layers[:].output", "layers[:].mlp.output"]


def prompts(length: int) -> tuple[list[int], list[int]]:
    tokens = torch.randint(3, zoo.VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    return tokens, [(tokens[0] + 5) % zoo.VOCAB, *tokens[1:]]


@pytest.mark.filterwarnings("ignore")  # of what dynamo cannot trace
def test_compiled_blocks_are_not_compiled_anew_for_every_chunk():
    clean, corrupted = map(list, zip(*(prompts(length) for length in (7, 12)), strict=True))

    def swept(model, **options):
        return ns.sweep(model, clean, corrupted, SITES, METRIC, progress=False, **options)

    module = zoo.build("llama", num_hidden_layers=2).double()
    expected = swept(ns.load(module, tokenizer=zoo.tokenizer()))
    compiled = zoo.build("llama", num_hidden_layers=2).double()
    for block in compiled.model.layers:
        block.compile(backend="eager")
    model = ns.load(compiled, tokenizer=zoo.tokenizer())
    torch._dynamo.reset()
    counters.clear()
    graphs, calls = [], []
    for options in ({"executor": "batched"}, {}, {"max_tokens": 70}, {"max_tokens": 50}, {"max_tokens": 33}):
        found = swept(model, **options)
        assert np.nanmax(np.abs(found.table.values - expected.table.values)) < 1e-12
        assert found.run.executor == options.get("executor", "packed")
        graphs.append(counters["stats"]["unique_graphs"])
        calls.append(found.run.block_calls)
    assert 0 < graphs[0] < graphs[1]  # packed rows go through the compiled blocks
    assert calls[2] < calls[3] < calls[4]  # in more chunks each time
    if Version(hf.__version__) < Version("5.23"):
        return  # under transformers 5.18 dynamo does compile them anew: 169 graphs, then 190
    assert graphs[3] == graphs[4] and graphs[4] - graphs[1] <= 2 * 2  # once more for sizes that vary
    torch._dynamo.reset()
