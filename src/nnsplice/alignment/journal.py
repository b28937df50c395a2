"""The journal of an alignment: a folder with a file for each finished layer of each model.

A run that goes on finds the layers that are there; a folder of another question is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnsplice.digests import digest_of
from nnsplice.errors import FileError
from nnsplice.files import from_json, local_path, text_of, whole
from nnsplice.headers import read_header
from nnsplice.results.files import canonical

ASKED = "asked.json"


@dataclass(frozen=True)
class AlignmentJournal:
    """A folder of finished layers; without a folder, nothing is kept."""

    folder: Path | None

    @classmethod
    def open(cls, folder: Any, asked: Mapping[str, Any]) -> AlignmentJournal:
        """Begin a folder, or go on with one of the same question.

        Raises:
            FileError: it is of another question.
        """
        if folder is None:
            return cls(None)
        path = local_path(folder)
        path.mkdir(exist_ok=True)
        question_file = path / ASKED
        question = canonical(asked)
        if not question_file.exists():
            if any(path.glob("*.safetensors")):
                raise FileError(f"{path} holds other files", expected="an empty folder, or that of the same alignment")
            with whole(question_file) as temporary:
                temporary.write_text(question, encoding="utf-8")
        elif text_of(question_file) != question:
            raise FileError(
                f"{path} is the journal of another alignment", expected="a new folder, or that of the same alignment"
            )
        return cls(path)

    def read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and the record of a finished layer; None if it is not finished.

        Raises:
            FileError: the file is damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self._path(name)
        if path is None or not path.exists():
            return None
        record = from_json(read_header(path).metadata.get("nnsplice", "null"), f"the header of {path}")
        try:
            tensors = load_file(path)
        except (SafetensorError, RuntimeError) as error:
            raise FileError(f"{path} is damaged: {error}", expected="a new folder") from None
        if not isinstance(record, dict) or record.get("digest") != digest_of(dict(sorted(tensors.items()))):
            raise FileError(f"{path} is damaged: its numbers are not those that were written", expected="a new folder")
        return tensors, record

    def write(self, name: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Keep a finished layer; whole, or not at all."""
        from safetensors.torch import save_file

        path = self._path(name)
        if path is None:
            return
        kept = {key: tensors[key].detach().cpu().contiguous().clone() for key in sorted(tensors)}
        with whole(path) as temporary:
            save_file(kept, temporary, metadata={"nnsplice": json.dumps({**record, "digest": digest_of(kept)})})

    def _path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{name}.safetensors"


def as_tensor(values: Any) -> Tensor:
    """Numbers for a file."""
    return torch.as_tensor(values, dtype=torch.float64)
