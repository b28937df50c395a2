"""The identity of a sweep as plain data, for results (`result.asked`) and journals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nnsplice import engine
from nnsplice.activations import features
from nnsplice.activations.prompts import Prompts
from nnsplice.activations.saved_activation import SavedActivation
from nnsplice.digests import digest_of
from nnsplice.sweeps.corruption import Corruption
from nnsplice.sweeps.operations import Operation
from nnsplice.sweeps.plan import Plan
from nnsplice.sweeps.targets import Target


def asked_of(
    model: engine.Model,
    corrupted: Prompts,
    clean: Prompts | None,
    targets: Sequence[Target],
    metric: Mapping[str, Any],
    operation: Operation,
    reference: SavedActivation | None,
    window: int,
    align: str,
    seed: int,
    corruption: Corruption | None,
    source: engine.Model | None = None,
) -> dict[str, Any]:
    """The identity of a sweep; it leaves out timings, executors and versions, which do not change the numbers."""
    name, revision = engine.name_of(model)
    return {
        "model": name,
        "revision": revision,
        "weights": engine.weights_digest(model),
        "clean": None if clean is None else prompts_record(clean),
        "corrupted": prompts_record(corrupted),
        "sites": [target.cell.path for target in targets],
        "metric": dict(metric),
        "operation": operation.identity,
        "reference": None if reference is None else digest_of(dict(reference.items())),
        "corruption": None if corruption is None else _corruption(corruption),
        "window": window,
        "align": align,
        "seed": seed,
        **({} if source is None else {"source": model_record(source)}),
        **sae_records(model, targets),
    }


def model_record(model: engine.Model) -> dict[str, Any]:
    """A model as plain data."""
    name, revision = engine.name_of(model)
    return {"model": name, "revision": revision, "weights": engine.weights_digest(model)}


def sae_records(model: engine.Model, targets: Sequence[Target]) -> dict[str, Any]:
    """The SAEs whose features are sites, by their names."""
    records = features.identities(model, (place for target in targets for place in target.places))
    return {"saes": records} if records else {}


def labels_of(model: engine.Model, plan: Plan) -> dict[str, Any]:
    """Labels for figures: texts of the answers' tokens, and the clean prompts if they differ."""
    metric = plan.asked["metric"]
    found: set[int] = set()
    for one in metric.get("metrics", [metric]):
        for row in (row for rows in one.get("ids", {}).values() for row in rows):
            found |= set(row) if isinstance(row, list | tuple) else {row}
    ids = sorted(found)
    words = dict(zip(map(str, ids), engine.token_texts(model, [[one] for one in ids]), strict=True))
    labels: dict[str, Any] = {"words": {key: text for key, (text,) in words.items()}}
    clean = plan.clean
    other = clean is not plan.corrupted and not plan.owners and plan.operation.name == "patch"
    if clean is not None and other and len(plan.tokens) == len(clean):
        tower = plan.targets[0].tower if plan.targets else "encoder"
        labels["clean"] = [list(row) for row in clean.token_texts(model, tower)]
    return labels


def prompts_record(prompts: Prompts) -> dict[str, Any]:
    """Prompts as plain data."""
    plain: dict[str, Any] = {"tokens": [list(row) for row in prompts.ids]}
    if prompts.texts is not None:
        plain["texts"] = list(prompts.texts)
    if prompts.decoder_ids is not None:
        plain["decoder"] = [list(row) for row in prompts.decoder_ids]
    if prompts.images is not None:
        plain["images"] = [images.digest for images in prompts.images]
    if prompts.spans is not None:
        plain["spans"] = {name: [list(bounds) for bounds in rows] for name, rows in prompts.spans.items()}
    return plain


def _corruption(corruption: Corruption) -> dict[str, Any]:
    values = {str(row): value for row, value in enumerate(corruption.values)}
    return {
        "positions": [list(row) for row in corruption.positions],
        "values": digest_of(values),
        "overwrites": corruption.overwrites,
    }
