"""The arithmetic of captures, on the packs that they hold."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from numbers import Real
from typing import Protocol

import torch
from torch import Tensor

from nnsplice.activations.lookup import KeyIndex
from nnsplice.activations.packs import MEAN, Pack, ranked
from nnsplice.engine import Rank
from nnsplice.errors import BadArgument, BadType, DuplicatePath, KeyMismatch, ShapeError, named
from nnsplice.paths import Path, Span


class Directions(Protocol):
    """A subspace: an orthonormal basis at an address."""

    @property
    def place(self) -> str:
        """The address."""
        ...

    @property
    def basis(self) -> Tensor:
        """`[width, k]`, its columns orthonormal."""
        ...


def mapped(packs: Sequence[Pack], fn: Callable[[Tensor], Tensor]) -> list[Pack]:
    """The function applied to every pack's `[prompt, position, width]`."""
    made: list[Pack] = []
    for pack in packs:
        new = fn(pack.tensor)
        if not isinstance(new, Tensor) or new.dim() != 3 or new.shape[1] != len(pack.keys):
            found = f"shape {list(new.shape)}" if isinstance(new, Tensor) else f"{named(new)}"
            raise ShapeError(
                f"the function made {found} of {list(pack.tensor.shape)}",
                path=pack.keys[0].place,
                expected="a tensor [prompt, position, width] with as many positions",
            )
        if made and new.shape[0] != made[0].tensor.shape[0]:
            raise ShapeError(
                f"the function made {new.shape[0]} rows here and {made[0].tensor.shape[0]} of the sites before",
                path=pack.keys[0].place,
                expected="as many rows at every site",
            )
        made.append(pack.with_tensor(new))
    return made


def mean(packs: Sequence[Pack], axis: str) -> list[Pack]:
    """The mean over prompts, or over the positions of each site.

    Raises:
        BadArgument: another axis.
    """
    if axis == "prompt":
        return [pack.with_tensor(pack.tensor.mean(0, keepdim=True)) for pack in packs]
    if axis == "position":
        return [Pack((pack.keys[0].at(Span(MEAN)),), pack.tensor.mean(1, keepdim=True)) for pack in packs]
    raise BadArgument(f"there is no mean over {axis!r}", expected='"prompt" or "position"')


def is_number(value: object) -> bool:
    """Whether a capture can be multiplied by it."""
    return isinstance(value, Real) and not isinstance(value, bool)


def combined(a: Sequence[Pack], b: Sequence[Pack], fn: Callable[[Tensor, Tensor], Tensor]) -> list[Pack]:
    """The function applied to two captures of the same sites; one row serves every prompt of the other capture."""
    made: list[Pack] = []
    for pack, other in zip(a, aligned(a, b), strict=True):
        (rows_a, _, width_a), (rows_b, _, width_b) = pack.tensor.shape, other.shape
        if rows_a != rows_b and 1 not in (rows_a, rows_b):
            raise ShapeError(
                f"one capture has {rows_a} rows, the other {rows_b}",
                expected="as many rows, or one row that serves every prompt",
                write="a - b.mean(), or a.slice[0:4] - b.slice[0:4]",
            )
        if width_a != width_b:
            raise ShapeError(f"one capture is {width_a} wide here, the other {width_b}", path=pack.keys[0].place)
        made.append(pack.with_tensor(fn(pack.tensor, other)))
    return made


def aligned(a: Sequence[Pack], b: Sequence[Pack]) -> list[Tensor]:
    """The tensors of `b` in the order of the packs and positions of `a`.

    Raises:
        KeyMismatch: they hold different sites.
    """
    index_a, index_b = KeyIndex(a), KeyIndex(b)
    found = [[index_b.same(key) for key in pack.keys] for pack in a]
    pairs = [
        (key, entry)
        for pack, entries in zip(a, found, strict=True)
        for key, entry in zip(pack.keys, entries, strict=True)
    ]
    left = [key for key, entry in pairs if entry is None]
    right = [key for pack in b for key in pack.keys if index_a.same(key) is None]
    if left or right:
        raise KeyMismatch(
            "two captures of different sites\n"
            + "\n".join(
                f"  only in the {side}: {', '.join(map(str, keys[:5]))}{', ...' if len(keys) > 5 else ''}"
                for side, keys in (("left", left), ("right", right))
                if keys
            ),
            expected="the same keys in both",
            write="shared = [key for key in a if key in b];  a.subset(shared) - b.subset(shared)",
        )
    tensors: list[Tensor] = []
    for entries in found:
        places = [entry for entry in entries if entry is not None]
        tensors.append(b[places[0][0]].take([position for _, position in places]).tensor)
    return tensors


def close(a: Sequence[Pack], b: Sequence[Pack], rtol: float, atol: float, equal_nan: bool) -> bool:
    """Whether two captures of the same sites hold the same values, whatever their devices and dtypes."""
    for pack, tensor in zip(a, aligned(a, b), strict=True):
        dtype = torch.promote_types(pack.tensor.dtype, tensor.dtype)
        mine, theirs = pack.tensor.to(dtype), tensor.to(pack.tensor.device, dtype)
        if mine.shape != theirs.shape or not torch.allclose(mine, theirs, rtol, atol, equal_nan):
            return False
    return True


def united(a: Sequence[Pack], b: Sequence[Pack], rank: Callable[[Path], Rank] | None) -> list[Pack]:
    """Two captures of the same prompts in one, in execution order if that is known.

    Args:
        rank: the place of a key in the execution order.

    Raises:
        DuplicatePath: a key stands in both.
        ShapeError: other numbers of prompts, or of other widths at one site.
    """
    index = KeyIndex(a)
    shared = [str(key) for pack in b for key in pack.keys if index.same(key) is not None]
    if shared:
        raise DuplicatePath(
            f"{len(shared)} path{'s' * (len(shared) != 1)} in both captures: {', '.join(shared[:5])}"
            + (", ..." if len(shared) > 5 else ""),
            expected="captures of different sites or positions",
            write="a | b.subset([...])",
        )
    rows = [pack.tensor.shape[0] for pack in (*a[:1], *b[:1])]
    if len(set(rows)) > 1:
        raise ShapeError(f"one capture has {rows[0]} rows, the other {rows[1]}", expected="the same prompts")
    both = merged([*a, *b])
    return both if rank is None or any(pack.keys[0].site is None for pack in both) else ranked(both, rank)


def merged(packs: Sequence[Pack]) -> list[Pack]:
    """Packs of one site joined into one."""
    groups: list[list[Pack]] = []
    known: dict[object, list[Pack]] = {}
    for pack in packs:
        names = [name for key in pack.keys for name in (str(key.place), key.place)]
        group = next((known[name] for name in names if name in known), None)
        if group is None:
            groups.append(group := [])
        known.update(dict.fromkeys(names, group))
        group.append(pack)
    return [group[0] if len(group) == 1 else _joined(group) for group in groups]


def _joined(group: Sequence[Pack]) -> Pack:
    widths = sorted({pack.tensor.shape[-1] for pack in group})
    if len(widths) > 1:
        raise ShapeError(f"entries of one site have widths {widths}", path=group[0].keys[0].place)
    # torch takes the dtype that holds both exactly; only the device has to be chosen.
    tensor = torch.cat([pack.tensor.to(group[0].tensor.device) for pack in group], dim=1)
    return Pack(tuple(key for pack in group for key in pack.keys), tensor)


def stacked(packs: Sequence[Pack], axis: str) -> Tensor:
    """The packs of one kind of site as one tensor, stacked by their numbers on an axis (layer, head, ...)."""
    if not packs:
        raise BadArgument("this capture is empty, so there is nothing to stack")
    kinds: dict[str, list[tuple[int, Pack]]] = {}
    for pack in packs:
        place = pack.keys[0].place
        along = next((s for s in place.steps if s.index is not None and s.name in (axis, f"{axis}s")), None)
        if along is None:
            axes = ", ".join(s.name.removesuffix("s") for s in place.steps if s.index is not None) or "none"
            raise BadArgument(f"there is no {axis} in this key", path=place, expected=f"an axis of the keys: {axes}")
        assert isinstance(along.index, int)
        without_number = tuple(replace(s, index=None) if s is along else s for s in place.steps)
        kinds.setdefault(str(replace(place, site=None, steps=without_number)), []).append((along.index, pack))
    if len(kinds) != 1:
        raise BadArgument(
            f"{len(kinds)} kinds of site stand here, and a stack is of one: {', '.join(list(kinds)[:4])}",
            write="saved.subset('layers[:].output').stack('layer')",
        )
    ((kind, members),) = kinds.items()
    members.sort(key=lambda member: member[0])
    positions = {tuple(str(key.position) for key in pack.keys) for _, pack in members}
    shapes = sorted({tuple(pack.tensor.shape) for _, pack in members})
    if len(positions) > 1 or len(shapes) > 1:
        raise ShapeError(
            f"the {axis}s hold tensors of different shape: {shapes}"
            if len(shapes) > 1
            else f"the {axis}s hold different positions",
            path=kind,
            expected=f"the same positions at every {axis}",
            write="saved.subset('layers[:].output[-1]').stack('layer')",
        )
    whole = torch.stack([pack.tensor for _, pack in members])
    return whole[:, :, 0] if whole.shape[2] == 1 else whole


def unit(values: Tensor) -> Tensor:
    """Vectors of length one; NaN for a zero vector. Its products stay in range where those of the vectors would not."""
    return values / values.norm(dim=-1, keepdim=True)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """`[prompt, position, 1]`."""
    return (a * b).sum(-1, keepdim=True)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """`[prompt, position, 1]`; NaN where one of them is zero."""
    return dot(unit(a), unit(b))


def without(values: Tensor, direction: Tensor) -> Tensor:
    """Values without their component along a direction; NaN where the direction is zero."""
    along = unit(direction.to(values))
    return values - dot(values, along) * along


def within(values: Tensor, basis: Tensor) -> Tensor:
    """The projection of `[..., width]` values onto an orthonormal basis; computed in float32 at least."""
    dtype = torch.promote_types(values.dtype, torch.float32)
    basis = basis.to(values.device, dtype)
    return (values.to(dtype) @ basis @ basis.T).to(values)


def interchanged(current: Tensor, source: Tensor, basis: Tensor) -> Tensor:
    """`current` with its projection onto the basis replaced by that of `source`; unchanged bits where the two agree."""
    return current + within(source.to(current) - current, basis)


def basis_of(packs: Sequence[Pack], directions: Directions, at: Callable[[str], Container[int]]) -> Tensor:
    """The basis of a subspace that fits every pack.

    Args:
        at: an address -> the numbers of its packs.

    Raises:
        BadArgument: a pack of another site than the subspace's.
        BadType: it is no subspace.
        ShapeError: a pack of another width.
    """
    basis = getattr(directions, "basis", None)
    if not isinstance(basis, Tensor) or basis.dim() != 2:
        raise BadType(f"{named(directions)} is no subspace", expected="an ns.Subspace")
    for pack in packs:
        if pack.tensor.shape[-1] != basis.shape[0]:
            raise ShapeError(
                f"the capture is {pack.tensor.shape[-1]} wide here, and the subspace's site {basis.shape[0]}",
                path=pack.keys[0].place,
                write="saved.subset(subspace.place)",
            )
    own = at(directions.place)
    for number, pack in enumerate(packs):
        if number not in own:
            raise BadArgument(
                f"the subspace is of {directions.place}, and the capture holds another site",
                path=pack.keys[0].place,
                expected="a capture of the subspace's own site",
                write=f"saved.subset({directions.place!r}), or "
                f"ns.Subspace({str(pack.keys[0].place)!r}, subspace.basis) if its directions are meant to hold there",
            )
    return basis
