"""Rows with frozen branches: the direct change of the stream, and what later sites read of it.

A branch is an attention or an MLP. Where every branch but the edited one adds what it added in the recorded run, an
edit moves the stream by one difference, from where it is made to the end. So no block has to run between the edit and a
site that reads it; and a block that is read runs only as far as the last site that is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nnsplice import engine
from nnsplice.packed.base import Base
from nnsplice.packed.cost import Cost
from nnsplice.packed.frozen_forward import FrozenForward
from nnsplice.packed.frozen_rows import FrozenBranch, FrozenRow, Moved, moved_row
from nnsplice.packed.heads import Head
from nnsplice.packed.own_code import check_own_code
from nnsplice.packed.rows import Read, SiteLocator
from nnsplice.packed.running import bucket_size, recorded


@dataclass(frozen=True)
class FrozenResult:
    """The final states and readings of rows with frozen branches."""

    head: Head
    #: By the row's number, the state that left the last block at its `end`: `[width]`.
    ends: Mapping[int, Tensor]
    #: By the row's number and the read; at other tokens, and where it is missing, a read has the recorded values.
    moved: Mapping[tuple[int, Read], Moved]
    cost: Cost


def run_frozen(base: Base, rows: Sequence[FrozenRow], branches: Sequence[FrozenBranch]) -> FrozenResult:
    """Run rows of which every branch is frozen but their own.

    Args:
        base: has to keep what all branches add: `Base(..., keep=[branch.added for branch in branches])`.
        branches: all of the model's.

    Raises:
        NotImplementedError: this model, or one of these sites, is not covered.
    """
    recording, recording_cost = recorded(base, [row.row.prompt for row in rows])
    if any(block.post_norm or block.scale != 1.0 or block.beside for block in recording.tower.blocks):
        raise NotImplementedError("its stream is normed or scaled on its way, so that a difference does not stay one")
    if engine.has_code_around(module for block in recording.blocks for module in block.modules()):
        raise NotImplementedError("hooks of the user's stand in its blocks, which may change a difference on its way")
    if any(row.row.cuts for row in rows):
        raise NotImplementedError("edges of attention are cut in rows whose branches run")
    locator = SiteLocator(recording)
    moved = [moved_row(recording, locator, row) for row in rows]
    recording_cost += check_own_code(base, recording, sum(len(row.tokens) for row in moved), bucket_size(recording))
    forward = FrozenForward(base, recording, moved, branches)
    with torch.no_grad():
        forward.run()
    return FrozenResult(recording.head, forward.ends, forward.moved, recording_cost + forward.cost)
