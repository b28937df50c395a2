"""One forward pass of a lens, outside of traces: values of sites, and logits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nnsplice import engine, wire
from nnsplice.activations.encoding import encode
from nnsplice.activations.prompts import Prompts, PromptsLike, SpanTexts
from nnsplice.atlas import Atlas, Site, Tower, unwrap
from nnsplice.errors import RefusedPlace


@dataclass(frozen=True)
class LensRun:
    """The values of one run over prompts of one length."""

    rows: tuple[int, ...]
    #: `[prompt, token, width]`, of the prompts' own tokens.
    values: Mapping[Site, Tensor]
    #: The return value of the model without its head.
    returned: Any
    #: `[prompt, token, vocab]`
    logits: Tensor


def prompts_of(
    model: engine.Model, prompts: PromptsLike, spans: SpanTexts | None = None, *, images: bool = False
) -> Prompts:
    """The prompts of a lens.

    Raises:
        BadArgument: they are values instead of tokens.
    """
    given = encode(model, prompts, spans, images=images)
    given.require_tokens("a lens reads")
    return given


def texts_of(model: engine.Model, ids: Iterable[int]) -> dict[int, str]:
    """The text of each token."""
    known = list(ids)
    return dict(zip(known, (row[0] for row in engine.token_texts(model, ([one] for one in known))), strict=True))


def decoder_of(model: engine.Model) -> Tower:
    """The decoder of a model whose head can read states.

    Raises:
        RefusedPlace: it has two towers, no unembedding, no module that holds all but its head, or layers that share
            modules.
    """
    towers = Atlas.of(model).towers
    if set(towers) != {"decoder"}:
        raise RefusedPlace(
            f"this model's towers are {' and '.join(towers) or 'unknown'}, and a lens reads the stream of one decoder",
            expected="a decoder",
        )
    tower = towers["decoder"]
    if tower.unembed is None or not tower.prefix:
        raise RefusedPlace(
            "it is not known where this model's layers end and its head begins", expected="a model with a head"
        )
    if tower.blocks[-1].occurrence:
        raise RefusedPlace("its layers share modules, so the state that leaves the last is met several times")
    return tower


def last_of(tower: Tower) -> Site:
    """The site of the stream at the output of the last layer."""
    last = tower.blocks[-1]
    return Site(last.end or last.module, "output", occurrence=last.occurrence)


def lens_run(model: engine.Model, prompts: Prompts, rows: Sequence[int], sites: Iterable[Site]) -> LensRun:
    """Run these prompts, all of one length, and keep the values of sites."""
    root, tower = unwrap(model), decoder_of(model)
    inputs = prompts.inputs(rows, model.device)
    assert isinstance(inputs, Mapping)
    length = prompts.lengths("decoder")[rows[0]]
    seen: dict[Site, Tensor] = {}
    returned: list[Any] = []
    with ExitStack() as stack:
        for site in dict.fromkeys(sites):
            stack.enter_context(_keeping(root, site, len(rows), seen))
        hook = root.get_submodule(tower.prefix).register_forward_hook(lambda _m, _a, out: returned.append(out))
        stack.callback(hook.remove)
        with engine.locked(model), torch.no_grad():
            logits = root(**{**inputs, "use_cache": False}).logits
    # Some families put tokens of their own before the prompt's.
    own = {site: value[:, value.shape[1] - length :] for site, value in seen.items()}
    return LensRun(tuple(rows), own, returned[-1] if returned else None, logits[:, logits.shape[1] - length :])


@contextmanager
def _keeping(root: nn.Module, site: Site, rows: int, into: dict[Site, Tensor]) -> Iterator[None]:
    """Keep a copy of the value of a site; a copy, as some blocks add into tensors in place."""
    visits: list[None] = []

    def keep(value: Tensor) -> None:
        visits.append(None)
        if len(visits) == site.occurrence + 1:
            into[site] = wire.as_rows(value, rows).clone()

    with engine.reading(root, site, keep):
        yield
