"""Roles of tokens: the last token of the subject, the first after it, the last of the prompt.

Prompts differ in length, so a mean over prompts of position 4 mixes unlike tokens; a role is comparable. A role with
several tokens in a prompt is averaged within the prompt first, so that long subjects do not count more.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from nnsplice.errors import BadArgument, BadType, SpanError, named
from nnsplice.paths import Span, parse_path
from nnsplice.results.table import AXES, Cell, Table

#: The roles around a subject, in the order of the literature's figures.
OF_SUBJECT = ("subject first", "subject middle", "subject last", "first after", "further", "last")
#: A role's tokens: a position or positions, for all prompts or for each, or a span's name.
Group = str | int | Sequence[int] | Sequence[Sequence[int]]
Roles = Mapping[str, Group]
Bounds = tuple[int, int]

_SPAN = re.compile(r'"?(?P<name>[^"]*?)"?(\[(?P<token>-?\d+)\])?')


def of_subject(start: int, stop: int, length: int) -> dict[str, tuple[int, ...]]:
    """The tokens of each role. A subject of one token is `subject last`; a prompt that ends with it has no `last`.

    >>> from nnsplice.results.roles import of_subject
    >>> [of_subject(1, 4, 7)[role] for role in ("subject last", "first after", "last")]
    [(3,), (4,), (6,)]
    """
    last = length - 1
    return {
        "subject first": (start,) if stop - start > 1 else (),
        "subject middle": tuple(range(start + 1, stop - 1)),
        "subject last": (stop - 1,),
        "first after": (stop,) if stop < last else (),
        "further": tuple(range(stop + 1, last)),
        "last": (last,) if last >= stop else (),
    }


def by_role(table: Table, roles: Roles | None) -> Table:
    """The table with a cell for each role instead of each position.

    Raises:
        BadArgument: no cell is of a token with a role.
    """
    if table.edges is not None:
        raise BadArgument("edges are no tokens, so they have no roles", expected="a result about sites")
    lengths, spans = [len(row) for row in table.tokens], spans_of(table)
    if not lengths:
        raise BadArgument("this result does not say which tokens its prompts have", expected="a sweep over tokens")
    if any(cell.key is not None for cell in table.cells):
        raise BadArgument(
            "an edge of attention has two tokens, and a role is what one token is",
            expected="a sweep of token positions, or edges between spans, which are the same in every prompt",
        )
    groups = _groups(roles, lengths, spans)
    cells: list[Cell] = []
    columns: list[tuple[tuple[int, ...], ...]] = []
    known: dict[tuple, dict[str, list[tuple[int, ...]]]] = {}
    for members in _alike(table.cells):
        positions = tuple(table.cells[n].position for n in members)
        if positions not in known:
            known[positions] = _found(positions, groups, lengths, spans)
        for role, rows in known[positions].items():
            if not any(row and table.exists[n, [members[at] for at in row]].all() for n, row in enumerate(rows)):
                continue  # tokens without a partner in the clean prompt have no cells
            place = parse_path(table.cells[members[0]].path).place
            cells.append(replace(table.cells[members[0]], path=str(place.at(Span(role))), position=None, role=role))
            columns.append(tuple(tuple(members[at] for at in row) for row in rows))
    if not cells:
        raise BadArgument(
            f"no cell stands for a single token with one of the roles {', '.join(groups)}",
            expected="a sweep of token positions",
            write='sites="layers[:].output[:]", or \'layers[:].output["subject"][-1]\' for one role alone',
        )
    return _averaged(
        table, cells, columns, {"roles": {role: [list(row) for row in rows] for role, rows in groups.items()}}
    )


def spans_of(table: Table) -> dict[str, list[Bounds]]:
    """The spans of the edited prompts, by name."""
    prompts = table.asked.get("corrupted")
    prompts = prompts if isinstance(prompts, Mapping) else table.asked.get("prompts")
    spans = (prompts.get("spans") if isinstance(prompts, Mapping) else None) or {}
    samples = table.asked.get("samples", 1)  # a trace has a row for each sample
    return {name: [(start, stop) for start, stop in rows[::samples]] for name, rows in spans.items()}


# --- which tokens -----------------------------------------------------------------------------------------------------


def _groups(
    roles: Roles | None, lengths: Sequence[int], spans: Mapping[str, Sequence[Bounds]]
) -> dict[str, list[tuple[int, ...]]]:
    """Role -> the tokens of each prompt."""
    if roles is None:
        if not spans:
            raise SpanError(
                'the span "subject" of these prompts is not given, so their tokens have no roles',
                expected='spans={"subject": [a text for each prompt]} where the sweep is made, or roles',
                write='by_role({"last": -1})',
            )
        found: dict[str, list[tuple[int, ...]]] = {}
        if "subject" in spans:
            each = [of_subject(*bounds, length) for bounds, length in zip(spans["subject"], lengths, strict=True)]
            found = {role: [one[role] for one in each] for role in OF_SUBJECT}
        others = {name: rows for name, rows in spans.items() if name != "subject" and name not in found}
        return found | {name: [tuple(range(*bounds)) for bounds in rows] for name, rows in others.items()}
    if not isinstance(roles, Mapping) or not roles:
        raise BadType(f"roles is {named(roles)}", expected='names with tokens: {"last": -1, "verb": [[3], [4]]}')
    return {role: _group(role, given, lengths, spans) for role, given in roles.items()}


def _group(
    role: str, given: Any, lengths: Sequence[int], spans: Mapping[str, Sequence[Bounds]]
) -> list[tuple[int, ...]]:
    if isinstance(given, str):
        found = [_span_tokens(given, row, spans) for row in range(len(lengths))]
        if None in found:
            raise SpanError(
                f'the role "{role}" is {given!r}, and that is no span of these prompts',
                expected=f"one of {', '.join(spans) or 'none'}, or its token: 'subject[-1]'",
            )
        return [row for row in found if row is not None]
    if isinstance(given, int):
        given = [given]
    flat = isinstance(given, Sequence) and all(isinstance(token, int) for token in given)
    each = [given] * len(lengths) if flat else given
    if not isinstance(each, Sequence) or len(each) != len(lengths):
        raise BadArgument(
            f'the role "{role}" is {given!r}, for {len(lengths)} prompts',
            expected="a token, tokens, a list of tokens for each prompt, or a span's name",
        )
    rows: list[tuple[int, ...]] = []
    for prompt, (tokens, length) in enumerate(zip(each, lengths, strict=True)):
        listed = [tokens] if isinstance(tokens, int) else list(tokens)
        if any(not isinstance(token, int) or not -length <= token < length for token in listed):
            raise BadArgument(
                f'the role "{role}" is {tokens!r} in prompt {prompt}, which has {length} tokens',
                expected=f"tokens from {-length} to {length - 1}",
            )
        rows.append(tuple(dict.fromkeys(token % length for token in listed)))
    return rows


def _span_tokens(text: str, prompt: int, spans: Mapping[str, Sequence[Bounds]]) -> tuple[int, ...] | None:
    """The tokens of `"subject"` or `"subject"[-1]`; None if the prompts have no such span."""
    match = _SPAN.fullmatch(text)
    if match is None or match["name"] not in spans:
        return None
    tokens = tuple(range(*spans[match["name"]][prompt]))
    if match["token"] is None:
        return tokens
    number = int(match["token"])
    return (tokens[number],) if -len(tokens) <= number < len(tokens) else ()


def _alike(cells: Sequence[Cell]) -> Iterable[tuple[int, ...]]:
    """Groups of cells, by number, that differ in their position only."""
    found: dict[tuple, list[int]] = {}
    for number, cell in enumerate(cells):
        if cell.position is not None:
            found.setdefault((cell.component, *(getattr(cell, axis) for axis in AXES)), []).append(number)
    return map(tuple, found.values())


def _found(
    positions: Sequence[int | str | None],
    groups: Mapping[str, Sequence[tuple[int, ...]]],
    lengths: Sequence[int],
    spans: Mapping[str, Sequence[Bounds]],
) -> dict[str, list[tuple[int, ...]]]:
    """Role -> for each prompt, the indices of the positions with this role; empty if a token has no cell."""
    found: dict[str, list[tuple[int, ...]]] = {role: [] for role in groups}
    for prompt, length in enumerate(lengths):
        at: dict[int, int] = {}
        for number, position in enumerate(positions):
            if isinstance(position, int):
                tokens = (position % length,) if -length <= position < length else ()
            else:
                tokens = _span_tokens(position or "", prompt, spans) or ()
            if len(tokens) == 1:  # several tokens changed at once are not a mean of single ones
                at.setdefault(tokens[0], number)
        for role, rows in groups.items():
            there = all(token in at for token in rows[prompt])
            found[role].append(tuple(at[token] for token in rows[prompt]) if there else ())
    return {role: rows for role, rows in found.items() if any(rows)}


# --- their means ------------------------------------------------------------------------------------------------------


def _averaged(
    table: Table, cells: Sequence[Cell], columns: Sequence[Sequence[tuple[int, ...]]], more: Mapping[str, Any]
) -> Table:
    prompts = len(table.clean)
    shape = (prompts, len(cells))
    values = np.full((*shape, *table.values.shape[2:]), np.nan)
    exact = None if table.exact is None else values.copy()
    done, exists, counts = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool), np.zeros(shape)
    for number, rows in enumerate(columns):
        for prompt, members in enumerate(rows):
            some = list(members)
            if not some or not table.exists[prompt, some].all():
                continue
            exists[prompt, number], counts[prompt, number] = True, len(some)
            done[prompt, number] = table.done[prompt, some].all()
            values[prompt, number] = table.values[prompt, some].mean(0)
            if exact is not None and table.exact is not None:
                exact[prompt, number] = table.exact[prompt, some].mean(0)
    return replace(
        table, cells=tuple(cells), values=values, done=done, exists=exists, counts=counts, exact=exact,
        asked={**table.asked, **more},
    )  # fmt: skip
