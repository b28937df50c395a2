"""Remote runs: reads and writes as plain data, executed by the functions of `wire`.

Only numbers, strings and tensors are sent, and a dictionary of tensors comes back, so the server needs no nnsplice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from nnsplice import engine, wire
from nnsplice.activations.access import Access, accesses, keys_of, site_of
from nnsplice.activations.packs import Pack
from nnsplice.activations.write_plan import at_position, plan_write, write_targets
from nnsplice.atlas import DERIVED
from nnsplice.errors import RefusedPlace
from nnsplice.paths import Path
from nnsplice.tokens import Rows, Spans, columns


def read(
    model: engine.Model,
    paths: Sequence[Path],
    inputs: Any,
    batch: engine.Batch,
    spans: Spans | None,
    remote: bool | str,
) -> list[Pack]:
    """Capture sites, given in execution order, in one remote run of prompts of one length."""
    recipe: list[wire.Stop] = []
    keys: list[tuple[Path, ...]] = []
    for access in accesses(model, paths):
        rows = batch.rows(access.tower)
        parts: list[wire.Part] = []
        for group in keys_of(access.paths, rows, rows.width or 0, spans):
            parts.append((str(len(keys)), _columns(group, rows, spans), site_of(group[0]).columns))
            keys.append(group)
        recipe.append(_stop(access, rows, parts))
    found = engine.read_remote(model, inputs, recipe, remote)
    return [Pack(group, found[str(number)]) for number, group in enumerate(keys)]


def logits(
    model: engine.Model,
    packs: Sequence[Pack],
    inputs: Any,
    batch: engine.Batch,
    *,
    add: bool,
    at: int | None,
    spans: Spans | None,
    remote: bool | str,
) -> Tensor:
    """The logits of one remote run with packs written into it."""
    recipe: list[wire.Stop] = []
    tensors: dict[str, Tensor] = {}
    packs, spans = at_position(packs, at, spans)
    for step in plan_write(model, packs):
        if step.access.kind == "stream":
            raise RefusedPlace(
                "a write there changes the stream beside the module that it is met at, which a remote run does not do",
                path=step.access.name,
                write=step.access.name.replace(".mid", ".output"),
            )
        rows = batch.rows(step.access.tower)
        parts: list[wire.Part] = []
        for target in write_targets(step.writes, rows, rows.width or 0, spans):
            if target.write.kind in DERIVED:  # the written values depend on those of the run
                raise _refusal(str(target.write.path.place))
            where, name = target.where, str(len(tensors))
            parts.append((name, where.tolist() if isinstance(where, Tensor) else where, target.part))
            tensors[name] = target.write.tensor.detach().cpu()
        recipe.append(_stop(step.access, rows, parts))
    return engine.write_remote(model, inputs, recipe, tensors, add, remote)


def _columns(keys: Sequence[Path], rows: Rows, spans: Spans | None) -> list[int] | list[list[int]]:
    where = columns([key.position for key in keys], rows, rows.width or 0, spans)  # type: ignore[misc]
    return where.tolist() if isinstance(where, Tensor) else where


def _stop(access: Access, rows: Rows, parts: list[wire.Part]) -> wire.Stop:
    if access.kind in DERIVED or access.place.occurrence:
        raise _refusal(access.name)
    return (access.place.names, access.place.end, access.item, rows.batch, parts)


def _refusal(path: str) -> RefusedPlace:
    return RefusedPlace(
        "this site is derived from several values of a run, which a remote run does not do",
        path=path,
        expected="a site that stands in one tensor",
    )
