"""Check that writing a run's own values changes nothing, and other values something."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from nnsplice.activations import capture, patched_logits
from nnsplice.checks.finding import CheckedValue, Finding, Subject, attempt, gap, kinds
from nnsplice.checks.structure import require_eager
from nnsplice.paths import Slice

#: Values that are written by changing other values computed from them, so that rounding may show.
_COMPUTED = ("pattern", "ungated")


def replay(subject: Subject) -> Iterator[Finding]:
    """A run's own values leave its logits equal, bit for bit; the values of another prompt do not."""
    for kind in kinds(subject):
        yield attempt("replay", str(kind.path), lambda kind=kind: _replayed(subject, kind))


def _replayed(subject: Subject, kind: CheckedValue) -> Finding:
    require_eager(subject, kind)
    what = str(kind.path)
    saved = capture(subject.model, subject.inputs, kind.path.at(Slice()))
    own = patched_logits(subject.model, subject.inputs, saved, progress=False)
    number = gap(own, subject.logits)
    allowed = subject.tolerance if kind.value.name in _COMPUTED or kind.role == "experts" else 0.0
    if not number <= allowed:
        return Finding("replay", what, "FAILED", number, "writing a run's own values changes its logits")
    # A write without effect has to fail. Samples of neurons or experts may have no effect.
    if kind.everything:
        other = patched_logits(subject.model, subject.inputs, saved.slice[1, 0], progress=False)
        if torch.equal(other, own):
            return Finding("replay", what, "FAILED", number, "writing another prompt's values changes nothing")
    return Finding("replay", what, "ok", number, "computed again on the way, so rounding shows" if number else "")
