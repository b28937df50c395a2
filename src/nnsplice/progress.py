"""The progress bar, shown after a second of work."""

from __future__ import annotations

import warnings
from typing import Any

#: How many seconds work has to take for its bar to be shown.
DELAY = 1.0


def bar(what: str, total: int | None, unit: str, show: bool | None = True, *, done: int = 0, **options: Any) -> Any:
    """A bar, as a context manager; one that is not shown counts too.

    Args:
        what: what is being done, in a word.
        total: how many units it will be; None where nobody knows.
        unit: what is counted; `"B"` is shown in thousands.
        show: True shows it once the work has taken `DELAY`, None on a terminal only.
        done: what was done before.
        options: for tqdm.
    """
    if show is False:  # tqdm.auto looks for a notebook, and warns of what it would need there
        from tqdm import tqdm

        return tqdm(total=total, initial=done, disable=True)
    with warnings.catch_warnings():  # in a notebook without ipywidgets the bar is text, which needs no warning
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm

    options = {"delay": DELAY, **options}
    if unit == "B":
        options |= {"unit_scale": True, "unit_divisor": 1000}
    return tqdm(total=total, initial=done, desc=what, unit=unit, disable=None if show is None else False, **options)
