"""Questions to a model on one device, and to one that is split over two: the CPU's numbers, by the same executor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nnsplice as ns
from machine import placed
from nnsplice.results import SweepResult

METRIC = ns.logit_diff("w7", "w8")
CLEAN, CORRUPTED = ["w3 w4 w5 w9", "w62 w4 w5 w61"], ["w3 w6 w5 w9", "w62 w8 w5 w61"]
RAGGED = ["w3 w4 w5 w9", "w62 w4"], ["w3 w6 w5 w9", "w62 w8"]
SITES = ["layers[:].output", "layers[:].attn.output", "layers[:].mlp.output", "layers[:].heads[:].output[-1]"]
HEADS = "layers[:].heads[:].output"

ASKED: dict[str, Callable[[Any], SweepResult]] = {
    "sweep": lambda m: ns.sweep(m, CLEAN, CORRUPTED, SITES, METRIC, progress=False),
    "ragged sweep": lambda m: ns.sweep(m, *RAGGED, SITES, METRIC, progress=False),
    "sets": lambda m: ns.sweep(
        m, CLEAN, CORRUPTED, [["layers[0].heads[1]", "layers[2].mlp"], ["layers[1].output"]], METRIC, progress=False
    ),
    "knockout": lambda m: ns.sweep(
        m, None, CORRUPTED, "layers[:].heads[:].pattern[-1][:2]", METRIC, operation="knockout", progress=False
    ),
    "zero": lambda m: ns.ablate(m, CLEAN, SITES[1:], METRIC, progress=False),
    "mean": lambda m: ns.ablate(m, CLEAN, SITES[1:], METRIC, operation="mean", progress=False),
    "noise": lambda m: ns.causal_trace(m, CLEAN, "w4", answer="w7", samples=2, progress=False),
    "paths": lambda m: ns.path_patch(m, CLEAN, CORRUPTED, HEADS, "layers[2].heads[:].q", METRIC, progress=False),
    "paths to the end": lambda m: ns.path_patch(
        m, CLEAN, CORRUPTED, HEADS, "layers[2].output[-1]", METRIC, progress=False
    ),
    **{
        method: lambda m, method=method: ns.attribute(
            m, CLEAN, CORRUPTED, HEADS, METRIC, method=method, verify=2, progress=False
        )
        for method in ("atp", "atp*", "eap", "eap-ig", "relp")
    },
}
#: Attention with code of its own, which runs whole prompts; and a window.
SOME = [("gptj", asked) for asked in ("ragged sweep", "sets", "zero", "paths")] + [("gpt_neo", "sweep")]
#: Families, questions and sites: keys and values that groups share on two devices, and one device.
CASES = [
    *(("llama", asked, "split") for asked in ASKED),
    *(("gpt2", asked, "one") for asked in ASKED),
    *((family, asked, "split") for family, asked in [*SOME, ("gpt2", "sweep"), ("gpt2", "relp")]),
]


def numbers(result: SweepResult) -> list[np.ndarray]:
    """Everything that was measured."""
    table = result.table
    return [part for part in (table.values, table.edges, table.exact, table.clean, table.corrupted) if part is not None]


@pytest.mark.parametrize(("family", "asked", "place"), CASES)
def test_the_numbers_are_those_of_the_cpu(machine, family, asked, place):
    expected = ASKED[asked](placed.model(family, "cpu"))
    simulated = machine(2)
    model = placed.model(family, place)
    with simulated.measured() as spent:
        found = ASKED[asked](model)
    assert spent.launches > 100 and (spent.copies["d2d"] > 0) is (place == "split")
    assert (found.run.executor, found.run.note) == (expected.run.executor, expected.run.note)
    assert "packed" in found.run.executor or asked in ("atp", "atp*", "eap", "eap-ig", "relp")
    for one, other in zip(numbers(found), numbers(expected), strict=True):
        assert np.array_equal(np.isnan(one), np.isnan(other))
        assert np.nanmax(np.abs(one - other)) < 1e-12
    assert np.nanstd(expected.table.values) > 1e-5  # an answer that is the same everywhere would equal another


@pytest.mark.parametrize("place", placed.PLACES[1:])
def test_a_journal_is_resumed_on_another_machine(machine, place, tmp_path: Path):
    journal = tmp_path / "journal.jsonl"
    expected = ns.sweep(placed.model("llama", "cpu"), CLEAN, CORRUPTED, HEADS, METRIC, progress=False, journal=journal)
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join(lines[: len(lines) // 2]) + "\n")
    with machine(2).measured() as spent:
        found = ns.sweep(
            placed.model("llama", place), CLEAN, CORRUPTED, HEADS, METRIC, progress=False, journal=journal, max_tokens=8
        )
    assert spent.launches > 100
    assert np.nanmax(np.abs(found.table.values - expected.table.values)) < 1e-12


@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj"])
def test_what_packed_rows_cannot_do_on_several_devices_goes_to_the_next_executor(machine, family, monkeypatch):
    from nnsplice.packed import recording

    expected = ns.sweep(placed.model(family, "cpu"), CLEAN, CORRUPTED, SITES, METRIC, progress=False)
    machine(2)
    model = placed.model(family, "split")
    monkeypatch.setattr(recording.Recording, "arguments", lambda self, layer, tokens: {"x": torch.ones(1) + tokens})
    found = ns.sweep(model, CLEAN, CORRUPTED, SITES, METRIC, progress=False)
    assert found.run.executor == "batched" and found.run.note.startswith(
        "not packed: RuntimeError: Expected all tensors"
    )
    assert np.nanmax(np.abs(found.table.values - expected.table.values)) < 1e-12


@pytest.mark.parametrize("place", placed.PLACES[1:])
def test_captures_and_replays_are_those_of_the_cpu(machine, place):
    paths = [
        "layers[:].output[:]",
        "layers[:].heads[:].output[-1]",
        "layers[:].heads[:].pattern[-1]",
        "embed.output[0]",
    ]
    here = placed.model("llama", "cpu", attn_implementation="eager")
    clean = ns.capture(here, CLEAN, paths)
    logits = ns.patched_logits(here, CORRUPTED, ns.capture(here, CLEAN, "layers[1].output[1]"))
    machine(2)
    model = placed.model("llama", place, attn_implementation="eager")
    found = ns.capture(model, CLEAN, paths)
    assert {str(value.device) for _, value in found.items()} == {"cuda:0"} | ({"cuda:1"} if place == "split" else set())
    for (path, one), (other_path, other) in zip(found.items(), clean.items(), strict=True):
        assert path == other_path and (one.cpu() - other).abs().max() < 1e-12
    patched = ns.patched_logits(model, CORRUPTED, ns.capture(model, CLEAN, "layers[1].output[1]"))
    assert (patched.cpu() - logits).abs().max() < 1e-12
