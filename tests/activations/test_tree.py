"""Captures as trees: `saved.values` goes down by names and numbers, and a nested mapping goes up again."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nnsplice as ns
from activations.captures import hand, same
from nnsplice.errors import BadArgument, BadType, DuplicatePath, MissingPosition, PathError, ShapeError, UnknownPath

NATIVE = "model.transformer.h[2].output[10]"


@pytest.fixture
def saved() -> ns.SavedActivation:
    return hand(
        NATIVE,
        "model.transformer.h[2].attn.output[0][-1]",
        "layers[0].heads[3].output[-1]",
        'layers[0].mlp.output["subject"][-1]',
        "encoder.layers[1].output[0]",
        "embed.output[2]",
    )


# --------------------------------------------------------------------------------------------------------------- down


def test_the_tree_follows_the_paths(saved: ns.SavedActivation) -> None:
    values = saved.values
    for found, key in (
        (values.transformer.h[2].output[10], NATIVE),
        (values.transformer.h[2].attn.output[0][-1], "model.transformer.h[2].attn.output[0][-1]"),
        (values.layers[0].heads[3].output[-1], "layers[0].heads[3].output[-1]"),
        (values.layers[0].mlp.output["subject"][-1], 'layers[0].mlp.output["subject"][-1]'),
        (values.encoder.layers[1].output[0], "encoder.layers[1].output[0]"),
        (values.embed.output[2], "embed.output[2]"),
    ):
        assert torch.equal(found, saved[key]), key


def test_completion_offers_what_is_there(saved: ns.SavedActivation) -> None:
    values = saved.values
    assert dir(values) == sorted(["transformer", "layers", "encoder", "embed"])
    assert dir(values.layers[0]) == ["heads", "mlp"]
    assert dir(values.layers) == []
    assert values.layers._ipython_key_completions_() == [0]
    assert all(getattr(values, name) is not None for name in dir(values))


def test_a_branch_says_what_it_holds(saved: ns.SavedActivation) -> None:
    values = saved.values
    assert (list(values.layers), len(values.layers), 0 in values.layers, 5 in values.layers) == ([0], 1, True, False)
    assert repr(values.layers[0]) == "<values.layers[0]: heads, mlp>"
    assert repr(values.transformer.h[2].attn.output[0]) == "<values.transformer.h[2].attn.output[0]: -1>"


def test_a_name_that_is_not_there_names_what_is(saved: ns.SavedActivation) -> None:
    with pytest.raises(AttributeError, match=r"nothing captured at values\.layers\[0\]\.head; there is heads"):
        _ = saved.values.layers[0].head
    with pytest.raises(KeyError, match=r"nothing captured at values\.layers\[7\]"):
        saved.values.layers[7]
    assert not hasattr(saved.values, "nothing")


@pytest.mark.parametrize("index", [slice(0, 2), (0, 1), [0]])
def test_a_tree_takes_one_number_at_a_time(saved: ns.SavedActivation, index: Any) -> None:
    with pytest.raises(BadType, match=r"one name or number at a time[\s\S]*saved\.subset"):
        saved.values.layers[index]


@pytest.mark.parametrize("name", ["_x", "__deepcopy__", "__array__", "_repr_html_", "__len_hint__"])
def test_names_with_an_underscore_are_never_places(saved: ns.SavedActivation, name: str) -> None:
    with pytest.raises(AttributeError):
        getattr(saved.values, name)


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda tree: pickle.loads(pickle.dumps(tree))], ids=["copy", "deep", "pickle"]
)
def test_a_tree_can_be_copied_and_pickled(saved: ns.SavedActivation, copied: Any) -> None:
    again = copied(saved.values)
    assert torch.equal(again.transformer.h[2].output[10], saved[NATIVE])
    assert repr(again) == repr(saved.values)


def test_a_tree_without_children_yet_does_not_search_for_them_forever(saved: ns.SavedActivation) -> None:
    bare = type(saved.values).__new__(type(saved.values))
    with pytest.raises(AttributeError):
        _ = bare._children


def test_a_tree_cannot_be_written_to(saved: ns.SavedActivation) -> None:
    with pytest.raises(AttributeError):
        saved.values.embed = 3  # type: ignore[attr-defined]
    with pytest.raises(TypeError):
        saved.values.layers[0] = 3


@pytest.mark.parametrize(
    "keys",
    [
        ("model.h[0].attn.output[0]", "model.h[0].attn.output[0][-1]"),
        ("model.h[0].attn.output[0][-1]", "model.h[0].attn.output[0]"),
        ("model.layers[0].output[1]", "layers[0].output[1]"),
        ('layers[0].output["s"]', 'layers[0].output["s"][0]'),
    ],
)
def test_two_keys_at_one_branch_are_not_mixed_up(keys: tuple[str, str]) -> None:
    with pytest.raises(BadArgument, match=r"two keys stand at one branch[\s\S]*write: saved\["):
        dir(hand(*keys).values)


# ----------------------------------------------------------------------------------------------------------------- up

_names = st.sampled_from(["transformer", "h", "attn", "block", "output_layer", "model"])
_numbers = st.integers(-3, 40)


@st.composite
def trees(draw: st.DrawFn) -> tuple[dict, dict[str, torch.Tensor]]:
    """A nested mapping of a model's attributes, and what it has to become."""
    tree: dict = {}
    expected: dict[str, torch.Tensor] = {}
    for n in range(draw(st.integers(1, 6))):
        names: list[str | int] = []
        for name in draw(st.lists(_names, min_size=1, max_size=3)):
            names += [name, *([draw(_numbers)] if draw(st.booleans()) else [])]
        names += [draw(st.sampled_from(["output", "input"])), draw(_numbers)]
        path = "model" + "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in names)
        node = tree
        for name in names[:-1]:
            node = node.setdefault(name, {})
        node[names[-1]] = expected[path] = torch.full((2, 3), float(n))
    return tree, expected


@given(trees())
def test_a_nested_mapping_becomes_a_capture_and_its_tree_is_the_mapping(
    made: tuple[dict, dict[str, torch.Tensor]],
) -> None:
    tree, expected = made
    saved = ns.SavedActivation(tree)
    assert same(saved, ns.SavedActivation.from_pairs(*expected.items()))

    def plain(branch: Any) -> Any:
        return branch if isinstance(branch, torch.Tensor) else {name: plain(branch[name]) for name in branch}

    assert same(ns.SavedActivation(plain(saved.values)), saved)


def test_roles_and_containers_are_read_as_in_a_path() -> None:
    entry = torch.zeros(1, 4)
    tree = {
        "layers": {3: {"heads": {1: {"output": {-1: entry}}}}},
        "encoder": {"layers": {0: {"mlp": {"output": {2: entry}}}}},
        "transformer": {"h": {0: {"attn": {"output": {0: {-1: entry}}}}}},
        "model": {"layers": {0: {"output": {1: entry}}}},
    }
    assert ns.SavedActivation(tree).keys() == [
        "layers[3].heads[1].output[-1]",
        "encoder.layers[0].mlp.output[2]",
        "model.transformer.h[0].attn.output[0][-1]",
        "model.model.layers[0].output[1]",
    ]


@pytest.mark.parametrize("key", [None, 1.5, (0, 1), True, b"h", slice, ns.parse_path("layers[0]")])
def test_a_key_of_another_type_is_a_type_error(key: Any) -> None:
    for tree in ({key: torch.zeros(1, 4)}, {"h": {0: {"output": {key: torch.zeros(1, 4)}}}}):
        with pytest.raises(TypeError, match="cannot be a key of the tree"):
            ns.SavedActivation(tree)


@pytest.mark.parametrize("leaf", [1.0, None, [[1.0]], "text"])
def test_a_leaf_that_is_no_tensor_is_a_type_error(leaf: Any) -> None:
    with pytest.raises(BadType, match="a leaf of the tree is a tensor"):
        ns.SavedActivation({"h": {0: {"output": {0: leaf}}}})


@pytest.mark.parametrize("shape", [(), (4,), (1, 1, 4), (0, 4)])
def test_a_leaf_of_another_shape_is_a_value_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError) as raised:
        ns.SavedActivation({"h": {0: {"output": {0: torch.zeros(shape)}}}})
    assert isinstance(raised.value, ShapeError) and "model.h[0].output[0]" in str(raised.value)


def test_leaves_of_one_capture_have_the_same_rows() -> None:
    with pytest.raises(ShapeError, match="3 rows where the entries before have 2"):
        ns.SavedActivation({"h": {0: {"output": {0: torch.zeros(2, 4)}}, 1: {"output": {0: torch.zeros(3, 4)}}}})


@pytest.mark.parametrize(
    ("tree", "kind", "message"),
    [
        ({"layers": {0: {"output": torch.zeros(1, 4)}}}, MissingPosition, r"write: layers\[0\]\.output\[-1\]"),
        ({"two words": {"output": {0: torch.zeros(1, 4)}}}, PathError, "cannot stand here"),
        ({0: torch.zeros(1, 4)}, PathError, "the model itself has no index"),
        ({"L0": {"output": {0: torch.zeros(1, 4)}}, "l0": {"output": {0: torch.zeros(1, 4)}}}, DuplicatePath, "twice"),
    ],
)
def test_a_tree_that_spells_no_path_says_so(tree: dict, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        ns.SavedActivation(tree)


@pytest.mark.parametrize("tree", [[1], torch.zeros(1, 4), None, "layers[0]"])
def test_what_is_no_mapping_is_a_type_error(tree: Any) -> None:
    with pytest.raises(TypeError, match="is no nested mapping"):
        ns.SavedActivation(tree)


def test_the_tree_of_a_capture_of_nothing_is_empty() -> None:
    values = ns.SavedActivation({}).values
    assert (dir(values), len(values)) == ([], 0)
    with pytest.raises(UnknownPath, match="nothing captured"):
        values["layers"]


def test_values_can_be_called_as_those_of_a_dictionary(saved: ns.SavedActivation) -> None:
    assert len(saved.values()) == len(saved) == 6
    for (key, tensor), found in zip(saved.items(), saved.values(), strict=True):
        assert torch.equal(tensor, found), key
    assert dict(zip(saved.keys(), saved.values(), strict=True)).keys() == dict(saved.items()).keys()


def test_captures_that_have_no_tree_have_values() -> None:
    # An element of an output and a token of another stand at one branch: `output[0]`.
    crossed = hand("model.transformer.h[0].output[0]", "model.transformer.h[0].output[0][-1]")
    assert len(crossed.values()) == 2
    with pytest.raises(BadArgument, match="one branch"):
        _ = crossed.values.transformer
    assert copy.copy(hand(NATIVE).values).transformer.h[2].output[10].shape == (2, 4)
