"""One run with gradients of the metric by the values of its sites."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nnsplice import engine, wire
from nnsplice.activations.access import accesses, site_of
from nnsplice.activations.prompts import Prompts
from nnsplice.atlas import Site, host, unwrap
from nnsplice.errors import BadArgument, RefusedPlace
from nnsplice.packed.cost import Cost, CostModel
from nnsplice.paths import Path
from nnsplice.sweeps.executors import check_length
from nnsplice.sweeps.plan import Plan
from nnsplice.sweeps.reading import only_read, read_at

#: The name of a value of a run: one tensor, with all its heads and neurons.
ValueKey = Hashable


def value_key(site: Site) -> ValueKey:
    """The value that a site is a part of."""
    return (*site.location, site.item)


@dataclass(frozen=True)
class GradientRun:
    """A run over prompts of one length: its values and its logits."""

    rows: tuple[int, ...]
    #: The tensors of the run that receive gradients, in the model's own shapes.
    tensors: Mapping[ValueKey, Tensor]
    #: Copies of the same, `[prompt, token, width]`.
    values: Mapping[ValueKey, Tensor]
    #: The logits that the metric reads, `[prompt, vocab]`.
    logits: Tensor


@dataclass(frozen=True)
class InterpolatedInput:
    """The input of the first layer that replaces the run's own: a point on the path between two runs."""

    place: Path
    #: `[prompt, token, width]`
    value: Tensor


@dataclass
class GradientCost:
    """The cost of the runs so far."""

    cost_model: CostModel
    cost: Cost = field(default_factory=Cost)
    backwards: int = 0
    notes: list[str] = field(default_factory=list)

    def forward(self, prompts: Prompts, rows: Sequence[int]) -> None:
        """Note a pass over these prompts."""
        self.cost += self.cost_model.whole(prompts, rows, 1)

    def backward(self, prompts: Prompts, rows: Sequence[int]) -> None:
        """Note a way back through it: a product with each matrix again, as parameters are asked for no gradient."""
        self.backwards += 1
        self.cost += Cost(flops=self.cost_model.whole(prompts, rows, 1).flops)


@contextmanager
def differentiable(model: engine.Model) -> Iterator[None]:
    """Gradients of values only: those of parameters are switched off meanwhile, as they cost memory."""
    flags = [(parameter, parameter.requires_grad) for parameter in unwrap(model).parameters()]
    with torch.inference_mode(False), torch.enable_grad():
        try:
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


def gradient_run(
    model: engine.Model,
    plan: Plan,
    rows: Sequence[int],
    paths: Sequence[Path],
    *,
    clean: bool = False,
    mixed: InterpolatedInput | None = None,
    tied: bool = True,
) -> GradientRun:
    """Run these prompts and keep the values of these sites.

    Args:
        clean: the plan's clean prompts, not the corrupted ones; the logits are of no use then.
        mixed: the input of the first layer that replaces the run's own.
        tied: keep what gradients need; without it, only values.
    """
    prompts = plan.clean if clean else plan.corrupted
    assert prompts is not None
    known = engine.map_of(model)
    wanted = {value_key(site_of(path)): host(path.place) for path in paths}
    if mixed is not None:
        wanted[value_key(site_of(mixed.place))] = mixed.place
    stops = accesses(model, sorted(wanted.values(), key=known.rank))
    inputs = prompts.inputs(rows, model.device)
    assert isinstance(inputs, Mapping)
    at = read_at(plan, rows[0], clean=clean)
    kept = only_read(model, at, wanted.values())
    tensors: dict[ValueKey, Tensor] = {}
    values: dict[ValueKey, Tensor] = {}
    found: list[Tensor] = []

    def body() -> None:
        mediator = engine.worker(model, "ns.attribute")
        for access in stops:
            key = value_key(site_of(access.paths[0]))
            raw = access.place.read(mediator)
            inner = engine.first_input(raw) if access.place.end == "input" else raw
            tensor = wire.unpack(inner, access.item)
            if mixed is not None and access.paths[0] == mixed.place:
                tensor = mixed.value.to(tensor).reshape(tensor.shape)
            if tensor.shape[0] == 1 < len(rows) and tensor.dim() == 3:
                raise RefusedPlace(
                    "all prompts of a batch share this value, so it has no gradient of one of them",
                    path=access.name,
                    expected="a site with rows of its own",
                )
            if tied and not tensor.requires_grad and tensor.is_floating_point():
                tensor.requires_grad_()  # the first value of the run: what comes after it is tied to it
            tensors[key] = tensor
            values[key] = wire.as_rows(tensor.detach().clone(), len(rows), site_of(access.paths[0]).columns is not None)
            check_length(access, values[key], prompts.lengths(access.tower)[rows[0]])
            if access.kind != "stream" and (tied or mixed is not None):
                # The run goes on with a copy, because some blocks add to the very tensor that a branch gave them.
                packed = wire.repack(inner, access.item, tensor.clone())
                whole = engine.with_first_input(raw, packed) if access.place.end == "input" else packed
                access.place.write(mediator, whole)
        found.append(wire.logits_of(model))

    with torch.set_grad_enabled(tied):
        engine.run(model, {**inputs, **kept}, body)
        return GradientRun(tuple(rows), tensors, values, found[0][:, at])


def measured(plan: Plan, one: GradientRun, clean_logits: Tensor | None) -> Tensor:
    """The metric of each row, tied to the run.

    Raises:
        BadArgument: it has no gradient.
    """
    value = plan.metric(one.logits, one.rows, clean_logits)
    if not value.requires_grad or not value.is_floating_point():
        raise BadArgument(
            f"{plan.metric.metric.name} has no gradient: it does not move when the logits move a little",
            expected="a smooth metric, such as ns.logit_diff or ns.log_probability",
        )
    return value


def pulled(metric: Tensor, tensors: Sequence[Tensor], *, again: bool) -> list[Tensor | None]:
    """The gradient of each row's metric at each tensor; None where the metric does not depend on it.

    Rows do not mix, so the gradient of their sum is that of each.
    """
    usable = [tensor for tensor in tensors if tensor.requires_grad]
    found = iter(torch.autograd.grad(metric.sum(), usable, retain_graph=again, allow_unused=True) if usable else ())
    return [next(found) if tensor.requires_grad else None for tensor in tensors]


def batches(model: engine.Model, prompts: Prompts, wanted: Sequence[int], room: int) -> Iterator[list[int]]:
    """These prompts in batches of one length, at most so many tokens at once."""
    among = set(wanted)
    for group in prompts.batches(model):
        rows = [row for row in group if row in among]
        step = max(room // max(prompts.length("encoder", group[0]), 1), 1)
        yield from (rows[start : start + step] for start in range(0, len(rows), step))


def halving(batch: list[int], work: Callable[[list[int]], Any]) -> None:
    """Do the work for a batch, in halves where memory does not hold it whole."""
    try:
        work(batch)
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        if len(batch) == 1 or not engine.is_out_of_memory(error):
            raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        middle = len(batch) // 2
        halving(batch[:middle], work)
        halving(batch[middle:], work)
