"""`run`: packed rows, from the recorded pass to their final states and reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from nnsplice.packed.base_runs import BaseRuns
from nnsplice.packed.cost import Cost
from nnsplice.packed.forward import PackedForward
from nnsplice.packed.heads import Head
from nnsplice.packed.knockouts import OWN_CODE
from nnsplice.packed.own_code import check_own_code
from nnsplice.packed.recording import Recording, record
from nnsplice.packed.rows import Read, Row, SiteLocator, prepared

#: Numbers of queries and keys are padded to a multiple of this, so that more rows share a call of attention: on a GPU
#: padding costs less than kernel launches (measured, see bench/RESULTS.md).
BUCKETS = {"cpu": 1, "cuda": 64}


@dataclass(frozen=True)
class PackedResult:
    """The final states and reads of rows."""

    head: Head
    #: The output of the last block at the `end` of each row, `[width]`, by the row's index.
    ends: Mapping[int, Tensor]
    #: The values of reads, `[position, width]`, by the row's index and the read.
    readings: Mapping[tuple[int, Read], Tensor]
    cost: Cost

    def states(self) -> Tensor:
        """The final states of all rows with an `end`, in order: `[row, width]`."""
        return torch.stack([self.ends[number] for number in sorted(self.ends)])


def run(
    base: BaseRuns, rows: Sequence[Row], *, prompts: Sequence[int] | None = None, keep_graph: bool = False
) -> PackedResult:
    """Run rows together; their prompts may have different lengths.

    Args:
        prompts: the prompts to record together, so that several calls share a recorded pass; those of the rows if left
            out.
        keep_graph: keep states and reads in the autograd graph of the written values. The recorded run is not part of
            it, so gradients pass only through the blocks after the edits.

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
    """The bucket size of a recording: that of its device, but no larger than the longest prompt needs."""
    ends = sorted((*recording.bases.values(), recording.total))
    longest = max(end - start for start, end in pairwise(ends))
    return min(BUCKETS.get(recording.entering[0].device.type, 1), 1 << (longest - 1).bit_length())


def recorded(base: BaseRuns, prompts: Sequence[int]) -> tuple[Recording, Cost]:
    """The recorded pass of exactly these prompts, so that results never depend on earlier calls; and its cost.

    The cost is 0 if the pass was recorded before.
    """
    wanted = tuple(dict.fromkeys(prompts))
    known = base.memo.get("recording")
    if known is not None and wanted == known.prompts and base.memo.get("way") == known.way:
        return known, Cost()
    recording = base.memo["recording"] = record(base, wanted)
    return recording, recording.cost
