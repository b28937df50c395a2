"""Prompts with images: the same numbers as plain hooks see, by every executor, and other numbers for another image."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import torch
from torch import Tensor

import nnsplice as ns
from activations.oracle import run, values
from families.images import FIRST, PIECES, with_image
from families.subject import Finding, Subject, gap, site_of
from families.values_of import Served

_SITES = 12
Inputs = dict[str, Tensor]


def _along(logits: Tensor) -> Tensor:
    """Where logits point, along a fixed direction of all of them."""
    generator = torch.Generator().manual_seed(5)
    direction = torch.randn(logits.shape[-1], generator=generator, dtype=torch.float64)
    return logits.double() @ (direction / direction.norm())


def judge_images(subject: Subject, served: dict[str, Served]) -> str:
    """Judge them; which executor ran a sweep."""
    places = [place for one in served.values() if not one.derived for place in one.values]
    places = [place for place in places if str(place) not in ("unembed.output", "final_norm.output")]
    clean = [with_image(subject.name, subject.ids, 1), with_image(subject.name, subject.other, 2)]
    corrupted = [with_image(subject.name, subject.ids, 3), with_image(subject.name, subject.other, 4)]
    with subject.check("images: capture"):
        _captures(subject, places, clean)
    with subject.check("images: replay"):
        _replay(subject, places, clean[0], corrupted[0])
    with subject.check("images: gradients"):
        _gradients(subject, clean[0], corrupted[0])
    return _sweeps(subject, places, clean, corrupted)


def _captures(subject: Subject, places: list[ns.Path], given: list[Inputs]) -> None:
    """Each prompt by itself, then both as one batch that a processor made of them."""
    texts = [f'{place}["image"]' for place in places]
    both = {name: torch.cat([one[name] for one in given]) for name in given[0]}
    saved, alone = ns.capture(subject.model, both, texts), ns.capture(subject.model, given, texts)
    for row, inputs in enumerate(given):
        seen = values(subject.bare, inputs, [site_of(place) for place in places])
        for captured in (saved, alone):
            of = [captured.get(text)[row] for text in texts]
            expected = [seen[site_of(place)][0, FIRST : FIRST + PIECES] for place in places]
            subject.found("images: capture", max(gap(a, b) for a, b in zip(of, expected, strict=True)))
    other = ns.capture(subject.model, with_image(subject.name, subject.ids, 9), texts)
    same = [text for text in texts if torch.equal(other.get(text)[0], saved.get(text)[0])]
    subject.claim("images: another image", not same, f"the same in {', '.join(same)}")


def _replay(subject: Subject, places: list[ns.Path], clean: Inputs, corrupted: Inputs) -> None:
    """All tokens of the image, written into a run with another image."""
    place = next(one for one in places if str(one) == "layers[1].output")
    (value,) = values(subject.bare, clean, [site_of(place)]).values()

    def edit(stream: Tensor) -> Tensor:
        stream[:, FIRST : FIRST + PIECES] = value[:, FIRST : FIRST + PIECES]
        return stream

    expected = run(subject.bare, corrupted, {site_of(place): edit})
    found = ns.patched_logits(subject.model, corrupted, ns.capture(subject.model, clean, f'{place}["image"]'))
    subject.found("images: replay", gap(found, expected))
    subject.claim("images: the replay changes the run", gap(found, subject.bare(**corrupted).logits) > 1e-6)


def _gradients(subject: Subject, clean: Inputs, corrupted: Inputs) -> None:
    """Attribution patching: the gradient in the corrupted run times the difference of the two."""
    sites = [site_of(place) for place in ns.expand(subject.model, "layers[:].output")]
    here, there = (values(subject.bare, inputs, sites) for inputs in (corrupted, clean))
    leaves: list[Tensor] = []

    def leaf(_: Any, __: Any, out: Any) -> Any:
        whole = isinstance(out, Tensor)
        leaves.append((out if whole else out[0]).detach().requires_grad_())
        # A step of zero size: the run is as it was, and its gradient stops here.
        return leaves[-1] if whole else (leaves[-1], *out[1:])

    result = ns.attribute(
        subject.model, clean, corrupted, "layers[:].output[:]", ns.Metric.of(_along), method="atp", progress=False
    )
    effects = {cell.path: float(v) for cell, v in zip(result.table.cells, result.table.values[0], strict=True)}
    start = float(result.table.corrupted[0])
    for number, site in enumerate(sites):
        leaves.clear()
        hook = subject.bare.get_submodule(site.module).register_forward_hook(leaf)
        _along(subject.bare(**corrupted).logits[0, -1]).backward()
        hook.remove()
        assert leaves[0].grad is not None
        expected = (leaves[0].grad * (there[site] - here[site]))[0].sum(-1)
        found = torch.tensor([effects[f"layers[{number}].output[{token}]"] - start for token in range(len(expected))])
        subject.found("images: gradients", gap(found, expected))


def _put(at: int, source: Tensor, value: Tensor) -> Tensor:
    value[:, at] = source[:, at]
    return value


def _sweeps(subject: Subject, places: list[ns.Path], clean: list[Inputs], corrupted: list[Inputs]) -> str:
    """Random sites at tokens of the image and others, between two images, by every executor."""
    rng = random.Random(subject.name)
    length = subject.ids.shape[1]
    asked = [
        (rng.choice(places), rng.choice((FIRST, FIRST + PIECES - 1, rng.randrange(length)))) for _ in range(_SITES)
    ]
    asked = list(dict.fromkeys([*asked, (places[0], FIRST)]))
    paths, metric, ran = [str(place.at(at)) for place, at in asked], ns.Metric.of(_along), ""
    truth, plain = [], []
    for a, b in zip(clean, corrupted, strict=True):
        seen = values(subject.bare, a, list(dict.fromkeys(site_of(place) for place, _ in asked)))
        plain.append(subject.bare(**b).logits[0, -1])
        row: dict[str, float] = {}
        for place, at in asked:
            edit = partial(_put, at, seen[site_of(place)])
            row[str(place.at(at))] = float(_along(run(subject.bare, b, {site_of(place): edit})[0, -1]))
        truth.append(row)
    for executor in ("reference", "batched", "packed", "auto"):
        check = f"images: sweep by {executor}"
        with subject.check(check):
            try:
                result = ns.sweep(subject.model, clean, corrupted, paths, metric, executor=executor, progress=False)
            except NotImplementedError as error:
                reason = str(error).partition("\n")[0].removeprefix("packed rows do not give this job's numbers: ")
                subject.findings.append(Finding(check, "refused" if reason else "crash", None, reason))
                continue
            size = float(torch.stack(plain).abs().max())
            for prompt, expected in enumerate(truth):
                for cell, value in zip(result.table.cells, result.table.values[prompt], strict=True):
                    subject.found(
                        check, abs(float(value) - expected[cell.path]) / size, f"{cell.path} of prompt {prompt}"
                    )
            moved = [abs(v - float(_along(plain[0]))) for v in truth[0].values()]
            subject.claim("images: a patch moves the logits", max(moved) > 1e-3 * size)
            ran = result.run.executor
    return ran
