"""Where a capture comes from, and what slices, arithmetic and copies make of that."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import nnsplice as ns
from activations.captures import same

PROMPTS = ["w3 w4 w5 w6", "w7 w8", "w9 w10 w11"]
TOKENS = ((3, 4, 5, 6), (7, 8), (9, 10, 11))
SPAN = {"subject": ["w4 w5", "w7", "w10"]}
KEYS = ["layers[0].output[1,-1]", 'layers[1].mlp.output["subject"][-1]', 'layers[1].mlp.output["subject"][0]']


@pytest.fixture(scope="module")
def saved(model) -> ns.SavedActivation:
    return ns.capture(model, PROMPTS, KEYS, spans=SPAN)


def test_a_capture_knows_its_model_prompts_tokens_and_positions(model, saved: ns.SavedActivation) -> None:
    assert saved.model == "GPT2LMHeadModel"
    assert saved.prompts == tuple(PROMPTS)
    assert saved.tokens == TOKENS
    assert saved.positions == {
        "layers[0].output[1]": [1, 1, 1],
        "layers[0].output[-1]": [3, 1, 2],
        'layers[1].mlp.output["subject"][0]': [1, 0, 1],
        'layers[1].mlp.output["subject"][-1]': [2, 0, 1],
    }
    for key, positions in saved.positions.items():
        for row, (prompt, position) in enumerate(zip(PROMPTS, positions or (), strict=True)):
            place = ns.parse_path(key).at(position)
            alone = ns.capture(model, prompt, place)
            assert torch.allclose(saved[key][row], alone[str(place)][0], atol=1e-5)


def test_token_ids_have_no_texts(model) -> None:
    saved = ns.capture(model, [[3, 4], [5, 6, 7]], "layers[0].output[-1]")
    assert saved.prompts is None and saved.tokens == ((3, 4), (5, 6, 7))
    assert saved.positions == {"layers[0].output[-1]": [1, 2]}


def test_one_by_hand_comes_from_nowhere() -> None:
    saved = ns.SavedActivation.from_pairs(("layers[0].output[-1]", torch.zeros(1, 4)))
    assert (saved.model, saved.prompts, saved.tokens) == (None, None, None)
    assert saved.positions == {"layers[0].output[-1]": None}


def test_rows_keep_their_own_prompts(saved: ns.SavedActivation) -> None:
    part = saved.slice[2, 0]
    assert part.prompts == (PROMPTS[2], PROMPTS[0]) and part.tokens == (TOKENS[2], TOKENS[0])
    assert part.positions['layers[1].mlp.output["subject"][-1]'] == [1, 2]
    assert part.model == saved.model
    assert saved.subset([]).slice[0:2].prompts == ()


def test_what_keeps_the_rows_keeps_the_prompts(saved: ns.SavedActivation) -> None:
    made = (saved.subset("layers[0].output"), saved * 2, -saved, saved.clone(), saved.detach(), saved.map(torch.abs))
    for one in (*made, saved.to(torch.float64), saved - saved, saved.mean("position")):
        assert (one.prompts, one.tokens, one.model) == (tuple(PROMPTS), TOKENS, saved.model)
    assert saved.mean("position").positions == {'layers[0].output["mean"]': None, 'layers[1].mlp.output["mean"]': None}


def test_a_mean_over_prompts_comes_from_no_prompt(saved: ns.SavedActivation) -> None:
    mean = saved.mean()
    assert (mean.model, mean.prompts, mean.tokens) == (saved.model, None, None)
    assert set(mean.positions.values()) == {None}


def test_arithmetic_keeps_what_both_have_in_common(model, saved: ns.SavedActivation) -> None:
    other = ns.capture(model, ["w3 w4 w5 w7", "w7 w8", "w9 w10 w11"], KEYS, spans=SPAN)
    difference = saved - other
    assert (difference.model, difference.prompts, difference.tokens) == (saved.model, None, None)
    assert set(difference.positions.values()) == {None}
    # One row that serves every prompt leaves the prompts of the others as they are.
    for made in (saved - other.mean(), other.mean() - saved, saved.project_out(other.slice[0])):
        assert (made.prompts, made.tokens, made.positions) == (saved.prompts, saved.tokens, saved.positions)


def test_a_union_keeps_what_both_have_in_common(model, saved: ns.SavedActivation) -> None:
    same_prompts = ns.capture(model, PROMPTS, "layers[2].output[-1]", spans=SPAN)
    assert (saved | same_prompts).prompts == tuple(PROMPTS)
    assert (saved | same_prompts).positions == {**saved.positions, **same_prompts.positions}
    other = ns.capture(model, ["w3", "w4", "w5"], "layers[2].output[-1]")
    assert ((saved | other).prompts, (saved | other).tokens, (saved | other).model) == (None, None, saved.model)
    assert (saved | ns.SavedActivation()).prompts == (ns.SavedActivation() | saved).prompts == tuple(PROMPTS)


def test_positions_of_two_towers_are_not_counted_in_the_tokens_of_one() -> None:
    from zoo import wrap

    saved = ns.capture(wrap("t5"), ["w3 w4 w5"], ["encoder.layers[0].output[-1]", "layers[0].output[-1]"])
    assert set(saved.positions.values()) == {None}
    assert saved.tokens is None  # the two towers have tokens of their own
    encoder = ns.capture(wrap("t5"), ["w3 w4 w5"], "encoder.layers[0].output[-1]")
    assert encoder.positions == {"encoder.layers[0].output[-1]": [2]}


# --------------------------------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_a_copy_holds_the_same_and_knows_as_much(saved: ns.SavedActivation, copied: Any) -> None:
    _ = saved.get("layers[0].output[-1]"), saved.values, saved.positions  # whatever is remembered on the way
    again = copied(saved)
    assert same(again, saved) and again.keys() == saved.keys()
    assert (again.model, again.prompts, again.tokens, again.positions) == (
        saved.model,
        saved.prompts,
        saved.tokens,
        saved.positions,
    )
    assert same(again - saved, saved * 0) and (again | saved.mean("position")).prompts == saved.prompts


def test_a_deep_copy_has_memory_of_its_own(saved: ns.SavedActivation) -> None:
    deep = copy.deepcopy(saved)
    deep["layers[0].output[-1]"].zero_()
    assert saved["layers[0].output[-1]"].any()
    assert torch.equal(deep["model.transformer.h[-3].output[1]"], saved["layers[0].output[1]"])


def test_a_pickle_is_small_and_leaves_the_model_behind(saved: ns.SavedActivation) -> None:
    assert len(pickle.dumps(saved)) < 10_000


def test_a_pickled_capture_is_found_by_place_in_another_process(saved: ns.SavedActivation, tmp_path: Path) -> None:
    (tmp_path / "saved.pickle").write_bytes(pickle.dumps(saved))
    program = (
        "import pickle, sys; saved = pickle.load(open(sys.argv[1], 'rb'))\n"
        "assert all(key in saved for key in saved) and (saved - saved).keys() == saved.keys()\n"
        "print(saved.model, saved.rows, sep=',')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "saved.pickle")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "GPT2LMHeadModel,3"
