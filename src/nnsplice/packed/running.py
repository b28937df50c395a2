"""Run packed rows: their final states and readings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from nnsplice.packed.base import Base
from nnsplice.packed.cost import Cost
from nnsplice.packed.forward import PackedForward
from nnsplice.packed.heads import Head
from nnsplice.packed.knockouts import OWN_CODE
from nnsplice.packed.own_code import check_own_code
from nnsplice.packed.recording import Recording, record
from nnsplice.packed.rows import Read, Row, SiteLocator, prepared

#: Numbers of queries and keys that are rounded up to a multiple share one call of attention: measured, see
#: bench/RESULTS.md. A launch on a GPU costs more than the padding does.
BUCKETS = {"cpu": 1, "cuda": 64}


@dataclass(frozen=True)
class PackedResult:
    """The final states and readings of a pack of rows."""

    head: Head
    #: By the row's number, the state that left the last block at its `end`: `[width]`.
    ends: Mapping[int, Tensor]
    #: By the row's number and the read: `[position, width]`.
    readings: Mapping[tuple[int, Read], Tensor]
    cost: Cost

    def states(self) -> Tensor:
        """The states of all rows that have an end, in their order: `[row, width]`."""
        return torch.stack([self.ends[number] for number in sorted(self.ends)])


def run(
    base: Base, rows: Sequence[Row], *, prompts: Sequence[int] | None = None, keep_graph: bool = False
) -> PackedResult:
    """Run rows side by side; their prompts may have different lengths.

    Args:
        prompts: those that are recorded together, where several runs of rows about some of them share the recorded
            pass; those of the rows, if left out.
        keep_graph: leave states and readings in the autograd graph of what the edits write; the recorded run is no
            part of it, so gradients pass through the blocks behind the edits only.

    Raises:
        NotImplementedError: this model, or one of these sites, is not covered.
    """
    recording, recording_cost = recorded(base, [row.prompt for row in rows] if prompts is None else prompts)
    if recording.whole.calls and any(row.cuts for row in rows):
        raise NotImplementedError(OWN_CODE)
    locator = SiteLocator(recording)
    prepared_rows = [prepared(row, locator, allow_partial=not recording.whole.calls) for row in rows]
    bucket = bucket_size(recording)
    recording_cost += check_own_code(base, recording, sum(row.length for row in prepared_rows), bucket)
    forward = PackedForward(base.root, recording, prepared_rows, base.cost_model, bucket)
    with torch.set_grad_enabled(keep_graph):
        ends = forward.run()
    return PackedResult(recording.head, ends, forward.readings, recording_cost + forward.cost)


def bucket_size(recording: Recording) -> int:
    """The multiple that numbers of queries and keys are rounded up to, no larger than the prompts need."""
    ends = sorted((*recording.bases.values(), recording.total))
    longest = max(end - start for start, end in pairwise(ends))
    return min(BUCKETS.get(recording.entering[0].device.type, 1), 1 << (longest - 1).bit_length())


def recorded(base: Base, prompts: Sequence[int]) -> tuple[Recording, Cost]:
    """The recorded pass of just these prompts, so that what a chunk gives never depends on the chunks before it.

    And what it cost, where it was made now.
    """
    wanted = tuple(dict.fromkeys(prompts))
    known = base.memo.get("recording")
    if known is not None and wanted == known.prompts and base.memo.get("way") == known.way:
        return known, Cost()
    recording = base.memo["recording"] = record(base, wanted)
    return recording, recording.cost
