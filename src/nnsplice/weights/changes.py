"""`diff`: the norm of the weight change between two models, by address."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from nnsplice.atlas import Atlas, Selection
from nnsplice.errors import BadArgument, BadType, circumstances
from nnsplice.paths import Path, parse_path
from nnsplice.weights.regions import counterpart, regions
from nnsplice.weights.selecting import select
from nnsplice.weights.shared_heads import shared_groups

if TYPE_CHECKING:
    import pandas as pd

#: The short forms of the argument `by`.
_BY = {"layers": "layers[:]", "heads": "layers[:].heads[:]", "groups": "layers[:].groups[:]"}


def diff(base: Any, tuned: Any, by: str | Path | list[str | Path] = "layers") -> pd.DataFrame:
    """The norm of the weight change from `base` to `tuned`, a row for each address.

    Columns: `norm`, the Frobenius norm of the change; `base`, that of the weights before; `relative`, the ratio of the
    two; `changed`, the number of elements that differ; and `numel`, the number of elements.

    >>> import copy
    >>> tuned = copy.deepcopy(ns.models.unwrap(model))
    >>> with torch.no_grad():
    ...     _ = tuned.transformer.h[1].mlp.c_fc.bias.add_(1.0)
    >>> ns.weights.diff(model, tuned)[["norm", "changed", "numel"]]
                norm  changed  numel
    embed        0.0        0   1024
    layers[0]    0.0        0   3280
    layers[1]    8.0       64   3280
    layers[2]    0.0        0   3280
    final_norm   0.0        0     32
    elsewhere    0.0        0   1024

    Args:
        base: the model before.
        tuned: a model of the same shape, or a mapping from parameter names to tensors.
        by: `"layers"`, `"heads"`, `"groups"`, or any addresses. With `"layers"`, parameters outside the layers have
            rows of their own, so each parameter is counted once. The row of a head has the change of its own weights;
            with `"heads"`, keys and values that heads share have rows of their group (`layers[0].groups[1].k`).

    Returns:
        The table, indexed by address.

    Raises:
        BadType: a `by` that is no address.
        BadArgument: models of different names or shapes, or no addresses.
    """
    with circumstances("ns.weights.diff"):
        selections = _by_layers(base) if by == "layers" else _selections(base, by)
        rows = {name: _measure(base, tuned, selection) for name, selection in selections.items()}
    import pandas as pd

    columns = ("norm", "base", "relative", "changed", "numel")
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(columns)).astype({"changed": int, "numel": int})


def _selections(model: Any, by: Any) -> dict[str, Selection]:
    atlas = Atlas.of(model)
    texts = by if isinstance(by, list) else [by]
    if not all(isinstance(text, str | Path) for text in texts):
        raise BadType(f"by={by!r}", expected='"layers", "heads", "groups", an address, or a list of addresses')
    if not texts:
        raise BadArgument("by=[] compares nothing", expected="at least one address")
    paths = [parse_path(_BY.get(text, text) if isinstance(text, str) else text) for text in texts]
    found = {str(place): select(model, place, own=True) for path in paths for place in atlas.split(path)}
    if "heads" in texts:
        found |= {
            str(place): atlas.resolve(place)
            for group, _ in shared_groups(atlas, parse_path(_BY["heads"]))
            for place in (replace(group, value="k"), replace(group, value="v"))
        }
    return found


def _by_layers(model: Any) -> dict[str, Selection]:
    """The rows of `by="layers"`: embedding, layers, final norm, unembedding, and the rest; each parameter once."""
    atlas = Atlas.of(model)
    found: dict[str, Selection] = {}
    left = atlas.resolve("full")
    for tower in sorted(atlas.towers.values(), key=lambda tower: tower.name != "encoder"):
        front = "encoder." if tower.name == "encoder" else ""
        names = [f"layers[{i}]" for i in range(tower.n_layers)]
        for name in ("embed", *names, "final_norm", "unembed"):
            if not name.startswith("layers") and getattr(tower, name) is None:
                continue
            selection = atlas.resolve(front + name) & left
            if len(selection):
                found[front + name] = selection
                left = left - selection
    return {**found, "elsewhere": left} if len(left) else found


def _measure(base: Any, tuned: Any, selection: Selection) -> tuple[float, float, float, int, int]:
    change = before = 0.0
    changed = 0
    found = regions(base, selection)
    values = counterpart(base, tuned, found)
    for region in found:
        for own, new in zip(region.views(region.tensor.detach()), region.views(values[region.name]), strict=True):
            a, b = own.double(), new.to(own.device).double()
            change += float((b - a).square().sum())
            before += float(a.square().sum())
            changed += int(torch.count_nonzero(b != a))
    norm, size = change**0.5, before**0.5
    return norm, size, norm / size if size else float("nan") if norm else 0.0, changed, selection.numel()
