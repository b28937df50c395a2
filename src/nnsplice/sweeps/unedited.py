"""The unedited runs of a sweep: the clean run, which also gives the values of a patch, and the corrupted run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from nnsplice import engine
from nnsplice.activations.access import site_of
from nnsplice.activations.capture import gather
from nnsplice.activations.packs import Pack
from nnsplice.activations.prompts import Prompts
from nnsplice.atlas import unwrap
from nnsplice.packed.cost import Cost, CostModel
from nnsplice.paths import Path
from nnsplice.sweeps import other_model
from nnsplice.sweeps.executors import corrupt
from nnsplice.sweeps.plan import Plan
from nnsplice.sweeps.reading import only_read, read_at
from nnsplice.sweeps.sources import Captured, Source


def clean_run(
    model: engine.Model, plan: Plan, at_once: int, other: engine.Model | None = None
) -> tuple[Tensor, Source, Cost]:
    """The clean run: the logits that the metric reads, `[prompt, vocab]`, the values for a patch, and the cost.

    Args:
        at_once: the number of tokens that run at once.
        other: the model of the clean run, if it is another one.
    """
    prompts = plan.corrupted if plan.clean is None else plan.clean
    device, model = model.device, model if other is None else other
    # Sites of the edited model, and the same sites of the other one, whose modules may have other names.
    sites = {} if other is None else other_model.counterparts(other, plan.targets)
    # Equal prompts share a clean run: the noised samples of a trace, and answers of several tokens.
    first = _first_equal(plan, prompts)
    needed: dict[int, dict[Path, set[int]]] = {}
    for prompt, places in _needed(plan).items():
        for place, positions in places.items():
            needed.setdefault(first[prompt], {}).setdefault(place, set()).update(positions)
    values: dict[object, dict[int, tuple[dict[int, int], Tensor]]] = {}

    def keep(rows: Sequence[int]) -> Callable[[], None]:
        wanted: dict[Path, set[int]] = {}
        for row in rows:
            for place, positions in needed.get(row, {}).items():
                wanted.setdefault(place, set()).update(positions)
        orders = {place: tuple(sorted(positions)) for place, positions in wanted.items()}
        if other is not None:
            orders = {sites[place]: order for place, order in orders.items()}
        places = engine.expand(model, [place.at(order) for place, order in orders.items()]) if orders else []

        def inside() -> None:
            mediator = engine.worker(model, "a sweep")
            for pack in gather(model, mediator, places, prompts.batch(rows)):
                _store(pack, rows, values)

        return inside

    targets = [place for target in plan.targets for place in target.places]
    read = targets if other is None else list(sites.values())
    logits, cost = _logits(model, plan, prompts, sorted(set(first)), at_once, keep, read, clean=True)
    if other is not None:
        # Values by the sites of the edited model, on its device.
        names = {site_of(there): site_of(place) for place, there in sites.items()}
        values = {
            names[site]: {row: (index, held.to(device or held.device)) for row, (index, held) in of.items()}  # type: ignore[index]
            for site, of in values.items()
        }
        logits = {row: one.to(device or one.device) for row, one in logits.items()}
    captured = Captured(values, first) if plan.operation.name == "patch" else None
    return torch.stack([logits[row] for row in first]), Source(plan, captured), cost


def corrupted_run(
    model: engine.Model, plan: Plan, at_once: int, rows: Sequence[int] | None = None
) -> tuple[Tensor, Cost]:
    """The corrupted run: the logits that the metric reads, `[prompt, vocab]`, and the cost.

    Args:
        rows: the prompts; all if left out.
    """
    rows = range(len(plan.corrupted)) if rows is None else rows
    places = [place for target in plan.targets for place in target.places]
    logits, cost = _logits(
        model, plan, plan.corrupted, rows, at_once, lambda rows: lambda: corrupt(model, plan, rows), places, clean=False
    )
    return torch.stack([logits[row] for row in rows]), cost


def _first_equal(plan: Plan, prompts: Prompts) -> list[int]:
    """For each prompt, the first equal prompt read at the same token, so that one run serves all of them."""
    known: dict[object, int] = {}
    return [
        known.setdefault((prompts.identity(row), read_at(plan, row, clean=True)), row) for row in range(len(prompts))
    ]


def _logits(
    model: engine.Model,
    plan: Plan,
    prompts: Prompts,
    chosen: Sequence[int],
    at_once: int,
    before: Callable[[Sequence[int]], Callable[[], None]],
    places: Sequence[Path],
    *,
    clean: bool,
) -> tuple[dict[int, Tensor], Cost]:
    """The logits of the chosen prompts that the metric reads, `[vocab]` by the prompt's number, and the cost."""
    logits: dict[int, Tensor] = {}
    cost_model, cost = CostModel.of(model), Cost()
    longest = max(max(prompts.lengths("encoder")), max(prompts.lengths("decoder")))
    # A user's hook may be written for one prompt at a time.
    one_by_one = engine.has_own_code(unwrap(model).modules())
    batches = prompts.take(chosen).batches(model, at_most=1 if one_by_one else max(at_once // longest, 1))
    for rows, at in _read_alike(plan, ([chosen[n] for n in batch] for batch in batches), clean):
        first = before(rows)
        found: list[Tensor] = []

        def body(at: int = at, found: list[Tensor] = found, first: Callable = first) -> None:
            first()
            found.append(engine.read_logits(model, at))

        inputs = prompts.inputs(rows, model.device)
        assert isinstance(inputs, Mapping)
        with torch.no_grad():
            engine.run(model, {**inputs, **(fewer := only_read(model, at, places))}, body)
        cost += cost_model.whole(prompts, rows, fewer.get("logits_to_keep", prompts.length("decoder", rows[0])))
        logits |= dict(zip(rows, found[0], strict=True))
    return logits, cost


def _read_alike(plan: Plan, batches: Iterable[list[int]], clean: bool) -> Iterator[tuple[list[int], int]]:
    """The batches, split by the position that the metric reads (counted from the end), with that position."""
    for batch in batches:
        alike: dict[int, list[int]] = {}
        for row in batch:
            alike.setdefault(read_at(plan, row, clean=clean), []).append(row)
        yield from ((rows, at) for at, rows in alike.items())


def _needed(plan: Plan) -> dict[int, dict[Path, set[int]]]:
    """The positions whose values a patch takes from the clean run, by prompt and site."""
    needed: dict[int, dict[Path, set[int]]] = {}
    if plan.operation.name != "patch":
        return needed
    for prompt, number in plan.jobs:
        for part in plan.targets[number].parts:
            tokens = plan.positions(part, prompt, of_clean=True)
            for place in part.places:
                needed.setdefault(prompt, {}).setdefault(place.place, set()).update(tokens)
    return needed


def _store(pack: Pack, rows: Sequence[int], values: dict[object, dict[int, tuple[dict[int, int], Tensor]]]) -> None:
    """Store captured values by site, prompt and position."""
    index = {key.position: number for number, key in enumerate(pack.keys)}
    for number, row in enumerate(rows):
        values.setdefault(pack.keys[0].site, {})[row] = (index, pack.tensor[number])  # type: ignore[assignment]
