"""`atp` and `ig`: linear estimates for cells, difference times gradient."""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from nnsplice import engine
from nnsplice.activations import features
from nnsplice.activations.access import site_of
from nnsplice.attribution.gradients import (
    GradientCost,
    GradientRun,
    InterpolatedInput,
    ValueKey,
    gradient_run,
    measured,
    pulled,
    value_key,
)
from nnsplice.packed.indices import on_device
from nnsplice.paths import Path
from nnsplice.sweeps.plan import Plan

#: The clean values: for each value of the run `[row, token, width]`, padded on the right.
CleanValues = Mapping[ValueKey, Tensor]
Gradients = dict[ValueKey, Tensor | None]


@dataclass(frozen=True)
class SiteEntries:
    """The request for one site: rows of the batch, their tokens in both runs, and their cells."""

    place: Path
    cells: Tensor
    rows: Tensor
    tokens: Tensor
    clean_tokens: Tensor


def entries_of(plan: Plan, rows: Sequence[int]) -> list[SiteEntries]:
    """The requests of the plan's jobs for each site, for these prompts."""
    number = {prompt: row for row, prompt in enumerate(rows)}
    found: dict[Path, list[tuple[int, int, int, int]]] = {}
    for prompt, cell in plan.jobs:
        if prompt not in number:
            continue
        for part in plan.targets[cell].parts:
            here, there = plan.positions(part, prompt), plan.positions(part, prompt, of_clean=True)
            for place in part.places:
                found.setdefault(place.place, []).extend(
                    (cell, number[prompt], a, b) for a, b in zip(here, there, strict=True)
                )
    return [SiteEntries(place, *torch.tensor(entries).T.contiguous().unbind(0)) for place, entries in found.items()]


@dataclass(frozen=True)
class AttributionBatch:
    """Prompts of one length, with their clean values and the requested sites."""

    model: engine.Model
    plan: Plan
    rows: tuple[int, ...]
    wanted: Sequence[SiteEntries]
    #: The clean run at every requested site, and its logits where the metric reads, `[row, vocab]`.
    clean: CleanValues
    clean_logits: Tensor
    #: Where the stream enters the first layer.
    entry: Path
    #: How many gradients are taken on the way from one run to the other; 0 for one, in the corrupted run.
    steps: int
    spent: GradientCost
    #: Device -> the tokens of `wanted`, sent there.
    sent: dict[torch.device, list[Tensor]] = field(default_factory=dict)

    def tokens_on(self, device: torch.device) -> list[Tensor]:
        """For each site that is wanted, on a device: `[3, number]`, its rows, tokens and tokens of the clean run.

        They go there in one copy, that nobody waits for: there are as many sites as heads.
        """
        if device not in self.sent:
            each = [torch.stack([one.rows, one.tokens, one.clean_tokens]) for one in self.wanted]
            together = on_device(torch.cat(each, 1).numpy(), device)
            self.sent[device] = list(together.split([part.shape[1] for part in each], 1))
        return self.sent[device]

    @property
    def paths(self) -> list[Path]:
        """The requested sites."""
        return [one.place for one in self.wanted]

    def run(self, paths: Sequence[Path], *, mixed: InterpolatedInput | None = None, tied: bool = True) -> GradientRun:
        """The corrupted prompts, or a point on their way to the clean ones."""
        self.spent.forward(self.plan.corrupted, self.rows)
        return gradient_run(self.model, self.plan, self.rows, paths, mixed=mixed, tied=tied)

    def metric(self, one: GradientRun) -> Tensor:
        """The metric of each row of a run, tied to it."""
        return measured(self.plan, one, self.clean_logits if self.plan.metric.metric.compares else None)

    def pulled(
        self, metric: Tensor, one: GradientRun, value_keys: Iterable[ValueKey], *, again: bool = False
    ) -> Gradients:
        """The metric's gradients at values of a run."""
        self.spent.backward(self.plan.corrupted, self.rows)
        names = list(value_keys)
        found = pulled(metric, [one.tensors[name] for name in names], again=again)
        return dict(zip(names, found, strict=True))


def clean_run(
    model: engine.Model, plan: Plan, rows: Sequence[int], paths: Sequence[Path], spent: GradientCost
) -> tuple[CleanValues, Tensor]:
    """The clean prompts' values and the logits that the metric reads; their lengths may differ."""
    assert plan.clean is not None
    groups: dict[object, list[int]] = {}
    for row in rows:
        groups.setdefault(plan.clean.shape(row), []).append(row)
    for members in groups.values():
        spent.forward(plan.clean, members)
    flows = [gradient_run(model, plan, members, paths, clean=True, tied=False) for members in groups.values()]
    if len(flows) == 1:
        return flows[0].values, flows[0].logits
    order = torch.tensor([list(rows).index(row) for one in flows for row in one.rows]).argsort()
    values: dict[ValueKey, Tensor] = {}
    for key in flows[0].values:
        lines = [line for one in flows for line in one.values[key]]
        values[key] = torch.nn.utils.rnn.pad_sequence([lines[n] for n in order], batch_first=True)
    return values, torch.cat([one.logits for one in flows])[order]


# --- atp and ig -------------------------------------------------------------------------------------------------------


def points(batch: AttributionBatch, before: Tensor, after: Tensor) -> Iterator[tuple[float, InterpolatedInput]]:
    """The points on the straight path between two embeddings at which gradients are taken, and their weights.

    Those of Gauss and Legendre: for so many gradients no others integrate more polynomials exactly.
    """
    at, weights = np.polynomial.legendre.leggauss(batch.steps)
    for x, weight in zip((at + 1) / 2, weights / 2, strict=True):
        yield float(weight), InterpolatedInput(batch.entry, before + (after - before) * float(x))


def at_corrupted(batch: AttributionBatch) -> tuple[GradientRun, Tensor]:
    """`atp`: the gradient at the corrupted run."""
    here = batch.run(batch.paths)
    gradients = batch.pulled(batch.metric(here), here, here.tensors)
    return here, lined_up(batch, here, gradients)


def along_the_way(batch: AttributionBatch) -> tuple[GradientRun, Tensor]:
    """`ig`: the mean gradient while the embeddings go from the corrupted to the clean prompt."""
    here = batch.run([*batch.paths, batch.entry], tied=False)
    entry = value_key(site_of(batch.entry))
    mean: Gradients = {}
    # The gradient by a feature of an SAE that scales its inputs has the scale of the point.
    scaled, parts = scaled_features(batch), FeatureDifferences(batch, here)
    scores = torch.zeros(len(here.rows), len(batch.plan.targets), dtype=torch.float64)
    for weight, mixed in points(batch, here.values[entry], batch.clean[entry]):
        one = batch.run(batch.paths, mixed=mixed)
        gradients = batch.pulled(batch.metric(one), one, one.tensors)
        if scaled:
            others = set(batch.paths) - scaled
            scores += weight * lined_up(batch, here, gradients, skip=others, parts=parts, scaled_at=one)
        for key, gradient in gradients.items():
            so_far = mean.get(key)
            if gradient is not None:
                mean[key] = gradient * weight if so_far is None else so_far + gradient * weight
    return here, scores + lined_up(batch, here, mean, skip=scaled, parts=parts)


def scaled_features(batch: AttributionBatch) -> set[Path]:
    """The sites that are features of SAEs which scale their inputs."""
    return {
        path for path in batch.paths
        if site_of(path).kind == "feature" and features.sae_of(batch.model, path).identity["norm"] != "none"
    }  # fmt: skip


def lined_up(
    batch: AttributionBatch,
    here: GradientRun,
    gradients: Gradients,
    skip: Container[Path] = (),
    *,
    parts: FeatureDifferences | None = None,
    scaled_at: GradientRun | None = None,
) -> Tensor:
    """`[row, cell]`: each cell's difference between the two runs times these gradients.

    Args:
        skip: sites whose cells are left at 0.
        parts: the features and errors of these runs.
        scaled_at: the run whose values say how large features are where an SAE scales its inputs; `here` by itself.
    """
    scores = torch.zeros(len(here.rows), len(batch.plan.targets), dtype=torch.float64)
    parts = FeatureDifferences(batch, here) if parts is None else parts
    found: list[tuple[SiteEntries, Tensor]] = []
    for number, one in enumerate(batch.wanted):
        site = site_of(one.place)
        gradient = gradients.get(value_key(site))
        if gradient is None or one.place in skip:
            continue
        columns = slice(*(site.columns or (0, None)))
        values = here.values[value_key(site)]
        # To where the layer is, whose values may lie on a device of their own.
        rows, tokens, clean_tokens = batch.tokens_on(values.device)[number]
        along = gradient.reshape(values.shape)[rows, tokens, columns].double()
        if one.place.sae is not None:
            moved = parts.of(one, here if scaled_at is None else scaled_at)
        else:
            clean, here_ = batch.clean[value_key(site)][rows, clean_tokens, columns], values[rows, tokens, columns]
            moved = clean.double() - here_.double()
        found.append((one, (moved * along).sum(-1)))
    for (one, _), worth in zip(found, on_host([worth for _, worth in found]), strict=True):
        scores.index_put_((one.rows, one.cells), worth, accumulate=True)
    return scores


def on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of one dtype on the host, with one wait for each device that they are on."""
    there: dict[torch.device, list[int]] = {}
    for number, tensor in enumerate(tensors):
        there.setdefault(tensor.device, []).append(number)
    found = list(tensors)
    for numbers in there.values():
        together = torch.cat([tensors[number].flatten() for number in numbers]).cpu()
        parts = together.split([tensors[number].numel() for number in numbers])
        for number, part in zip(numbers, parts, strict=True):
            found[number] = part.view(tensors[number].shape)
    return found


class FeatureDifferences:
    """The change of a site when features, or the error, are patched and its other parts are kept."""

    def __init__(self, batch: AttributionBatch, here: GradientRun) -> None:
        self._batch, self._here = batch, here
        #: All features, or the error, of a value of the clean run and of this one: `[row, token, ...]`.
        self._known: dict[Hashable, tuple[Tensor, Tensor]] = {}

    def of(self, one: SiteEntries, scaled_at: GradientRun) -> Tensor:
        """`[wanted, width]`

        Args:
            scaled_at: the run whose values say how large a feature is where the SAE scales its inputs.
        """
        site = site_of(one.place)
        sae, at = features.sae_of(self._batch.model, one.place), value_key(site)
        here, clean = self._here.values[at].double(), self._batch.clean[at].double()
        if (at, site.sae, site.kind) not in self._known:
            read = sae.error if site.kind == "error" else sae.encode
            self._known[at, site.sae, site.kind] = read(clean), read(here)
        there, now = self._known[at, site.sae, site.kind]
        rows, tokens, clean_tokens = (at_.to(now.device) for at_ in (one.rows, one.tokens, one.clean_tokens))
        part = slice(None) if site.index is None else slice(site.index, site.index + 1)
        difference = there[rows, clean_tokens, part] - now[rows, tokens, part]
        return features.moved(sae, site, difference, scaled_at.values[at].double()[rows, tokens])


def places_of(plan: Plan) -> list[Path]:
    """Every site that a job of the plan changes."""
    return list(dict.fromkeys(place.place for _, cell in plan.jobs for place in plan.targets[cell].places))
