"""`Subspace`: an orthonormal basis at one address, as a value."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from nnsplice.activations import SavedActivation
from nnsplice.digests import digest_of
from nnsplice.errors import BadArgument, BadType, PathError, ShapeError, circumstances, named
from nnsplice.paths import Path, parse_path
from nnsplice.shown import printable
from nnsplice.subspaces import bases, storage

#: How far a basis may be from orthonormal.
ORTHONORMAL = 1e-9


@dataclass(frozen=True, eq=False)
class Subspace:
    """A subspace of one site: `h + Q Qᵀ (h' - h)` takes only that part of another run's value.

    >>> saved = ns.capture(model, ["w3 w4", "w5 w6", "w7 w8", "w9 w10"], "layers[1].output[-1]")
    >>> subspace = ns.Subspace.pca(saved, k=2)
    >>> subspace
    Subspace: 2 of 16 dimensions at layers[1].output, pca, 99% of the variance
    >>> subspace.angles(subspace.random(seed=1)).shape
    torch.Size([2])
    >>> result = ns.sweep(model, "w3 w4", "w5 w4", "layers[:].output[0]", ns.logit_diff("w7", "w8"), subspace=subspace,
    ...                   progress=False)

    Attributes:
        place: the address, canonical and without token positions.
        basis: `[width, k]`, orthonormal columns in float64 on the CPU; not to be changed.
        about: its origin, as plain data.
    """

    place: str
    basis: Tensor
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "place", _place(self.place))
        object.__setattr__(self, "about", MappingProxyType(dict(self.about)))
        basis = self.basis
        if not isinstance(basis, Tensor) or basis.dim() != 2 or basis.shape[0] < max(basis.shape[1], 1):
            found = f"shape {list(basis.shape)}" if isinstance(basis, Tensor) else named(basis)
            raise ShapeError(f"a basis of {found}", path=self.place, expected="[width, k] with k at most width")
        basis = basis.detach().cpu().double().clone()
        off = (basis.T @ basis - torch.eye(basis.shape[1], dtype=torch.float64)).abs()
        if not bool((off < ORTHONORMAL).all()):  # NaN is not below
            raise BadArgument(
                "the columns are not orthonormal, or not finite",
                path=self.place,
                expected="an orthonormal basis",
                write="ns.Subspace.of(site, vectors), which makes one of any vectors",
            )
        object.__setattr__(self, "basis", basis)

    # -------------------------------------------------------------------------------------------------------- made of

    @classmethod
    def of(cls, place: str | Path, vectors: Tensor | SavedActivation) -> Subspace:
        """The subspace that some vectors span.

        >>> ns.Subspace.of("layers[1].output", torch.eye(16)[:3])
        Subspace: 3 of 16 dimensions at layers[1].output, vectors

        Args:
            place: the address; of a capture, the site in it, whose prompts and positions are the vectors.
            vectors: `[width]`, `[k, width]`, or a capture: a `SteeringVector` holds one vector for each site.

        Raises:
            BadArgument: NaN, a zero vector, or vectors that depend on each other.
            BadType: something other than a tensor or a capture.
            PathError: an address of several sites.
            ShapeError: more vectors than each has numbers, or a tensor of another shape.
            UnknownPath: a site that was not captured.
        """
        with circumstances("ns.Subspace.of"):
            if isinstance(vectors, SavedActivation):
                about = {"method": type(vectors).__name__, "model": vectors.model}
                rows = _rows(vectors, place)
            elif isinstance(vectors, Tensor):
                about = {"method": "vectors"}
                rows = vectors[None] if vectors.dim() == 1 else vectors
            else:
                raise BadType(f"{named(vectors)} is no vectors", expected="a tensor [k, width], or a capture")
            return cls(str(place), bases.orthonormal(rows), about)

    @classmethod
    def pca(cls, saved: SavedActivation, k: int, place: str | Path | None = None) -> Subspace:
        """The directions in which a capture varies most, over its prompts and positions, around their mean.

        Args:
            saved: a capture of one site, or with `place` of several.
            k: the number of directions; at most one less than there are rows.
            place: the address, where the capture has several.

        Returns:
            The subspace; `about["variance"]` is the share of the variance that it holds.

        Raises:
            BadArgument: the rows do not vary in so many directions, hold NaN, or are of several sites.
            BadType: something other than a capture.
            UnknownPath: a site that was not captured.
        """
        with circumstances("ns.Subspace.pca"):
            if not isinstance(saved, SavedActivation):
                raise BadType(f"{named(saved)} is no capture", expected="a SavedActivation", write="ns.capture(...)")
            if place is None:
                places = list(dict.fromkeys(str(parse_path(key).place) for key in saved))
                if len(places) != 1:
                    raise BadArgument(
                        f"a capture of {len(places)} sites", expected="one site", write="ns.Subspace.pca(..., place=)"
                    )
                place = places[0]
            rows = _rows(saved, place)
            if not bool(torch.isfinite(rows).all()):
                raise BadArgument("the capture holds NaN or infinity", path=place, expected="finite numbers")
            centred = rows.double() - rows.double().mean(0)
            _, sizes, directions = torch.linalg.svd(centred, full_matrices=False)
            limit = float(sizes.max()) * bases.tolerance(rows) if len(sizes) else 0.0
            rank = int((sizes > limit).sum())
            _check_k(k, rank, f"{len(rows)} rows vary in {rank} directions")
            share = float(sizes[:k].square().sum() / sizes.square().sum())
            about = {"method": "pca", "rows": len(rows), "variance": share, "model": saved.model}
            return cls(str(place), directions[:k].T, about)

    def random(self, k: int | None = None, seed: int = 0) -> Subspace:
        """A random subspace of the same site and dimension, uniformly drawn, as a control.

        Args:
            k: the number of dimensions; that of this subspace if left out.
            seed: the seed of the directions.

        Raises:
            BadArgument: a `k` below 1, or above the width of the site.
        """
        k = self.k if k is None else k
        _check_k(k, self.width, f"the site is {self.width} wide")
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(self.width, k, generator=generator, dtype=torch.float64)
        return Subspace(self.place, bases.orthonormal(drawn.T), {"method": "random", "seed": seed})

    # --------------------------------------------------------------------------------------------------- properties

    @property
    def k(self) -> int:
        """The number of dimensions."""
        return self.basis.shape[1]

    @property
    def width(self) -> int:
        """The width of the site."""
        return self.basis.shape[0]

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        """The identity of a subspace, as plain data."""
        return {"place": self.place, "k": self.k, "basis": digest_of({"basis": self.basis})}

    # ------------------------------------------------------------------------------------------------------- compared

    def angles(self, other: Subspace) -> Tensor:
        """The principal angles to another subspace of the same width, in radians, smallest first.

        >>> a = ns.Subspace.of("layers[1].output", torch.eye(16)[:2])
        >>> b = ns.Subspace.of("layers[1].output", torch.eye(16)[1:3])
        >>> a.angles(b).round(decimals=3)
        tensor([0.0000, 1.5710], dtype=torch.float64)

        Args:
            other: the other subspace.

        Returns:
            As many angles as the smaller of the two has dimensions.

        Raises:
            BadType: something other than a subspace.
            ShapeError: subspaces of different widths.
        """
        self._check_beside(other)
        return bases.angles(self.basis, other.basis)

    def __and__(self, other: Subspace) -> Subspace:
        """The intersection; it may have no dimensions."""
        self._check_beside(other, place=True)
        return Subspace(self.place, bases.common(self.basis, other.basis), self._made("&", other))

    def __or__(self, other: Subspace) -> Subspace:
        """The sum of both subspaces."""
        self._check_beside(other, place=True)
        return Subspace(self.place, bases.joined(self.basis, other.basis), self._made("|", other))

    def _made(self, sign: str, other: Subspace) -> dict[str, Any]:
        return {"method": sign, "of": [dict(self.about), dict(other.about)]}

    def _check_beside(self, other: Subspace, *, place: bool = False) -> None:
        if not isinstance(other, Subspace):
            raise BadType(f"{named(other)} is no subspace", expected="a Subspace")
        if self.width != other.width:
            raise ShapeError(f"one subspace is of a site {self.width} wide, the other of one {other.width} wide")
        if place and self.place != other.place:
            raise BadArgument(
                f"subspaces of {self.place} and of {other.place}",
                expected="two of one site",
                write=f"ns.Subspace({self.place!r}, other.basis), if they are meant to be of one",
            )

    # ---------------------------------------------------------------------------------------------------------- files

    def to_file(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file with the address and the provenance in its header, completely or not at all.

        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     ns.Subspace.of("layers[1].output", torch.eye(16)[:3]).to_file(f"{folder}/part.safetensors")
        ...     print(ns.Subspace.from_file(f"{folder}/part.safetensors"))
        Subspace: 3 of 16 dimensions at layers[1].output, vectors

        Args:
            path: the file to write.
        """
        storage.write(path, self.basis, {"place": self.place, "about": dict(self.about)})

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Subspace:
        """Read a subspace.

        Args:
            path: the file.

        Raises:
            FileError: the file holds no subspace, is of another format, or is damaged.
        """
        basis, contents = storage.read(path)
        with storage.damaged(path):
            return cls(contents["place"], basis, contents["about"])

    def __repr__(self) -> str:
        how = str(self.about.get("method", ""))
        text = f"Subspace: {self.k} of {self.width} dimensions at {self.place}" + (f", {how}" if how else "")
        if "variance" in self.about:
            text += f", {self.about['variance']:.0%} of the variance"
        return printable(text)


def _place(given: object) -> str:
    if not isinstance(given, str | Path):
        raise BadType(f"{named(given)} is no address", expected='an address such as "layers[5].output"')
    path = parse_path(given)
    if not path.concrete:
        raise PathError("a subspace is of one site", path=path, expected="a number in every bracket")
    return str(path.at(-1).place)  # where the value is left open, it is the output


def _rows(saved: SavedActivation, place: str | Path) -> Tensor:
    """`[prompt x position, width]` of a site in a capture."""
    held = saved.get(parse_path(place).place)
    return held.flatten(0, -2)


def _check_k(k: int, most: int, why: str) -> None:
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise BadArgument(f"k={k!r}", expected="a number of dimensions, at least 1")
    if k > most:
        raise BadArgument(f"k={k}, and {why}", expected=f"k of at most {most}")
