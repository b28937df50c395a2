"""`patched_logits`: one run of prompts with a capture written into it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nnsplice import engine, wire
from nnsplice.activations import remote as runs
from nnsplice.activations import writing
from nnsplice.activations.packs import Pack
from nnsplice.activations.prompts import PromptsLike, SpanTexts, encode
from nnsplice.activations.saved_activation import SavedActivation
from nnsplice.errors import BadArgument, BadType, ShapeError, circumstances, named
from nnsplice.tokens import Spans


def patched_logits(
    model: Any,
    prompts: PromptsLike,
    saved: SavedActivation,
    *,
    add: bool = False,
    at: int | None = None,
    spans: SpanTexts | None = None,
    remote: bool | str = False,
) -> Tensor:
    """Run prompts with a capture written into the run: `[prompt, token, vocab]`.

    Rows are aligned at their last token; where a row has no token its logits are NaN.

    >>> clean = ns.capture(model, "w3 w4 w5", "layers[1].output[-1]")
    >>> ns.patched_logits(model, ["w6 w7 w8", "w9 w10"], clean).shape
    torch.Size([2, 3, 64])

    Args:
        add: add the capture instead of replacing with it.
        at: write at this position instead of the keys' own.
        spans: where the named spans of the capture stand in these prompts.
        remote: run on nnsight's remote service.
    """
    model = engine.as_model(model)
    if not isinstance(saved, SavedActivation):
        raise BadType(
            f"{named(saved)} is no capture",
            expected="a SavedActivation",
            write='ns.capture(model, prompts, paths), or SavedActivation.from_pairs(("layers[3].output[-1]", tensor))',
        )
    with circumstances("ns.patched_logits"):
        given = encode(model, prompts, spans)
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
        if not len(saved):
            raise BadArgument("this capture is empty, so writing it would do nothing")
    longest = max(given.lengths("decoder"))
    out: Tensor | None = None
    for rows in given.batches(None):
        packs = [_rows(pack, rows) for pack in saved._packs]
        inputs, found = given.inputs(rows, model.device), given.spans_of(rows)
        if remote:
            batch = given.batch(rows)
            logits = runs.logits(model, packs, inputs, batch, add=add, at=at, spans=found, remote=remote)
        else:
            logits = _local(model, packs, inputs, add=add, at=at, spans=found)
        if out is None:
            shape = (len(given), longest, logits.shape[-1])
            out = torch.full(shape, float("nan"), dtype=logits.dtype, device=logits.device)
        out[rows, longest - logits.shape[1] :] = logits
    assert out is not None
    return out


def _rows(pack: Pack, rows: Sequence[int]) -> Pack:
    return pack if pack.tensor.shape[0] == 1 else pack.with_tensor(pack.tensor[list(rows)])


def _local(
    model: engine.Model, packs: Sequence[Pack], inputs: Any, *, add: bool, at: int | None, spans: Spans | None
) -> Tensor:
    found: list[Tensor] = []

    def body() -> None:
        writing.write(model, packs, 1.0 if add else None, at=at, spans=spans)
        found.append(wire.logits_of(model).clone())

    with torch.no_grad():
        engine.run(model, inputs, body)
    return found[0]
