"""Each leaf against plain torch, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from nnsplice import checkpoints as ck
from nnsplice.atlas.layouts import Layout, LayoutKind
from nnsplice.errors import BadArgument, BadType, MapperError

X = torch.arange(24.0).reshape(4, 6)
Y = X + 100

#: Leaf, its inputs, its outputs in plain torch.
CASES = {
    "rename": (ck.Rename("x", "y"), {"x": X}, {"y": X}),
    "transpose": (ck.Transpose("x", (0, 1)), {"x": X}, {"x": X.T}),
    "permute": (ck.Permute("x", (1, 0)), {"x": X}, {"x": X.T}),
    "squeeze": (ck.Squeeze("x"), {"x": X[None, :, None]}, {"x": X}),
    "squeeze one": (ck.Squeeze("x", 0), {"x": X[None, :, None]}, {"x": X[:, None]}),
    "unsqueeze": (ck.Unsqueeze("x", 1), {"x": X}, {"x": X[:, None]}),
    "slice": (ck.Slice("x", 1, 2, 5), {"x": X}, {"x": X[:, 2:5]}),
    "slice from the end": (ck.Slice("x", 0, -2), {"x": X}, {"x": X[-2:]}),
    "cast": (ck.Cast("x", torch.bfloat16), {"x": X}, {"x": X.bfloat16()}),
    "copy": (ck.Copy("x", ["x", "y"]), {"x": X}, {"x": X, "y": X}),
    "stack": (ck.StackTensors(["x", "y"], "z", 1), {"y": Y, "x": X}, {"z": torch.stack([X, Y], 1)}),
    "stack_dim": (ck.StackTensors(["x", "y"], "z", stack_dim=-1), {"x": X, "y": Y}, {"z": torch.stack([X, Y], -1)}),
    "unstack": (ck.UnstackTensors("x", ["a", "b", "c", "d"], 0), {"x": X}, dict(zip("abcd", X, strict=True))),
    "unstack columns": (ck.UnstackTensors("x", list("abcdef"), 1), {"x": X}, dict(zip("abcdef", X.T, strict=True))),
    "concatenate": (ck.ConcatenateTensors(["x", "y"], "z", 1), {"x": X, "y": Y}, {"z": torch.cat([X, Y], 1)}),
    "chunk": (ck.ChunkTensors("x", ["a", "b", "c"], 1), {"x": X}, {"a": X[:, :2], "b": X[:, 2:4], "c": X[:, 4:]}),
    "split": (ck.Split("x", ["q", "k", "v"], [2, 1, 1], 0), {"x": X}, {"q": X[:2], "k": X[2:3], "v": X[3:]}),
    "select": (ck.SelectChildModules(["w", "b"], "parent"), {"parent.b": X}, {"b": X}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_leaf_is_plain_torch(case: str):
    leaf, given, expected = CASES[case]
    made = leaf.apply(given)
    assert made.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(made[name], tensor) and made[name].dtype == tensor.dtype
        assert made[name].is_contiguous()


def test_identity_rename_and_copy_are_the_very_same_tensor():
    assert ck.Identity("x").apply({"x": X})["x"] is X
    assert ck.Rename("x", "y").apply({"x": X})["y"] is X
    assert all(tensor is X for tensor in ck.Copy("x", ["a", "b"]).apply({"x": X}).values())


def test_a_slice_does_not_hold_what_was_cut_away():
    made = ck.Slice("x", 0, 0, 1).apply({"x": X})["x"]
    assert made.untyped_storage().nbytes() == made.nbytes


def test_permute_goes_between_rotary_layouts():
    # Meta's checkpoints have the two numbers of a rotation side by side, transformers half a head apart.
    heads, half, width = 3, 2, 5
    weight = torch.randn(heads * half * 2, width)
    made = ck.Permute("q", (0, 2, 1, 3), view=(heads, half, 2, width)).apply({"q": weight})["q"]
    for head in range(heads):
        for pair in range(half):
            for side in range(2):
                row = head * half * 2
                assert torch.equal(made[row + side * half + pair], weight[row + pair * 2 + side])
    bias = ck.Permute("q", (0, 2, 1), view=(heads, half, 2)).apply({"q": weight[:, 0].clone()})["q"]
    assert torch.equal(bias, made[:, 0])


def test_the_groups_of_select_are_one_for_each_name():
    groups = ck.SelectChildModules(["w", "b"], "p").state_dependency_groups()
    assert groups == {
        ck.StateGroup(frozenset({"p.w"}), frozenset({"w"})),
        ck.StateGroup(frozenset({"p.b"}), frozenset({"b"})),
    }


@pytest.mark.parametrize(
    ("leaf", "given", "said"),
    [
        (ck.ChunkTensors("x", list("abcde"), 0), {"x": X}, "gives 4 tensors"),
        (ck.UnstackTensors("x", ["a"], 0), {"x": X}, "gives 4 tensors"),
        (ck.Split("x", ["a", "b"], [1, 2], 0), {"x": X}, "x [4, 6]"),
        (ck.Squeeze("x", 0), {"x": X}, "not of length 1"),
        (ck.Transpose("x", (0, 2)), {"x": X}, "x [4, 6]"),
        (ck.StackTensors(["x", "y"], "z", 0), {"x": X, "y": X.T}, "y [6, 4]"),
        (ck.StackTensors(["x", "y"], "z", 0), {"x": X, "y": X.double()}, "float32 and torch.float64"),
        (ck.ConcatenateTensors(["x", "y"], "z", 0), {"x": X, "y": X.half()}, "put together"),
        (ck.Slice("x", 0, 2, 9), {"x": X}, "length 4"),
        (ck.Slice("x", 0, 2, 2), {"x": X}, "no range"),
        (ck.Rename("x", "y"), {"z": X}, "undefined group"),
        (ck.Rename("x", "y"), {"x": X, "z": X}, "undefined group"),
        (ck.StackTensors(["x", "y"], "z", 0), {"x": X}, "undefined group"),
        (ck.SelectChildModules(["w"], "p"), {"p.b": X}, "undefined group"),
    ],
)
def test_a_leaf_refuses_what_does_not_fit(leaf: ck.ModelStateMapper, given: dict[str, torch.Tensor], said: str):
    with pytest.raises(MapperError) as caught:
        leaf.apply(given)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: ck.StackTensors(["x"], "z"),
        lambda: ck.StackTensors(["x"], "z", 0, stack_dim=0),
        lambda: ck.StackTensors([], "z", 0),
        lambda: ck.ConcatenateTensors(["x", "x"], "z", 0),
        lambda: ck.Copy("x", ["y", "y"]),
        lambda: ck.Split("x", ["a", "b"], [1], 0),
        lambda: ck.Transpose("x", (0, 1, 2)),  # pyright: ignore[reportArgumentType]
    ],
)
def test_a_leaf_that_cannot_mean_anything_is_not_made(wrong):
    with pytest.raises(BadArgument):
        wrong()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: ck.Cast("x", "bfloat16"),  # pyright: ignore[reportArgumentType] - torch would take it for a device
        lambda: ck.Copy("x", "new"),
        lambda: ck.UnstackTensors("x", "new", 0),
        lambda: ck.StackTensors("old", "x", 0),
        lambda: ck.SelectChildModules("ab", "x"),
    ],
)
def test_a_text_is_no_list_of_names_and_no_type(wrong):
    with pytest.raises(BadType):
        wrong()


def test_a_text_for_names_is_shown_as_the_list_that_was_meant():
    with pytest.raises(BadType, match=r"(?s)source_names is the text 'qkv'.*\['qkv'\]"):
        ck.ConcatenateTensors("qkv", "z", 0)
    with pytest.raises(BadType, match=r"(?s)dtype='bf16'.*torch\.bfloat16"):
        ck.Cast("x", "bf16")  # pyright: ignore[reportArgumentType]


def test_leaves_are_values():
    assert ck.Split("x", ["a", "b"], [1, 2], 0) == ck.Split("x", ("a", "b"), (1, 2), 0)
    assert len({ck.Copy("x", ["a"]), ck.Copy("x", ["a"])}) == 1


@pytest.mark.parametrize("name", [name for name in vars(ck) if name.startswith("ModelStateMapper")])
def test_every_mapper_has_a_short_name(name: str):
    short = name.removeprefix("ModelStateMapper")
    assert not short or getattr(ck, short) is getattr(ck, name)


LAYOUTS = [
    ("concat", 4, 2),
    ("concat", 4, 4),
    ("interleaved", 4, 4),
    ("grouped", 4, 2),
    ("grouped", 4, 4),
    ("quartered", 8, 8),
]


@pytest.mark.parametrize(("kind", "heads", "groups"), LAYOUTS)
def test_what_was_dealt_is_collected_again(kind: LayoutKind, heads: int, groups: int):
    layout = Layout(kind, heads, groups, head_dim=3)
    ranges = tuple(tuple(layout.range(role, i) for i in range(layout.count(role))) for role in ("q", "k", "v"))
    fused = torch.randn(5, layout.width("q"))
    deal, collect = ck.Deal("qkv", ("q", "k", "v"), ranges, 1), ck.Collect(("q", "k", "v"), "qkv", ranges, 1)
    parts = deal.apply({"qkv": fused})
    for role in ("q", "k", "v"):
        for i in range(layout.count(role)):
            start, stop = layout.range(role, i)
            assert torch.equal(parts[role][:, 3 * i : 3 * i + 3], fused[:, start:stop])
    assert torch.equal(collect.apply(parts)["qkv"], fused)


@pytest.mark.parametrize("ranges", [(((0, 2),), ((3, 4),)), (((0, 2),), ((1, 4),)), (((0, 2),), ((2, 3),))])
def test_what_is_dealt_is_all_of_it_once(ranges: tuple[tuple[tuple[int, int], ...], ...]):
    with pytest.raises(MapperError):
        ck.Deal("x", ("a", "b"), ranges, 0).apply({"x": torch.arange(4)})


def test_formulas_shapes_and_nothing():
    assert torch.equal(ck.Scale("x", 2.0).apply({"x": X})["x"], X * 2)
    assert torch.equal(ck.Shift("x", 1.0).apply({"x": X})["x"], X + 1)
    assert torch.equal(ck.Reshape("x", (6, 4)).apply({"x": X})["x"], X.view(6, 4))
    assert ck.Drop("x").apply({"x": X}) == {}
    zeros = ck.Zeros("z", (2, 3), torch.bfloat16).apply({})["z"]
    assert zeros.shape == (2, 3) and zeros.dtype == torch.bfloat16 and not zeros.any()
