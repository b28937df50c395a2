"""`updates`: iterate over sites of a run, each with its value and a function that replaces it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nnsplice import closures, engine, wire
from nnsplice.activations import derived, features
from nnsplice.activations.access import Access, access_to, accesses, live_value, require_positions, site_of
from nnsplice.activations.write_plan import SiteWrite
from nnsplice.activations.writing import SourceValues, with_writes
from nnsplice.atlas import host
from nnsplice.deprecated import renamed
from nnsplice.errors import BadArgument, DuplicatePath, LateUpdate, PathError, RefusedPlace, ShapeError
from nnsplice.paths import Path, Paths, parse_path
from nnsplice.tokens import Rows, columns

Update = Callable[[Tensor], None]


@renamed(paths="sites")
@engine.only_local
def updates(model: Any, sites: Paths) -> Iterator[tuple[str, Tensor, Update]]:
    """Edit activations of the running trace one by one, in the order of the forward pass.

    >>> with model.trace("w3 w4 w5"):
    ...     for key, current, update in ns.updates(model, ["layers[2].output[-1]", "layers[0].output[-1]"]):
    ...         update(current * 0)

    Args:
        model: the model that is traced.
        sites: a path or several, each a single site and position.

    Yields:
        `(key, current, update)`: the path as it was given, a copy of the current value `[prompt, width]` that keeps the
        graph, and a function that writes another value.

    Raises:
        OutsideTrace: no trace is running.
        PathError: a slice or a list of positions, or no path.
        DuplicatePath: the same site twice.
        LateUpdate: `update` is called after the run has passed its site.
    """
    model = engine.as_model(model)
    mediator = engine.worker(model, "ns.updates")
    wanted = engine.listed(sites)
    if not wanted:
        raise BadArgument("no paths, so there is nothing to update", expected="at least one path")
    arranged = engine.map_of(model).arrange(wanted)
    require_positions([path for path, _ in arranged])
    numbers: dict[Path, int] = {}
    for path, number in arranged:
        if path in numbers or not isinstance(path.position, int) or [n for _, n in arranged].count(number) > 1:
            kind = DuplicatePath if path in numbers else PathError
            raise kind(
                "the same site twice" if path in numbers else "updates go through single sites and positions",
                path=wanted[number],
                expected="a number in every bracket, each site once",
                write="for key, current, update in ns.updates(model, saved.keys())",
            )
        numbers[path] = number
    batch = engine.batch_of(model, mediator)
    plan = accesses(model, [path for path, _ in arranged])
    for access in plan:
        access.check_not_past(mediator)
    derived.refuse_routers(model, [path for path, _ in arranged])
    for path, _ in arranged:
        if site_of(path).kind == "ungated":
            raise RefusedPlace(
                "what stands before a gate is computed from two sites, and an update goes through one",
                path=path,
                write=str(replace(path, value="output")),
            )
        if site_of(path).kind == "pattern":
            raise RefusedPlace(
                "when a pattern can be read it has already been used, so it cannot be updated in the same run",
                path=path,
                write="saved = ns.capture(...); then saved.map(...).apply(model) in another run",
            )
    closures.require(model, [_written_at(model, path) for path, _ in arranged])
    names = {path: str(parse_path(wanted[number])) for path, number in arranged}
    return _walk(model, plan, mediator, batch, names)


def _walk(
    model: engine.Model, plan: Sequence[Access], mediator: Any, batch: engine.Batch, names: dict[Path, str]
) -> Iterator[tuple[str, Tensor, Update]]:
    sae_inputs = _SaeInputs()
    for access in plan:
        rows = batch.rows(access.tower)
        computed = derived.experts(access, mediator, rows) if access.kind == "expert" else None
        if access.kind == features.TRANSCODED:  # read once, as the run goes on to another site with the first update
            inputs = live_value(access, mediator, rows).tensor
            computed = {site_of(path).index: inputs for path in access.paths}
        for path in access.paths:
            # Read again for each position, as the user's block may have updated the value.
            values = live_value(access, mediator, rows).tensor if computed is None else computed[site_of(path).index]
            sources = None if computed is None else {path.site: values}
            if access.kind == features.TRANSCODED:
                values = features.part(features.sae_of(model, path), site_of(path), values)
            if access.kind in features.KINDS:
                values = features.part(features.sae_of(model, path), site_of(path), sae_inputs.of(access, values))
            position = path.position
            assert isinstance(position, int)
            where = columns((position,), rows, values.shape[1])
            current = wire.pick(values, where, site_of(path).columns)[:, 0]
            yield names[path], current, _updater(model, mediator, path, rows, sources, sae_inputs)


class _SaeInputs:
    """The values at each site before parts of SAEs were updated, so that updates of several parts add up."""

    def __init__(self) -> None:
        #: Value -> what SAEs encode, and the value since the last update.
        self._values: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}

    def of(self, access: Access, values: Tensor) -> Tensor:
        """What SAEs encode here; the values themselves if something else has changed them."""
        before, now = self._values.get(self._key(access), (values, values))
        return before if now is values or torch.equal(now, values) else values

    def note(self, access: Access, before: Tensor, now: Tensor) -> None:
        """Remember an update of a part."""
        self._values[self._key(access)] = before, now

    @staticmethod
    def _key(access: Access) -> tuple[object, ...]:
        return (access.place.key, access.item)


def _written_at(model: engine.Model, path: Path) -> Path:
    """The site that an update of this path is written to."""
    if site_of(path).kind == features.TRANSCODED:
        return features.written_at(model, path)
    return derived.expert_output(path) if site_of(path).kind == "expert" else host(path)


def _updater(
    model: engine.Model, mediator: Any, path: Path, rows: Rows, sources: SourceValues | None, sae_inputs: _SaeInputs
) -> Update:
    position = path.position
    assert isinstance(position, int)
    kind = site_of(path).kind
    target = _written_at(model, path)
    sae = features.sae_of(model, path) if kind in (*features.KINDS, features.TRANSCODED) else None
    access = access_to(model, (target,))
    visits = mediator.occurrence(access.place.key)

    def update(new: Tensor) -> None:
        engine.worker(model, "update")
        closures.warn_of_joint_norms(model, [path])
        if mediator.occurrence(access.place.key) != visits:
            raise LateUpdate(
                "the run has already gone past this site, so the update would change nothing",
                path=path,
                expected="update(...) inside the loop, before the next key is asked for",
            )
        if not isinstance(new, Tensor) or new.dim() != 2:
            found = f"shape {list(new.shape)}" if isinstance(new, Tensor) else f"type {type(new).__name__}"
            raise ShapeError(
                f"an update of {found}",
                path=path,
                expected="a tensor [prompt, width], as the value that came with it",
                write="update(torch.zeros_like(current))",
            )
        write = SiteWrite(path, target, (position,), new[:, None], None if sources is None else path, sae)
        value = live_value(access, mediator, rows)
        before = value.tensor if sae is None else sae_inputs.of(access, value.tensor)
        now = with_writes(value.tensor, [write], rows, sources=sources, before=before)
        if sae is not None:
            sae_inputs.note(access, before, now)
        value.write(now)

    return update
