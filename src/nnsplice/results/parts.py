"""The question (`asked`) of a part of a sweep, with some of its prompts.

A part names its prompts: `{"part": {"prompts": [4, 7], "of": 100}}`. Everything else is equal to the question of the
whole, except lists with an entry for each prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

#: The key of a part's prompts.
PART = "part"

_Change = Callable[[Sequence[Any]], list[Any]]


def numbers_of(asked: Mapping[str, Any]) -> list[int] | None:
    """The numbers of a part's prompts in the whole; None for a whole."""
    return list(asked[PART]["prompts"]) if PART in asked else None


def taken(asked: Mapping[str, Any], rows: Sequence[int], of: int) -> dict[str, Any]:
    """The question of some of the prompts.

    Args:
        rows: their indices among the prompts of `asked`.
        of: the number of prompts of the whole.
    """
    numbers = numbers_of(asked)
    changed = _changed(asked, lambda each: [each[row] for row in rows])
    return {**changed, PART: {"prompts": [row if numbers is None else numbers[row] for row in rows], "of": of}}


def joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The question of the prompts of all parts, ordered by their numbers; the whole if none is missing."""
    order: dict[int, tuple[int, int]] = {}
    for at, part in enumerate(parts):
        for row, number in enumerate(part[PART]["prompts"]):
            order.setdefault(number, (at, row))
    chosen, of = [order[number] for number in sorted(order)], parts[0][PART]["of"]
    lists = [_lists(part) for part in parts]
    columns = iter([[each[at][row] for at, row in chosen] for each in zip(*lists, strict=True)])
    changed = _changed(parts[0], lambda _: next(columns))
    if len(order) == of:
        del changed[PART]
        return changed
    return {**changed, PART: {"prompts": sorted(order), "of": of}}


def _lists(asked: Mapping[str, Any]) -> list[Sequence[Any]]:
    """Every list with an entry for each prompt, in the order of `_changed`."""
    found: list[Sequence[Any]] = []

    def keep(each: Sequence[Any]) -> list[Any]:
        found.append(each)
        return []

    _changed(asked, keep)
    return found


def common(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The part of the question that is equal in all parts of one sweep."""
    changed = _changed(asked, lambda _: [])
    return {**changed, PART: changed[PART]["of"]} if PART in changed else changed


def _changed(asked: Mapping[str, Any], change: _Change) -> dict[str, Any]:
    """The question, with every list that has an entry for each prompt changed."""
    changed = dict(asked)
    for name in ("clean", "corrupted", "prompts"):
        if isinstance(prompts := changed.get(name), Mapping):
            changed[name] = {
                key: {span: change(rows) for span, rows in of.items()} if key == "spans" else change(of)
                for key, of in prompts.items()
            }
    if isinstance(metric := changed.get("metric"), Mapping):
        changed["metric"] = (
            {**metric, "metrics": [_answers(one, change) for one in metric["metrics"]]}
            if "metrics" in metric
            else _answers(metric, change)
        )
    if isinstance(corruption := changed.get("corruption"), Mapping):
        changed["corruption"] = {**corruption, "positions": change(corruption["positions"])}
    return changed


def _answers(metric: Mapping[str, Any], change: _Change) -> dict[str, Any]:
    return {**metric, "ids": {name: change(each) for name, each in metric["ids"].items()}}
