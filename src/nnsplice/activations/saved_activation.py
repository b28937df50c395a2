"""`SavedActivation`: an immutable mapping from paths to tensors, with algebra.

The work is in the other modules: `lookup` (the entries of a path), `tree` (the attribute view), `algebra`, `rows`,
`writing` (into runs), `storage` (files), `display` (text and HTML).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import Any, Self

import torch
from torch import Tensor

from nnsplice import engine
from nnsplice.activations import algebra, display, features, lookup, packs, storage, tree, writing
from nnsplice.activations.activation_folder import ActivationFolder
from nnsplice.activations.packs import Pack, Provenance
from nnsplice.activations.rows import RowSlicer
from nnsplice.atlas import Atlas
from nnsplice.deprecated import renamed
from nnsplice.errors import BadType, KeyMismatch, PathError, UnknownPath, named
from nnsplice.paths import Path, Paths, parse_path
from nnsplice.shown import printable


class SavedActivation:
    """Activations by path: values are tensors `[prompt, width]`, and captures support arithmetic (`clean - corrupted`).

    >>> saved = ns.capture(model, ["w3 w4 w5", "w6 w7 w8"], ["layers[1].output[-1]", "layers[0].output[-1]"])
    >>> list(saved)
    ['layers[0].output[-1]', 'layers[1].output[-1]']
    >>> saved["layers[1].output[-1]"].shape
    torch.Size([2, 16])

    A capture never shares memory with the run. Its slices may share memory with it, as tensors do: call `clone()`
    before changing one in place.
    """

    parse_path: staticmethod[[str | Path], Path] = staticmethod(parse_path)

    # numpy then raises a TypeError for `array - capture`, instead of subtracting from each element of the array.
    __array_ufunc__ = None

    def __init__(self, tree_of_tensors: Mapping[Any, Any] = {}) -> None:  # never changed
        """From a nested mapping: attribute names and indices down to token positions and tensors.

        >>> ns.SavedActivation({"transformer": {"h": {2: {"output": {10: torch.zeros(1, 4)}}}}}).keys()
        ['model.transformer.h[2].output[10]']
        """
        if not isinstance(tree_of_tensors, Mapping):
            raise BadType(f"{named(tree_of_tensors)} is no nested mapping", expected='{"layers": {0: {...}}}')
        self._fill(packs.from_entries(tree.flatten(tree_of_tensors)), Provenance(), None)

    @classmethod
    def from_pairs(cls, *pairs: tuple[str | Path, Tensor]) -> Self:
        """A capture of `(path, tensor)` pairs.

        >>> ns.SavedActivation.from_pairs(("layers[0].output[-1]", torch.zeros(1, 4)))
        SavedActivation: 1 site, 1 position each, 1 row, float32, 16 B
          layers[0].output  [-1]  width 4

        Args:
            *pairs: paths with tensors `[prompt, width]`.

        Raises:
            MissingPosition: a path without a position.
            ShapeError: a tensor of another shape, or with another number of prompts than the others.
            DuplicatePath: the same site and position twice.
        """
        return cls._new(packs.from_pairs(pairs), Provenance(), None)

    @classmethod
    def _new(cls, of: Sequence[Pack], provenance: Provenance, known: engine.ModelMap | None) -> Self:
        saved = cls.__new__(cls)
        saved._fill(of, provenance, known)
        # Inside a trace the capture is kept past the trace's end, as by save().
        return engine.keep(saved)

    def _fill(self, of: Sequence[Pack], provenance: Provenance, known: engine.ModelMap | None) -> None:
        engine.only_local(self)
        self._packs = tuple(of)
        self._provenance = provenance
        #: The atlas and the execution order of the model, if it is known: keys are then found by any spelling.
        self._known = known

    def __getstate__(self) -> dict[str, Any]:
        # The atlas of the model is not pickled; the keys keep their sites.
        return {"_packs": self._packs, "_provenance": self._provenance, "_known": None}

    def __copy__(self) -> Self:
        return self._like(self._packs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.clone()

    def _like(self, of: Sequence[Pack], provenance: Provenance | None = None) -> Self:
        return self._new(of, self._provenance if provenance is None else provenance, self._known)

    # --- mapping ------------------------------------------------------------------------------------------------------

    @cached_property
    def _index(self) -> lookup.KeyIndex:
        return lookup.KeyIndex(self._packs)

    def keys(self) -> list[str]:
        """The canonical paths, in the order of the forward pass."""
        return list(self._index.by_text)

    def items(self) -> list[tuple[str, Tensor]]:
        """Each path with its tensor `[prompt, width]`."""
        return [(key, self._packs[p].tensor[:, n]) for key, (p, n) in self._index.by_text.items()]

    def __iter__(self) -> Iterator[str]:
        return iter(self._index.by_text)

    def __len__(self) -> int:
        return len(self._index.by_text)

    def __contains__(self, path: object) -> bool:
        if not isinstance(path, str | Path):
            return False
        try:
            return lookup.match(self._index, parse_path(path), *self._context)[1] is None
        except (UnknownPath, PathError):
            return False

    def __getitem__(self, path: str | Path) -> Tensor:
        return self.get(path)

    def get(self, path: str | Path) -> Tensor:
        """The tensor at a path: `[prompt, width]`, or `[prompt, position, width]` for a slice or list of positions.

        Args:
            path: a path of one site.

        Raises:
            UnknownPath: the capture does not have it.
        """
        return lookup.tensor(self._index, path, *self._context)

    @cached_property
    def _context(self) -> tuple[Atlas | None, int | None]:
        """The atlas of the model, and the number of tokens of every prompt; None if unknown."""
        return self._known.atlas if self._known else None, packs.common_length(self._packs, self._provenance)

    @property
    def values(self) -> tree.Values:
        """The tensors: `saved.values()` lists them, `saved.values.transformer.h[2].output[10]` follows the paths."""
        return tree.Values((key, pack.tensor[:, n]) for pack in self._packs for n, key in enumerate(pack.keys))

    @renamed(paths="sites")
    def subset(self, sites: Paths) -> Self:
        """Only these sites and positions, in the order of the forward pass.

        Args:
            sites: a path or several, with slices and lists.
        """
        found = (lookup.find(self._index, path, *self._context) for path in engine.listed(sites))
        return self._like(lookup.chosen(self._packs, set(chain.from_iterable(found))))

    def union(self, other: SavedActivation) -> Self:
        """Both captures in one.

        Args:
            other: a capture of other paths, of as many prompts.
        """
        both = self._with_packs_of(other)
        known = self._known or other._known
        merged = algebra.united(*both, known.rank if known else None)
        origins = [capture._provenance for capture in (self, other) if capture._packs]
        return self._new(merged, origins[0].joined(origins[-1]) if origins else Provenance(), known)

    def __or__(self, other: SavedActivation) -> Self:
        return self.union(other) if isinstance(other, SavedActivation) else NotImplemented

    # --- rows ---------------------------------------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        """The number of prompts."""
        return self._packs[0].tensor.shape[0] if self._packs else 0

    @property
    def slice(self) -> RowSlicer[SavedActivation]:
        """Select prompts: `slice[0:4]`, `slice[3]`, `slice[0:2, 5, 7:9]`, `slice[range(3)]`."""
        return RowSlicer(self.rows, self._take_rows)

    def _take_rows(self, rows: Sequence[int]) -> Self:
        return self._like([pack.take_rows(rows) for pack in self._packs], self._provenance.rows(rows))

    # --- algebra ------------------------------------------------------------------------------------------------------

    def map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        """Apply a function to the tensor of each site, `[prompt, position, width]`.

        Args:
            fn: the function; it returns a tensor of as many prompts and positions.
        """
        return self._computed(algebra.mapped(self._packs, fn))

    def _computed(self, made: Sequence[Pack]) -> Self:
        """A capture of computed packs; without the prompts if the number of rows has changed."""
        same = not made or made[0].tensor.shape[0] == self.rows
        return self._like(made, None if same else self._provenance.without_rows())

    def mean(self, axis: str = "prompt") -> Self:
        """The mean over prompts, which leaves one row, or over the positions of each site.

        After `mean("position")` the position of a key is `["mean"]`, and writing it needs `at=`.

        Args:
            axis: `"prompt"` or `"position"`.
        """
        return self._computed(algebra.mean(self._packs, axis))

    def _with_packs_of(self, other: SavedActivation) -> tuple[Sequence[Pack], Sequence[Pack]]:
        """The packs of both, with keys located in the atlas of either."""
        if not isinstance(other, SavedActivation):
            raise BadType(f"{type(other).__name__} is no capture", expected="a SavedActivation")
        known = self._known or other._known
        if known is None or (self._known and other._known):
            return self._packs, other._packs
        return lookup.located(self._packs, known.atlas), lookup.located(other._packs, known.atlas)

    def _combined(self, other: SavedActivation, fn: Callable[[Tensor, Tensor], Tensor]) -> Self:
        """A function applied to the values of two captures of the same sites."""
        combined = algebra.combined(*self._with_packs_of(other), fn)
        origin = packs.combined_origin((self._provenance, self.rows), (other._provenance, other.rows))
        return self._new(combined, origin, self._known or other._known)

    def __add__(self, other: SavedActivation) -> Self:
        return self._combined(other, torch.add) if isinstance(other, SavedActivation) else NotImplemented

    def __sub__(self, other: SavedActivation) -> Self:
        return self._combined(other, torch.sub) if isinstance(other, SavedActivation) else NotImplemented

    def __neg__(self) -> Self:
        return self.map(torch.neg)

    def __mul__(self, factor: float) -> Self:
        if not algebra.is_number(factor):
            return NotImplemented
        return self.map(lambda tensor: tensor * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Self:
        if not algebra.is_number(divisor):
            return NotImplemented
        return self.map(lambda tensor: tensor / divisor)

    def norm(self) -> dict[str, Tensor]:
        """The Euclidean norm of each value: `{path: [prompt]}`."""
        return {key: tensor.norm(dim=-1) for key, tensor in self.items()}

    def dot(self, other: SavedActivation) -> dict[str, Tensor]:
        """The inner product with another capture: `{path: [prompt]}`.

        Args:
            other: a capture of the same paths.
        """
        return self._combined(other, algebra.dot)._flat()

    def cosine(self, other: SavedActivation) -> dict[str, Tensor]:
        """The cosine similarity with another capture: `{path: [prompt]}`; NaN for a vector of zeros.

        Args:
            other: a capture of the same paths.
        """
        return self._combined(other, algebra.cosine)._flat()

    def project_out(self, direction: SavedActivation) -> Self:
        """Remove the component along a direction.

        >>> saved = ns.SavedActivation.from_pairs(("layers[0].output[-1]", torch.tensor([[3.0, 4.0]])))
        >>> across = ns.SavedActivation.from_pairs(("layers[0].output[-1]", torch.tensor([[0.0, 2.0]])))
        >>> saved.project_out(across)["layers[0].output[-1]"]
        tensor([[3., 0.]])

        Args:
            direction: a capture of the same paths, with one row or one for each prompt.
        """
        return self._combined(direction, algebra.without)

    def project(self, subspace: algebra.Directions) -> Self:
        """The part of every value that lies in a subspace.

        Args:
            subspace: an `ns.Subspace` of the captured site; for another site, `ns.Subspace(site, subspace.basis)`.
        """
        basis = algebra.basis_of(self._packs, subspace, self._packs_at)
        return self.map(lambda tensor: algebra.within(tensor, basis))

    def interchange(self, other: SavedActivation, subspace: algebra.Directions) -> Self:
        """These values, with the part in a subspace taken from another capture of the same sites.

        Args:
            other: the other capture, with as many rows or one row for all prompts.
            subspace: an `ns.Subspace` of the captured site; for another site, `ns.Subspace(site, subspace.basis)`.
        """
        basis = algebra.basis_of(self._packs, subspace, self._packs_at)
        return self._combined(other, lambda mine, theirs: algebra.interchanged(mine, theirs, basis))

    def _packs_at(self, place: str) -> set[int]:
        """The numbers of the packs of an address."""
        return {number for number, _ in lookup.match(self._index, parse_path(place), *self._context)[0]}

    def _flat(self) -> dict[str, Tensor]:
        return {key: tensor[:, 0] for key, tensor in self.items()}

    def stack(self, axis: str = "layer") -> Tensor:
        """Stack the values of all layers (or heads, groups, neurons, experts) into one tensor.

        The shape is `[layer, prompt, width]`, or `[layer, prompt, position, width]` for several positions.

        Args:
            axis: `"layer"`, `"head"`, `"group"`, `"neuron"` or `"expert"`.
        """
        return algebra.stacked(self._packs, axis)

    # --- like tensors -------------------------------------------------------------------------------------------------

    def to(self, device_or_dtype: torch.device | torch.dtype | str) -> Self:
        """Copy to another device or dtype.

        Args:
            device_or_dtype: the device or dtype, as for `torch.Tensor.to`.
        """
        return self.map(lambda tensor: tensor.to(device_or_dtype))

    def detach(self) -> Self:
        """The values detached from the autograd graph."""
        return self.map(torch.Tensor.detach)

    def clone(self) -> Self:
        """A copy with memory of its own."""
        return self.map(torch.Tensor.clone)

    def allclose(self, other: SavedActivation, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False) -> bool:
        """Whether two captures of the same paths hold close values, as `torch.allclose`.

        Args:
            other: a capture of the same paths.
            rtol: the relative tolerance.
            atol: the absolute tolerance.
            equal_nan: whether NaN equals NaN.
        """
        return algebra.close(*self._with_packs_of(other), rtol, atol, equal_nan)

    def __eq__(self, other: object) -> bool:
        """Whether both hold the same sites with exactly the same values."""
        if not isinstance(other, SavedActivation):
            return NotImplemented
        try:
            return self.allclose(other, rtol=0.0, atol=0.0)
        except KeyMismatch:
            return False

    def save(self, path: object = None) -> Self:
        """Keep this object past the end of the trace, as nnsight's `save`; it writes no file.

        Args:
            path: refused, as files are written by `to_file`.
        """
        if path is not None:
            raise BadType(
                "save() keeps a capture past the end of a trace, and writes no file",
                expected="to_file for a file",
                write=f"saved.to_file({str(path)!r})",
            )
        return engine.keep(self)

    def _located(self, model: Any) -> Self:
        """The capture with its keys located in a model, as keys from files or pairs are not."""
        known = engine.map_of(model)
        self._check_saes(model)
        return self if self._known else self._new(lookup.located(self._packs, known.atlas), self._provenance, known)

    def _check_saes(self, model: Any) -> None:
        """Raise if features of this capture are of another SAE than the model's SAE of that name."""
        if self._provenance.saes:
            features.check_packs(engine.as_model(model), self._packs, self._provenance.saes)

    # --- runs ---------------------------------------------------------------------------------------------------------

    def apply(self, model: Any, *, at: int | Sequence[int] | None = None) -> None:
        """Replace values of the running trace by these.

        Args:
            model: the model that is traced.
            at: one position (or one for each row) to write at, instead of the keys' own.

        Raises:
            ShapeError: the width of a site, or the number of rows of the run, is another.
            LateUpdate: a site has already run in this trace.
            OverlappingWrite: two of the values are written to the same numbers.
        """
        self._check_saes(model)
        writing.write(model, self._packs, None, at=at)

    def add_to(
        self, model: Any, coefficient: writing.Coefficient = 1.0, *, at: int | Sequence[int] | None = None
    ) -> None:
        """Add these values to those of the running trace.

        Args:
            model: the model that is traced.
            coefficient: a factor, or one for each row.
            at: one position (or one for each row) to write at, instead of the keys' own.
        """
        self._check_saes(model)
        writing.write(model, self._packs, coefficient, at=at)

    # --- files --------------------------------------------------------------------------------------------------------

    def to_file(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file with the provenance in its header, completely or not at all.

        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     ns.capture(model, "w3 w4", "layers[:].output[:]").to_file(f"{folder}/run.safetensors")
        ...     read = ns.SavedActivation.from_file(f"{folder}/run.safetensors", "layers[0:2].output[1]")
        >>> read.keys(), read.prompts
        (['layers[0].output[1]', 'layers[1].output[1]'], ('w3 w4',))

        Args:
            path: the file to write.
        """
        storage.write(path, self._packs, self._provenance)

    @classmethod
    @renamed(paths="sites")
    def from_file(cls, path: str | os.PathLike[str], sites: Paths | None = None) -> Self:
        """Read a capture, or only some of its paths.

        Args:
            path: the file.
            sites: a path or several to read; all if left out.

        Raises:
            FileError: the file is not a capture, or is damaged.
            UnknownPath: the file does not have a path.
        """
        of, provenance = storage.read(path, sites)
        return cls._new(of, provenance, None)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> ActivationFolder[Self]:
        """The captures that `ns.capture_to` wrote into a folder; files are read when they are needed.

        Args:
            folder: the folder.
        """
        return ActivationFolder.open(folder, cls.from_file)

    # --- provenance ---------------------------------------------------------------------------------------------------

    @property
    def model(self) -> str | None:
        """The name of the model that was captured."""
        return self._provenance.model

    @property
    def prompts(self) -> tuple[str, ...] | None:
        """The prompts, if they were texts."""
        return self._provenance.prompts

    @property
    def tokens(self) -> tuple[tuple[int, ...], ...] | None:
        """The token ids of each prompt, without padding."""
        return self._provenance.tokens

    @property
    def images(self) -> tuple[str | None, ...] | None:
        """A digest of the images or the sound of each prompt, None for one of text; None where all are of text."""
        return self._provenance.images

    @property
    def positions(self) -> dict[str, list[int] | None]:
        """The token position of each value in each prompt, by path; None where it is not known."""
        return packs.positions(self._packs, self._provenance)

    def __repr__(self) -> str:
        return printable(display.text(self._packs, self.rows))

    def _repr_html_(self) -> str:
        return display.html(self._packs, self.rows)
