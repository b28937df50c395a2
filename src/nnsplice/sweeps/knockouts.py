"""Attention knockout: cells in which a query does not attend to some keys."""

from __future__ import annotations

from collections.abc import Sequence

from nnsplice import engine
from nnsplice.activations.access import site_of
from nnsplice.activations.prompts import Prompts
from nnsplice.atlas import edges_between_towers
from nnsplice.errors import BadArgument
from nnsplice.packed import Cut
from nnsplice.sweeps.jobs import Job
from nnsplice.sweeps.operations import Operation
from nnsplice.sweeps.plan import Plan
from nnsplice.sweeps.targets import Target, has_tokens, own_tokens

_EDGE = "layers[3].heads[1].pattern[-1][2]"


def check(model: engine.Model, operation: Operation, targets: Sequence[Target], edited: Prompts) -> None:
    """Check that the operation and the sites fit: a knockout cuts edges, and edges are only cut.

    Raises:
        BadArgument: a knockout of something else, another operation on an edge, or a query that would lose all keys.
    """
    for target in targets:
        for part in target.parts:
            place = part.places[0]
            if place.steps[-1].name == "cross.heads" and (operation.way == "cut" or part.key is not None):
                raise edges_between_towers(part.cell.path)
            if operation.way != "cut" and part.key is not None:
                raise BadArgument(
                    f"an edge of attention is cut or not, it has no value to {operation.name}",
                    path=part.cell.path,
                    expected='operation="knockout", or the pattern of a query',
                )
            if operation.way == "cut" and site_of(place).kind != "pattern":
                raise BadArgument(
                    "a knockout is of an edge of attention, and this is none",
                    path=part.cell.path,
                    expected="the pattern of a head, from a query to a key",
                    write=f'sites="{_EDGE}"',
                )
            if operation.way == "cut" and part.key is None:
                raise BadArgument(
                    "which keys? All of them would leave this query nothing to attend to",
                    path=part.cell.path,
                    expected="the keys in a second bracket; in a list of lists, those of one list are cut together",
                    write=f'{place}[-1][:] for each key by itself, {place}[-1][2:5] or {place}[-1]["subject"] for some',
                )
        if operation.way == "cut":
            _check_rest(model, target, edited)


def _check_rest(model: engine.Model, target: Target, edited: Prompts) -> None:
    """Raise if a query would lose all keys that it can see."""
    causal = edited.is_causal(model)
    for prompt in range(len(edited)):
        lost: dict[tuple[object, int], set[int]] = {}
        for part in target.parts:
            length = edited.length(part.tower, prompt)
            if not (has_tokens(part.position, length) and has_tokens(part.key, length)):
                continue
            keys = own_tokens(part.key, edited, prompt, length)
            for query in own_tokens(part.position, edited, prompt, length):
                for place in part.places:
                    lost.setdefault((place.site, query), set()).update(keys)
                    if set(range(query + 1 if causal else length)) <= lost[place.site, query]:
                        raise BadArgument(
                            f"token {query} of prompt {prompt} would be left without any key to attend to",
                            path=target.cell.path,
                            expected="a knockout that leaves each query a key",
                            write=f"{part.places[0]}[1:][...], as token 0 sees nothing but itself"
                            if not query
                            else None,
                        )


def cuts_of(plan: Plan, job: Job) -> tuple[Cut, ...]:
    """The edges of attention that a job cuts; empty for other operations."""
    if plan.operation.way != "cut":
        return ()
    return tuple(
        Cut(place, tuple(plan.edges(part, job[0]))) for part in plan.targets[job[1]].parts for place in part.places
    )
