"""A result as a self-contained HTML page.

The template `page.html` draws the JSON data that it holds. All texts are escaped, so a token may be any text, and the
page's policy forbids it to load anything.
"""

from __future__ import annotations

import html
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np

from nnsplice.errors import BadArgument
from nnsplice.files import whole
from nnsplice.results import estimates, figure, labelled, measures, several, wording
from nnsplice.results.kinds import kinds_of
from nnsplice.results.table import Table

#: The path of a cell -> for each prompt its likeliest tokens.
Tokens = Mapping[str, Sequence[Sequence[str]]]
#: Significant digits of a number on the page.
DIGITS = 7
#: The path of a head's pattern at one query.
_PATTERN = re.compile(r"layers\[(\d+)\]\.heads\[(\d+)\]\.pattern\[(\d+)\]")


def write(
    path: str | os.PathLike[str], table: Table, metric: str, *, patterns: Any = None, tokens: Tokens | None = None
) -> None:
    """Write the page, atomically."""
    text = page(table, metric, patterns=patterns, tokens=tokens)
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="xmlcharrefreplace")


def page(table: Table, metric: str, *, patterns: Any = None, tokens: Tokens | None = None) -> str:
    """The text of the page.

    Args:
        metric: the metric's name; with several metrics the page has a choice.
        patterns: a capture of attention patterns; a click on a head shows its pattern.
        tokens: the likeliest tokens of cells, by path and for each prompt.
    """
    template = resources.files("nnsplice.results").joinpath("page.html").read_text(encoding="utf-8")
    before, between, after = template.split("@@")
    model = wording.model_name(table.asked)
    title = f"{metric}, {model}" if model else metric
    # `<` could end the script that holds the data; escaped it is the same JSON.
    each = {name: several.one(table, name) for name in table.metrics} or {metric: table}
    more = {"patterns": _patterns(patterns, len(table.clean)), "tops": _tops(tokens, table)}
    data = json.dumps([_data(one, name) | more for name, one in each.items()], separators=(",", ":"), allow_nan=False)
    escaped = data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return before + html.escape(title) + between + escaped + after


def _data(table: Table, metric: str) -> dict[str, Any]:
    moved = measures.change(table)
    # One prompt shows its own share; the mean over prompts shows the pooled effect.
    each = {"effect": measures.share(table), "change": moved, "value": table.values}
    pooled = {name: measures.mean(values) for name, values in {**each, "effect": measures.effect(table)}.items()}
    prompts = [
        {
            "tokens": list(table.tokens[n]) if table.tokens else [],
            "other": list(wording.clean_tokens(table, n) or ()) if table.tokens else [],
            "clean": _number(clean),
            "corrupted": _number(corrupted),
        }
        for n, (clean, corrupted) in enumerate(zip(table.clean, table.corrupted, strict=True))
    ]
    receivers = wording.receivers(table.asked)
    return {
        "metric": metric,
        "words": wording.metric_words(table, metric, None),
        "model": wording.model_name(table.asked),
        "operation": " through ".join(filter(None, [_name_of(table.asked, "operation"), receivers])),
        "method": estimates.method_of(table) or "",
        "shown": measures.shown(table),
        "prompts": prompts,
        "kinds": [_kind(table, kind, each, pooled) for kind in kinds_of(table.cells)],
    }


def _kind(table: Table, kind: str, each: Mapping[str, np.ndarray], pooled: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """One kind of site for the page: its axes, labels, cells and values."""
    numbers = [n for n, cell in enumerate(table.cells) if cell.component == kind]
    labels, at = labelled.grid_points([table.cells[n] for n in numbers])
    axes = list(labels)
    down, across = figure.sides(axes, [len(of) for of in labels.values()])
    mean = len(table.clean) > 1 and labelled.no_mean(table, kind) is None
    some = [bool(table.done[:, n].any()) for n in numbers]
    return {
        "name": kind,
        "axes": axes,
        # Numeric positions stay numbers: the page looks their tokens up in the prompt.
        "labels": [
            [label if isinstance(label, int) else labelled.label_text(label) for label in of] for of in labels.values()
        ],
        "down": [axes.index(axis) for axis in down],
        "across": [axes.index(axis) for axis in across],
        "at": at.tolist(),
        "paths": [table.cells[n].path for n in numbers],
        # Whether a mean over prompts makes sense.
        "mean": mean,
        "means": {
            name: [_number(value) if done else None for value, done in zip(values[numbers].tolist(), some, strict=True)]
            for name, values in pooled.items()
        }
        if mean
        else {},
        **{
            name: [
                [_number(value) if done else None for value, done in zip(row, has, strict=True)]
                for row, has in zip(values[:, numbers].tolist(), table.done[:, numbers], strict=True)
            ]
            for name, values in each.items()
        },
    }


def _patterns(saved: Any, prompts: int) -> dict[str, list[list[list[float]]]]:
    """`layer.head` -> `[prompt, query, key]`."""
    if saved is None:
        return {}
    found: dict[str, dict[int, np.ndarray]] = {}
    for path, value in saved.items():
        if match := _PATTERN.fullmatch(str(path)):
            layer, head, query = match.groups()
            found.setdefault(f"{layer}.{head}", {})[int(query)] = np.asarray(value.detach().float().cpu())
    rows = {len(one) for queries in found.values() for one in queries.values()}
    if not found or rows != {prompts}:
        raise BadArgument(
            f"patterns of {max(rows)} prompts beside a result of {prompts}"
            if found
            else "these are no patterns of heads",
            expected="a capture of the patterns of the same prompts, query by query",
            write='patterns=ns.capture(model, prompts, "layers[:].heads[:].pattern[:]")',
        )
    return {
        head: [
            [[round(float(share), 3) for share in queries[query][prompt]] for query in sorted(queries)]
            for prompt in range(prompts)
        ]
        for head, queries in found.items()
    }


def _tops(tokens: Tokens | None, table: Table) -> dict[str, list[list[str]]]:
    known = {cell.path for cell in table.cells}
    for path, each in (tokens or {}).items():
        if path not in known or len(each) != len(table.clean):
            raise BadArgument(
                f"tokens for {len(each)} prompts at {path}" if path in known else f"tokens at {path}, which is no cell",
                expected=f"the path of a cell, with a list of tokens for each of {len(table.clean)} prompts",
            )
    return {path: [list(map(str, texts)) for texts in each] for path, each in (tokens or {}).items()}


def _number(value: float) -> float | str:
    """A finite number for JSON, else its name: JSON has no infinity and NaN."""
    value = float(value)
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else str(value)


def _name_of(asked: Mapping[str, Any], key: str) -> str:
    value = asked.get(key)
    if isinstance(value, Mapping):
        value = value.get("name", "")
    return value if isinstance(value, str) else ""
