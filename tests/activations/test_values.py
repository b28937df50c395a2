"""A capture as a mapping: what its keys are, and which of them a path means."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given

import nnsplice as ns
from activations.captures import captures, hand, keys, same
from nnsplice.activations.packs import Provenance
from nnsplice.errors import BadArgument, BadType, DuplicatePath, MissingPosition, PathError, ShapeError, UnknownPath
from nnsplice.paths import parse_path

PROMPTS = ["w3 w4 w5", "w6 w7 w8"]


@pytest.fixture(scope="module")
def saved(model) -> ns.SavedActivation:
    """Three tokens of every layer, and one head under its native name's neighbour."""
    return ns.capture(model, PROMPTS, ["layers[:].output[:]", "layers[1].heads[:].output[-1]"])


# ------------------------------------------------------------------------------------------------------------ mapping


@given(captures())
def test_keys_items_length_iteration_and_membership_agree(saved: ns.SavedActivation) -> None:
    assert list(saved) == saved.keys() == [key for key, _ in saved.items()]
    assert len(saved) == len(saved.keys()) == len(set(saved))
    assert all(key in saved and parse_path(key) in saved for key in saved)
    assert all(torch.equal(tensor, saved.get(key)) and torch.equal(tensor, saved[key]) for key, tensor in saved.items())
    assert {**dict(saved)}.keys() == set(saved)


@given(keys())
def test_a_capture_by_hand_keeps_the_order_of_its_places(chosen: list[str]) -> None:
    places = [str(parse_path(key).place) for key in hand(*chosen)]
    assert list(dict.fromkeys(places)) == list(dict.fromkeys(str(parse_path(key).place) for key in chosen))


def test_keys_are_canonical_whatever_was_written() -> None:
    assert hand("L5H3[-1]", " layers[2] . mlp [0]", "blocks.1.hook_resid_post[4]").keys() == [
        "layers[5].heads[3].output[-1]",
        "layers[2].mlp.output[0]",
        "layers[1].output[4]",
    ]


def test_a_captured_ones_keys_are_in_the_order_of_the_forward_pass(model) -> None:
    saved = ns.capture(model, PROMPTS, ["layers[2].output[1,0]", "unembed.output[-1]", "embed.output[0]", "l0 mlp[2]"])
    assert saved.keys() == [
        "embed.output[0]",
        "layers[0].mlp.output[2]",
        "layers[2].output[0]",
        "layers[2].output[1]",
        "unembed.output[-1]",
    ]


def test_what_is_no_path_is_not_in_a_capture() -> None:
    saved = hand("layers[0].output[0]")
    for other in (3, None, "", "no path at all", "layers[0].output[1]", "layers[0].output[5:]"):
        assert other not in saved


def test_an_empty_capture_is_legal() -> None:
    empty = ns.SavedActivation()
    assert (len(empty), empty.keys(), empty.items(), list(empty), empty.rows) == (0, [], [], [], 0)
    for made in (
        empty + empty,
        -empty,
        empty * 2,
        empty.mean(),
        empty.mean("position"),
        empty.slice[0:3],
        empty.clone(),
    ):
        assert len(made) == 0
    saved = hand("layers[0].output[0]")
    assert same(empty | saved, saved) and same(saved | empty, saved)
    assert saved.subset([]).keys() == []
    with pytest.raises(UnknownPath, match="this capture is empty"):
        empty["layers[0].output[0]"]


# ------------------------------------------------------------------------------------------------- made by hand


def test_the_same_place_twice_is_refused_however_it_is_written() -> None:
    entry = torch.zeros(1, 4)
    with pytest.raises(DuplicatePath, match=r"layers\[0\]\.output\[0\]"):
        ns.SavedActivation.from_pairs(("layers[0].output[0]", entry), ("L0[0]", entry))


@pytest.mark.parametrize(
    ("path", "kind", "message"),
    [
        ("layers[0].output", MissingPosition, r"write: layers\[0\]\.output\[-1\]"),
        ("layers[0]", MissingPosition, r"write: layers\[0\]\.output\[-1\]"),
        ("layers[0].attn.q.weight", PathError, "parameters have no tokens"),
        ("layers[0].output[0:2]", PathError, "one token position"),
        ("layers[0].output[0,1]", PathError, "one token position"),
        ("layers[:].output[0]", PathError, "a number in every bracket"),
        ("layers[0,1].output[0]", PathError, "a number in every bracket"),
    ],
)
def test_a_key_is_one_position_of_one_place(path: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        hand(path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([torch.zeros(4)], r"shape \[4\] is not \[prompt, width\]"),
        ([torch.zeros(1, 1, 4)], r"shape \[1, 1, 4\]"),
        (["text"], "a str is not"),
        ([torch.zeros(2, 4), torch.zeros(3, 4)], "3 rows where the entries before have 2"),
        ([torch.zeros(2, 4), torch.zeros(2, 5)], r"widths \[4, 5\]"),
        ([torch.zeros(0, 4)], "without rows"),
    ],
)
def test_entries_of_the_wrong_shape_are_refused(tensors: list, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        ns.SavedActivation.from_pairs(*((f"layers[0].output[{n}]", tensor) for n, tensor in enumerate(tensors)))


@pytest.mark.parametrize("wrong", [[("layers[0].output[0]", torch.zeros(1, 4))], "layers[0].output[0]", ("l0[0]",)])
def test_what_is_no_pair_is_refused(wrong: Any) -> None:
    with pytest.raises(BadType, match=r"is no pair[\s\S]*from_pairs\(\*pairs\)"):
        ns.SavedActivation.from_pairs(wrong)


def test_a_capture_by_hand_does_not_alias_what_it_was_made_of() -> None:
    tensors = [torch.zeros(2, 4), torch.zeros(2, 4)]
    saved = ns.SavedActivation.from_pairs(("layers[0].output[0]", tensors[0]), ("layers[1].output[0]", tensors[1]))
    for tensor in tensors:
        tensor += 1
    assert not any(entry.any() for _, entry in saved.items())


def test_dtypes_of_one_place_are_joined_without_loss() -> None:
    exact = torch.tensor([[1 / 3]], dtype=torch.float64)
    saved = ns.SavedActivation.from_pairs(("layers[0].output[0]", exact.bfloat16()), ("layers[0].output[1]", exact))
    assert torch.equal(saved["layers[0].output[1]"], exact)
    assert torch.equal(saved["layers[0].output[0]"], exact.bfloat16().double())


# ---------------------------------------------------------------------------------------------------------- positions


def test_a_position_slice_or_list_gives_prompt_position_width(saved: ns.SavedActivation) -> None:
    parts = [saved[f"layers[1].output[{p}]"] for p in range(3)]
    for text, chosen in {
        "[:]": (0, 1, 2),
        "[0:2]": (0, 1),
        "[1:]": (1, 2),
        "[-2:]": (1, 2),
        "[:-1]": (0, 1),
        "[::2]": (0, 2),
        "[::-1]": (2, 1, 0),
        "[2,0]": (2, 0),
        "[1,1]": (1, 1),
        "[1,]": (1,),
        "[0:99]": (0, 1, 2),
    }.items():
        expected = torch.stack([parts[p] for p in chosen], dim=1)
        assert torch.equal(saved[f"layers[1].output{text}"], expected), text
    assert torch.equal(saved["layers[1].output"], saved["layers[1].output[:]"])


def test_a_position_stays_as_it_was_asked_for(model) -> None:
    saved = ns.capture(model, PROMPTS, "layers[0].output[2,-1]")
    assert saved.keys() == ["layers[0].output[2]", "layers[0].output[-1]"]
    last = saved.subset("layers[0].output[-1]")
    assert "layers[0].output[2]" not in last and "layers[0].output[-1]" in last


def test_slices_find_positions_from_either_end_where_the_prompts_length_is_known(model) -> None:
    saved = ns.capture(model, PROMPTS, "layers[0].output[0,-2,-1]")
    assert saved.subset("layers[0].output[1:]").keys() == ["layers[0].output[-2]", "layers[0].output[-1]"]
    assert saved.subset("layers[0].output[-1:]").keys() == ["layers[0].output[-1]"]
    assert saved.subset("layers[0].output[:2]").keys() == ["layers[0].output[0]", "layers[0].output[-2]"]
    assert saved["layers[0].output[:]"].shape == (2, 3, 16)


def test_a_slice_from_the_end_is_not_taken_from_the_last_position_that_happens_to_be_stored(model) -> None:
    saved = ns.capture(model, PROMPTS, "layers[0].output[0:2]")
    assert saved.subset("layers[0].output[-2:]").keys() == ["layers[0].output[1]"]
    with pytest.raises(UnknownPath):
        saved["layers[0].output[-1:]"]
    with pytest.raises(UnknownPath, match="depends on the number of tokens of the prompts, which is not known"):
        saved.mean().get("layers[0].output[-1:]")


def test_slices_that_count_from_the_same_end_as_the_keys_need_no_length() -> None:
    negative = hand(*(f"layers[0].output[{p}]" for p in (-3, -2, -1)))
    assert negative.subset("layers[0].output[-2:]").keys() == ["layers[0].output[-2]", "layers[0].output[-1]"]
    assert negative.subset("layers[0].output[:-1]").keys() == ["layers[0].output[-3]", "layers[0].output[-2]"]
    assert negative["layers[0].output[:]"].shape == (2, 3, 4)
    positive = hand(*(f"layers[0].output[{p}]" for p in (2, 5, 7)))
    assert positive.subset("layers[0].output[3:8]").keys() == ["layers[0].output[5]", "layers[0].output[7]"]
    for saved, wanted in ((negative, "[0:2]"), (positive, "[-2:]"), (negative, "[::2]")):
        with pytest.raises(UnknownPath, match="is not known"):
            saved[f"layers[0].output{wanted}"]


def test_positions_past_the_prompt_are_not_counted_from_the_prompts_end() -> None:
    by_hand = hand("layers[0].output[5]", "layers[0].output[7]")
    # What is captured while generating: the prompts had three tokens.
    saved = ns.SavedActivation._new(by_hand._packs, Provenance(tokens=((1, 2, 3), (4, 5, 6))), None)
    assert saved.subset("layers[0].output[6:]").keys() == ["layers[0].output[7]"]
    with pytest.raises(UnknownPath, match="is not known"):
        saved.subset("layers[0].output[-1:]")


def test_tokens_of_a_span_are_found_together_and_one_by_one() -> None:
    saved = hand('layers[0].output["s"][0]', 'layers[0].output["s"][1]', 'layers[0].output["t"][0]')
    assert saved.get('layers[0].output["s"]').shape == (2, 2, 4)
    assert saved.get('layers[0].output["s"][1]').shape == (2, 4)
    assert saved.subset('layers[0].output["t"]').keys() == ['layers[0].output["t"][0]']
    with pytest.raises(UnknownPath):
        saved.get('layers[0].output["u"]')


# ---------------------------------------------------------------------------------------------------------- spellings


def test_other_spellings_of_a_place_are_found_through_the_model(saved: ns.SavedActivation) -> None:
    expected = saved["layers[2].output[1]"]
    for spelling in ("l2", "layers[-1]", "decoder.layers[2]", "model.transformer.h[2]", "model.transformer.h[-1]"):
        assert torch.equal(saved[f"{spelling}.output[1]"], expected), spelling
        assert f"{spelling}.output[1]" in saved
    assert saved.subset("model.transformer.h[0:2].output[0]").keys() == ["layers[0].output[0]", "layers[1].output[0]"]
    assert saved.subset("layers[-2:].output[0]").keys() == ["layers[1].output[0]", "layers[2].output[0]"]
    assert saved.subset("layers[1].heads[-1].output").keys() == ["layers[1].heads[3].output[-1]"]


def test_a_place_under_two_names_keeps_both_texts_and_answers_to_both(model) -> None:
    saved = ns.capture(model, PROMPTS, ["layers[0].output[0]", "model.transformer.h[0].output[1]"])
    assert saved.keys() == ["layers[0].output[0]", "model.transformer.h[0].output[1]"]
    for spelling in ("layers[0]", "model.transformer.h[0]"):
        assert saved[f"{spelling}.output[:]"].shape == (2, 2, 16)
        assert torch.equal(saved[f"{spelling}.output[1]"], saved["model.transformer.h[0].output[1]"])


def test_without_a_model_only_the_texts_are_compared() -> None:
    saved = hand("layers[0].output[0]", "layers[1].output[0]", "layers[3].output[0]")
    assert saved.subset("layers[0:2].output[0]").keys() == ["layers[0].output[0]", "layers[1].output[0]"]
    assert saved.subset("layers[1:].output").keys() == ["layers[1].output[0]", "layers[3].output[0]"]
    assert saved["layers[0,0].output[0,0]"].shape == (2, 2, 4)  # the site once, each position as often as it is named
    assert saved.subset("layers[3,0]").keys() == ["layers[0].output[0]", "layers[3].output[0]"]
    for wanted in ("layers[-1].output[0]", "layers[-2:].output[0]"):
        with pytest.raises(UnknownPath, match=r"ns\.expand\(model, "):
            saved.subset(wanted)


# ------------------------------------------------------------------------------------------------------------ mistakes


def test_an_unknown_path_is_a_key_error_that_names_the_closest_keys() -> None:
    saved = hand("layers[0].output[0]", "layers[10].mlp.output[3]", "layers[11].mlp.output[3]")
    with pytest.raises(KeyError) as raised:
        saved["layers[12].mlp.output[3]"]
    lines = str(raised.value).splitlines()
    assert lines[:2] == ["not in this capture", "    layers[12].mlp.output[3]"]
    assert "layers[11].mlp.output[3]" in lines[2]


@pytest.mark.parametrize(
    ("wanted", "missing"),
    [
        ("layers[0].output[0,5]", "layers[0].output[5]"),
        ("layers[0,7].output[0]", "layers[7].output[0]"),
        ("layers[0,1].output[0,-1]", "layers[0].output[-1]"),
    ],
)
def test_every_number_of_a_list_has_to_be_there(wanted: str, missing: str) -> None:
    saved = hand("layers[0].output[0]", "layers[1].output[0]")
    with pytest.raises(UnknownPath) as raised:
        saved.subset(wanted)
    assert str(raised.value).splitlines()[0] == f"{missing} is not in this capture"
    assert wanted not in saved


def test_a_slice_selects_what_is_there() -> None:
    saved = hand("layers[0].output[0]", "layers[1].output[0]", "layers[1].output[3]")
    assert saved.subset("layers[:].output[3]").keys() == ["layers[1].output[3]"]
    assert saved.subset("layers[0:9].output[0:2]").keys() == ["layers[0].output[0]", "layers[1].output[0]"]
    with pytest.raises(UnknownPath):
        saved.subset("layers[4:].output")


def test_get_of_several_places_says_what_to_write(saved: ns.SavedActivation) -> None:
    with pytest.raises(BadArgument, match=r"3 sites[\s\S]*saved\.subset\('layers\[:\]\.output\[0\]'\)"):
        saved.get("layers[:].output[0]")


@pytest.mark.parametrize("path", [3, None, ("layers[0].output[0]",)])
def test_what_is_no_path_is_a_type_error(path: object) -> None:
    with pytest.raises(TypeError, match="a path is a text or a Path"):
        hand("layers[0].output[0]")[path]  # type: ignore[index]


def test_a_capture_cannot_be_changed_through_its_mapping() -> None:
    saved = hand("layers[0].output[0]")
    with pytest.raises(TypeError):
        saved["layers[0].output[0]"] = torch.zeros(2, 4)  # type: ignore[index]
    saved.keys().clear()
    saved.items().clear()
    assert len(saved) == 1
