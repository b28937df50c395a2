"""Measures derived from a metric: change, and effect as a share of the total effect.

Averages are pooled, as in the literature: differences are averaged over prompts and then divided, so that a prompt
whose corruption costs nearly nothing counts for nearly nothing. The mean of each prompt's own ratio, which divides by
such a prompt's tiny cost, is made on request only.
"""

from __future__ import annotations

import numpy as np

from nnsplice.results.table import Table

#: A total effect below this share of the metric's size counts as none.
TINY = 1e-6
#: Below this share of the usual total effect, a prompt's own ratio is mostly noise. So is a pooled ratio where total
#: effects of both signs cancel to less than this share of their size.
SMALL = 0.1


def quiet() -> np.errstate:
    """No warnings about overflow, division by zero and NaN: they are results here."""
    return np.errstate(over="ignore", invalid="ignore", divide="ignore")


def mean(values: np.ndarray) -> np.ndarray:
    """The mean over the first axis without NaN; NaN where there is no number, without a warning."""
    there = ~np.isnan(values)
    with quiet():
        return np.where(there, values, 0.0).sum(0) / np.where(there.any(0), there.sum(0), np.nan)


def span(table: Table) -> np.ndarray:
    """`[prompt]`: the total effect, clean minus corrupted."""
    with quiet():
        return table.clean - table.corrupted


def spanless(table: Table) -> np.ndarray:
    """`[prompt]`: whether the total effect is zero, so that no share of it can be taken."""
    whole = np.abs(span(table))
    return ~_enough(whole, np.maximum(np.abs(table.clean), np.abs(table.corrupted)))


def change(table: Table) -> np.ndarray:
    """`[prompt, cell]`: the metric minus that of the corrupted run."""
    with quiet():
        return table.values - table.corrupted[:, None]


def effect(table: Table) -> np.ndarray:
    """`[prompt, cell]`: changes in units of the mean total effect; their mean over prompts is the pooled effect.

    NaN where the mean total effect is zero.
    """
    return pooled(table, change(table))


def pooled(table: Table, moved: np.ndarray) -> np.ndarray:
    """`[prompt, ...]`: differences in units of the mean total effect of the prompts that have one."""
    spans = beside(span(table), moved)
    sizes = beside(np.maximum(np.abs(table.clean), np.abs(table.corrupted)), moved)
    there = ~np.isnan(moved) & np.isfinite(spans)
    with quiet():
        way, size = (mean(np.where(there, values, np.nan)) for values in (spans, sizes))
        share = np.where(there & _enough(np.abs(way), size), moved / way, np.nan)
    return share + 0.0  # no minus zero


def share(table: Table) -> np.ndarray:
    """`[prompt, cell]`: changes divided by each prompt's own total effect; NaN where it is zero."""
    usable = ~spanless(table)
    found = np.full(table.values.shape, np.nan)
    with quiet():
        found[usable] = change(table)[usable] / span(table)[usable, None]
    return found + 0.0


def size(table: Table, moved: np.ndarray) -> np.ndarray:
    """The size of differences, for comparing cells: the absolute pooled effect; without total effects, the mean."""
    shares = mean(pooled(table, moved))
    return np.abs(mean(moved) if np.isnan(shares).all() else shares)


def shown(table: Table) -> str:
    """The default measure of a figure: `"effect"`, or `"change"` where every total effect is zero."""
    return "change" if spanless(table).all() else "effect"


def doubts(table: Table, metric: str, *, own: bool, prompt: int | None = None) -> list[str]:
    """Warnings for a reader of effects: total effects that are zero, or too small to divide by.

    Args:
        own: about each prompt's own ratio, not the pooled effect.
        prompt: the prompt; None is all of them.
    """
    chosen = np.arange(len(table.clean)) if prompt is None else np.arange(len(table.clean))[[prompt]]
    whole = np.abs(span(table))
    usual = float(mean(np.where(np.isfinite(whole), whole, np.nan)))
    if not own:
        way = abs(float(mean(np.where(np.isfinite(whole), span(table), np.nan))))
        sized = float(
            mean(np.where(np.isfinite(whole), np.maximum(np.abs(table.clean), np.abs(table.corrupted)), np.nan))
        )
        if not _enough(np.array(way), np.array(sized)):
            equal = "the same" if spanless(table).all() else "the same in the mean"
            return [_none(metric, equal, table.prompts[spanless(table)])]
        if way < SMALL * usual:
            return [
                f"the total effects of the prompts have both signs and cancel: {way:.3g} in the mean, of {usual:.3g} "
                "in size; shares of that are mostly noise. change() has the differences themselves"
            ]
        return []
    flat = spanless(table)[chosen]
    small = (whole[chosen] < SMALL * usual) & ~flat
    found = [_none(metric, "the same", table.prompts[chosen[flat]])] if flat.any() else []
    if small.any():
        found.append(
            f"the total effect is small in prompt {_numbers(table.prompts[chosen[small]])} (below {SMALL:.0%} of "
            f"the usual {usual:.3g}), and its own ratio divides by that; effect() pools: differences are averaged, "
            "then divided"
        )
    return found


def _none(metric: str, equal: str, prompts: np.ndarray) -> str:
    of = f" for prompt {_numbers(prompts)}" if len(prompts) else ""
    return (
        f"{metric} of clean and corrupted runs is {equal}{of}, so there is no share of their difference: NaN there; "
        "change() has the differences themselves"
    )


def _numbers(prompts: np.ndarray) -> str:
    return ", ".join(map(str, prompts[:8])) + (f", ... ({len(prompts)} in all)" if len(prompts) > 8 else "")


def _enough(whole: np.ndarray, size: np.ndarray) -> np.ndarray:
    with quiet():
        return (whole >= TINY * size) & (whole > 0) & np.isfinite(whole)


def beside(ends: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`[prompt, 1, ...]`: a number per prompt that broadcasts over the other axes of the values."""
    return ends.reshape(-1, *[1] * (values.ndim - 1))
