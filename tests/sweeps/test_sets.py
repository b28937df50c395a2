"""Sets of sites, changed together in one run: against torch hooks at all of them at once."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nnsplice as ns
from hooked import kept_at, run_with
from nnsplice.activations.access import site_of
from nnsplice.errors import BadArgument, BadType, DuplicatePath, OverlappingWrite, ShortRow
from nnsplice.paths import Slice
from nnsplice.sweeps import Plan, plan_sweep, run
from zoo import FAMILIES, double, having, wrap

CLEAN, CORRUPTED = "w3 w4 w5 w6 w7 w11", "w3 w9 w5 w6 w8 w11"
METRIC = ns.logit_diff("w7", "w8")
PLACES = (
    "layers[0].input", "layers[1].input", "layers[:].output", "layers[:].attn.output", "layers[:].mlp.output",
    "layers[:].heads[:].output", "layers[:].heads[:].q", "layers[:].groups[:].k", "layers[:].groups[:].v",
)  # fmt: skip
#: Sites of one layer, where one stands before the other or beside it.
WITHIN = (
    ["layers[1].heads[2].output[3]", "layers[1].attn.output[3]"],
    ["layers[1].heads[1].q[4]", "layers[1].groups[0].k[1]"],
    ["layers[1].input[1]", "layers[1].output[4]"],
    ["layers[1].groups[1].k[1]", "layers[1].groups[1].v[1,4]", "layers[1].heads[3].output[-1]"],
    ["layers[2].heads[:].output[-1]", "layers[2].mlp.output[-1]"],
    ["layers[1].output[4]", "layers[2].input[4]"],
    ["layers[1].attn.output[1]", "layers[1].mlp.output[4]"],
)
DECODERS = [family for family in (*FAMILIES, "gpt_oss") if family not in ("t5", "bart", "bert")]


def _ids(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


def _random_sets(model: Any, count: int, seed: int) -> list[list[str]]:
    chosen = random.Random(seed)
    places = [str(place.place) for site in having(model, PLACES) for place in ns.expand(model, f"{site}[0]")]
    sets: list[list[str]] = []
    while len(sets) < count:
        some = chosen.sample(places, chosen.choice([2, 2, 3, 4]))
        tokens = ["[:]", "[1:5]", *(f"[{n}]" for n in range(6)), "[-1]", "[1,4]"]
        sets.append([place + chosen.choice(tokens) for place in some])
    return sets


def _tokens(plan: Plan, number: int) -> list[tuple[Any, list[int]]]:
    """The sites of a cell and their tokens, read off its name alone."""
    found = []
    for name in plan.targets[number].cell.path.split(" + "):
        path = ns.parse_path(name)
        at: Any = range(6) if path.position is None else path.position
        at = at.range(6) if isinstance(at, Slice) else [at] if isinstance(at, int) else at
        found.append((name, [token % 6 for token in at]))
    return found


def by_hooks(model: Any, plan: Plan, operation: str) -> np.ndarray:
    """Every set, with a hook for each of its sites."""
    values = []
    for number in range(len(plan.targets)):
        sites = [
            (site_of(place), tokens)
            for name, tokens in _tokens(plan, number)
            for place in ns.expand(model, ns.parse_path(name).place)
        ]
        kept = kept_at(model, _ids(CLEAN), [site for site, _ in sites])

        def act(held: torch.Tensor, site: Any, tokens: list[int], kept: Any = kept) -> torch.Tensor:
            new = held.clone()
            new[tokens] = kept[site][tokens] if operation == "patch" else 2 * held[tokens] - 1
            return new

        acts = [(site, lambda held, s=site, t=tokens: act(held, s, t)) for site, tokens in sites]
        logits = run_with(model, _ids(CORRUPTED), acts)[-1]
        values.append(float(logits[7] - logits[8]))
    return np.array(values)


def double_less_one(value: torch.Tensor) -> torch.Tensor:
    return 2 * value - 1


@pytest.mark.parametrize("operation", ["patch", double_less_one], ids=["patch", "function"])
@pytest.mark.parametrize("family", DECODERS)
def test_sets_are_what_hooks_at_all_their_sites_give(family: str, operation: Any) -> None:
    model = double(family)
    within = [sites for sites in WITHIN if len(having(model, sites)) == len(sites)]
    plan = plan_sweep(model, CLEAN, CORRUPTED, [*within, *_random_sets(model, 14, 0)], METRIC, operation=operation)
    expected = by_hooks(model, plan, "patch" if operation == "patch" else "function")
    result = run(plan, model, progress=False)
    assert np.abs(result.table.values[0] - expected).max() < 1e-11
    # Not because sets are what one of their sites does.
    assert np.abs(expected - result.corrupted[0]).max() > 1e-3


@pytest.mark.parametrize("operation", ["patch", "zero", "noise", "mean", "resample", "add", double_less_one])
@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom", "mixtral"])
def test_every_operation_on_sets_is_the_same_in_every_executor(family: str, operation: Any) -> None:
    model = double(family)
    sets = [*(s for s in WITHIN if len(having(model, s)) == len(s)), *_random_sets(model, 4, 1)]
    needs = operation in ("mean", "resample", "add")
    sites = sorted({ns.parse_path(path).place for one in sets for path in one}, key=str)
    reference = ns.capture(
        model, ["w20 w21 w22 w23 w24 w62"] * 2, [s.at(ns.parse_path("embed[:]").position) for s in sites]
    )
    plan = plan_sweep(
        model, CLEAN, CORRUPTED, [*sets, "layers[1].output[1]"], METRIC, operation=operation,
        reference=reference if needs else None, seed=2,
    )  # fmt: skip
    found = {
        name: run(plan, model, executor=name, progress=False).table.values for name in ("reference", "batched", "auto")
    }
    assert np.abs(found["batched"] - found["reference"]).max() < 1e-11
    assert np.abs(found["auto"] - found["reference"]).max() < 1e-11


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gptj"])
def test_packed_rows_run_sets(family: str) -> None:
    model = double(family)
    sets = [s for s in WITHIN if len(having(model, s)) == len(s)]
    assert ns.sweep(model, CLEAN, CORRUPTED, sets, METRIC, progress=False).run.executor == "packed"


def test_sets_of_an_encoder_and_a_decoder() -> None:
    model = double("t5")
    sets = [["encoder.layers[1].output[1]", "layers[1].output[0]"], ["encoder.layers[:].mlp.output[1]"]]
    plan = plan_sweep(model, CLEAN, CORRUPTED, sets, METRIC)
    a, b = (run(plan, model, executor=name, progress=False).table.values for name in ("reference", "batched"))
    assert np.abs(a - b).max() < 1e-11


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_sets_known_without_computing_are_what_computing_gives(family: str) -> None:
    model = double(family)
    late = ns.logit_diff("w7", "w8", position=3)
    sets = [
        ["layers[0].output[0]", "layers[2].output[2]"], ["layers[0].output[0]", "layers[1].mlp.output[0]"],
        ["layers[0].output[5]", "layers[1].output[4]"], ["layers[0].output[0]", "layers[1].output[5]"],
        ["layers[0].output[0]", "layers[1].output[1]"], ["layers[2].mlp.output[1]", "layers[2].output[2]"],
        *_random_sets(model, 20, 3),
    ]  # fmt: skip
    with pytest.warns(UserWarning, match="after the position") if family != "bert" else _nothing():
        plan = plan_sweep(model, CLEAN, CORRUPTED, sets, late)
    everything = replace(plan, jobs=tuple(sorted({*plan.jobs, *plan.known})), known=())
    pruned = run(plan, model, executor="reference", progress=False).table.values
    assert np.abs(run(everything, model, executor="reference", progress=False).table.values - pruned).max() < 1e-12
    assert len(plan.known) >= 4 if family != "bert" else not plan.known


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()


def test_a_set_with_a_span_that_stands_elsewhere_in_the_clean_prompt_prunes_nothing_it_moves() -> None:
    # The span writes before the first token that differs, so a token after it is no longer what both runs have.
    model = double("llama")
    clean, corrupted = "w3 w4 w5 w6 w7 w8", "w3 w4 w5 w6 w7 w9"
    spans = {"clean": {"subject": [(2, 3)]}, "corrupted": {"subject": [(0, 1)]}}
    sets = [['layers[0].output["subject"]', "layers[1].output[1]"]]
    plan = plan_sweep(model, clean, corrupted, sets, METRIC, spans=spans)
    found = {n: run(plan, model, executor=n, progress=False) for n in ("reference", "batched", "packed")}
    for result in found.values():
        assert abs(result.table.values[0, 0] - found["reference"].table.values[0, 0]) < 1e-12
    first, second = site_of(ns.expand(model, "layers[0].output")[0]), site_of(ns.expand(model, "layers[1].output")[0])
    kept = kept_at(model, _ids(clean), [first, second])

    def put(at: int, value: torch.Tensor) -> Any:
        def act(held: torch.Tensor) -> torch.Tensor:
            held[at] = value
            return held

        return act

    acts = [(first, put(0, kept[first][2])), (second, put(1, kept[second][1]))]
    logits = run_with(model, _ids(corrupted), acts)[-1]
    assert abs(found["packed"].table.values[0, 0] - float(logits[7] - logits[8])) < 1e-12


def test_spans_of_sets_stand_where_each_prompt_has_them() -> None:
    model = double("gpt2")
    clean, corrupted = ["w3 w4 w5 w6", "w13 w14 w15"], ["w3 w9 w10 w6", "w13 w24 w15"]
    spans = {"subject": [(1, 3), (1, 2)]}
    both = [['layers[0].output["subject"]', "layers[1].heads[2].output[-1]"]]
    result = ns.sweep(model, clean, corrupted, both, METRIC, spans=spans, progress=False)
    alone = [
        ns.sweep(
            model,
            clean[0],
            corrupted[0],
            [["layers[0].output[1,2]", "layers[1].heads[2].output[3]"]],
            METRIC,
            progress=False,
        ),
        ns.sweep(
            model,
            clean[1],
            corrupted[1],
            [["layers[0].output[1]", "layers[1].heads[2].output[2]"]],
            METRIC,
            progress=False,
        ),
    ]
    assert np.abs(result.table.values[:, 0] - [one.table.values[0, 0] for one in alone]).max() < 1e-12


def test_a_set_of_one_site_is_that_site_and_a_slice_in_it_is_a_window() -> None:
    model = double("llama")
    single = ns.sweep(model, CLEAN, CORRUPTED, "layers[1].output[1]", METRIC, progress=False)
    joint = ns.sweep(model, CLEAN, CORRUPTED, [["layers[1].output[1]"]], METRIC, progress=False)
    assert abs(single.table.values - joint.table.values).max() < 1e-12
    window = ns.sweep(model, CLEAN, CORRUPTED, "layers[:].mlp.output[1]", METRIC, window=3, progress=False)
    joint = ns.sweep(model, CLEAN, CORRUPTED, [["layers[0:3].mlp.output[1]"]], METRIC, progress=False)
    assert abs(window.table.values[0, 1] - joint.table.values[0, 0]) < 1e-12


def test_all_tokens_of_a_set_are_changed_where_it_says_none() -> None:
    model = double("llama")
    heads = ["layers[1].heads[2]", "layers[2].heads[1]"]
    joint = ns.ablate(model, CORRUPTED, [heads], METRIC, progress=False)
    acts = [
        (site_of(place), lambda held: torch.zeros_like(held))
        for place in ns.expand(model, [f"{h}.output" for h in heads])
    ]
    logits = run_with(model, _ids(CORRUPTED), acts)[-1]
    assert abs(joint.table.values[0, 0] - float(logits[7] - logits[8])) < 1e-12
    assert joint.grid().set.values.tolist() == ["layers[1].heads[2].output + layers[2].heads[1].output"]


@pytest.mark.parametrize("with_", ["mean", "resample"])
def test_pairs_are_ablated_by_means_and_samples(with_: str) -> None:
    model = double("gpt2")
    pairs = [list(pair) for pair in combinations([f"layers[1].heads[{h}]" for h in range(4)], 2)]
    a, b = (
        ns.ablate(model, CORRUPTED, pairs, METRIC, operation=with_, executor=name, progress=False).table.values
        for name in ("reference", "packed")
    )
    assert np.abs(a - b).max() < 1e-12 and len(pairs) == a.shape[1] == 6


# --- the result -------------------------------------------------------------------------------------------------------


def _mixed(model: Any, **options: Any) -> ns.SweepResult:
    pairs = [["layers[0].heads[1]", f"layers[1].heads[{h}]"] for h in range(3)]
    return ns.sweep(model, CLEAN, CORRUPTED, ["layers[:].output[1]", *pairs], METRIC, progress=False, **options)


def test_sets_have_an_axis_of_their_own(tmp_path: Path) -> None:
    result = _mixed(double("llama"))
    grid = result.grid("sets")
    assert grid.dims == ("prompt", "set")
    names = [f"layers[0].heads[1].output + layers[1].heads[{h}].output" for h in range(3)]
    assert grid.set.values.tolist() == names
    assert result.grid("layers[:].output").dims == ("prompt", "layer", "position")
    frame = result.frame()
    assert frame["set"].isna().tolist() == [True] * 3 + [False] * 3 and frame["set"].tolist()[3:] == names
    best = result.best(6)
    assert set(best["set"].dropna()) == set(names)
    axes = result.plot("sets")
    assert [text.get_text() for text in axes.get_yticklabels()] == [f"L0H1 + L1H{h}" for h in range(3)]
    result.to_html(tmp_path / "page.html")
    assert names[1] in (tmp_path / "page.html").read_text()
    result.to_file(tmp_path / "result.safetensors")
    again = ns.SweepResult.from_file(tmp_path / "result.safetensors")
    assert again == result and again.cells == result.cells


def test_the_order_in_a_set_is_no_part_of_the_question() -> None:
    model = double("llama")
    forth = ns.sweep(model, CLEAN, CORRUPTED, [["layers[0].output[1]", "L1H2"]], METRIC, progress=False)
    back = ns.sweep(
        model, CLEAN, CORRUPTED, [("layers[1].heads[2].output[:]", "layers[0].output[1]")], METRIC, progress=False
    )
    assert forth == back
    twice = plan_sweep(model, CLEAN, CORRUPTED, [["L0H1", "L1H2"], ["L1H2", "L0H1"]], METRIC)
    assert len(twice.targets) == 1


def test_shards_and_journals_of_sets(tmp_path: Path) -> None:
    model = double("llama")
    whole = _mixed(model, journal=tmp_path / "run.jsonl")
    assert _mixed(model, journal=tmp_path / "run.jsonl") == whole
    pairs = [["layers[0].heads[1]", f"layers[1].heads[{h}]"] for h in range(3)]
    plan = plan_sweep(model, CLEAN, CORRUPTED, ["layers[:].output[1]", *pairs], METRIC)
    parts = [run(plan.shard(n, 2), model, progress=False) for n in range(2)]
    assert np.abs(ns.SweepResult.merge(parts).table.values - whole.table.values).max() < 1e-12
    with pytest.raises(ns.errors.NnspliceError, match="sites"):
        ns.sweep(model, CLEAN, CORRUPTED, pairs, METRIC, progress=False, journal=tmp_path / "run.jsonl")


def test_noise_at_a_site_is_the_same_in_a_set() -> None:
    model = double("llama")
    last = "layers[2].output[-1]"
    one = ns.sweep(model, CLEAN, None, last, METRIC, operation="noise", progress=False)
    # What comes last in the run decides alone, whatever was done before it.
    two = ns.sweep(model, CLEAN, None, [[last, "layers[2].mlp.output[0]"]], METRIC, operation="noise", progress=False)
    assert abs(one.table.values - two.table.values).max() < 1e-12


def test_two_parts_of_what_one_module_returns_are_two_sites() -> None:
    parts = [f"model.model.layers[1].mlp.gate.output[{item}][1]" for item in (1, 2)]  # the weights, and whose they are
    (target,) = plan_sweep(wrap("mixtral"), CLEAN, CORRUPTED, [parts], METRIC).targets
    assert len(target.parts) == 2


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sites", "error", "said"),
    [
        ([[]], BadArgument, "an empty set"),
        ([["layers[0].output", ["layers[1].output"]]], BadType, "a set of sites within a set"),
        ([["layers[0].output", 3]], BadType, "int in a set"),
        ([["layers[0].output[1]", "layers[0].output[1]"]], DuplicatePath, "twice"),
        ([["layers[0].heads[1]", "L0H1.output[:]"]], DuplicatePath, "twice"),
        ([["layers[0].output[1]", "layers[0].output[-5]"]], OverlappingWrite, "token 1 of prompt 0"),
        ([["layers[2].output[3]", "layers[2].output[:]"]], OverlappingWrite, "token 3 of prompt 0"),
        ([["layers[2].heads[:].output[3]", "layers[2].heads[1].output[1:4]"]], OverlappingWrite, "token 3"),
        ([["layers[0].attn.k", "layers[0].groups[1].k[2]"]], OverlappingWrite, "token 2"),
        ([["layers[0].output[9]", "layers[1].output"]], ShortRow, "no prompt has"),
        ([["layers[0].output[3:9]", "layers[1].output"]], ShortRow, "no prompt has"),
        ([['layers[0].output["subject"]']], ns.errors.NnspliceError, "subject"),
    ],
)  # fmt: skip
def test_mistakes_in_sets_are_told(sites: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        plan_sweep(double("llama"), CLEAN, CORRUPTED, sites, METRIC)


def test_sites_of_one_place_that_share_no_number_are_a_set() -> None:
    sets = [
        ["layers[2].output[3]", "layers[2].output[:3]"],
        ["layers[2].heads[0].output[3]", "layers[2].heads[1].output[3]"],
    ]
    assert len(plan_sweep(double("llama"), CLEAN, CORRUPTED, sets, METRIC).targets) == 2


def test_windows_and_estimates_and_senders_refuse_sets() -> None:
    model, pair = double("llama"), [["layers[0].heads[1]", "layers[1].heads[0]"]]
    with pytest.raises(BadArgument, match="window=3 beside sets"):
        plan_sweep(model, CLEAN, CORRUPTED, pair, METRIC, window=3)
    with pytest.raises(BadArgument, match="not the sum"):
        ns.attribute(model, CLEAN, CORRUPTED, pair, METRIC, method="atp")  # type: ignore[arg-type]
    with pytest.raises(BadArgument, match="single senders"):
        ns.path_patch(model, CLEAN, CORRUPTED, pair, "unembed", METRIC)  # type: ignore[arg-type]


def test_a_prompt_without_all_tokens_of_a_set_has_no_such_cell() -> None:
    model = double("llama")
    sets = [["layers[0].output[1]", "layers[1].output[3]"], ["layers[0].output[1]", "layers[1].output[-1]"]]
    result = ns.sweep(model, ["w3 w4 w5 w6", "w3 w4 w5"], ["w3 w9 w5 w6", "w3 w9 w5"], sets, METRIC, progress=False)
    assert result.table.exists.tolist() == [[True, True], [False, True]]
