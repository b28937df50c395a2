"""`ns.capture` in units: the sites of some prompts, each unit's a safetensors file of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nnsplice import engine
from nnsplice.activations import features
from nnsplice.activations.capture import captured_within, checked, joined, origin_of
from nnsplice.activations.encoding import encode
from nnsplice.activations.packs import Provenance
from nnsplice.activations.prompts import PromptsLike, SpanTexts
from nnsplice.activations.saved_activation import SavedActivation
from nnsplice.errors import BadArgument, circumstances
from nnsplice.paths import Paths
from nnsplice.units.plain import plain_prompts, prompts_of
from nnsplice.units.plan import Agree, Kind, Models, Outcomes, UnitPlan, bytes_of, prompts_in, read_from
from nnsplice.work import Arrays


def plan(model: Any, prompts: PromptsLike, sites: Paths, *, spans: SpanTexts | None = None) -> UnitPlan[Any]:
    """The plan of `ns.capture` with these arguments."""
    model = engine.as_model(model)
    with circumstances("ns.capture"):
        given = encode(model, prompts, spans)
        if given.values is not None:
            raise BadArgument("prompts are tokens in units, and these are values", expected="texts or token ids")
        wanted = checked(model, given, sites)
    question = {
        "weights": engine.weights_digest(model),
        "prompts": plain_prompts(given),
        "sites": [str(path) for path in wanted],
        "saes": features.identities(model, wanted),
        "origin": {k: v for k, v in dataclasses.asdict(origin_of(model, given, wanted)).items() if k != "images"},
    }
    depth = len(engine.expand(model, "layers[:].output"))
    lengths = zip(given.lengths("encoder"), given.lengths("decoder"), strict=True)
    return UnitPlan.of("nnsplice.units.capturing:CAPTURE", question, [depth * max(pair) for pair in lengths], {})


def _ready(plan: UnitPlan[Any], models: Models, max_tokens: int, _agree: Agree) -> Callable[[Sequence[int]], Arrays]:
    model, sites = models.model, plan.question["sites"]
    whole = prompts_of(plan.question["prompts"], model)

    def unit(prompts: Sequence[int]) -> Arrays:
        found = captured_within(model, whole.take(prompts), sites, max_tokens)
        return {"capture": np.frombuffer(bytes_of(found.to_file), dtype=np.uint8)}

    return unit


def _joined(plan: UnitPlan[Any], outcomes: Outcomes) -> SavedActivation:
    origin = plan.question["origin"]
    origin = Provenance(
        origin["model"], origin["revision"], _tuples(origin["prompts"]), _tuples(origin["tokens"]),
        None if origin["spans"] is None else {name: _tuples(rows) or () for name, rows in origin["spans"].items()},
        origin["saes"],
    )  # fmt: skip
    parts = [read_from(arrays["capture"].tobytes(), SavedActivation.from_file)._packs for _, arrays in outcomes]
    packs = joined(parts, [prompts for prompts, _ in outcomes])
    return SavedActivation._new(packs, origin.rows(prompts_in(outcomes)), None)


def _tuples(rows: Any) -> Any:
    return None if rows is None else tuple(tuple(row) if isinstance(row, list) else row for row in rows)


CAPTURE = Kind("ns.capture", _ready, _joined)
