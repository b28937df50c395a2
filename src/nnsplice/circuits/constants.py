"""`OptimalAblation`: a trained constant for each sender."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from nnsplice.activations import storage
from nnsplice.activations.saved_activation import SavedActivation
from nnsplice.errors import FileError
from nnsplice.files import from_json

#: The name of its own part of a file's header.
HEADER = "nnsplice.optimal_ablation"


@dataclass(frozen=True)
class Training:
    """The record of training; divergences are means over prompts, from the full model's logits to the circuit's."""

    steps: int
    lr: float
    seed: int
    #: The numbers of the prompts that were trained on, and of those that were held out.
    trained_on: tuple[int, ...]
    held_out: tuple[int, ...]
    #: On the training prompts: with the initial means, and with the trained constants.
    mean_divergence: float
    divergence: float
    #: The same on those held out; None where none was.
    mean_held_out: float | None
    held_out_divergence: float | None
    #: Divergences on the way, on the prompts that were trained on.
    history: tuple[float, ...] = field(repr=False)

    def __str__(self) -> str:
        line = f"divergence {self.mean_divergence:.4g} with means, {self.divergence:.4g} trained on "
        line += f"{len(self.trained_on)} prompt{'s' * (len(self.trained_on) != 1)}"
        if self.mean_held_out is None:
            return f"{line}; none held out"
        return f"{line}; on {len(self.held_out)} held out {self.mean_held_out:.4g} and {self.held_out_divergence:.4g}"


@dataclass(frozen=True, eq=False, repr=False)
class OptimalAblation:
    """Trained values of everything outside one circuit: one vector for each sender, at every token.

    It is for the circuit that it was trained with, and `ablation=` takes it for any: the same run can be repeated.

    >>> circuit = ns.Circuit.of(nodes=["embed", "layers[:].heads[:]"], model=model)
    >>> constants = ns.optimal_ablation(model, circuit, ["w3 w4 w5", "w9 w4 w5"], steps=5, progress=False)
    >>> constants.senders
    ('layers[0].mlp', 'layers[1].mlp', 'layers[2].mlp')
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     constants.to_file(f"{folder}/constants.safetensors")
    ...     read = ns.OptimalAblation.from_file(f"{folder}/constants.safetensors")
    >>> read.training == constants.training
    True

    Attributes:
        values: one row, with a value for `embed.output` and for every head and MLP.
        senders: whose vectors were trained; the others have their mean, which nothing reads.
        training: the record of the training.
        provenance: the model, its weights, and the circuit.
    """

    values: SavedActivation
    senders: tuple[str, ...]
    training: Training
    provenance: Mapping[str, Any]

    def to_file(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; whole, or not at all.

        Args:
            path: the file.
        """
        record = {"senders": self.senders, "training": asdict(self.training), "provenance": dict(self.provenance)}
        storage.write(path, self.values._packs, self.values._provenance, {HEADER: json.dumps(record)})

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> OptimalAblation:
        """Read a file of `to_file`.

        Args:
            path: the file.

        Raises:
            FileError: it is something else, or damaged.
        """
        values = SavedActivation.from_file(path)
        text = storage.note(path, HEADER)
        if text is None:
            raise FileError(
                f"{path} is a capture without a word about training", expected="what OptimalAblation.to_file wrote"
            )
        record = from_json(text, f"the header of {path}")
        try:
            found = {one.name: record["training"][one.name] for one in fields(Training)}
            training: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in found.items()}
            return cls(values, tuple(record["senders"]), Training(**training), dict(record["provenance"]))
        except (KeyError, TypeError, ValueError):
            raise FileError(f"the header of {path} is damaged: it does not say how it was trained") from None

    def __repr__(self) -> str:
        return f"OptimalAblation of {len(self.senders)} senders: {self.training}"


def note_of(trainings: Sequence[Training]) -> str:
    """Some trainings in one line: the mean of each number."""

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    one = trainings[0]
    record = Training(
        one.steps, one.lr, one.seed, one.trained_on, one.held_out, mean([t.mean_divergence for t in trainings]) or 0.0,
        mean([t.divergence for t in trainings]) or 0.0, mean([t.mean_held_out for t in trainings]),
        mean([t.held_out_divergence for t in trainings]), (),
    )  # fmt: skip
    each = "" if len(trainings) == 1 else f", in the mean of {len(trainings)} circuits"
    return f"optimal ablation: {record}{each}"
