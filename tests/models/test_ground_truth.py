"""On models whose circuit is known, every patch has the effect that it must; and broken patches are found out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

import nnsplice as ns
import zoo
from models.circuits import CIRCUITS, Circuit
from models.ground_truth import FORMS, HEAD_WIDTH, HEADS, LAYERS, NEURONS
from nnsplice.models import load

TOLERANCE = 0.02


@dataclass(frozen=True)
class Case:
    form: str
    name: str
    circuit: Circuit
    model: Any
    clean: list[list[int]]
    corrupted: list[list[int]]

    def difference(self, logits: Tensor) -> Tensor:
        last, row = logits[:, -1], torch.arange(len(self.clean))
        return last[row, list(self.circuit.answers)] - last[row, list(self.circuit.wrong)]

    def run(self, prompts: list[list[int]]) -> Tensor:
        with torch.no_grad():
            return self.difference(self.model._module(torch.tensor(prompts)).logits)


@lru_cache
def case(form: str, name: str) -> Case:
    circuit = CIRCUITS[name]
    model = load(FORMS[form](circuit), tokenizer=zoo.tokenizer())
    clean, corrupted = ([list(row) for row in rows] for rows in (circuit.clean, circuit.corrupted))
    return Case(form, name, circuit, model, clean, corrupted)


def places(length: int) -> list[str]:
    """Every component at every position."""
    parts = ["input", "attn.output", "mid", "mlp.output", "output", *(f"heads[{j}].output" for j in range(HEADS))]
    sites = [f"layers[{i}].{part}" for i in range(LAYERS) for part in parts]
    return [f"{site}[{p}]" for site in ("embed.output", *sites, "final_norm.output") for p in range(length)]


#: How a site is patched: what is written into the corrupted run for the sake of this path.
Patch = Callable[[Case, str], ns.SavedActivation]


@lru_cache
def everything(form: str, name: str, which: str) -> ns.SavedActivation:
    at = case(form, name)
    return ns.capture(at.model, getattr(at, which), places(len(at.clean[0])))


def right(case: Case, path: str) -> ns.SavedActivation:
    return everything(case.form, case.name, "clean").subset(path)


def effects(case: Case, patch: Patch, paths: list[str]) -> dict[str, Tensor]:
    """Path -> `[prompt]`, how much of the way from the corrupted answer to the clean one the patch goes."""
    corrupted = case.run(case.corrupted)
    way = case.run(case.clean) - corrupted
    found = {}
    for path in paths:
        logits = ns.patched_logits(case.model, case.corrupted, patch(case, path))
        found[path] = (case.difference(logits) - corrupted) / way
    return found


def mistaken(case: Case, patch: Patch, paths: list[str]) -> list[str]:
    """The sites whose effect is not what the circuit says, for any of the prompts."""
    return [
        f"{path}: {effect.tolist()}"
        for path, effect in effects(case, patch, paths).items()
        if (effect - float(path in case.circuit.on)).abs().max() > TOLERANCE
    ]


cases = pytest.mark.parametrize("name", CIRCUITS)
forms = pytest.mark.parametrize("form", FORMS)


@forms
@cases
def test_the_circuit_answers(form: str, name: str) -> None:
    at = case(form, name)
    with torch.no_grad():
        for prompts, answers in ((at.clean, at.circuit.answers), (at.corrupted, at.circuit.wrong)):
            last = at.model._module(torch.tensor(prompts)).logits[:, -1]
            assert last.argmax(-1).tolist() == list(answers)


@forms
@cases
def test_every_component_has_its_effect_and_no_other(form: str, name: str) -> None:
    at = case(form, name)
    paths = places(len(at.clean[0]))
    assert at.circuit.on <= set(paths)
    assert mistaken(at, right, paths) == []


@forms
def test_every_projection_has_its_effect_and_no_other(form: str) -> None:
    """A head's word travels in its values; where it looks is the same in both runs."""
    at = case(form, "fact")
    groups = getattr(at.model._module.config, "num_key_value_heads", HEADS)
    # The word it carries stands at the first word of the subject, then at the last.
    carries = zip(at.circuit.heads, (2, 3), strict=True)
    on = {f"layers[{h.layer}].groups[{h.head * groups // HEADS}].v[{position}]" for h, position in carries}
    parts = [*(f"heads[{j}].q" for j in range(HEADS)), *(f"groups[{g}].{kv}" for g in range(groups) for kv in "kv")]
    paths = [f"layers[{i}].{part}[{p}]" for i in range(LAYERS) for part in parts for p in range(len(at.clean[0]))]
    clean = ns.capture(at.model, at.clean, paths)
    found = effects(at, lambda _, path: clean.subset(path), paths)
    assert [path for path, effect in found.items() if (effect - float(path in on)).abs().max() > TOLERANCE] == []


@forms
def test_two_neurons_share_a_fact(form: str) -> None:
    """One of them says the clean answer and one the corrupted; each is half of the difference between the two."""
    at = case(form, "fact")
    (lookup,) = at.circuit.lookups
    paths = [f"layers[{lookup.layer}].neurons[{n}].output[3]" for n in range(NEURONS)]
    clean = ns.capture(at.model, at.clean, paths)
    found = effects(at, lambda _, path: clean.subset(path), paths)
    firing = dict(zip((paths[3 * n + 1] for n in range(len(lookup.table))), lookup.table, strict=True))
    for path, effect in found.items():
        subject = firing.get(path)
        told = [subject in {(a[2], a[3]), (b[2], b[3])} for a, b in zip(at.clean, at.corrupted, strict=True)]
        torch.testing.assert_close(effect, torch.tensor(told).double() / 2, atol=TOLERANCE, rtol=0)
        assert any(told) == (subject is not None)
    whole = ns.patched_logits(at.model, at.corrupted, clean)
    torch.testing.assert_close(at.difference(whole), at.run(at.clean), atol=TOLERANCE, rtol=0)


@forms
@cases
def test_what_is_inert_is_active(form: str, name: str) -> None:
    """Zero effect would prove nothing about a component that says the same in both runs."""
    at = case(form, name)
    working = {(head.layer, head.head) for head in at.circuit.heads}
    last = len(at.clean[0]) - 1
    for i in range(LAYERS):
        for j in {*range(HEADS)} - {j for layer, j in working if layer == i}:
            path = f"layers[{i}].heads[{j}].output[{last}]"
            clean, corrupted = (everything(form, name, which)[path] for which in ("clean", "corrupted"))
            assert clean.abs().amax(-1).min() > 0.1, path
            # In the first layer it is the attention to the one word that differs, which may be small.
            assert (clean - corrupted).abs().max() > (0.01 if i else 1e-6), path
        mlp = f"layers[{i}].mlp.output[{last}]"
        assert everything(form, name, "clean")[mlp].abs().amax(-1).min() > 0.1


# ---------------------------------------------------------------------------------------------- patches that are broken


def _renamed(path: str, clean: ns.SavedActivation) -> ns.SavedActivation:
    ((_, tensor),) = clean.items()
    return ns.SavedActivation.from_pairs((path, tensor))


def next_head(case: Case, path: str) -> ns.SavedActivation:
    """The head beside it is read."""
    place = ns.parse_path(path)
    (j,) = [step.index for step in place.steps if step.name == "heads"]
    assert isinstance(j, int)
    return _renamed(path, right(case, path.replace(f"heads[{j}]", f"heads[{(j + 1) % HEADS}]")))


def next_layer(case: Case, path: str) -> ns.SavedActivation:
    """The layer after it is read."""
    (i,) = [step.index for step in ns.parse_path(path).steps if step.name == "layers"]
    assert isinstance(i, int)
    return _renamed(path, right(case, path.replace(f"layers[{i}]", f"layers[{(i + 1) % LAYERS}]")))


def next_position(case: Case, path: str) -> ns.SavedActivation:
    """The token after it is read."""
    site, position = path.removesuffix("]").rsplit("[", 1)
    return _renamed(path, right(case, f"{site}[{(int(position) + 1) % len(case.clean[0])}]"))


def after_projection(case: Case, path: str) -> ns.SavedActivation:
    """A head's columns are taken out of attention's output, where all heads are mixed already."""
    layer, rest = path.split(".heads[")
    j, position = int(rest.split("]")[0]), path.rsplit("[", 1)[1]
    output = f"{layer}.attn.output[{position}"
    mixed = everything(case.form, case.name, "corrupted")[output].clone()
    own = slice(j * HEAD_WIDTH, (j + 1) * HEAD_WIDTH)
    mixed[:, own] = right(case, output)[output][:, own]
    return ns.SavedActivation.from_pairs((output, mixed))


def after_addition(case: Case, path: str) -> ns.SavedActivation:
    """Attention's output is taken where it has been added to the stream, and put back there."""
    return right(case, path.replace("attn.output", "mid"))


#: Broken patch -> the sites that it is asked for.
BROKEN: dict[Patch, str] = {
    next_head: ".heads[",
    next_layer: "layers[",
    next_position: "layers[",
    after_projection: ".heads[",
    after_addition: ".attn.output",
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda patch: patch.__name__)
@forms
@cases
def test_a_broken_patch_is_found_out(form: str, name: str, broken: Patch) -> None:
    at = case(form, name)
    paths = [path for path in places(len(at.clean[0])) if BROKEN[broken] in path]
    if broken in (next_layer, next_position):
        # Enough to show it, and a fraction of the runs.
        paths = [path for path in paths if path in at.circuit.on]
    assert mistaken(at, right, [path for path in paths if path in at.circuit.on]) == []
    assert mistaken(at, broken, paths)
