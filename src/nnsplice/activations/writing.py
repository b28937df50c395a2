"""Writing captures into a run.

A write replaces: the value is copied, the copy changed and handed to the run. Nothing is changed in place, so no other
reader of the same tensor sees it (the one exception is the stream between attention and MLP, see `LiveValue.write`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nnsplice import closures, engine, wire
from nnsplice.activations import derived, features
from nnsplice.activations.access import Access, live_value, site_of
from nnsplice.activations.packs import Pack
from nnsplice.activations.write_plan import SiteWrite, WriteTarget, at_position, check_write, plan_write, write_targets
from nnsplice.errors import BadArgument, BadType, ShapeError
from nnsplice.tokens import Rows, Spans

#: A factor, or one for each row.
Coefficient = float | Sequence[float] | Tensor
#: Site -> its value in this run, for the sources of derived writes.
SourceValues = Mapping[object, Tensor]


def write(
    model: Any,
    packs: Sequence[Pack],
    coefficient: Coefficient | None,
    *,
    at: int | Sequence[int] | None = None,
    spans: Spans | None = None,
) -> None:
    """Write packs into the run that this block belongs to: replace, or add `coefficient` times."""
    model = engine.as_model(model)
    mediator = engine.worker(model, "writing a capture")
    if not packs:
        raise BadArgument("this capture is empty, so writing it would do nothing", expected="at least one entry")
    packs, spans = at_position(packs, at, spans)
    steps = plan_write(model, packs)
    closures.warn_of_joint_norms(model, (one.path for step in steps for one in step.writes))
    batch = engine.batch_of(model, mediator)
    for step in steps:
        step.access.check_not_past(mediator)
        for one in step.writes:
            check_write(one, step.access.tower, batch)
    factor = None if coefficient is None else _factor(coefficient)
    sources: dict[object, Tensor] = {}
    for step in steps:
        rows = batch.rows(step.access.tower)
        if not step.writes:
            sources.update(_read_sources(step.access, mediator, rows))
            continue
        value = live_value(step.access, mediator, rows)
        value.write(with_writes(value.tensor, step.writes, rows, factor, spans, sources))


def _read_sources(access: Access, mediator: Any, rows: Rows) -> SourceValues:
    if access.kind == "expert":
        contributions = derived.experts(access, mediator, rows)
        return {path.site: contributions[site_of(path).index] for path in access.paths}
    tensor = live_value(access, mediator, rows).tensor
    if access.kind == features.TRANSCODED:
        return {path.site: tensor for path in access.paths}
    found: dict[object, Tensor] = {}
    for path in access.paths:
        start, stop = site_of(path).columns or (0, tensor.shape[-1])
        found[path.site] = tensor[..., start:stop]
    return found


def with_writes(
    values: Tensor,
    writes: Sequence[SiteWrite],
    rows: Rows,
    factor: Tensor | float | None = None,
    spans: Spans | None = None,
    sources: SourceValues | None = None,
    before: Tensor | None = None,
) -> Tensor:
    """A copy of `[prompt, token, width]` values with all writes in it.

    Args:
        factor: add the writes this many times instead of replacing.
        before: the values that SAEs encode, where parts of them were written into `values` already.
    """
    width = values.shape[1]
    before = values if before is None else before
    encoded: dict[tuple[int, int], Tensor] = {}
    for target in write_targets(writes, rows, width, spans):
        write, where = target.write, target.where
        source = None if sources is None or write.source is None else sources[write.source.site]
        if write.sae is not None:
            values = _with_sae_part(target, before if source is None else source, values, factor, encoded)
            continue
        part = target.part or (0, values.shape[-1])
        new = write.tensor
        if write.kind == "pattern" and source is not None:
            new = derived.mixed(new, source, rows)
        if write.kind == "ungated" and source is not None:
            new = new.to(values) * wire.pick(source, where, None).sigmoid().to(values)
        if new.shape[-1] != part[1] - part[0]:
            raise ShapeError(
                f"the capture is {new.shape[-1]} wide, the site {part[1] - part[0]}", path=write.path.place
            )
        if new.shape[0] not in (1, values.shape[0]):
            raise ShapeError(f"the capture has {new.shape[0]} rows, the run {values.shape[0]}", path=write.path.place)
        new = new.to(values)
        if factor is not None:
            new = wire.pick(values, where, part) + _scaled(new, factor)
        elif write.kind == "expert" and source is not None:
            # The sum of all experts changes by as much as this one does.
            new = wire.pick(values, where, part) + new - wire.pick(source, where, None)
        values = wire.put(values, where, part, new)
    return values


def _with_sae_part(
    target: WriteTarget,
    before: Tensor,
    values: Tensor,
    factor: Tensor | float | None,
    encoded: dict[tuple[int, int], Tensor],
) -> Tensor:
    """The values with the change of a feature or an error added; changes by parts of one SAE add up.

    Args:
        before: the values that the SAE encodes, without other writes; a transcoder's are of another site.
        encoded: the features by SAE and values, kept for further writes.
    """
    write, where = target.write, target.where
    assert write.sae is not None
    site = site_of(write.path)
    if site.index is None:
        old = features.part(write.sae, site, before)
    else:
        key = (id(write.sae), id(before))
        encoded[key] = write.sae.encode(before) if key not in encoded else encoded[key]
        old = encoded[key][..., site.index : site.index + 1].to(before)
    old = wire.pick(old, where, None)
    new = write.tensor.to(values)
    if new.shape[-1] != old.shape[-1] or new.shape[0] not in (1, old.shape[0]):
        raise ShapeError(
            f"the capture is {list(new.shape)} here, and what stands there {list(old.shape)}", path=write.path.place
        )
    difference = new - old if factor is None else _scaled(new, factor).expand_as(old)
    change = features.moved(write.sae, site, difference, wire.pick(before, where, None))
    return wire.put(values, where, None, wire.pick(values, where, None) + change)


def _scaled(new: Tensor, factor: Tensor | float) -> Tensor:
    return (factor.to(new)[:, None, None] if isinstance(factor, Tensor) else factor) * new


def _factor(coefficient: Coefficient) -> Tensor | float:
    if isinstance(coefficient, Tensor):
        if coefficient.dim() > 1:
            raise ShapeError(f"a coefficient of shape {list(coefficient.shape)}", expected="a number, or one per row")
        return coefficient if coefficient.dim() else float(coefficient)
    if isinstance(coefficient, int | float):
        return float(coefficient)
    if isinstance(coefficient, Sequence) and not isinstance(coefficient, str):
        return torch.tensor(list(coefficient), dtype=torch.float64)
    raise BadType(f"a coefficient of type {type(coefficient).__name__}", expected="a number, or one for each row")
