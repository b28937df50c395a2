"""`fit`: tuned lenses by training, Jacobian lenses as mean derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nnsplice import engine, wire
from nnsplice.activations.access import site_of
from nnsplice.activations.prompts import Prompts, PromptsLike
from nnsplice.atlas import Site, unwrap
from nnsplice.attribution.gradients import batches, differentiable
from nnsplice.errors import BadArgument, RefusedPlace, circumstances
from nnsplice.lens.fitted import FittedLens, LensKind, detached_copy
from nnsplice.lens.runs import decoder_of, last_of, lens_run, prompts_of
from nnsplice.lens.tail import Tail
from nnsplice.metrics import divergence
from nnsplice.progress import bar
from nnsplice.sweeps.identity import model_record
from nnsplice.sweeps.running import check_mode


def fit(
    model: Any,
    prompts: PromptsLike,
    kind: LensKind = "tuned",
    layers: Sequence[int] | None = None,
    *,
    steps: int = 250,
    rate: float = 1e-3,
    batch: int = 256,
    held_out: float = 0.2,
    chunk: int = 16,
    max_tokens: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> FittedLens:
    """Fit a lens: an affine map from each layer's states to states of the last layer.

    `"tuned"`: the map is trained to minimise the KL divergence from the model's own distribution to that of the mapped
    state; `held_out()` has the KL on held-out prompts by layer, beside that of the logit lens. `"jacobian"`: the mean
    derivative of the last layer's states with respect to a layer's, over all pairs of a token and itself or a later
    one; no training.

    >>> prompts = [f"w{n} w{n + 1} w{n + 2} w{n}" for n in range(3, 13)]
    >>> tuned = ns.lens.fit(model, prompts, steps=50, progress=False)
    >>> tuned.held_out().columns.tolist()
    ['layer', 'kl', 'logit_lens']

    Args:
        model: a model from `ns.load`, in eval mode.
        prompts: texts like those that the lens will be used on; all their tokens count.
        kind: `"tuned"` or `"jacobian"`.
        layers: the layers whose outputs are mapped; all of them if left out.
        steps: the number of training steps for each layer.
        rate: the learning rate at the first step; it falls linearly to 0.
        batch: how many tokens are drawn for each step.
        held_out: the share of the prompts that a tuned lens is not trained on.
        chunk: how many rows of a Jacobian are computed at once, as rows of a batch.
        max_tokens: how many tokens run at once.
        seed: the seed of the held-out prompts and of the tokens that each step draws.
        progress: show a bar.

    Returns:
        The lens, with an affine map for each layer.

    Raises:
        BadArgument: a model in train mode or with edits of nnsight, an unknown `kind` or layer, a number below 1, or a
            tuned lens with no prompt to train on or none held out.
        RefusedPlace: a model that the logit lens refuses, or for Jacobians one that is not causal.
    """
    model = engine.as_model(model)
    with circumstances("ns.lens.fit"):
        engine.refuse_edits(model)
        engine.refuse_changed_logits(model)
        check_mode(model)
        if kind not in ("tuned", "jacobian"):
            raise BadArgument(f"kind={kind!r}", expected='"tuned" or "jacobian"')
        for name, number in (("steps", steps), ("batch", batch), ("chunk", chunk)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise BadArgument(f"{name}={number!r}", expected="a whole number, at least 1")
        given = prompts_of(model, prompts)
        tower = decoder_of(model)
        chosen = range(tower.n_layers) if layers is None else sorted(set(layers))
        places = engine.expand(model, "layers[:].output")
        if not all(0 <= n < tower.n_layers for n in chosen) or not chosen:
            raise BadArgument(f"layers={layers!r}", expected=f"numbers from 0 to {tower.n_layers - 1}")
        from nnsplice import closures

        closures.require(model, places)
        job = _FitJob(model, given, tuple(chosen), tuple(site_of(places[n]) for n in chosen))
        at_once = engine.tokens_at_once(model, max_tokens)
        if kind == "jacobian":
            matrices, measured = _jacobians(job, at_once, chunk, progress)
            biases = torch.zeros(matrices.shape[:2], dtype=matrices.dtype)
        else:
            matrices, biases, measured = _tuned(job, at_once, steps, rate, batch, held_out, seed, progress)
    about = {
        **model_record(model), "prompts": len(given), "tokens": sum(map(len, given.ids)), **measured,
    }  # fmt: skip
    return FittedLens(kind, job.layers, detached_copy(matrices), detached_copy(biases), about)


@dataclass(frozen=True)
class _FitJob:
    """The model, prompts and sites of a fit."""

    model: engine.Model
    prompts: Prompts
    layers: tuple[int, ...]
    sites: tuple[Site, ...]


# --- tuned ------------------------------------------------------------------------------------------------------------


def _tuned(
    job: _FitJob, at_once: int, steps: int, rate: float, batch: int, held_out: float, seed: int, progress: bool
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(job.prompts), generator=generator).tolist()
    kept = round(len(order) * held_out)
    if not 0 < kept < len(order):
        raise BadArgument(
            f"held_out={held_out} of {len(order)} prompts are {kept}, and some have to be trained on and some not",
            expected="more prompts, or another share",
        )
    tail, test = _states(job, order[:kept], at_once)
    _, train = _states(job, order[kept:], at_once)
    tokens, width = train[0].shape
    matrices = torch.eye(width).repeat(len(job.layers), 1, 1).to(train[0])
    biases = torch.zeros(len(job.layers), width).to(train[0])
    with bar("tuned lens", steps * len(job.layers), "step", progress) as shown, differentiable(job.model):
        for number, states in enumerate(train[:-1]):
            change, bias = torch.zeros_like(matrices[0], requires_grad=True), biases[number].clone().requires_grad_()
            optimiser = torch.optim.Adam([change, bias], lr=rate)
            schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, steps)
            for _ in range(steps):
                sampled = torch.randint(tokens, (min(batch, tokens),), generator=generator).to(states.device)
                here = states[sampled]
                target = _logits(tail, train[-1][sampled]).detach()
                loss = divergence(target, _logits(tail, here + here @ change.T + bias))
                optimiser.zero_grad()
                change.grad, bias.grad = torch.autograd.grad(loss.mean(), [change, bias])
                optimiser.step()
                schedule.step()
                shown.update(1)
            with torch.no_grad():
                matrices[number] += change
                biases[number] = bias
    plain = [_kl(tail, test[-1], states) for states in test[:-1]]
    found = [
        _kl(tail, test[-1], states @ matrix.T + bias)
        for states, matrix, bias in zip(test[:-1], matrices, biases, strict=True)
    ]
    measured = {"kl": found, "logit_lens": plain, "steps": steps, "rate": rate, "batch": batch, "seed": seed}
    return matrices, biases, {**measured, "held_out": kept}


def _logits(tail: Tail, states: Tensor) -> Tensor:
    return tail.head.logits_of_normed(tail.head.normed(states))


@torch.no_grad()
def _kl(tail: Tail, last: Tensor, states: Tensor) -> float:
    """The mean over tokens of the KL from the model's distribution to that of `states`, `[token, width]` as `last`."""
    total = 0.0
    for rows, logits in tail.each(states):
        total += float(divergence(tail.logits(last[rows]), logits).double().sum())
    return total / len(states)


def _states(job: _FitJob, prompts: Sequence[int], at_once: int) -> tuple[Tail, list[Tensor]]:
    """The states `[token, width]` of each fitted layer and of the last layer, over all tokens of some prompts."""
    end = last_of(decoder_of(job.model))
    found: list[list[Tensor]] = []
    tail: Tail | None = None
    for rows in batches(job.model, job.prompts, prompts, at_once):
        run = lens_run(job.model, job.prompts, rows, [*job.sites, end])
        tail = tail or Tail.of(job.model, run)
        found.append([run.values[site].flatten(0, 1) for site in (*job.sites, end)])
    assert tail is not None
    return tail, [torch.cat(column) for column in zip(*found, strict=True)]


# --- jacobian ---------------------------------------------------------------------------------------------------------


def _jacobians(job: _FitJob, at_once: int, chunk: int, progress: bool) -> tuple[Tensor, dict[str, Any]]:
    if not engine.is_causal(job.model):
        raise RefusedPlace("a Jacobian lens is a mean over later tokens, and this model does not read forwards alone")
    end = last_of(decoder_of(job.model))
    # The model's norm and head have to reproduce its logits, as for the logit lens.
    first = next(batches(job.model, job.prompts, range(len(job.prompts)), at_once))
    Tail.of(job.model, lens_run(job.model, job.prompts, first, [end]))
    total: Tensor | None = None
    pairs = 0
    with bar("jacobians", len(job.prompts), "prompt", progress) as shown, differentiable(job.model):
        for row in range(len(job.prompts)):
            length = job.prompts.lengths("decoder")[row]
            found = _jacobian(job, row, end, chunk)
            total = found if total is None else total + found
            pairs += length * (length + 1) // 2
            shown.update(1)
    assert total is not None
    return total / pairs, {"pairs": pairs}


def _jacobian(job: _FitJob, row: int, end: Site, chunk: int) -> Tensor:
    """`[layer, width, width]`: the derivatives, summed over all pairs of a token and itself or a later one."""
    root = unwrap(job.model)
    rows: list[Tensor] = []
    width = start = 0
    while start == 0 or start < width:
        inputs = job.prompts.inputs([row] * chunk, job.model.device)
        assert isinstance(inputs, Mapping)
        with _in_graph(root, [*job.sites, end]) as seen, engine.locked(job.model):
            root(**{**inputs, "use_cache": False})
        last = seen[end]
        width = last.shape[-1]
        numbers = torch.arange(start, min(start + chunk, width), device=last.device)
        # Row n of the batch gives the derivative of number n of the last state, summed over tokens: a state depends on
        # its own and earlier tokens only, so the sum is over the pairs that are counted.
        chosen = last.reshape(chunk, -1, width)[torch.arange(len(numbers), device=last.device), :, numbers].sum()
        found = torch.autograd.grad(chosen, [seen[site] for site in job.sites], allow_unused=True)
        rows.append(
            torch.stack(
                [
                    torch.zeros(len(numbers), width, dtype=last.dtype, device=last.device)
                    if one is None
                    else one.reshape(chunk, -1, width)[: len(numbers)].sum(1)
                    for one in found
                ]
            ).cpu()
        )
        start += chunk
    return torch.cat(rows, 1)


@contextmanager
def _in_graph(root: Any, sites: Sequence[Site]) -> Iterator[dict[Site, Tensor]]:
    """The values of a run in its autograd graph; the first site that is reached becomes the leaf."""
    seen: dict[Site, Tensor] = {}

    def hook(site: Site) -> Callable[..., Any]:
        visits: list[None] = []

        def after(_module: Any, _args: Any, out: Any) -> Any:
            visits.append(None)
            if len(visits) != site.occurrence + 1:
                return None
            value = wire.unpack(out, site.item)
            if not value.requires_grad:
                value = value.detach().requires_grad_()
            # A copy, as some blocks add into their input in place.
            seen[site] = value.clone() if not value.is_leaf else value
            return wire.repack(out, site.item, seen[site])

        return after

    with ExitStack() as stack:
        for site in dict.fromkeys(sites):
            handle = root.get_submodule(site.module).register_forward_hook(hook(site))
            stack.callback(handle.remove)
        yield seen
