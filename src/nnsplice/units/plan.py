"""`UnitPlan`: a question as plain data, cut into units.

A unit is some whole prompts. Its outcome is a few arrays, which depend on the plan and the unit and on nothing else.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from nnsplice import engine
from nnsplice.errors import BadArgument
from nnsplice.files import from_json, text_of, whole
from nnsplice.shown import counted
from nnsplice.work import Arrays, imported, write_json

#: How much work a unit is about, in tokens times layers that are run.
SIZE = 2.5e6
#: How many tokens of a unit run at once, on every machine alike.
MAX_TOKENS = 4096
PLAN = "plan.json"
R = TypeVar("R")
#: What the question returns that was planned.
Result = TypeVar("Result")

#: What a worker finds out that all workers of a run have to take alike: a name, and how it is found out.
Agree = Callable[[str, Callable[[], Any]], Any]
#: The units that are done: the prompts of each, and what it gave.
Outcomes = Sequence[tuple[Sequence[int], Arrays]]


@dataclass(frozen=True)
class Models:
    """The models of a plan in this process."""

    model: engine.Model
    #: The second one, for a question about two.
    source: Any = None


@dataclass(frozen=True)
class Kind:
    """How a kind of question is run in units, and put together."""

    #: What its users call it: `ns.attribute`.
    name: str
    #: Gets ready to run units, with so many tokens at once: a function from the prompts of a unit to its outcome.
    ready: Callable[[UnitPlan[Any], Models, int, Agree], Callable[[Sequence[int]], Arrays]]
    #: The result of the units that are done; without a model.
    joined: Callable[[UnitPlan[Any], Outcomes], Any]


class Planned(Generic[Result]):
    """What `ns.run` runs: a `Plan`, or a `UnitPlan`; `Result` is what it returns for it."""


@dataclass(frozen=True, repr=False)
class UnitPlan(Planned[Result]):
    """A question cut into units, as plain data without a reference to the model: what `ns.plan` returns.

    >>> pairs = ["w3 w4 w5", "w3 w4"], ["w3 w6 w5", "w3 w6"]
    >>> plan = ns.plan(ns.attribute, model, *pairs, "layers[:].heads[:]", ns.logit_diff("w7", "w8"))
    >>> plan
    UnitPlan: ns.attribute, 2 prompts, 1 unit
    >>> plan.units(size=1)
    ((0,), (1,))

    Attributes:
        kind: where the kind of question is found, `module:NAME`.
        text: the question, as JSON.
        costs: `[prompt]`, about how much work each prompt is, in tokens times layers.
        files: tensors that belong to the question, as the bytes of safetensors files, by name.
    """

    kind: str
    text: str = field(repr=False)
    costs: tuple[float, ...] = field(repr=False)
    files: tuple[tuple[str, bytes], ...] = field(default=(), repr=False)

    @classmethod
    def of(
        cls, kind: str, told: Mapping[str, Any], costs: Sequence[float], files: Mapping[str, bytes]
    ) -> UnitPlan[Any]:
        """A plan of plain data, which holds at least the digest of the model's weights, `"weights"`."""
        text = json.dumps(told)
        return cls(kind, text, tuple(float(cost) for cost in costs), tuple(sorted(files.items())))

    def __len__(self) -> int:
        """The number of prompts."""
        return len(self.costs)

    def __repr__(self) -> str:
        return f"UnitPlan: {self.row.name}, {counted(len(self), 'prompt')}, {counted(len(self.units()), 'unit')}"

    @cached_property
    def told(self) -> Mapping[str, Any]:
        """The question."""
        return json.loads(self.text)

    @property
    def row(self) -> Kind:
        """What there is to know of such questions."""
        found = imported(self.kind)
        if not isinstance(found, Kind):
            raise BadArgument(f"{self.kind} is no kind of question", expected="a plan that ns.plan made")
        return found

    @cached_property
    def digest(self) -> str:
        """What tells this question from others."""
        found = hashlib.sha256(f"{self.kind} {self.text}".encode())
        for name, content in self.files:
            found.update(f"{name} {len(content)} ".encode() + content)
        return found.hexdigest()[:16]

    def file(self, name: str) -> bytes:
        """The bytes of a file that belongs to the question."""
        return dict(self.files)[name]

    def units(self, size: float | None = None) -> tuple[tuple[int, ...], ...]:
        """The prompts of each unit: together every prompt once, the same ones always.

        Args:
            size: how much work a unit is about, in tokens times layers; 2.5 million if left out. A prompt is never
                split.

        Returns:
            The units, those of the largest prompts first.

        Raises:
            BadArgument: a size of 0 or less.
        """
        size = SIZE if size is None else size
        if not size > 0:
            raise BadArgument(f"size={size}", expected="a number above 0, in tokens times layers")
        found: list[tuple[int, ...]] = []
        together: list[int] = []
        filled = 0.0
        for prompt in sorted(range(len(self)), key=lambda prompt: (-self.costs[prompt], prompt)):
            if together and filled + self.costs[prompt] > size:
                found.append(tuple(together))
                together, filled = [], 0.0
            together.append(prompt)
            filled += self.costs[prompt]
        return (*found, tuple(together)) if together else tuple(found)

    def write(self, folder: Path, **more: Any) -> None:
        """Write the plan, with more plain data beside it."""
        for name, content in self.files:
            with whole(folder / name) as temporary:
                temporary.write_bytes(content)
        told = {
            "kind": self.kind,
            "question": self.text,
            "costs": self.costs,
            "files": [name for name, _ in self.files],
        }
        write_json(folder / PLAN, {**told, **more})

    @classmethod
    def read(cls, folder: Path) -> tuple[UnitPlan[Any], Mapping[str, Any]]:
        """A plan that `write` wrote, and what stands beside it."""
        told = from_json(text_of(folder / PLAN), folder / PLAN)
        files = tuple((name, (folder / name).read_bytes()) for name in told["files"])
        return cls(told["kind"], told["question"], tuple(told["costs"]), files), told


def bytes_of(write: Callable[[Path], Any]) -> bytes:
    """What a function writes to a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        write(path)
        return path.read_bytes()


def read_from(content: bytes, read: Callable[[Path], R]) -> R:
    """What a function reads from a file of these bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(content)
        return read(path)


def rows_of(outcomes: Outcomes, name: str) -> np.ndarray:
    """One of the arrays of all units, `[prompt, ...]`, in the order of the prompts that are there."""
    rows = np.concatenate([np.asarray(prompts, dtype=np.int64) for prompts, _ in outcomes])
    return np.concatenate([arrays[name] for _, arrays in outcomes])[np.argsort(rows, kind="stable")]


def packed_text(told: Any) -> np.ndarray:
    """Plain data as an array, for the outcome of a unit."""
    return np.frombuffer(json.dumps(told).encode(), dtype=np.uint8)


def text_in(array: np.ndarray) -> Any:
    """What `packed_text` was given."""
    return json.loads(array.tobytes())


def lists_of(outcomes: Outcomes, name: str) -> list[Any]:
    """One of the lists of all units, which `packed_text` packed, an entry for each prompt, in their order."""
    found = {
        prompt: entry
        for prompts, arrays in outcomes
        for prompt, entry in zip(prompts, text_in(arrays[name]), strict=True)
    }
    return [found[prompt] for prompt in sorted(found)]


def prompts_in(outcomes: Outcomes) -> list[int]:
    """The prompts of the units that are done, in order."""
    return sorted(prompt for prompts, _ in outcomes for prompt in prompts)
