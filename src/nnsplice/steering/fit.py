"""`fit`: a steering vector from two groups of states, with its held-out quality."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from nnsplice import engine
from nnsplice.activations import SavedActivation, capture
from nnsplice.activations.encoding import one_by_one
from nnsplice.activations.messages import is_chat, template_of
from nnsplice.activations.packs import Pack
from nnsplice.activations.prompts import PromptsLike, SpanTexts
from nnsplice.deprecated import renamed
from nnsplice.errors import BadArgument, BadType, circumstances, named
from nnsplice.paths import Paths
from nnsplice.steering.about import About
from nnsplice.steering.directions import checked, direction
from nnsplice.steering.quality import held_out
from nnsplice.steering.vector import SteeringVector


def fit(
    positive: SavedActivation,
    negative: SavedActivation,
    *,
    method: str = "mean_difference",
    folds: int = 5,
    seed: int = 0,
    **options: Any,
) -> SteeringVector:
    """Fit a steering vector at every site of two captures: the direction from the negative to the positive states.

    A vector's length is the distance of the two means along it, so a coefficient of 1.0 goes from one mean to the
    other; `vector.in_residual_norms()` is in units of the residual norm instead.

    >>> toy = ns.load("toy")
    >>> reviews = [review for review in ns.models.toy_prompts().reviews if review.mood == "good"][:20]
    >>> good = ns.capture(toy, [review.text for review in reviews], "layers[1:4].output[-1]")
    >>> bad = ns.capture(toy, [review.opposite for review in reviews], "layers[1:4].output[-1]")
    >>> ns.steering.fit(good, bad)
    SteeringVector: 3 sites, width 64, method mean_difference, unit from the negative mean to the positive,
        from 20 and 20 rows
      layers[1].output  0.83 of the states' norm, AUC 1.00 held out
      layers[2].output  0.85 of the states' norm, AUC 1.00 held out
      layers[3].output  0.80 of the states' norm, AUC 1.00 held out

    Args:
        positive: a capture of prompts with the wanted property, a row for each prompt.
        negative: a capture of prompts without it; row i is paired with row i where there are equally many.
        method: `"mean_difference"`; `"pca"` (option `centring="pair"` or `"global"`); `"logistic"` (`ridge=`); or
            `"lda"` (`shrinkage=`).
        folds: the number of cross-validation folds for the held-out quality.
        seed: the seed of the folds.
        **options: the options of the method.

    Returns:
        One vector for each site, with its held-out AUC and norm in `vector.about`.

    Raises:
        BadType: something other than a capture.
        BadArgument: an option that the method does not have, fewer than 2 folds, or states that do not differ.
        KeyMismatch: the captures hold different sites.
    """
    with circumstances("ns.steering.fit"):
        for name, saved in (("positive", positive), ("negative", negative)):
            if not isinstance(saved, SavedActivation):
                raise BadType(
                    f"{name} is {named(saved)}",
                    expected="a capture",
                    write="ns.steering.fit_from_prompts(model, positive, negative) for prompts",
                )
        if not isinstance(folds, int) or folds < 2:
            raise BadArgument(f"folds={folds}", expected="2 or more")
        chosen = checked(method, options)
        both = positive.mean() - negative.mean()  # raises KeyMismatch for different sites
        if not len(both):
            raise BadArgument("these captures are empty, so there is nothing to fit")
        aligned = negative.subset(positive.keys()) if positive.keys() == negative.keys() else negative
        packs, quality, norms = _fit_sites(positive, aligned, method, chosen, folds, seed)
    made = SteeringVector._new(packs, both._provenance.without_rows(), both._known)
    return made._with_about(
        About(
            method=method,
            options=chosen,
            quality=quality,
            norms=norms,
            rows=(positive.rows, negative.rows),
            unit="from the negative mean to the positive",
            model_type=None if both._known is None else both._known.atlas.tree.facts.get("model_type"),
        )
    )


def _fit_sites(
    positive: SavedActivation, negative: SavedActivation, method: str, options: dict[str, Any], folds: int, seed: int
) -> tuple[list[Pack], dict[str, float], dict[str, float]]:
    def find(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return direction(a, b, method, options)

    packs: list[Pack] = []
    quality: dict[str, float] = {}
    norms: dict[str, float] = {}
    for pack in positive._packs:
        found = []
        for n, key in enumerate(pack.keys):
            a, b = pack.tensor[:, n].double(), negative[key].to(pack.tensor.device).double()
            if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
                raise BadArgument("a state is infinite or not a number", path=key)
            vector = find(a, b)
            if not bool(torch.isfinite(vector).all()) or not bool(vector.norm() > 0):
                raise BadArgument(
                    "the positive and the negative states have the same mean here, so there is no direction",
                    path=key,
                    expected="prompts that differ before the position that was captured",
                )
            score = held_out(a, b, find, folds, seed)
            if score is not None:
                quality[str(key)] = score
            norms[str(key)] = torch.cat([a, b]).norm(dim=-1).mean().item()
            found.append(vector)
        dtype = pack.tensor.dtype if pack.tensor.dtype in (torch.float32, torch.float64) else torch.float32
        packs.append(pack.with_tensor(torch.stack(found)[None].to(dtype)))
    return packs, quality, norms


@renamed(paths="sites")
def fit_from_prompts(
    model: Any,
    positive: PromptsLike,
    negative: PromptsLike,
    sites: Paths = "layers[:].output[-1]",
    *,
    method: str = "mean_difference",
    chat: bool = False,
    spans: SpanTexts | None = None,
    batch_size: int | None = None,
    progress: bool = True,
    folds: int = 5,
    seed: int = 0,
    **options: Any,
) -> SteeringVector:
    """Run two groups of prompts and fit a steering vector at every site.

    >>> ns.steering.fit_from_prompts(model, ["w3 w4", "w5 w6"], ["w3 w7", "w5 w7"], "layers[1].output[-1]").layers
    [1]

    Args:
        model: a model from `ns.load`.
        positive: prompts with the wanted property: texts, token ids or chat messages.
        negative: prompts without it; prompt i is paired with prompt i where there are equally many.
        sites: paths with the position that is read.
        method: as for `ns.steering.fit`.
        chat: put each text through the tokenizer's chat template as a user message; messages always go through it.
        spans: token spans by name, for the positive prompts followed by the negative ones.
        batch_size: how many prompts run in one pass; all prompts of one length if left out.
        progress: show a progress bar once a second has passed.
        folds: the number of cross-validation folds for the held-out quality.
        seed: the seed of the folds.
        **options: the options of the method.

    Returns:
        One vector for each site.

    Raises:
        BadType: something other than prompts on one side.
        BadArgument: no prompts on one side, or an option that the method does not have.
        PathError: no path, or a path without a position.
    """
    model = engine.as_model(model)
    with circumstances("ns.steering.fit_from_prompts"):
        for name, given in (("positive", positive), ("negative", negative)):
            if not isinstance(given, Iterable):
                raise BadType(f"{name} is {named(given)}", expected="a prompt, or several")
        good, bad = one_by_one(positive), one_by_one(negative)
        checked(method, options)
        if not good or not bad:
            raise BadArgument("no prompts on one side", expected="positive and negative prompts")
        prompts, template = _with_template(model, [*good, *bad], chat)
    saved = capture(model, prompts, sites, spans=spans, batch_size=batch_size, progress=progress)
    n = len(good)
    vector = fit(saved.slice[0:n], saved.slice[n : n + len(bad)], method=method, folds=folds, seed=seed, **options)
    return vector if template is None else vector._with_about(replace(vector.about, template=template))


def _with_template(model: engine.Model, prompts: Sequence[Any], chat: bool) -> tuple[list[Any], str | None]:
    """The prompts as chats, with a digest of the chat template; or as they are, for plain prompts."""
    if not chat and not any(map(is_chat, prompts)):
        return list(prompts), None
    chats = [[{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt for prompt in prompts]
    return chats, hashlib.sha256(template_of(model).encode()).hexdigest()[:16]
