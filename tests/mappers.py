"""Random pipelines for the tests: a state, and mappers that fit it, with what they do said in plain dictionaries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from nnsplice import checkpoints as ck

State = dict[str, Tensor]


@dataclass
class Pipeline:
    """Stages, and the same as functions of a whole state."""

    state: State
    stages: list[ck.ModelStateMapper] = field(default_factory=list)
    #: One step of plain torch a mapper.
    steps: list[list[tuple[list[str], Callable[[list[Tensor]], State]]]] = field(default_factory=list)

    def by_hand(self) -> State:
        """The state after all stages, worked out with no mapper."""
        state = dict(self.state)
        for stage in self.steps:
            made: State = {}
            for names, step in stage:
                made |= step([state[name] for name in names])
            used = {name for names, _ in stage for name in names}
            state = {name: tensor for name, tensor in state.items() if name not in used} | made
        return state


@st.composite
def pipelines(draw: st.DrawFn) -> Pipeline:
    """A few tensors of [4, 6], and up to four stages; every stage leaves some tensors alone."""
    count = draw(st.integers(1, 6))
    pipeline = Pipeline({f"t{i}": torch.arange(24.0).reshape(4, 6) + 100 * i for i in range(count)})
    shapes = dict.fromkeys(pipeline.state, (4, 6))
    for number in range(draw(st.integers(1, 4))):
        free = draw(st.permutations(sorted(shapes)))
        mappers: list[ck.ModelStateMapper] = []
        steps: list[tuple[list[str], Callable[[list[Tensor]], State]]] = []
        for index in range(draw(st.integers(1, 3))):
            if not free:
                break
            mapper, names, step, made = draw(_mapper(free, shapes, f"s{number}m{index}"))
            free = [name for name in free if name not in names]
            mappers.append(mapper)
            steps.append((names, step))
            for name in names:
                del shapes[name]
            shapes |= made
        pipeline.stages.append(ck.Parallel(draw(st.permutations(mappers))))
        pipeline.steps.append(steps)
    return pipeline


@st.composite
def _mapper(draw: st.DrawFn, free: list[str], shapes: dict[str, tuple[int, ...]], new: str) -> Any:
    one = free[0]
    shape: Any = shapes[one]
    kinds = ["rename", "copy", "transpose", "swap"]
    kinds += ["split", "chunk", "unstack"] if min(shape, default=0) > 1 else []
    same = [name for name in free if shapes[name] == shape][:3]
    kinds += ["stack"] if len(same) > 1 and len(shape) < 3 else []
    kinds += ["concatenate"] if len(same) > 1 and shape else []
    kind = draw(st.sampled_from(kinds))
    if kind == "rename":
        return ck.Rename(one, new), [one], lambda t: {new: t[0]}, {new: shape}
    if kind == "swap" and len(free) > 1:
        other = free[1]
        mapper = ck.Parallel([ck.Rename(one, other), ck.Rename(other, one)])
        return mapper, [one, other], lambda t: {other: t[0], one: t[1]}, {other: shape, one: shapes[other]}
    if kind in ("copy", "swap"):
        names = [one, new]
        return ck.Copy(one, names), [one], lambda t: dict.fromkeys(names, t[0]), dict.fromkeys(names, shape)
    if kind == "transpose":
        return (
            ck.Transpose(one, (0, -1)),
            [one],
            lambda t: {one: t[0].mT if t[0].ndim == 2 else t[0].transpose(0, -1)},
            {one: (shape[-1], *shape[1:-1], shape[0]) if len(shape) > 1 else shape},
        )
    if kind == "split":
        cut = draw(st.integers(1, shape[0] - 1))
        names = [f"{new}a", f"{new}b"]
        return (
            ck.Split(one, names, [cut, shape[0] - cut], 0), [one],
            lambda t: {names[0]: t[0][:cut], names[1]: t[0][cut:]},
            {names[0]: (cut, *shape[1:]), names[1]: (shape[0] - cut, *shape[1:])},
        )  # fmt: skip
    if kind == "chunk":
        names, half = [f"{new}a", f"{new}b"], -(-shape[-1] // 2)
        return (
            ck.ChunkTensors(one, names, -1), [one],
            lambda t: {names[0]: t[0][..., :half], names[1]: t[0][..., half:]},
            {names[0]: (*shape[:-1], half), names[1]: (*shape[:-1], shape[-1] - half)},
        )  # fmt: skip
    if kind == "unstack":
        names = [f"{new}.{i}" for i in range(shape[0])]
        return (
            ck.UnstackTensors(one, names, 0), [one],
            lambda t: {name: t[0][i] for i, name in enumerate(names)}, dict.fromkeys(names, shape[1:]),
        )  # fmt: skip
    if kind == "stack":
        return (
            ck.StackTensors(same, new, stack_dim=0), same,
            lambda t: {new: torch.cat([x.unsqueeze(0) for x in t])}, {new: (len(same), *shape)},
        )  # fmt: skip
    return (
        ck.ConcatenateTensors(same, new, 0), same,
        lambda t: {new: torch.cat(t)}, {new: (shape[0] * len(same), *shape[1:])},
    )  # fmt: skip
