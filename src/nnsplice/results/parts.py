"""Parts of a sweep with some of its prompts, and how they are joined again.

A part says which prompts of the whole it has: `{"part": {"prompts": [4, 7], "of": 100}}`. All else that it says is
either the whole's, or a list with an entry for each of its prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

#: The key under which a part says which prompts it has.
PART = "part"

_Change = Callable[[Sequence[Any]], list[Any]]


def numbers_of(asked: Mapping[str, Any]) -> list[int] | None:
    """The numbers that a part's prompts have in the whole; None for a whole."""
    return list(asked[PART]["prompts"]) if PART in asked else None


def taken(asked: Mapping[str, Any], rows: Sequence[int], of: int) -> dict[str, Any]:
    """What is asked of some of the prompts.

    Args:
        rows: their indices among those that `asked` is about.
        of: how many prompts the whole has.
    """
    numbers = numbers_of(asked)
    told = _changed(asked, lambda each: [each[row] for row in rows])
    return {**told, PART: {"prompts": [row if numbers is None else numbers[row] for row in rows], "of": of}}


def joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is asked of all prompts of some parts, ordered by their numbers; a whole where none is missing."""
    order: dict[int, tuple[int, int]] = {}
    for at, part in enumerate(parts):
        for row, number in enumerate(part[PART]["prompts"]):
            order.setdefault(number, (at, row))
    chosen, of = [order[number] for number in sorted(order)], parts[0][PART]["of"]
    lists = [_lists(part) for part in parts]
    columns = iter([[each[at][row] for at, row in chosen] for each in zip(*lists, strict=True)])
    told = _changed(parts[0], lambda _: next(columns))
    if len(order) == of:
        del told[PART]
        return told
    return {**told, PART: {"prompts": sorted(order), "of": of}}


def _lists(asked: Mapping[str, Any]) -> list[Sequence[Any]]:
    """Every list that has an entry for each prompt, in the order in which `_changed` comes by them."""
    found: list[Sequence[Any]] = []

    def keep(each: Sequence[Any]) -> list[Any]:
        found.append(each)
        return []

    _changed(asked, keep)
    return found


def common(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What all parts of one sweep say alike."""
    told = _changed(asked, lambda _: [])
    return {**told, PART: told[PART]["of"]} if PART in told else told


def _changed(asked: Mapping[str, Any], change: _Change) -> dict[str, Any]:
    """What is asked, with every list that has an entry for each prompt changed."""
    told = dict(asked)
    for name in ("clean", "corrupted", "prompts"):
        if isinstance(prompts := told.get(name), Mapping):
            told[name] = {
                key: {span: change(rows) for span, rows in of.items()} if key == "spans" else change(of)
                for key, of in prompts.items()
            }
    if isinstance(metric := told.get("metric"), Mapping):
        told["metric"] = (
            {**metric, "metrics": [_answers(one, change) for one in metric["metrics"]]}
            if "metrics" in metric
            else _answers(metric, change)
        )
    if isinstance(corruption := told.get("corruption"), Mapping):
        told["corruption"] = {**corruption, "positions": change(corruption["positions"])}
    return told


def _answers(metric: Mapping[str, Any], change: _Change) -> dict[str, Any]:
    return {**metric, "ids": {name: change(each) for name, each in metric["ids"].items()}}
