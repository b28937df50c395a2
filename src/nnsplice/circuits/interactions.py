"""`interactions`: the joint effect of two sites beyond the sum of their effects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np

from nnsplice import engine
from nnsplice.activations.prompts import PromptsLike
from nnsplice.errors import BadArgument, circumstances
from nnsplice.metrics import MetricLike
from nnsplice.paths import Path, Paths, parse_path
from nnsplice.results import SweepResult
from nnsplice.sweeps.options import RUNNING, check_options, known_of
from nnsplice.sweeps.planning import plan_sweep
from nnsplice.sweeps.running import run_fresh

#: The metrics of a result.
SUFFICIENCY, NECESSITY = "sufficiency", "necessity"
#: Options of `ns.sweep` that are refused, as both directions patch between the two runs.
_SET_HERE = ("operation", "reference", "together", "corruption", "window", "source")


def interactions(
    model: Any,
    clean: PromptsLike,
    corrupted: PromptsLike,
    sites: Paths,
    metric: MetricLike,
    *,
    pairs: str | Sequence[tuple[str | Path, str | Path]] = "all",
    **options: Any,
) -> SweepResult:
    """Interactions: the effect of each site alone, and of each pair beyond the sum of both, measured exactly.

    Let m(A) be the metric of the corrupted run with the clean values of the sites A, and M all sites together: m(M - A)
    is the clean run with the corrupted values of A. For one site, `sufficiency` is m(i) - m(nothing) and `necessity`
    m(M) - m(M - i). For a pair they are

        sufficiency    m(i, j) - m(i) - m(j) + m(nothing)
        necessity      m(M - i - j) - m(M - i) - m(M - j) + m(M)

    and 0 where the effects add up. A site with a backup has little necessity alone, and a negative necessity with its
    backup: the metric falls only without both. If one site is upstream of the other, the later one has a given value,
    which hides the effect through it, so they interact even in a linear model.

    `change()` has the numbers, with an axis `metric` for the two and an axis `set` for sites and pairs.

    >>> sites = ["layers[0].heads[1]", "layers[1].mlp", "layers[2].mlp"]
    >>> pair = "w3 w4 w5", "w3 w6 w5"
    >>> found = ns.interactions(model, *pair, sites, ns.logit_diff("w7", "w8"), progress=False)
    >>> found.change().sizes
    Frozen({'prompt': 1, 'metric': 2, 'set': 6})
    >>> str(found.change().coords["set"].values[-1])
    'layers[1].mlp.output + layers[2].mlp.output'

    Args:
        model: a model from `ns.load`, in eval mode.
        clean: the prompts that values are taken from. Prompt i is paired with prompt i of `corrupted`.
        corrupted: the prompts whose run is edited.
        sites: a path or several; a site without a position is patched at all tokens at once.
        metric: one metric, such as `ns.logit_diff(answer, wrong)`.
        pairs: the pairs to measure: `"all"`, or pairs of the sites' paths.
        **options: `spans` and `align` of `ns.plan_sweep`; `executor`, `max_tokens` and `progress` of `ns.run`.

    Returns:
        Sufficiency and necessity of each site and pair.

    Raises:
        BadType: an option that does not exist.
        BadArgument: fewer than two sites, a pair that is not of the sites, several metrics, or a journal.
    """
    check_options("ns.interactions", options, known_of(interactions, plan_sweep, _SET_HERE))
    running = {name: options.pop(name) for name in RUNNING if name in options}
    if "journal" in running:
        raise BadArgument("interactions are two sweeps, and a journal is of one", expected="no journal=")
    model = engine.as_model(model)
    with circumstances("ns.interactions"):
        places = _places(model, sites)
        chosen = _pairs(model, places, pairs)
        sets = [[place] for place in places] + [[places[a], places[b]] for a, b in chosen]
        there, back = (
            run_fresh(plan_sweep(model, *both, sets, metric, **options), model, **running).table
            for both in ((clean, corrupted), (corrupted, clean))
        )
        if there.metrics:
            raise BadArgument("interactions are of one metric", expected="one metric, such as ns.logit_diff")
        # `there` begins at the corrupted run, `back` at the clean one.
        up, down = (_beyond(table.values - table.corrupted[:, None], len(places), chosen) for table in (there, back))
        down[:, : len(places)] *= -1.0  # of one site, what is lost
        moved = np.stack([up, down], -1)
        ends = {name: np.stack([getattr(there, name)] * 2, -1) for name in ("clean", "corrupted")}
        asked = {**there.asked, "operation": "interactions", "pairs": [list(pair) for pair in chosen]}
        run = replace(
            there.run,
            seconds=there.run.seconds + back.run.seconds,
            **{name: getattr(there.run, name) + getattr(back.run, name)
               for name in ("forwards", "block_calls", "tokens", "flops", "known")},
            note="; ".join(dict.fromkeys(note for note in (there.run.note, back.run.note) if note)),
        )  # fmt: skip
        values = ends["corrupted"][:, None] + moved
        return SweepResult(
            replace(there, values=values, **ends, asked=asked, run=run, metrics=(SUFFICIENCY, NECESSITY))
        )


def _beyond(moved: np.ndarray, places: int, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    """`[prompt, cell]`: the change of the metric; of pairs, the change beyond the sum of both sites."""
    found = moved.copy()
    for number, (a, b) in enumerate(pairs, places):
        found[:, number] -= moved[:, a] + moved[:, b]
    return found


def _places(model: engine.Model, sites: Paths) -> list[Path]:
    wanted = [parse_path(path) for path in engine.listed(sites)]
    found = [place.at(path.position) for path in wanted for place in engine.expand(model, path.place)]
    places = sorted(dict.fromkeys(found), key=engine.map_of(model).rank)
    if len(places) < 2:
        raise BadArgument(f"{len(places)} site, and two are needed to act together", expected="several sites")
    return places


def _pairs(model: engine.Model, places: Sequence[Path], pairs: Any) -> list[tuple[int, int]]:
    if isinstance(pairs, str):
        if pairs != "all":
            raise BadArgument(f"pairs={pairs!r}", expected='"all", or pairs of paths')
        return list(combinations(range(len(places)), 2))
    number = {place: n for n, place in enumerate(places)}
    found: dict[tuple[int, int], None] = {}
    for pair in pairs:
        if isinstance(pair, str) or len(pair) != 2:
            raise BadArgument(f"{pair!r} is no pair", expected="two paths", write='("layers[3].mlp", "layers[4].mlp")')
        at: list[int] = []
        for end in map(parse_path, pair):
            same = [place.at(end.position) for place in engine.expand(model, end.place)]
            if len(same) != 1 or same[0] not in number:
                raise BadArgument(f"{end} is none of the sites", expected="pairs of sites that are among them")
            at.append(number[same[0]])
        if at[0] == at[1]:
            raise BadArgument(f"{pair[0]} with itself is no pair", expected="two sites")
        found[min(at), max(at)] = None
    if not found:
        raise BadArgument("no pairs", expected='"all", or pairs of paths')
    return list(found)
