"""`patched_logits`: one run of prompts with a capture written into it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nnsplice import engine, wire
from nnsplice.activations import remote as runs
from nnsplice.activations import writing
from nnsplice.activations.access import site_of
from nnsplice.activations.encoding import encode
from nnsplice.activations.packs import Pack
from nnsplice.activations.prompts import Prompts, PromptsLike, SpanTexts
from nnsplice.activations.saved_activation import SavedActivation
from nnsplice.atlas import Site, unwrap
from nnsplice.errors import BadArgument, BadType, ShapeError, ShortRow, circumstances, named
from nnsplice.paths import Path, Span
from nnsplice.progress import bar
from nnsplice.tokens import Spans


def patched_logits(
    model: Any,
    prompts: PromptsLike,
    saved: SavedActivation,
    *,
    add: bool = False,
    at: int | None = None,
    spans: SpanTexts | None = None,
    positions: int | Sequence[int] | None = None,
    batch_size: int | None = None,
    keep_graph: bool = False,
    progress: bool = True,
    remote: bool | str = False,
) -> Tensor:
    """Run prompts with saved activations written into the run, and return the logits.

    With `positions` only the logits of these tokens are returned, and only they are computed where the model's forward
    has an argument for that.

    >>> clean = ns.capture(model, "w3 w4 w5", "layers[1].output[-1]")
    >>> ns.patched_logits(model, ["w6 w7 w8", "w9 w10"], clean).shape
    torch.Size([2, 3, 64])
    >>> ns.patched_logits(model, ["w6 w7 w8", "w9 w10"], clean, positions=-1).shape
    torch.Size([2, 64])

    Args:
        model: a model from `ns.load`.
        prompts: a text, a list of texts, token ids or chat messages.
        saved: the activations to write, a row for each prompt or one row for all.
        add: add the activations to the run's values instead of replacing them.
        at: one position to write at, instead of the keys' own.
        spans: token spans by name in these prompts, for keys that name a span.
        positions: a position or several of each prompt's own tokens; all tokens if None.
        batch_size: how many prompts run at once; all prompts of one length if None.
        keep_graph: record gradients to the activations and to the model's parameters.
        progress: show a progress bar once a second has passed.
        remote: run on nnsight's remote service.

    Returns:
        `[prompt, token, vocab]`, aligned at the last token, with NaN where a shorter prompt has no token;
        `[prompt, vocab]` for one position and `[prompt, position, vocab]` for several.

    Raises:
        BadType: `saved` is no capture.
        ShapeError: another number of rows than prompts, or values of another width than the site.
        ShortRow: a prompt has no token at a position.
        RefusedPlace: a site that cannot be written exactly.
        OverlappingWrite: two keys write the same value.
    """
    with engine.accepting_sharded(model):
        return _patched(
            engine.as_model(model), prompts, saved, add, at, spans, positions, batch_size, keep_graph, progress, remote
        )


def _patched(
    model: engine.Model,
    prompts: PromptsLike,
    saved: SavedActivation,
    add: bool,
    at: int | None,
    spans: SpanTexts | None,
    positions: int | Sequence[int] | None,
    batch_size: int | None,
    keep_graph: bool,
    progress: bool,
    remote: bool | str,
) -> Tensor:
    if not isinstance(saved, SavedActivation):
        raise BadType(
            f"{named(saved)} is no capture",
            expected="a SavedActivation",
            write='ns.capture(model, prompts, paths), or SavedActivation.from_pairs(("layers[3].output[-1]", tensor))',
        )
    with circumstances("ns.patched_logits"):
        engine.refuse_changed_logits(model)
        given = encode(model, prompts, spans, images=True, sounds=True)
        if at is not None and not isinstance(at, int):
            raise BadType(
                f"at={at!r}",
                expected="one position for all prompts",
                write='spans={"here": [(4, 5), (1, 2)]} and a capture of ["here"][0] for one of each',
            )
        if saved.rows not in (0, 1, len(given)):
            raise ShapeError(
                f"the capture has {saved.rows} rows, and there are {len(given)} prompts",
                expected="a row for each prompt, or one row that serves all",
            )
        saved._check_saes(model)
        if not len(saved):
            raise BadArgument("this capture is empty, so writing it would do nothing")
        if keep_graph and remote:
            raise BadArgument("gradients do not cross the wire", expected="keep_graph=True or remote=True, not both")
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise BadArgument(f"batch_size={batch_size!r}", expected="a whole number, at least 1")
        wanted = _wanted(positions, given)
        if at is None:
            _check_spans(model, saved, given)
    found: dict[int, Tensor] = {}
    with bar("logits", len(given), "prompt", progress) as shown:
        for rows in given.batches(model, size=batch_size):
            packs = [_rows(pack, rows) for pack in saved._packs]
            inputs, spanned = given.inputs(rows, model.device), given.spans_of(rows)
            length = given.length("decoder", rows[0])
            at_end = range(-length, 0) if wanted is None else [position % length - length for position in wanted]
            if remote:
                batch = given.batch(rows)
                logits = runs.logits(model, packs, inputs, batch, add=add, at=at, spans=spanned, remote=remote)
            else:
                arguments = logits_to_keep(model, min(at_end), (key for pack in packs for key in pack.keys))
                with nullcontext() if keep_graph else torch.no_grad():
                    logits = _local(model, packs, inputs, arguments, add=add, at=at, spans=spanned)
                    engine.gather(unwrap(model), logits, None, "a row of logits")
            found |= dict(zip(rows, logits[:, list(at_end)], strict=True))
            shown.update(len(rows))
    each = [found[row] for row in range(len(given))]
    if wanted is not None:
        return torch.stack([row[0] for row in each] if isinstance(positions, int) else each)
    longest = max(given.lengths("decoder"))
    return torch.stack([_padded(row, longest) for row in each])


def _padded(logits: Tensor, length: int) -> Tensor:
    return logits if len(logits) == length else F.pad(logits, (0, 0, length - len(logits), 0), value=float("nan"))


def _check_spans(model: engine.Model, saved: SavedActivation, given: Prompts) -> None:
    """Raise for spans of the encoder's prompts at sites of the decoder."""
    for key in (key for pack in saved._packs for key in pack.keys if isinstance(key.position, Span)):
        for place in engine.expand(model, key.place):
            with circumstances(str(key)):
                given.check_span(key.position, site_of(place).tower)


def _wanted(positions: int | Sequence[int] | None, given: Prompts) -> list[int] | None:
    """The positions whose logits are wanted; None for all."""
    if positions is None:
        return None
    wanted = [positions] if isinstance(positions, int) else list(positions)
    if not wanted or any(isinstance(one, bool) or not isinstance(one, int) for one in wanted):
        raise BadType(f"positions={positions!r}", expected="a position, or a list of positions", write="positions=-1")
    for row, length in enumerate(given.lengths("decoder")):
        short = next((one for one in wanted if not -length <= one < length), None)
        if short is not None:
            raise ShortRow(f"prompt {row} has {length} tokens, and no position [{short}]")
    return wanted


def logits_to_keep(model: engine.Model, first: int, keys: Iterable[Path]) -> dict[str, Any]:
    """The argument `logits_to_keep` of a model's forward, if it has one, so that it computes fewer logits.

    Args:
        first: the first wanted token, counted from the end.
        keys: the written keys; if these are logits, all are computed.
    """
    tower = engine.map_of(model).atlas.towers.get("decoder")
    if tower is None or not engine.keeps_logits(model):
        return {}
    sites = [place.site for key in keys for place in engine.expand(model, key.place)]
    if any(isinstance(site, Site) and site.module == tower.unembed for site in sites):
        return {}
    return {"logits_to_keep": -first}


def _rows(pack: Pack, rows: Sequence[int]) -> Pack:
    return pack if pack.tensor.shape[0] == 1 else pack.with_tensor(pack.tensor[list(rows)])


def _local(
    model: engine.Model,
    packs: Sequence[Pack],
    inputs: Any,
    arguments: Mapping[str, Any],
    *,
    add: bool,
    at: int | None,
    spans: Spans | None,
) -> Tensor:
    found: list[Tensor] = []

    def body() -> None:
        with engine.accepting_sharded(model):  # again, as nnsight runs this in another thread
            writing.write(model, packs, 1.0 if add else None, at=at, spans=spans)
        found.append(wire.logits_of(model).clone())

    engine.run(model, {**inputs, **arguments} if arguments else inputs, body)
    return found[0]
