"""Laws of mappers, over random pipelines."""

from __future__ import annotations

import os
import subprocess
import sys

import networkx
import torch
from hypothesis import given
from hypothesis import strategies as st

from mappers import Pipeline, pipelines
from nnsplice import checkpoints as ck
from nnsplice.checkpoints.mapper.abc import inputs_of, ordered, outputs_of


def run(mapper: ck.ModelStateMapper, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every group once, with exactly its inputs; what no group needs stays."""
    made = {name: tensor for name, tensor in state.items() if name not in inputs_of(mapper)}
    for group in ordered(mapper.state_dependency_groups()):
        outputs = mapper.apply({name: state[name] for name in group.inputs})
        assert outputs.keys() == group.outputs
        made |= outputs
    return made


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@given(pipelines())
def test_a_chain_equals_its_steps_by_hand(pipeline: Pipeline):
    assert equal(run(ck.Sequential(pipeline.stages), pipeline.state), pipeline.by_hand())


@given(pipelines())
def test_a_chain_equals_its_stages_one_after_the_other(pipeline: Pipeline):
    state = pipeline.state
    for stage in pipeline.stages:
        state = run(stage, state)
    assert equal(run(ck.Sequential(pipeline.stages), pipeline.state), state)


@given(pipelines(), st.data())
def test_chains_may_be_cut_and_nested_anywhere(pipeline: Pipeline, data: st.DataObject):
    cut = data.draw(st.integers(0, len(pipeline.stages)))
    halves = [ck.Sequential(half) for half in (pipeline.stages[:cut], pipeline.stages[cut:]) if half]
    flat = ck.Sequential(pipeline.stages)
    nested = ck.Sequential(halves)
    assert nested.state_dependency_groups() == flat.state_dependency_groups()
    assert equal(run(nested, pipeline.state), run(flat, pipeline.state))


@given(pipelines())
def test_groups_partition_the_keys(pipeline: Pipeline):
    groups = ck.Sequential(pipeline.stages).state_dependency_groups()
    for kind in ("inputs", "outputs"):
        names = [name for group in groups for name in getattr(group, kind)]
        assert len(names) == len(set(names))


@given(pipelines())
def test_groups_are_what_hangs_together(pipeline: Pipeline):
    # The whole graph, level by level: a key that no mapper of a stage takes goes straight on.
    graph, keys = networkx.Graph(), set(pipeline.state)
    for level, stage in enumerate(pipeline.stages):
        for group in stage.state_dependency_groups():
            node = (level, group)
            graph.add_edges_from((node, (level, name)) for name in group.inputs)
            graph.add_edges_from((node, (level + 1, name)) for name in group.outputs)
        keys -= inputs_of(stage)
        graph.add_edges_from(((level, name), (level + 1, name)) for name in keys)
        keys |= outputs_of(stage)
    last = len(pipeline.stages)
    expected = {
        ck.StateGroup(
            frozenset(name for level, name in part if level == 0 and isinstance(name, str)),
            frozenset(name for level, name in part if level == last and isinstance(name, str)),
        )
        for part in networkx.connected_components(graph)
        if any(isinstance(what, ck.StateGroup) for _, what in part)
    }
    assert ck.Sequential(pipeline.stages).state_dependency_groups() == expected


@given(pipelines(), st.integers(1, 5), st.booleans())
def test_shares_partition_the_groups(pipeline: Pipeline, total: int, sized: bool):
    chain = ck.Sequential(pipeline.stages)
    sizes = {name: 10 + 3 * i for i, name in enumerate(sorted(inputs_of(chain)))} if sized else None
    shares = [ck.Shard(chain, total, i, sizes) for i in range(total)]
    groups = [group for share in shares for group in share.state_dependency_groups()]
    assert len(groups) == len(set(groups)) and set(groups) == chain.state_dependency_groups()
    together: dict[str, torch.Tensor] = {}
    for share in shares:
        for group in share.state_dependency_groups():
            together |= share.apply({name: pipeline.state[name] for name in group.inputs})
    untouched = {name: tensor for name, tensor in pipeline.state.items() if name not in inputs_of(chain)}
    assert equal(together | untouched, pipeline.by_hand())


@given(pipelines())
def test_a_prefix_changes_names_only(pipeline: Pipeline):
    chain = ck.Sequential(pipeline.stages)
    scoped = ck.PrefixScope(chain, "from.", "to.")
    state = {f"from.{name}": tensor for name, tensor in pipeline.state.items() if name in inputs_of(chain)}
    plain = run(chain, {name: tensor for name, tensor in pipeline.state.items() if name in inputs_of(chain)})
    assert equal(run(scoped, state), {f"to.{name}": tensor for name, tensor in plain.items()})


@given(pipelines())
def test_a_dry_run_knows_shapes_and_types(pipeline: Pipeline):
    chain = ck.Sequential(pipeline.stages)
    for group in chain.state_dependency_groups():
        blank = chain.apply({name: pipeline.state[name].to("meta") for name in group.inputs})
        made = chain.apply({name: pipeline.state[name] for name in group.inputs})
        assert {n: (t.shape, t.dtype) for n, t in blank.items()} == {n: (t.shape, t.dtype) for n, t in made.items()}


@given(pipelines())
def test_what_leaves_a_mapper_is_contiguous(pipeline: Pipeline):
    chain = ck.Sequential(pipeline.stages)
    made = run(chain, {name: tensor for name, tensor in pipeline.state.items() if name in inputs_of(chain)})
    assert made.keys() == outputs_of(chain)
    assert all(tensor.is_contiguous() for tensor in made.values())


HASHED = """
import torch
from nnsplice import checkpoints as ck
names = [f"k{i}" for i in range(40)]
chain = ck.Sequential([
    ck.Parallel([ck.Copy(n, [n, f"{n}.copy"]) for n in names[:9]]),
    ck.Parallel([ck.StackTensors(names[i:i + 4], f"s{i}", 0) for i in range(0, 40, 4)]),
    ck.Parallel([ck.UnstackTensors(f"s{i}", [f"u{i}.{j}" for j in range(4)], 0) for i in range(0, 40, 8)]),
])
from nnsplice.checkpoints.mapper.abc import ordered
from nnsplice.checkpoints.mapper.fingerprint import fingerprint
for i in range(3):
    for group in ordered(ck.Shard(chain, 3, i).state_dependency_groups()):
        print(sorted(group.inputs), list(chain.apply({n: torch.ones(1) for n in group.inputs})))
print(chain.explain())
print(list(fingerprint(chain)))
"""


def test_nothing_depends_on_the_order_of_hashes():
    seen = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", HASHED], env=environment, capture_output=True, text=True, timeout=120, check=True
        )
        seen.add(done.stdout)
    assert len(seen) == 1 and seen.pop().strip()
