"""Rows with frozen branches, for path patching: the direct effect of an edit on later sites.

A branch is an attention or an MLP. If every branch but the edited one adds its recorded output, an edit changes the
stream by one difference, which stays the same up to the last block. So no block runs between the edit and a site that
is read, and a block with such a site runs only up to that site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nnsplice import engine
from nnsplice.packed.base_runs import BaseRuns
from nnsplice.packed.cost import Cost
from nnsplice.packed.frozen_forward import FrozenForward
from nnsplice.packed.frozen_rows import FrozenBranch, FrozenRow, Moved, moved_row
from nnsplice.packed.heads import Head
from nnsplice.packed.own_code import check_own_code
from nnsplice.packed.rows import Read, SiteLocator
from nnsplice.packed.running import bucket_size, recorded


@dataclass(frozen=True)
class FrozenResult:
    """The final states and reads of rows with frozen branches."""

    head: Head
    #: The output of the last block at the `end` of each row, `[width]`, by the row's index.
    ends: Mapping[int, Tensor]
    #: The changed values of reads, by the row's index and the read; all other values are as recorded.
    moved: Mapping[tuple[int, Read], Moved]
    cost: Cost


def run_frozen(base: BaseRuns, rows: Sequence[FrozenRow], branches: Sequence[FrozenBranch]) -> FrozenResult:
    """Run rows in which all branches are frozen except those that they edit.

    Args:
        base: keeps the outputs of all branches: `BaseRuns(..., keep=[branch.added for branch in branches])`.
        branches: all branches of the model.

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
