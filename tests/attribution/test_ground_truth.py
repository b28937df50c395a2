"""On models whose circuit is known: which of its sites each method puts on top, and which it cannot see."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest

import nnsplice as ns
import zoo
from models.circuits import CIRCUITS
from models.ground_truth import FORMS

SITES = ["embed"]
SITES += [f"layers[:]{part}" for part in (".input", ".attn", ".mid", ".mlp", ".output", ".heads[:]")]
#: What stands behind the last choice that attention makes: from there on the model is a straight line.
BEHIND = ("layers[2].heads[2]", "layers[2].attn", "layers[2].mid", "layers[2].output", "layers[3]")


@lru_cache
def _task(form: str, name: str) -> tuple:
    circuit = CIRCUITS[name]
    model = ns.load(FORMS[form](circuit), tokenizer=zoo.tokenizer())
    prompts = [[list(row) for row in rows] for rows in (circuit.clean, circuit.corrupted)]
    return model, *prompts, ns.logit_diff(list(circuit.answers), list(circuit.wrong))


def _sizes(form: str, name: str, sites: Any, **options: Any) -> dict[str, float]:
    model, clean, corrupted, metric = _task(form, name)
    best = ns.attribute(model, clean, corrupted, sites, metric, progress=False, **options).best(10_000)
    return dict(zip(best["path"], best["effect"].abs(), strict=True))


def _on_top(sizes: dict[str, float], on: frozenset[str]) -> bool:
    """Whether the known sites come first."""
    return set(list(sizes)[: len(on)]) == on


@pytest.mark.parametrize("method", ["atp", "atp*", "ig"])
@pytest.mark.parametrize("form", FORMS)
def test_where_attention_looks_at_the_same_tokens_the_whole_circuit_is_on_top(form: str, method: str) -> None:
    sizes = _sizes(form, "fact", SITES, method=method)
    on = CIRCUITS["fact"].on & set(sizes)
    assert len(on) == 17 and _on_top(sizes, on)
    off = max(size for path, size in sizes.items() if path not in on)
    assert min(sizes[path] for path in on) > 0.2 > 1e-6 > off
    if method != "atp*":  # which takes means over layers that stand still
        assert min(sizes[path] for path in on) > 0.99


@pytest.mark.parametrize("form", FORMS)
def test_before_a_certain_choice_gradients_see_nothing_and_a_walk_between_the_runs_does(form: str) -> None:
    """The heads that tell who was named twice turn another head's attention round, which is certain both times."""
    plain, walked = _sizes(form, "ioi", SITES), _sizes(form, "ioi", SITES, method="ig", steps=64)
    on = CIRCUITS["ioi"].on & set(plain)
    behind = frozenset(path for path in on if path.startswith(BEHIND))
    assert len(on) == 18 and len(behind) == 7
    assert _on_top(plain, behind) and min(plain[path] for path in behind) > 0.99
    assert max(size for path, size in plain.items() if path not in behind) < 1e-6
    assert _on_top(walked, on) and min(walked[path] for path in on) > 0.5


@pytest.mark.parametrize("form", FORMS)
def test_atp_star_sees_the_query_that_turns_the_choice(form: str) -> None:
    sites = ["layers[:].heads[:].q", "layers[:].groups[:].k"]
    model, clean, corrupted, metric = _task(form, "ioi")
    exact: Any = ns.sweep(model, clean, corrupted, sites, metric, progress=False).best(4).set_index("path")["effect"]
    star, plain = _sizes(form, "ioi", sites, method="atp*"), _sizes(form, "ioi", sites)
    last, before = "layers[2].heads[2].q[7]", "layers[0].heads[3].q[5]"
    assert next(iter(star)) == last and abs(star[last] - abs(exact[last])) < 1e-6 and plain[last] < 1e-6
    # One choice it computes; behind another certain one the gradient that it starts from is nothing too.
    assert abs(exact[before]) > 0.98 and star[before] < 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_the_edges_of_the_circuit_are_on_top(form: str) -> None:
    """Previous-token head -> lookup -> mover -> logits, each through the site that it is read by."""
    model, clean, corrupted, metric = _task(form, "fact")
    groups = 4 if form == "gpt2" else 2
    value = 2 * groups // 4
    expected = {
        ("embed.output", f"layers[0].groups[{1 * groups // 4}].v"),
        ("layers[0].heads[1].output", "layers[1].mlp.output"),
        ("layers[1].mlp.output", f"layers[2].groups[{value}].v"),
        ("layers[2].heads[2].output", "unembed.output"),
    }
    result: Any = ns.attribute(
        model, clean, corrupted, ["embed", "layers[:].heads[:]", "layers[:].mlp"], metric, method="eap", verify=4,
        progress=False,
    )  # fmt: skip
    first = result.edges().head(4)
    assert set(zip(first["sender"], first["receiver"], strict=True)) == expected
    assert np.abs(first["exact"] - first["score"]).max() < 0.02 * first["score"].abs().max()
    assert result.edges()["score"].abs()[4] < 1e-6 * first["score"].abs().min()
    assert result.verification.recall == 1.0


@pytest.mark.parametrize("form", FORMS)
def test_the_paths_of_the_circuit_and_no_others(form: str) -> None:
    model, clean, corrupted, metric = _task(form, "fact")
    heads = ns.path_patch(model, clean, corrupted, "layers[:].heads[:]", "layers[1].mlp", metric, progress=False)
    share = abs(heads.effect()).mean("prompt").squeeze()
    assert float(share.sel(layer=0, head=1)) > 0.98
    assert float(share.where((share.layer != 0) | (share["head"] != 1)).max()) < 0.02
    direct = ns.path_patch(model, clean, corrupted, "layers[:].heads[:]", "unembed", metric, progress=False)
    share = abs(direct.effect()).mean("prompt").squeeze()
    assert float(share.sel(layer=2, head=2)) > 0.98 and float(share.sel(layer=0, head=1)) < 0.02
