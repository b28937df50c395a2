"""One bar, in bytes."""

from __future__ import annotations

from typing import Any


def bar(what: str, total: int | None, show: bool, position: int | None = None) -> Any:
    """A bar that counts bytes; one that is not shown counts too."""
    if not show:  # tqdm.auto looks for a notebook, and warns of what it would need there
        from tqdm import tqdm

        return tqdm(disable=True)
    from tqdm.auto import tqdm

    return tqdm(desc=what, total=total, unit="B", unit_scale=True, unit_divisor=1000, position=position)
