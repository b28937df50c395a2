"""Regions: the selected parts of a model's parameters, read and written in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from nnsplice.atlas import Atlas, ParameterSlice, Selection, refuse_sharded, rest_of, unwrap
from nnsplice.atlas.families import WRAPPED
from nnsplice.errors import BadArgument, ShapeError, UnknownParameter, closest, named
from nnsplice.paths import Path
from nnsplice.warn import warn_caller
from nnsplice.weights.selecting import Restriction, exact, select
from nnsplice.weights.shared_heads import notes

#: What `select` takes, or masks.
Selected: TypeAlias = "Restriction | Path | Selection | Mapping[str, Tensor | None]"


@dataclass(frozen=True)
class Region:
    """A part of one parameter: all of it (None), ranges along an axis, or the elements of a bool mask."""

    name: str
    tensor: nn.Parameter
    part: ParameterSlice | Tensor

    def views(self, tensor: Tensor) -> list[Tensor]:
        """This part of a tensor of the parameter's shape: views, or for a mask a copy."""
        if self.part is None:
            return [tensor]
        if isinstance(self.part, Tensor):
            return [tensor[self.part.to(tensor.device)]]
        axis, ranges = self.part
        return [tensor.narrow(axis, start, stop - start) for start, stop in ranges]

    def read(self) -> list[Tensor]:
        """A copy of this part of the parameter."""
        return [view.clone() for view in self.views(self.tensor.detach())]

    def write(self, values: Sequence[Tensor], tensor: Tensor | None = None) -> None:
        """Write this part of the parameter, or of another tensor of its shape."""
        target = (self.tensor if tensor is None else tensor).detach()
        with torch.no_grad():
            if isinstance(self.part, Tensor):
                target[self.part.to(target.device)] = values[0].to(target)
                return
            for view, value in zip(self.views(target), values, strict=True):
                view.copy_(value)

    def rest(self) -> Region | None:
        """The rest of the parameter; None if there is none."""
        if isinstance(self.part, Tensor):
            return Region(self.name, self.tensor, ~self.part)
        left = rest_of(self.part, tuple(self.tensor.shape))
        return Region(self.name, self.tensor, left) if left is not None and left[1] else None


def regions(model: Any, selected: Selected) -> list[Region]:
    """The regions of a restriction, a selection or masks.

    An address of a head means its own weights; a selection and masks are taken as they are, with a warning if they
    include keys and values that other heads read too.

    Raises:
        BadArgument: nothing is selected, or the model has no weights to read.
    """
    root = unwrap(model)
    if isinstance(selected, Mapping):
        found = list(_masked(model, root, selected))
    else:
        selection = select(model, selected, own=not isinstance(selected, Selection))
        found = [Region(name, root.get_parameter(name), part) for name, part in selection.parts.items()]
    if not found:
        raise BadArgument("this selects no parameter, so it would do nothing", expected="at least one site")
    refuse_sharded(((region.name, region.tensor) for region in found), "these weights")
    _refuse_quantised((region.name, region.tensor) for region in found)
    for region in found:
        if region.tensor.is_meta:
            raise BadArgument(f"{region.name} is on the meta device: this model has no weights yet")
    if isinstance(selected, Mapping | Selection):
        note = next(notes(Atlas.of(model), {region.name: region.part for region in found}), None)
        if note is not None:
            warn_caller(f"other heads change with these weights: {note}")
    return found


def _refuse_quantised(parameters: Iterable[tuple[str, Any]]) -> None:
    """Raise for a quantised parameter.

    Raises:
        BadArgument: it is a tensor subclass with scales, or its dtype is not floating point.
    """
    for name, tensor in parameters:
        packed = hasattr(tensor, "__tensor_flatten__")
        if isinstance(tensor, Tensor) and (packed or not (tensor.is_floating_point() or tensor.is_complex())):
            kind = type(tensor.data if type(tensor) is nn.Parameter else tensor).__name__
            raise BadArgument(
                f"{name} is quantised ({kind} of {str(tensor.dtype).removeprefix('torch.')}): its rows and columns are "
                "no plain numbers, and parts of it share their scales",
                expected="a model of plain weights; activations of this one can be read and written",
                write='ns.load(name, dtype="bfloat16"), without quantization_config',
            )


def _refuse_adapter(names: Iterable[str], whose: str) -> None:
    """Raise if one of two models that differ in their names has PEFT's layers around its own."""
    wrapped = next((name for name in names if not set(WRAPPED).isdisjoint(name.split("."))), None)
    if wrapped is not None:
        raise BadArgument(
            f"{whose} has an adapter of PEFT, whose factors stand beside its weights ({wrapped}), and the one that it "
            "is compared with has none there",
            expected="two models of plain weights, the adapter merged into them by peft",
            write="plain = ns.models.unwrap(ns.load(name))\n"
            "         tuned = ns.load(PeftModel.from_pretrained(plain, folder).merge_and_unload(), tokenizer)",
        )


def _masked(model: Any, root: nn.Module, masks: Mapping[Any, Any]) -> Iterator[Region]:
    atlas = Atlas.of(model)
    found: dict[str, Tensor | None] = {}
    for given, mask in masks.items():
        name = exact(model, atlas, given) if isinstance(given, str) else None
        if name is None:
            raise UnknownParameter(
                f"this model has no parameter {given}", expected=closest(str(given), atlas.tree.params)
            )
        if mask is not None:
            _check_mask(name, mask, root.get_parameter(name))
        if name in found:  # another name of a tied tensor: both masks are meant
            other = found[name]
            mask = None if mask is None or other is None else mask | other.to(mask.device)
        found[name] = mask
    yield from (Region(name, root.get_parameter(name), mask) for name, mask in found.items())


def _check_mask(name: str, mask: Any, tensor: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != tensor.shape:
        shown = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else f"{named(mask)}"
        raise ShapeError(f"the mask of {name} is {shown}", expected=f"None, or a bool tensor {list(tensor.shape)}")
    if not mask.any():
        raise BadArgument(f"the mask of {name} selects nothing of it", expected="at least one number")


def counterpart(model: Any, other: Any, wanted: Sequence[Region]) -> dict[str, Tensor]:
    """The tensors of another model for these regions, by parameter name.

    Args:
        other: a model of the same shape, wrapped or not, or a mapping from names to tensors.

    Raises:
        BadArgument: the same model, or one with other parameters, shapes or ties.
    """
    own = Atlas.of(model).tree
    if isinstance(other, Mapping):
        held: dict[str, Tensor] = dict(other)
    else:
        if unwrap(other) is unwrap(model):
            raise BadArgument("both are the same model, so nothing would change", expected="two models")
        held = dict(unwrap(other).named_parameters(remove_duplicate=False))
    refuse_sharded(((r.name, held[r.name]) for r in wanted if r.name in held), "the other model's weights")
    _refuse_quantised((r.name, held[r.name]) for r in wanted if r.name in held)
    for region in wanted:
        tensor = held.get(region.name)
        if tensor is None:
            _refuse_adapter((r.name for r in wanted), "this model")
            _refuse_adapter(held, "the other model")
            raise BadArgument(
                f"the other model has no {region.name}", expected=f"its names: {closest(region.name, held)}"
            )
        if tensor.shape != region.tensor.shape:
            raise BadArgument(
                f"{region.name} has shape {list(tensor.shape)} in the other model",
                expected=f"{list(region.tensor.shape)}, as here",
            )
        if tensor.is_meta:
            raise BadArgument(f"{region.name} of the other model is on the meta device: it has no weights")
        for alias, first in own.aliases.items():
            twin = held.get(alias, tensor) if first == region.name else tensor
            if twin is not tensor and not torch.equal(twin, tensor):
                raise BadArgument(
                    f"{alias} is tied to {first} in this model, and the other model has different weights there",
                    expected="two models that tie the same parameters",
                )
    # Tensors that share memory with the written ones are copied first, so that layers of one model can be exchanged.
    written = {region.tensor.untyped_storage()._cdata for region in wanted}
    found = {region.name: held[region.name].detach() for region in wanted}
    return {name: one.clone() if one.untyped_storage()._cdata in written else one for name, one in found.items()}
