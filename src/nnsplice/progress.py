"""The bar of long work: one look, and silence where nobody asked for it."""

from __future__ import annotations

from typing import Any


def bar(what: str, total: int | None, unit: str, show: bool | None = True, *, done: int = 0, **options: Any) -> Any:
    """A bar, as a context manager; one that is not shown counts too.

    Args:
        what: what is being done, in a word.
        total: how many units it will be; None where nobody knows.
        unit: what is counted; `"B"` is shown in thousands.
        show: None shows it on a terminal only.
        done: what was done before.
        options: for tqdm.
    """
    if show is False:  # tqdm.auto looks for a notebook, and warns of what it would need there
        from tqdm import tqdm

        return tqdm(total=total, initial=done, disable=True)
    from tqdm.auto import tqdm

    if unit == "B":
        options |= {"unit_scale": True, "unit_divisor": 1000}
    return tqdm(total=total, initial=done, desc=what, unit=unit, disable=None if show is None else False, **options)
