"""`ActivationFolder`: captures of many prompts in a folder of safetensors files, read a file at a time.

    capture.json           the manifest: model, weights, sites, prompts per chunk
    chunk-000007.json      the prompts of a chunk, and the files that hold them
    chunk-000007-0.safetensors    a capture as `SavedActivation.to_file` writes it
    index.json             the files of all chunks; written at the end

A chunk is complete once its json exists, so a capture that was stopped continues after the last complete chunk.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from nnsplice.errors import BadArgument, FileError, UnknownPath
from nnsplice.files import from_json
from nnsplice.paths import Path, Paths, parse_path
from nnsplice.shown import counted
from nnsplice.stores import Store, store_of

KIND, FORMAT = "nnsplice captures", 1


class _Capture(Protocol):
    def get(self, path: str | Path) -> Tensor: ...


CaptureT = TypeVar("CaptureT", bound=_Capture)


@dataclass(frozen=True)
class ActivationFolder(Generic[CaptureT]):
    """Captures in a folder; values are read from the files when they are asked for.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     captures = ns.capture_to(folder, model, ["w3 w4", "w5", "w6 w7 w8"], "layers[:].output[-1]", chunk=2)
    ...     captures.rows, captures.get("layers[1].output[-1]").shape
    (3, torch.Size([3, 16]))
    """

    #: The folder, or the object store.
    store: Store
    #: The contents of capture.json: model, weights, sites.
    manifest: Mapping[str, Any]
    #: File name and prompt numbers of each file.
    files: tuple[tuple[str, tuple[int, ...]], ...]
    #: Whether all prompts are there; False if the capture was stopped.
    is_complete: bool
    #: Reads a file, or only some of its sites.
    read: Callable[[FilePath | str, Paths | None], CaptureT] = field(repr=False)

    @classmethod
    def open(
        cls, folder: str | os.PathLike[str], read: Callable[[FilePath | str, Paths | None], CaptureT]
    ) -> ActivationFolder[CaptureT]:
        """The captures of a folder, which may be incomplete.

        Args:
            folder: the folder, or its address in an object store.
            read: reads a file.

        Raises:
            FileError: there are none, or some are damaged.
        """
        store = store_of(folder)
        if not store.has("capture.json"):
            raise FileError(f"{store.address} holds no captures", expected="a folder that ns.capture_to wrote")
        manifest, complete = read_manifest(store), store.has("index.json")
        found = from_json(store.read("index.json"), store.at("index.json")).get("files") if complete else None
        if found is None:  # a capture that was stopped
            names = set(store.names())
            chunks = itertools.takewhile(names.__contains__, (f"chunk-{n:06}.json" for n in itertools.count()))
            found = [one for name in chunks for one in from_json(store.read(name), store.at(name))["files"]]
        files = tuple((one["name"], tuple(one["rows"])) for one in found)
        return cls(store, manifest, files, complete, read)

    def __repr__(self) -> str:
        """Three lines: the numbers of sites and prompts, and the model; the sites; the folder."""
        state = "" if self.is_complete else ", not finished"
        sites = ", ".join(self.paths[:6]) + (f" and {len(self.paths) - 6} more" if len(self.paths) > 6 else "")
        return (
            f"ActivationFolder: {counted(len(self.paths), 'site')}, {counted(self.rows, 'prompt')} of "
            f"{self.manifest['model']}{state}\n  {sites}\n  {self.folder}"
        )

    @property
    def folder(self) -> FilePath | str:
        """The folder, or its address."""
        return self.store.address if self.store.folder is None else self.store.folder

    @property
    def paths(self) -> list[str]:
        """The captured sites with their positions, as given."""
        return list(self.manifest["paths"])

    @property
    def rows(self) -> int:
        """How many prompts there are."""
        return sum(len(rows) for _, rows in self.files)

    def parts(self, paths: Paths | None = None) -> Iterator[tuple[tuple[int, ...], CaptureT]]:
        """For each file, the numbers of its prompts and its capture; with `paths`, of these sites only."""
        for name, rows in self.files:
            yield rows, self.read(self.store.at(name), paths)

    def get(self, path: str | Path) -> Tensor:
        """One site of all prompts, `[prompt, width]`; the other sites are not read.

        Raises:
            UnknownPath: the site was not captured.
            BadArgument: prompts of different lengths, captured at all tokens.
        """
        found: Tensor | None = None
        for rows, part in self.parts(path):
            values = part.get(path)
            if found is None:
                found = values.new_empty((self.rows, *values.shape[1:]))
            if values.shape[1:] != found.shape[1:]:
                raise BadArgument(
                    "prompts of different length have different numbers of tokens there",
                    path=path,
                    expected="one token of each prompt",
                    write=f"for batch in captures.tokens({str(parse_path(path).place)!r}): ...",
                )
            found[list(rows)] = values
        if found is None:
            raise UnknownPath("no prompt is there yet", path=path)
        return found

    def __getitem__(self, path: str | Path) -> Tensor:
        """As `get`."""
        return self.get(path)

    def tokens(self, place: str | Path, batch_size: int = 1024, *, seed: int | None = None) -> Iterator[Tensor]:
        """All captured tokens of one site in batches `[token, width]`, to train a probe or an autoencoder on.

        One file is in memory at a time. The last batch may be smaller.

        Args:
            seed: shuffles the files, and the tokens within each.

        Raises:
            UnknownPath: the site was not captured.
        """
        if batch_size < 1:
            raise BadArgument(f"batch_size={batch_size}", expected="at least 1")
        wanted = parse_path(place).place
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        order = list(range(len(self.files)))
        if generator is not None:
            order = torch.randperm(len(order), generator=generator).tolist()
        rest: Tensor | None = None
        for number in order:
            part = self.read(self.store.at(self.files[number][0]), wanted)
            values = part.get(wanted)
            flat = values.reshape(-1, values.shape[-1])
            flat = flat if generator is None else flat[torch.randperm(len(flat), generator=generator)]
            flat = flat if rest is None else torch.cat([rest, flat])
            complete = len(flat) // batch_size * batch_size
            yield from flat[:complete].split(batch_size) if complete else ()
            rest = flat[complete:]
        if rest is not None and len(rest):
            yield rest


def read_manifest(store: Store) -> dict[str, Any]:
    """The contents of capture.json."""
    manifest = from_json(store.read("capture.json"), store.at("capture.json"))
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND or manifest["format"] > FORMAT:
        raise FileError(f"{store.address} holds something else, or was written by a newer nnsplice")
    return manifest
