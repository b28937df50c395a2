"""Measures derived from a metric: change, and effect as a share of the total effect.

Averages are pooled, as in the literature: differences are averaged over prompts and then divided, so that a prompt
whose corruption costs nearly nothing counts for nearly nothing. The mean of each prompt's own ratio, which divides by
such a prompt's tiny cost, is made on request only.
"""

from __future__ import annotations

import numpy as np

from nnsplice.results.table import Table

#: Where clean and corrupted run differ by less of their size, a share of their difference means nothing.
TINY = 1e-6
#: Below this share of the usual total effect, a prompt's own ratio is mostly noise; and so is a pooled one where total
#: effects of both signs cancel to less than this share of their size.
SMALL = 0.1


def quiet() -> np.errstate:
    """Sums past the largest number are infinite, and infinity less infinity is no number; no warning about either."""
    return np.errstate(over="ignore", invalid="ignore", divide="ignore")


def mean(values: np.ndarray) -> np.ndarray:
    """The mean over the first axis of what is there, and NaN where nothing is; no warning about that."""
    there = ~np.isnan(values)
    with quiet():
        return np.where(there, values, 0.0).sum(0) / np.where(there.any(0), there.sum(0), np.nan)


def span(table: Table) -> np.ndarray:
    """`[prompt]`: the total effect, clean less corrupted."""
    with quiet():
        return table.clean - table.corrupted


def spanless(table: Table) -> np.ndarray:
    """`[prompt]`: whether the clean and the corrupted run have no difference to take a share of."""
    whole = np.abs(span(table))
    return ~_enough(whole, np.maximum(np.abs(table.clean), np.abs(table.corrupted)))


def change(table: Table) -> np.ndarray:
    """`[prompt, cell]`: how far the metric moved from the corrupted run's."""
    with quiet():
        return table.values - table.corrupted[:, None]


def effect(table: Table) -> np.ndarray:
    """`[prompt, cell]`: changes, counted in the mean total effect, so that their mean over prompts is the pooled share.

    NaN where there is no way from corrupted to clean in the mean.
    """
    return pooled(table, change(table))


def pooled(table: Table, moved: np.ndarray) -> np.ndarray:
    """`[prompt, ...]` differences in units of the mean total effect of those prompts that have one."""
    spans = beside(span(table), moved)
    sizes = beside(np.maximum(np.abs(table.clean), np.abs(table.corrupted)), moved)
    there = ~np.isnan(moved) & np.isfinite(spans)
    with quiet():
        way, size = (mean(np.where(there, values, np.nan)) for values in (spans, sizes))
        share = np.where(there & _enough(np.abs(way), size), moved / way, np.nan)
    return share + 0.0  # and no minus zero, where nothing changed and the way goes down


def share(table: Table) -> np.ndarray:
    """`[prompt, cell]`: each prompt's own share of its own way; NaN where it has none."""
    usable = ~spanless(table)
    found = np.full(table.values.shape, np.nan)
    with quiet():
        found[usable] = change(table)[usable] / span(table)[usable, None]
    return found + 0.0


def size(table: Table, moved: np.ndarray) -> np.ndarray:
    """How large differences are where cells are compared: the pooled share's size, or where no prompt has a way, the
    size of the mean difference itself."""
    shares = mean(pooled(table, moved))
    return np.abs(mean(moved) if np.isnan(shares).all() else shares)


def shown(table: Table) -> str:
    """What a figure shows by itself: `"effect"`, or `"change"` where no prompt has one."""
    return "change" if spanless(table).all() else "effect"


def doubts(table: Table, metric: str, *, own: bool, prompt: int | None = None) -> list[str]:
    """What a reader of shares has to know: which are none, and which are too small to trust.

    Args:
        own: whether they are each prompt's own.
        prompt: the one that is meant; all of them, if left out.
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
            told = "the same" if spanless(table).all() else "the same in the mean"
            return [_none(metric, told, table.prompts[spanless(table)])]
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


def _none(metric: str, told: str, prompts: np.ndarray) -> str:
    of = f" for prompt {_numbers(prompts)}" if len(prompts) else ""
    return (
        f"{metric} of clean and corrupted runs is {told}{of}, so there is no share of their difference: NaN there; "
        "change() has the differences themselves"
    )


def _numbers(prompts: np.ndarray) -> str:
    return ", ".join(map(str, prompts[:8])) + (f", ... ({len(prompts)} in all)" if len(prompts) > 8 else "")


def _enough(whole: np.ndarray, size: np.ndarray) -> np.ndarray:
    with quiet():
        return (whole >= TINY * size) & (whole > 0) & np.isfinite(whole)


def beside(ends: np.ndarray, values: np.ndarray) -> np.ndarray:
    """A number for each prompt, beside whatever else the values have."""
    return ends.reshape(-1, *[1] * (values.ndim - 1))
