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

#: The work of a unit, in tokens times layers.
SIZE = 2.5e6
#: Tokens that run at once; the same on every machine, as results must be identical.
MAX_TOKENS = 4096
PLAN = "plan.json"
R = TypeVar("R")
#: The return type of the planned question.
Result = TypeVar("Result")

#: `agree(name, compute)`: a value that all workers of a run share; the first worker to need it computes it.
Agree = Callable[[str, Callable[[], Any]], Any]
#: Finished units: the prompts of each, and its arrays.
Outcomes = Sequence[tuple[Sequence[int], Arrays]]


@dataclass(frozen=True)
class Models:
    """The models of a plan in this process."""

    model: engine.Model
    #: The second model, for a question about two.
    source: Any = None


@dataclass(frozen=True)
class Kind:
    """How one kind of question is run in units and joined."""

    #: The public function: `ns.attribute`.
    name: str
    #: `ready(plan, models, max_tokens, agree)`: a function from the prompts of a unit to its outcome.
    ready: Callable[[UnitPlan[Any], Models, int, Agree], Callable[[Sequence[int]], Arrays]]
    #: The result of the finished units; needs no model.
    joined: Callable[[UnitPlan[Any], Outcomes], Any]


class Planned(Generic[Result]):
    """A plan for `ns.run`: a `Plan` or a `UnitPlan`; `Result` is the type that `ns.run` returns for it."""


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
        kind: the kind of question, as `module:NAME`.
        text: the question, as JSON.
        costs: `[prompt]`, the estimated work of each prompt, in tokens times layers.
        files: tensors of the question, by name, as the bytes of safetensors files.
    """

    kind: str
    text: str = field(repr=False)
    costs: tuple[float, ...] = field(repr=False)
    files: tuple[tuple[str, bytes], ...] = field(default=(), repr=False)

    @classmethod
    def of(
        cls, kind: str, question: Mapping[str, Any], costs: Sequence[float], files: Mapping[str, bytes]
    ) -> UnitPlan[Any]:
        """A plan from plain data; `question["weights"]` is the digest of the model's weights."""
        text = json.dumps(question)
        return cls(kind, text, tuple(float(cost) for cost in costs), tuple(sorted(files.items())))

    def __len__(self) -> int:
        """The number of prompts."""
        return len(self.costs)

    def __repr__(self) -> str:
        return f"UnitPlan: {self.row.name}, {counted(len(self), 'prompt')}, {counted(len(self.units()), 'unit')}"

    @cached_property
    def question(self) -> Mapping[str, Any]:
        """The question as plain data."""
        return json.loads(self.text)

    @property
    def row(self) -> Kind:
        """The `Kind` of this question."""
        found = imported(self.kind)
        if not isinstance(found, Kind):
            raise BadArgument(f"{self.kind} is no kind of question", expected="a plan that ns.plan made")
        return found

    @cached_property
    def digest(self) -> str:
        """A hash of the question and its files."""
        found = hashlib.sha256(f"{self.kind} {self.text}".encode())
        for name, content in self.files:
            found.update(f"{name} {len(content)} ".encode() + content)
        return found.hexdigest()[:16]

    def file(self, name: str) -> bytes:
        """The bytes of a file that belongs to the question."""
        return dict(self.files)[name]

    def units(self, size: float | None = None) -> tuple[tuple[int, ...], ...]:
        """The prompts of each unit; every prompt is in exactly one, always the same.

        Args:
            size: the work of a unit, in tokens times layers; 2.5 million if left out. A prompt is never split.

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
        contents = {
            "kind": self.kind,
            "question": self.text,
            "costs": self.costs,
            "files": [name for name, _ in self.files],
        }
        write_json(folder / PLAN, {**contents, **more})

    @classmethod
    def read(cls, folder: Path) -> tuple[UnitPlan[Any], Mapping[str, Any]]:
        """A plan that `write` wrote, and all data in its file."""
        contents = from_json(text_of(folder / PLAN), folder / PLAN)
        files = tuple((name, (folder / name).read_bytes()) for name in contents["files"])
        return cls(contents["kind"], contents["question"], tuple(contents["costs"]), files), contents


def bytes_of(write: Callable[[Path], Any]) -> bytes:
    """The bytes that a function writes to a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        write(path)
        return path.read_bytes()


def read_from(content: bytes, read: Callable[[Path], R]) -> R:
    """The value that a function reads from a file of these bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(content)
        return read(path)


def rows_of(outcomes: Outcomes, name: str) -> np.ndarray:
    """One array of all units, `[prompt, ...]`, in the order of the prompts."""
    rows = np.concatenate([np.asarray(prompts, dtype=np.int64) for prompts, _ in outcomes])
    return np.concatenate([arrays[name] for _, arrays in outcomes])[np.argsort(rows, kind="stable")]


def packed_text(data: Any) -> np.ndarray:
    """Plain data as an array, for the outcome of a unit."""
    return np.frombuffer(json.dumps(data).encode(), dtype=np.uint8)


def text_in(array: np.ndarray) -> Any:
    """The data that `packed_text` packed."""
    return json.loads(array.tobytes())


def lists_of(outcomes: Outcomes, name: str) -> list[Any]:
    """One list of all units, with an entry for each prompt in order; `packed_text` packed it."""
    found = {
        prompt: entry
        for prompts, arrays in outcomes
        for prompt, entry in zip(prompts, text_in(arrays[name]), strict=True)
    }
    return [found[prompt] for prompt in sorted(found)]


def prompts_in(outcomes: Outcomes) -> list[int]:
    """The prompts of finished units, in order."""
    return sorted(prompt for prompts, _ in outcomes for prompt in prompts)
