"""Mappers made of mappers: what the contract says beyond the laws."""

from __future__ import annotations

import cProfile
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nnsplice import checkpoints as ck
from nnsplice.errors import BadArgument, MapperError

ONE = torch.ones(2)


def group(inputs: str, outputs: str) -> ck.StateGroup:
    return ck.StateGroup(frozenset(inputs.split()), frozenset(outputs.split()))


@dataclass(frozen=True)
class Constant(ck.ModelStateMapper):
    """A mapper of one's own that makes something of nothing."""

    name: str

    def state_dependency_groups(self) -> frozenset[ck.StateGroup]:
        return frozenset({group("", self.name)})

    def apply(self, group: dict[str, Tensor]) -> dict[str, Tensor]:
        assert not group
        return {self.name: ONE}


class Empty(ck.ModelStateMapper):
    def state_dependency_groups(self) -> frozenset[ck.StateGroup]:
        return frozenset()

    def apply(self, group: dict[str, Tensor]) -> dict[str, Tensor]:
        raise AssertionError("it has no group")


def test_a_split_followed_by_a_rename_is_one_group():
    chain = ck.Sequential([ck.UnstackTensors("s", ["a", "b"], 0), ck.Rename("a", "x")])
    assert chain.state_dependency_groups() == {group("s", "x b")}
    made = chain.apply({"s": torch.arange(2)})
    assert made["x"] == 0 and made["b"] == 1


@pytest.mark.parametrize("kind", ["input", "output"])
def test_mappers_side_by_side_share_no_key(kind: str):
    twice = (
        [ck.Rename("a", "x"), ck.Rename("a", "y")] if kind == "input" else [ck.Rename("a", "x"), ck.Rename("b", "x")]
    )
    with pytest.raises(ValueError, match=f"colliding {kind}"):
        ck.Parallel(twice)


def test_a_set_of_keys_that_is_no_group_is_refused():
    both = ck.Parallel([ck.Rename("a", "x"), ck.Rename("b", "y")])
    for given in ({}, {"a": ONE, "b": ONE}, {"c": ONE}):
        with pytest.raises(ValueError, match="undefined group"):
            both.apply(given)


def test_a_group_in_part_is_refused():
    chain = ck.Sequential([ck.StackTensors(["a", "b"], "s", 0), ck.Rename("s", "t")])
    with pytest.raises(ValueError, match="undefined group"):
        chain.apply({"a": ONE})


def test_empty_mappers_are_dropped():
    assert ck.Parallel([]).state_dependency_groups() == frozenset()
    assert len(ck.Parallel([Empty(), ck.Identity("a"), ck.Parallel([])]).mappers) == 1
    assert ck.filter_empty_mappers([Empty(), ck.Parallel([])]) == []
    for stages in ([], [Empty()]):
        with pytest.raises(ValueError):
            ck.Sequential(stages)


@pytest.mark.parametrize("kind", [ck.Parallel, ck.Sequential])
def test_what_is_no_list_of_mappers_is_refused(kind: Any):
    with pytest.raises(TypeError, match=r"(?s)Rename alone.*\[mapper\]"):
        kind(ck.Rename("a", "b"))
    with pytest.raises(TypeError, match="a str is no mapper"):
        kind(["a"])


def test_names_may_be_exchanged():
    swap = ck.Parallel([ck.Rename("a", "b"), ck.Rename("b", "a")])
    twice = ck.Sequential([swap, swap])
    assert twice.state_dependency_groups() == {group("a", "a"), group("b", "b")}
    joined = ck.Sequential([swap, ck.StackTensors(["a", "b"], "s", 0)])
    assert joined.apply({"a": ONE, "b": ONE * 2})["s"].tolist() == [[2, 2], [1, 1]]


def test_what_is_used_up_is_not_there_again():
    with pytest.raises(MapperError, match="stage 0 has used up") as caught:
        ck.Sequential([ck.Rename("a", "x"), ck.Rename("a", "y")])
    assert "Copy" in str(caught.value)
    chain = ck.Sequential([ck.Copy("a", ["a", "b"]), ck.Rename("a", "x"), ck.Transpose("b", (0, 0))])
    assert chain.state_dependency_groups() == {group("a", "x b")}


def test_a_name_that_passes_by_is_not_made_again():
    with pytest.raises(ValueError, match="colliding output"):
        ck.Sequential([ck.Rename("a", "x"), ck.Rename("b", "x")])


def test_something_of_nothing_works_in_every_stage():
    first = ck.Sequential([Constant("c"), ck.StackTensors(["a", "c"], "s", 0)])
    assert first.state_dependency_groups() == {group("a", "s")}
    assert first.apply({"a": ONE * 2})["s"].tolist() == [[2, 2], [1, 1]]
    last = ck.Sequential([ck.Rename("a", "b"), Constant("c"), Constant("d")])
    assert last.state_dependency_groups() == {group("a", "b"), group("", "c d")}
    assert last.apply({}).keys() == {"c", "d"} and last.apply({"a": ONE}).keys() == {"b"}
    both = ck.Parallel([Constant("c"), Constant("d"), ck.Identity("a")])
    assert both.state_dependency_groups() == {group("a", "a"), group("", "c d")}
    assert both.apply({}).keys() == {"c", "d"}


def test_a_mapper_that_makes_something_else_is_found_out():
    class Wrong(Constant):
        def apply(self, group: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"other": ONE}

    with pytest.raises(MapperError, match="declared c and made other"):
        ck.Parallel([Wrong("c")]).apply({})
    with pytest.raises(MapperError, match="declared c and made other"):
        ck.Sequential([Wrong("c")]).apply({})


def test_groups_of_one_mapper_that_share_a_key_are_joined_in_a_chain():
    class Sharing(ck.ModelStateMapper):
        def state_dependency_groups(self) -> frozenset[ck.StateGroup]:
            return frozenset({group("a b", "x"), group("b c", "y")})

        def apply(self, group: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"x" if "a" in group else "y": sum(group.values(), torch.zeros(2))}

    chain = ck.Sequential([Sharing(), ck.Rename("x", "z")])
    assert chain.state_dependency_groups() == {group("a b c", "z y")}
    made = chain.apply({"a": ONE, "b": ONE * 2, "c": ONE * 4})
    assert made["z"].tolist() == [3, 3] and made["y"].tolist() == [6, 6]


@pytest.mark.parametrize(("total", "current"), [(0, 0), (-1, 0), (2, 2), (2, -1)])
def test_a_share_that_does_not_exist_is_refused(total: int, current: int):
    with pytest.raises(BadArgument):
        ck.Shard(ck.Identity("a"), total, current)


def test_shares_go_round_in_the_order_of_names():
    whole = ck.Parallel([ck.Identity(name) for name in "edcba"])
    shares = [ck.Shard(whole, 2, i) for i in range(2)]
    assert [sorted(n for g in s.state_dependency_groups() for n in g.inputs) for s in shares] == [
        list("ace"),
        list("bd"),
    ]


def test_an_empty_share_does_nothing():
    share = ck.Shard(ck.Identity("a"), 3, 2)
    assert share.state_dependency_groups() == frozenset()
    assert ck.Parallel([share]).state_dependency_groups() == frozenset()
    with pytest.raises(ValueError, match="undefined group"):
        share.apply({"a": ONE})


def test_a_share_refuses_the_groups_of_others():
    whole = ck.Parallel([ck.Identity("a"), ck.Identity("b")])
    with pytest.raises(ValueError, match="undefined group"):
        ck.Shard(whole, 2, 0).apply({"b": ONE})


def test_shares_by_size_are_stretches_of_the_files_of_about_one_size():
    names = [f"t{i}" for i in range(60)]
    sizes = {name: 100 + 37 * (i * i % 11) for i, name in enumerate(reversed(names))}
    whole = ck.Parallel([ck.Identity(name) for name in names])
    order, bytes_of = list(sizes), []
    for i in range(4):
        own = [order.index(next(iter(g.inputs))) for g in ck.Shard(whole, 4, i, sizes).state_dependency_groups()]
        assert sorted(own) == list(range(min(own), max(own) + 1))
        bytes_of.append(sum(sizes[order[place]] for place in own))
    assert max(bytes_of) - min(bytes_of) <= 2 * max(sizes.values())
    with pytest.raises(MapperError, match="sizes of t0"):
        ck.Shard(whole, 2, 0, {name: 1 for name in names if name != "t0"})


def test_adapters():
    module = nn.BatchNorm1d(2)
    module.register_buffer("scratch", torch.zeros(1), persistent=False)
    names = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    mapper = ck.identity_mapper_from_module(module)
    assert mapper.state_dependency_groups() == {group(name, name) for name in names}
    made = ck.identity_mapper_from_mapper_outputs(ck.UnstackTensors("s", ["a", "b"], 0))
    assert made.state_dependency_groups() == {group("a", "a"), group("b", "b")}


# -- many keys ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counting(ck.ModelStateMapper):
    """Another mapper, with a note of every key that it was asked about."""

    mapper: ck.ModelStateMapper
    asked: list[int] = field(default_factory=list)

    def state_dependency_groups(self) -> frozenset[ck.StateGroup]:
        return self.mapper.state_dependency_groups()

    def apply(self, group: dict[str, Tensor]) -> dict[str, Tensor]:
        self.asked.append(len(group))
        return self.mapper.apply(group)


def big(count: int) -> tuple[ck.ModelStateMapper, list[Counting]]:
    renames = ck.Parallel([ck.Rename(f"a.{i}", f"b.{i}") for i in range(count)])
    stacks = ck.Parallel(
        [ck.StackTensors([f"b.{i + j}" for j in range(10)], f"c.{i}", 0) for i in range(0, count // 2, 10)]
    )
    splits = ck.Parallel(
        [ck.UnstackTensors(f"c.{i}", [f"d.{i + j}" for j in range(10)], 0) for i in range(0, count // 2, 10)]
    )
    stages = [Counting(stage) for stage in (renames, stacks, splits)]
    return ck.Sequential(stages), stages


def test_the_cost_of_planning_grows_as_the_number_of_keys() -> None:
    calls = []
    for count in (1000, 4000):
        profile = cProfile.Profile(builtins=False)
        chain, _ = profile.runcall(big, count)
        assert len(profile.runcall(chain.state_dependency_groups)) == count // 2 + count // 20
        calls.append(sum(entry.callcount for entry in profile.getstats()))
    assert calls[1] < 4.2 * calls[0], calls


def test_fifty_thousand_keys_are_planned() -> None:
    chain, _ = big(50_000)
    assert len(chain.state_dependency_groups()) == 27_500


def test_one_group_touches_only_its_own_keys():
    for count in (100, 2000):
        chain, stages = big(count)
        chain.apply({f"a.{i}": ONE for i in range(10)})
        assert [stage.asked for stage in stages] == [[1] * 10, [10], [1]]


def test_all_groups_touch_each_key_once_a_stage():
    for count in (100, 2000):
        chain, stages = big(count)
        for one in chain.state_dependency_groups():
            chain.apply(dict.fromkeys(one.inputs, ONE))
        assert [sum(stage.asked) for stage in stages] == [count, count // 2, count // 20]


def test_a_share_of_the_files_has_about_its_part_of_the_bytes_where_one_tensor_is_large() -> None:
    whole = ck.Parallel([ck.Identity("small"), ck.Identity("large")])
    shares = [ck.Shard(whole, 2, number, {"small": 1, "large": 99}) for number in range(2)]
    names = [[sorted(group.inputs) for group in share.state_dependency_groups()] for share in shares]
    assert names == [[["small"]], [["large"]]]
