"""The values of senders outside a circuit: of another run, zero, means, given or trained."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from nnsplice import engine
from nnsplice.activations.prompts import Prompts
from nnsplice.activations.saved_activation import SavedActivation
from nnsplice.atlas import unwrap
from nnsplice.circuits.constants import OptimalAblation
from nnsplice.circuits.recording import SenderValues, record
from nnsplice.circuits.wiring import Wiring
from nnsplice.digests import digest_of
from nnsplice.errors import BadArgument, BadType, KeyMismatch, ShapeError, UnknownPath, named
from nnsplice.packed.cost import Cost, CostModel
from nnsplice.paths import Path, parse_path

Ablation = Literal["patch", "zero", "mean", "optimal"] | SavedActivation | OptimalAblation
_EXPECTED = '"patch", "zero", "mean", "optimal", a SavedActivation or an OptimalAblation'


@dataclass(frozen=True)
class AblationSource:
    """The source of ablated values."""

    #: `(numbers of prompts of one length, their clean values)` -> the ablated values, and their cost.
    values: Callable[[Sequence[int], SenderValues], tuple[SenderValues, Cost]]
    #: Whether they are those of one run, so that a sender which reads nothing but ablated values has its own.
    is_run: bool
    #: The identity, as plain data.
    identity: object
    #: Where values are to be trained for each circuit: the prompts of the means that this begins at.
    trained_from: Prompts | None = None
    #: Whether it has values of single experts.
    has_experts: bool = True


def source_of(
    model: engine.Model,
    wiring: Wiring,
    clean: Prompts,
    corrupted: Prompts | None,
    ablation: Ablation,
    reference: Prompts | None,
    max_tokens: int | None = None,
) -> AblationSource:
    """The source of the values of an ablation.

    Args:
        max_tokens: how many tokens of a mean's prompts run at once; what suits the device, if left out.
    """
    if reference is not None and ablation not in ("mean", "optimal"):
        raise BadArgument(
            'only ablation="mean" and "optimal" take a reference', expected='ablation="mean", or no reference'
        )
    if isinstance(ablation, OptimalAblation):
        _check_weights(model, ablation)
        return _saved(model, wiring, clean, ablation.values)
    if isinstance(ablation, SavedActivation):
        return _saved(model, wiring, clean, ablation)
    if ablation == "patch":
        if corrupted is None:
            raise BadArgument(
                'ablation="patch" takes its values from the corrupted run, and corrupted is None',
                expected="corrupted prompts",
                write='ablation="mean" or ablation="zero", which need none',
            )
        return AblationSource(
            lambda rows, own: _run(model, wiring, corrupted, rows, own.experts), is_run=True, identity="patch"
        )
    if ablation == "zero":
        return AblationSource(lambda rows, own: (own.map(torch.zeros_like), Cost()), is_run=False, identity="zero")
    if ablation in ("mean", "optimal"):
        begin = reference or corrupted or clean
        mean = _mean(model, wiring, begin, max_tokens)
        if ablation == "mean":
            return mean
        return replace(mean, identity={"optimal": mean.identity}, trained_from=begin)
    if isinstance(ablation, str):
        raise BadArgument(f"there is no ablation {ablation!r}", expected=_EXPECTED)
    raise BadType(f"{named(ablation)} is no ablation", expected=_EXPECTED)


def refuse_training(ablation: object, who: str) -> None:
    """Raise where constants would be trained anew for each of very many circuits."""
    if isinstance(ablation, str) and ablation == "optimal":
        raise BadArgument(
            f'{who} runs very many circuits, and ablation="optimal" would train constants for each of them',
            expected="constants that are trained once",
            write="ablation=ns.optimal_ablation(model, circuit, clean, corrupted)",
        )


def _check_weights(model: engine.Model, ablation: OptimalAblation) -> None:
    weights = ablation.provenance.get("weights")
    if weights is not None and weights != engine.weights_digest(model):
        raise KeyMismatch(
            f"this ablation was trained on {ablation.provenance.get('model')} with other weights than this model has",
            expected="the model that it was trained on",
            write="ablation.values   (takes its numbers as they are)",
        )


def _run(
    model: engine.Model, wiring: Wiring, prompts: Prompts, rows: Sequence[int], experts: Collection[tuple[int, int]]
) -> tuple[SenderValues, Cost]:
    made = record(unwrap(model), model, wiring, prompts, rows, -1, experts)
    return made.values, CostModel.of(model).whole(prompts, rows, 1)


def mean_of(
    model: engine.Model,
    wiring: Wiring,
    reference: Prompts,
    experts: Collection[tuple[int, int]] = (),
    max_tokens: int | None = None,
) -> tuple[SenderValues, Cost]:
    """The mean over the tokens of each prompt, and then over prompts: one vector for each site."""
    sums: list[SenderValues] = []
    cost = Cost()
    room = max(engine.tokens_at_once(model, max_tokens) // max(reference.lengths("decoder")), 1)
    for rows in reference.batches(model, at_most=room):
        values, more = _run(model, wiring, reference, rows, experts)
        sums.append(values.map(lambda t: t.double().mean(1).sum(0) / len(reference)))
        cost += more
    whole = SenderValues(
        sum((one.embed for one in sums[1:]), sums[0].embed),
        tuple(torch.stack(parts).sum(0) for parts in zip(*(one.z for one in sums), strict=True)),
        tuple(torch.stack(parts).sum(0) for parts in zip(*(one.mlp for one in sums), strict=True)),
        {key: torch.stack([one.experts[key] for one in sums]).sum(0) for key in experts},
    )
    return whole, cost


def _mean(model: engine.Model, wiring: Wiring, reference: Prompts, max_tokens: int | None) -> AblationSource:
    """The mean, the same at every token."""
    known: dict[frozenset[tuple[int, int]], SenderValues] = {}

    def values(rows: Sequence[int], own: SenderValues) -> tuple[SenderValues, Cost]:
        cost, experts = Cost(), frozenset(own.experts)
        if experts not in known:
            known[experts], cost = mean_of(model, wiring, reference, experts, max_tokens)
        return at_every_token(known[experts], own), cost

    return AblationSource(values, is_run=False, identity={"mean": [list(row) for row in reference.ids]})


def at_every_token(values: SenderValues, own: SenderValues) -> SenderValues:
    """One vector of each site, at every token."""

    def expanded(value: Tensor, like: Tensor) -> Tensor:
        return value.to(like).expand_as(like)

    return SenderValues(
        expanded(values.embed, own.embed),
        tuple(map(expanded, values.z, own.z)),
        tuple(map(expanded, values.mlp, own.mlp)),
        {key: expanded(value, own.experts[key]) for key, value in values.experts.items()},
    )


def _saved(model: engine.Model, wiring: Wiring, clean: Prompts, saved: SavedActivation) -> AblationSource:
    saved = saved._located(model)
    lengths = clean.lengths("decoder")

    def held(place: Path, width: int) -> Tensor:
        """`[prompt or 1, token or 1, width]`."""
        try:
            value = saved.get(place)
        except UnknownPath:
            raise UnknownPath(
                f"the ablation holds no value of {place}",
                expected="a value for embed.output and for every head and MLP",
                write='ns.capture(model, prompts, ["embed.output[:]", "layers[:].heads[:].output[:]", '
                '"layers[:].mlp.output[:]"])',
            ) from None
        value = value if value.dim() == 3 else value[:, None]
        if value.shape[-1] != width or value.shape[0] not in (1, len(clean)):
            raise ShapeError(
                f"the ablation has {list(value.shape)} for {place}",
                expected=f"[{len(clean)} or 1, token or 1, {width}]",
                write='saved.mean("prompt")   (one value for all prompts)',
            )
        if value.shape[1] != 1 and {value.shape[1]} != set(lengths):
            raise ShapeError(
                f"the ablation has {value.shape[1]} tokens for {place}, and the prompts have {sorted(set(lengths))}",
                expected="a value for each token of prompts of one length, or one for all",
                write='saved.mean("position")',
            )
        return value

    def values(rows: Sequence[int], own: SenderValues) -> tuple[SenderValues, Cost]:
        def of(place: Path, like: Tensor, width: int) -> Tensor:
            value = held(place, width).to(like)
            chosen = value if value.shape[0] == 1 else value[list(rows)]
            return chosen.expand(len(rows), like.shape[1], -1)

        z: list[Tensor] = []
        mlp: list[Tensor] = []
        for number, layer in enumerate(wiring.layers):
            made = own.z[number].clone()
            for head, site in enumerate(layer.z):
                start, stop = site.columns or (0, 0)
                place = _expanded(model, f"layers[{number}].heads[{head}].output")
                made[..., start:stop] = of(place, made, stop - start)
            z.append(made)
            place = _expanded(model, f"layers[{number}].mlp.output")
            mlp.append(of(place, own.mlp[number], own.mlp[number].shape[-1]))
        return SenderValues(of(wiring.embed, own.embed, own.embed.shape[-1]), tuple(z), tuple(mlp)), Cost()

    return AblationSource(
        values, is_run=False, identity={"saved": digest_of({str(k): v for k, v in saved.items()})}, has_experts=False
    )


def _expanded(model: engine.Model, text: str) -> Path:
    (path,) = engine.expand(model, parse_path(text))
    return path
