"""`SteeringVector`: a capture of one row, with its method, quality and unit."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nnsplice import plots
from nnsplice.activations import SavedActivation, storage
from nnsplice.deprecated import renamed
from nnsplice.errors import BadArgument, BadType, ShapeError, UnknownPath, named
from nnsplice.paths import Path, Paths, parse_path
from nnsplice.shown import printable
from nnsplice.steering import vector_display
from nnsplice.steering.about import HEADER, About
from nnsplice.steering.quality import auc
from nnsplice.steering.sites import LEAVE_OUT, NOT_ZERO, layer_of


class SteeringVector(SavedActivation):
    """A direction for each site: a `SavedActivation` of one row, with its arithmetic.

    >>> words = ["w3 w4 w5", "w6 w7 w8", "w9 w10 w11"]
    >>> acts = ns.capture(model, words + [text + " w12" for text in words], "layers[:].output[-1]")
    >>> vector = ns.steering.fit(acts.slice[0:3], acts.slice[3:6])
    >>> vector.layers
    [0, 1, 2]
    >>> vector.at(1).keys()
    ['layers[1].output[-1]']
    >>> vector.in_residual_norms().about.unit
    'residual norm'

    Subsets, copies and multiples keep the measurements; sums and differences do not.

    Attributes:
        about: method, quality, norms and origin of the vector.
    """

    about: About = About()

    @classmethod
    def of(cls, saved: SavedActivation, **about: Any) -> SteeringVector:
        """A capture of one row as a steering vector, for directions that were found elsewhere.

        >>> ns.steering.SteeringVector.of(ns.SavedActivation.from_pairs(("layers[1].output[-1]", torch.ones(1, 16))))
        SteeringVector: 1 site, width 16, method given, unit as given
          layers[1].output

        Args:
            saved: a capture of one row.
            **about: fields of `vector.about`: `method`, `unit`, ...

        Raises:
            BadType: something other than a capture.
            ShapeError: a capture of several rows.
        """
        if not isinstance(saved, SavedActivation):
            raise BadType(
                f"{named(saved)} is no capture",
                expected="a SavedActivation of one row",
                write='SteeringVector.of(ns.SavedActivation.from_pairs(("layers[3].output[-1]", tensor)))',
            )
        if saved.rows != 1:
            raise ShapeError(f"a capture of {saved.rows} rows is no one direction", write="saved.mean()")
        made = cls._new(saved._packs, saved._provenance.without_rows(), saved._known)
        return made._with_about(About(**{"method": "given", **about}))

    @classmethod
    def from_tensor(cls, vector: Tensor, layer: int | str | Path, **about: Any) -> SteeringVector:
        """A steering vector of a tensor `[width]`, for the residual stream after a layer.

        Args:
            vector: the direction, `[width]` or `[1, width]`.
            layer: the number of a layer, or the path of another site: `"layers[1].attn.output[-1]"`.
            **about: fields of `vector.about`: `method=`, `unit=`, `norms=`, ...

        Raises:
            ShapeError: several directions.
        """
        if not isinstance(vector, Tensor):
            raise BadType(f"{named(vector)} is no tensor", expected="a tensor [width]", write="torch.as_tensor(vector)")
        if isinstance(layer, bool) or not isinstance(layer, int | str | Path):
            raise BadType(f"a layer {layer!r}", expected="its number, or a path", write="layer=15")
        if vector.dim() == 2 and len(vector) == 1:
            vector = vector[0]
        if vector.dim() != 1:
            raise ShapeError(
                f"a tensor of shape {list(vector.shape)} is no one direction",
                expected="[width]",
                write="from_tensor(vectors[15], layer=15), for each of them; `|` joins vectors",
            )
        path = parse_path(f"layers[{layer}].output[-1]" if isinstance(layer, int) else layer)
        if path.position is None:
            path = path.at(-1)
        return cls.of(SavedActivation.from_pairs((path, vector.detach().clone()[None])), **about)

    def _with_about(self, about: About) -> SteeringVector:
        self.about = about
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "about": self.about}

    # -- properties --------------------------------------------------------------------------------------------------

    @property
    def method(self) -> str | None:
        """The method that fitted it."""
        return self.about.method

    @property
    def quality(self) -> dict[str, float]:
        """The AUC on held-out prompts, by path: 1.0 separates the groups, 0.5 is chance."""
        return dict(self.about.quality)

    @property
    def norms(self) -> dict[str, float]:
        """The mean norm of the states at each site."""
        return dict(self.about.norms)

    @property
    def coefficient(self) -> float | None:
        """The coefficient that was saved with it."""
        return self.about.coefficient

    @property
    def layers(self) -> list[int]:
        """The layers that it has directions for."""
        return list(dict.fromkeys(number for key in self.keys() if (number := layer_of(parse_path(key))) is not None))

    def at(self, layer: int | Iterable[int]) -> SteeringVector:
        """Only the directions of some layers.

        Args:
            layer: the number of a layer, or several.

        Raises:
            UnknownPath: no direction of this layer.
            BadType: something other than numbers.
        """
        if isinstance(layer, str) or not isinstance(layer, int | Iterable):
            raise BadType(f"a layer {layer!r}", expected="its number, or several", write="vector.at(3)")
        wanted = [layer] if isinstance(layer, int) else list(layer)
        held = self.layers
        for number in wanted:
            if number not in held:
                raise UnknownPath(
                    f"there is no vector of layer {number}",
                    expected=f"one of {', '.join(map(str, held))}" if held else "a vector of layers",
                )
        return self.subset([key for key in self.keys() if layer_of(parse_path(key)) in wanted])

    def auc(self, positive: SavedActivation, negative: SavedActivation) -> dict[str, float]:
        """The AUC of each direction on other states: the probability that a positive state lies further along it.

        >>> toy = ns.load("toy")
        >>> reviews = [review for review in ns.models.toy_prompts().reviews if review.mood == "good"][:40]
        >>> good = ns.capture(toy, [review.text for review in reviews], "layers[0:3:2].output[-1]")
        >>> bad = ns.capture(toy, [review.opposite for review in reviews], "layers[0:3:2].output[-1]")
        >>> ns.steering.fit(good.slice[0:20], bad.slice[0:20]).auc(good.slice[20:40], bad.slice[20:40])
        {'layers[0].output[-1]': 0.6125, 'layers[2].output[-1]': 1.0}

        Args:
            positive: a capture of prompts with the property.
            negative: a capture of prompts without it.
        """
        found: dict[str, float] = {}
        for key, vector in self.items():
            scores = [saved[key].double().cpu() @ vector[0].double().cpu() for saved in (positive, negative)]
            found[key] = auc(*scores)
        return found

    # -- its length --------------------------------------------------------------------------------------------------

    def in_residual_norms(self) -> SteeringVector:
        """The same directions, scaled so that a coefficient of 1.0 is the mean norm of the states.

        >>> toy = ns.load("toy")
        >>> acts = ns.capture(toy, ["The hotel was lovely", "The hotel was awful"], "layers[1:4].output[-1]")
        >>> vector = ns.steering.fit(acts.slice[0], acts.slice[1])
        >>> vector
        SteeringVector: 3 sites, width 64, method mean_difference, unit from the negative mean to the positive,
            from 1 and 1 rows
          layers[1].output  0.57 of the states' norm
          layers[2].output  0.58 of the states' norm
          layers[3].output  0.62 of the states' norm
        >>> vector.in_residual_norms()
        SteeringVector: 3 sites, width 64, method mean_difference, unit residual norm, from 1 and 1 rows
          layers[1].output  1.00 of the states' norm
          layers[2].output  1.00 of the states' norm
          layers[3].output  1.00 of the states' norm
        """
        return self._lengths(self._known_norms(), "residual norm")

    def normalised(self) -> SteeringVector:
        """The same directions with length 1."""
        return self._lengths(dict.fromkeys(self.keys(), 1.0), "length one")

    def _known_norms(self) -> dict[str, float]:
        norms = self.norms
        missing = [key for key in self.keys() if key not in norms]
        if missing:
            raise BadArgument(
                f"the norm of the states at {missing[0]} was not measured",
                expected="a vector that ns.steering.fit made, or its multiple",
                write="SteeringVector.of(saved, norms={...})",
            )
        return norms

    def _lengths(self, lengths: Mapping[str, float], unit: str) -> SteeringVector:
        packs = []
        for pack in self._packs:
            scale = torch.tensor([lengths[str(key)] for key in pack.keys]).to(pack.tensor)[:, None]
            length = pack.tensor.norm(dim=-1, keepdim=True)
            if not bool((length > 0).all()):
                key = next(key for key, size in zip(pack.keys, length[0, :, 0].tolist(), strict=True) if not size > 0)
                raise BadArgument("a zero vector has no direction", path=key, expected=NOT_ZERO, write=LEAVE_OUT)
            packs.append(pack.with_tensor(pack.tensor / length * scale))
        return self._like(packs)._with_about(replace(self.about, unit=unit))

    # -- operations that keep the measurements -------------------------------------------------------------------------

    def _kept(self, made: SteeringVector) -> SteeringVector:
        """`made` with the measurements of its sites."""
        return made._with_about(self.about.only(made.keys()))

    @renamed(paths="sites")
    def subset(self, sites: Paths) -> SteeringVector:
        """Only some sites.

        Args:
            sites: a path or several.
        """
        return self._kept(super().subset(sites))

    def __mul__(self, factor: float) -> SteeringVector:
        made = super().__mul__(factor)
        return made if made is NotImplemented else self._scaled(made, factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> SteeringVector:
        made = super().__truediv__(divisor)
        return made if made is NotImplemented else self._scaled(made, divisor)

    def __neg__(self) -> SteeringVector:
        return self._scaled(super().__neg__(), -1.0)

    def _scaled(self, made: SteeringVector, factor: float) -> SteeringVector:
        return made._with_about(self.about.scaled(factor).only(made.keys()))

    def to(self, device_or_dtype: torch.device | torch.dtype | str) -> SteeringVector:
        """Copy to another device or dtype.

        Args:
            device_or_dtype: the device or dtype, as for `torch.Tensor.to`.
        """
        return self._kept(super().to(device_or_dtype))

    def detach(self) -> SteeringVector:
        """The values detached from the autograd graph."""
        return self._kept(super().detach())

    def clone(self) -> SteeringVector:
        """A copy with memory of its own."""
        return self._kept(super().clone())

    def __copy__(self) -> SteeringVector:
        return self._kept(super().__copy__())

    # -- files -------------------------------------------------------------------------------------------------------

    def to_file(self, path: str | os.PathLike[str], *, coefficient: float | None = None) -> None:
        """Write a safetensors file with `vector.about` in its header; `SavedActivation.from_file` reads it too.

        Args:
            path: the file to write.
            coefficient: a coefficient to save with it.
        """
        about = self.about if coefficient is None else replace(self.about, coefficient=float(coefficient))
        storage.write(path, self._packs, self._provenance, {HEADER: about.to_json()})

    @classmethod
    @renamed(paths="sites")
    def from_file(cls, path: str | os.PathLike[str], sites: Paths | None = None) -> SteeringVector:
        """Read a steering vector, or only some of its sites.

        Args:
            path: the file.
            sites: a path or several to read; all if left out.

        Raises:
            FileError: the file is no steering vector, or damaged.
        """
        packs, provenance = storage.read(path, sites)
        about = About.from_header(path, storage.note(path, HEADER))
        made = cls._new(packs, provenance, None)
        return made._with_about(about.only(made.keys()))

    # -- display -----------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        return printable(vector_display.text(dict(self.items()), self.about))

    def _repr_html_(self) -> str:
        return vector_display.html(dict(self.items()), self.about)

    def plot(self, ax: plots.Axes | None = None) -> plots.Axes:
        """Draw the held-out AUC by layer, a line for each kind of site.

        Args:
            ax: axes to draw on; a new figure if left out.

        Raises:
            BadArgument: a vector whose quality was not measured.
        """
        return vector_display.plot(self.about, ax)
