"""What device code costs grows with the blocks of a model, and not with the tokens or cells that are asked about."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import nnsplice as ns
import zoo
from machine import placed
from nnsplice import digests, engine
from nnsplice.engine.memory import bytes_per_token
from nnsplice.packed import layout
from nnsplice.sweeps import plan_sweep, run
from nnsplice.sweeps.choosing import choose
from nnsplice.sweeps.executors import Work
from nnsplice.sweeps.packing import corrupted_logits, run_packed
from nnsplice.sweeps.unedited import clean_run

METRIC = ns.logit_diff(7, 8)
FAMILIES = ["gpt2", "llama"]
STREAM = ["layers[:].output", "layers[:].mlp.output", "layers[:].attn.output"]


def prompts(length: int, seed: int = 0) -> tuple[list[int], list[int]]:
    """A pair of prompts of so many tokens, which differ in the first."""
    tokens = torch.randint(3, zoo.VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return tokens, [(tokens[0] + 5) % zoo.VOCAB, *tokens[1:]]


def work_of(model: Any, length: int, sites: Any = STREAM, **options: Any) -> Work:
    """A sweep that is about to run, with everything that is measured once done."""
    clean, corrupted = prompts(length)
    if options:
        clean = None
    plan = plan_sweep(model, clean, corrupted, sites, METRIC, **options)
    logits, source, _ = clean_run(model, plan, 10_000)
    work = Work(model, plan, source, logits)
    assert choose("packed", work)[0] == "packed"
    corrupted_logits(work, range(len(plan.corrupted)))  # the recorded pass
    return work


def chunk(simulated: Any, work: Work) -> Any:
    """What all jobs in one chunk spend, after the recorded pass."""
    with simulated.measured() as spent:
        values, _ = run_packed(work, work.plan.jobs)
    assert spent.launches > 50 and len(values) == len(work.plan.jobs)
    return spent


@pytest.mark.parametrize("family", FAMILIES)
def test_a_chunk_launches_as_much_for_8_tokens_as_for_32(machine, family):
    simulated = machine(1)
    model = placed.model(family, "one")
    short, long = (chunk(simulated, work_of(model, length)) for length in (8, 32))
    assert short.launches == long.launches and short.waits == long.waits
    assert long.extra() > 1.5 * short.extra()  # it is the work in each that grows
    assert short.copied_bytes["h2d"] < long.copied_bytes["h2d"]


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_comes_back_to_the_host_before_the_metric(machine, family):
    simulated = machine(1)
    model = placed.model(family, "one")
    for sites in (STREAM, "layers[:].heads[:].output", "layers[:].attn.v", "layers[:].input"):
        spent = chunk(simulated, work_of(model, 8, sites))
        assert not spent.within("d2h", "packed/") and not spent.within("waits", "packed/")
        assert spent.copies["d2h"] == 1 and spent.waits <= 4, spent.lines["waits"]  # all of the metric


@pytest.mark.parametrize("family", FAMILIES)
def test_knockouts_launch_and_wait_as_much_for_8_tokens_as_for_32(machine, family):
    simulated = machine(1)
    model = placed.model(family, "one")
    sites = "layers[:].heads[:].pattern[-1][0:6]"
    short, long = (chunk(simulated, work_of(model, length, sites, operation="knockout")) for length in (8, 32))
    assert not long.within("waits", "packed/") and long.waits == short.waits <= 4
    assert long.launches == short.launches


@pytest.mark.parametrize("place", ["one", "split"])
def test_waits_of_a_whole_sweep_do_not_grow_with_tokens_and_hardly_with_blocks(machine, place):
    simulated, found = machine(2), {}
    for layers in (3, 6):
        for length in (8, 32):
            model = placed.model("llama", place, num_hidden_layers=layers)
            clean, corrupted = prompts(length)
            plan = plan_sweep(model, clean, corrupted, STREAM, METRIC)
            run(plan, model, executor="packed", progress=False)  # what is asked once of a model is asked here
            with simulated.measured() as spent:
                result = run(plan, model, executor="packed", progress=False)
            assert spent.launches > 100 and result.run.executor == "packed"
            found[layers, length] = spent.waits
    assert found[3, 8] == found[3, 32] and found[6, 8] == found[6, 32]
    assert found[6, 8] - found[3, 8] <= 3 * 4  # captures of the clean run are read at each site


@pytest.mark.parametrize("operation", ["noise", "mean", "resample"])
def test_values_are_made_once_for_a_layer(machine, operation):
    simulated, found = machine(1), []
    model = placed.model("llama", "one")
    for length in (8, 32):
        options: dict[str, Any] = {"operation": operation}
        if operation != "noise":
            options["reference"] = ns.capture(model, [prompts(5, 1)[0], prompts(5, 2)[0]], "layers[:].output[:]")
        spent = chunk(simulated, work_of(model, length, "layers[:].output", **options))
        found.append((spent.launches, spent.copies["h2d"]))
        assert not spent.within("waits", "packed/")
    assert found[0] == found[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wait_in_the_packed_rows_would_be_seen(machine, family, monkeypatch):
    """The same counts with what used to be there: a question about each mask."""
    simulated = machine(1)
    model = placed.model(family, "one")
    work = work_of(model, 8)
    plain = layout.AttentionGroup._mask_of

    def asking(self: Any, table: Any) -> Any:
        made = plain(self, table)
        assert made is None or not bool(made.all())
        return made

    monkeypatch.setattr(layout.AttentionGroup, "_mask_of", asking)
    assert chunk(simulated, work).waits > 3


HEADS, QUERIES = "layers[:].heads[:].output", "layers[1].heads[:].q"
ASKED: dict[str, Any] = {
    "path patches": lambda m, pair: ns.path_patch(
        m, pair[0], pair[1], HEADS, "layers[2].heads[:].q", METRIC, progress=False
    ),
    **{
        f"{method} of {sites}": lambda m, pair, method=method, sites=sites: ns.attribute(
            m, pair[0], pair[1], sites, METRIC, method=method, steps=2 if method == "eap-ig" else None, progress=False
        )
        for method, sites in [("atp", HEADS), ("atp*", HEADS), ("atp*", QUERIES), ("eap", HEADS), ("eap-ig", HEADS)]
    },
}


@pytest.mark.parametrize("asked", ASKED)
def test_attribution_waits_for_blocks_and_not_for_edges_cells_or_tokens(machine, asked):
    simulated, found = machine(1), []
    for length, heads in ((8, 4), (32, 4), (8, 2)):
        model = placed.model("llama", "one", num_attention_heads=heads, num_key_value_heads=2)
        ASKED[asked](model, prompts(length))  # what is asked once of a model is asked here
        with simulated.measured() as spent:
            result = ASKED[asked](model, prompts(length))
        assert spent.launches > 100 and result.table.values.size >= heads
        found.append(spent)
    short, long, few = found
    assert short.waits == long.waits == few.waits <= 20 + 4 * 3, long.lines["waits"].most_common(8)
    # Keys of another run are tried token by token; queries, outputs and edges are not.
    assert long.launches == short.launches


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_peak_of_a_chunk_is_within_what_was_planned(machine, family):
    simulated = machine(1)
    model = placed.model(family, "one")
    for length in (8, 32, 60):
        work = work_of(model, length)
        spent = chunk(simulated, work)
        tokens = sum(length - n % length for _, n in work.plan.jobs)
        assert 0 < spent.extra() <= tokens * bytes_per_token(model)


@pytest.mark.parametrize("share", [0.9, 0.6, 0.4])
def test_memory_that_runs_out_changes_no_value(machine, share):
    simulated = machine(1)
    model = placed.model("llama", "one")
    clean, corrupted = prompts(24)
    plan = plan_sweep(model, clean, corrupted, STREAM, METRIC)
    run(plan, model, progress=False)  # what is asked once of a model is asked here
    with simulated.measured() as spent:
        expected = run(plan, model, progress=False)
    simulated.capacity = spent.before["cuda:0"] + int(share * spent.extra())
    with simulated.measured() as spent:
        found = run(plan, model, progress=False, max_tokens=100_000)
    assert spent.launches > 100 and found.run.executor == "packed"
    assert spent.peak["cuda:0"] <= simulated.capacity
    assert np.nanmax(np.abs(found.table.values - expected.table.values)) < 1e-12
    assert found.run.block_calls > expected.run.block_calls  # it took more chunks


# --- digests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", placed.PLACES)
def test_a_digest_waits_once_for_each_device_and_reads_nothing_twice(machine, place):
    expected = engine.weights_digest(placed.model("llama", "cpu"))
    simulated = machine(2)
    model = placed.model("llama", place)
    with simulated.measured() as first:
        assert engine.weights_digest(model, anew=True) == expected
    parameters = len(list(model._module.parameters()))
    if place != "cpu":
        assert 0 < first.launches < 20 * parameters
    assert first.waits == {"cpu": 0, "one": 1, "split": 2}[place]
    with simulated.measured() as again:
        assert engine.weights_digest(model) == expected
    assert (again.launches, again.waits) == (0, 0)


def test_a_large_tensor_is_summed_in_few_launches(machine):
    simulated, numbers = machine(1), torch.arange((1 << 18) * 40 + 3)
    expected = digests.checksum(numbers)
    with simulated.measured() as spent:
        assert digests.checksum(numbers.to("cuda")) == expected
    assert 0 < spent.launches < 30 and spent.waits == 2  # one is of the copy to the device
