"""The origin of a steering vector, and the measurements of its fit."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from nnsplice.errors import FileError
from nnsplice.files import from_json

#: The name of this text in the header of a vector's file.
HEADER = "nnsplice.steering"


@dataclass(frozen=True)
class About:
    """The origin of a vector and its measurements; None or empty where something is not known.

    Attributes:
        method: the method that fitted it.
        options: the options of the method.
        quality: the AUC on held-out prompts, by path.
        norms: the mean norm of the states it was fitted on, by path.
        rows: the numbers of positive and negative rows.
        unit: what a coefficient of 1.0 is.
        model_type: the architecture of the model, by its config.
        template: a digest of the chat template that the prompts went through.
        coefficient: the recommended coefficient.
    """

    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    quality: Mapping[str, float] = field(default_factory=dict)
    norms: Mapping[str, float] = field(default_factory=dict)
    rows: tuple[int, ...] | None = None
    unit: str = "as given"
    model_type: str | None = None
    template: str | None = None
    coefficient: float | None = None

    def only(self, keys: Collection[str]) -> About:
        """The measurements of these paths only."""
        return replace(
            self,
            quality={key: value for key, value in self.quality.items() if key in keys},
            norms={key: value for key, value in self.norms.items() if key in keys},
        )

    def scaled(self, factor: float) -> About:
        """The data of the vector times a number."""
        # A direction that separates the groups separates them in the opposite order when it is reversed.
        quality = {key: 1 - value for key, value in self.quality.items()} if factor < 0 else self.quality
        unit = self.unit if factor == 1 else f"{self.unit}, times a number"
        return replace(self, quality=quality, unit=unit, coefficient=None)

    def to_json(self) -> str:
        """The text for the header of a file."""
        return json.dumps(asdict(self))

    @classmethod
    def from_header(cls, path: str | os.PathLike[str], text: str | None) -> About:
        """Read the text of a file's header.

        Raises:
            FileError: the file has none, or it is damaged.
        """
        if text is None:
            raise FileError(
                f"{path} holds a capture, and nothing about a steering vector",
                expected="a file that SteeringVector.to_file wrote",
                write="SteeringVector.of(SavedActivation.from_file(path))",
            )
        try:
            held = from_json(text, f"the header of {path}")
            rows = held.pop("rows")
            return cls(**held, rows=rows and tuple(map(int, rows)))
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            raise FileError(f"what {path} says about its steering vector is damaged") from None
