"""All checks, in order of dependence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from nnsplice.checks.finding import Finding, Subject, reason_of, subject_of
from nnsplice.checks.replay import replay
from nnsplice.checks.streams import causal, heads, layouts, padding, promises
from nnsplice.checks.structure import order, parts, sites
from nnsplice.paths import Slice

Check = Callable[[Subject], Iterator[Finding]]

#: Name -> check.
CHECKS: dict[str, Check] = {
    "parts": parts,
    "order": order,
    "sites": sites,
    "replay": replay,
    "heads": heads,
    "promises": promises,
    "layouts": layouts,
    "causal": causal,
    "padding": padding,
}


def run_checks(model: Any, layers: Slice | tuple[int, ...] | int | None = None, *, seed: int = 0) -> Iterator[Finding]:
    """Test the exactness of nnsplice on one model.

    >>> from nnsplice.checks import run_checks
    >>> {finding.state for finding in run_checks(model, layers=0) if finding.check == "layouts"}
    {'ok'}

    Args:
        model: a model from `ns.load`.
        layers: the layers to test; None for all.
        seed: the seed of the random prompts.

    Yields:
        Each finding as soon as it is measured.

    Raises:
        BadArgument: a model in train mode.
        OutOfRange: a layer that does not exist.
    """
    subject = subject_of(model, layers, seed)
    for name, check in CHECKS.items():
        if name != "parts" and not subject.atlas.towers:
            yield Finding(name, "the parts of this model", "skipped", detail="they are not recognised")
            continue
        yield from _guarded(name, check, subject)


def _guarded(name: str, check: Check, subject: Subject) -> Iterator[Finding]:
    """The findings of a check; an error in the check itself is a failure too."""
    try:
        yield from check(subject)
    except Exception as error:
        yield Finding(name, "the check itself", "FAILED", detail=reason_of(error))
