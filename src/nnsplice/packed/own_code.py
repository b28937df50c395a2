"""Code of the user's in the blocks of a model: whether it does to packed tokens what it does to a prompt's.

A hook that changes the fifth token of a prompt changes the fifth of a pack, which belongs to another row. So packs of
one token are run first, once in each row, and for as many rows as a pack of the job has tokens: every row has to leave
the last block as the token did in its prompt.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from nnsplice import engine
from nnsplice.packed.base import Base
from nnsplice.packed.cost import Cost
from nnsplice.packed.forward import PackedForward
from nnsplice.packed.recording import Recording
from nnsplice.packed.rows import PreparedRow, Row

#: How far states may lie apart by rounding, relative to their size; parts of float64 models may compute in float32.
TOLERANCE = {torch.float64: 5e-6, torch.float32: 3e-4, torch.float16: 3e-2}
HALF = 1e-1
#: Tokens that attention modules with code of their own run at most for this, as they run the whole prompt of each row.
MOST = 1 << 16
#: Where the memo of a base has how many rows were tried, by the way of the recording.
TRIED = "rows tried"


def check_own_code(base: Base, recording: Recording, tokens: int, bucket: int) -> Cost:
    """Raise where code of the user's makes packed rows other runs than the recorded ones; what it cost to know.

    Args:
        tokens: how many the pack has that is to run.

    Raises:
        NotImplementedError: a row does not give what its prompt gives.
    """
    if not engine.has_own_code(module for block in recording.blocks for module in block.modules()):
        return Cost()
    base_of_longest, longest = _longest(recording)
    rows = max(longest, tokens) + 1
    if recording.whole.calls:
        rows = min(rows, MOST // longest)
        if rows <= longest:
            raise NotImplementedError("code of yours stands in its blocks, and the prompts are too long to try it")
    tried = base.memo.setdefault(TRIED, {})
    if tried.get(recording.way, 0) >= rows:
        return Cost()
    cost, row = Cost(), _last_token(recording, base_of_longest, longest)
    for count in (1, rows):
        forward = PackedForward(base.root, recording, [row] * count, base.cost_model, bucket)
        with torch.no_grad():
            states = torch.stack([*forward.run().values()])
        cost += forward.cost
        if not _are(states, recording.entering[-1][row.base + row.last]):
            raise NotImplementedError(
                "code of yours in its blocks (a hook, a replaced forward, a class of your own) does not change a token "
                "by that token alone"
            )
    tried[recording.way] = rows
    return cost


def _longest(recording: Recording) -> tuple[int, int]:
    """Where the longest prompt begins among the recorded tokens, and its length."""
    ends = sorted((*recording.bases.values(), recording.total))
    return max(((start, end - start) for start, end in pairwise(ends)), key=lambda found: found[1])


def _last_token(recording: Recording, base: int, length: int) -> PreparedRow:
    """The last token of the prompt that begins there, unchanged, through all blocks."""
    prompt = next(prompt for prompt, start in recording.bases.items() if start == base)
    return PreparedRow(
        Row(prompt, (), length - 1), (), (), layer=0, start=length - 1, last=length - 1,
        prompt=list(recording.bases).index(prompt), base=base, changed_only=False, changed=(),
    )  # fmt: skip


def _are(states: Tensor, expected: Tensor) -> bool:
    """Whether all rows are this state, but for rounding; a few numbers that are far larger hide none of the others."""
    wide, there = states.double(), expected.double().to(states.device)
    apart = (wide - there) / (there.abs() + there.abs().median().clamp_min(1e-300))
    same = (wide == there) | (wide.isnan() & there.isnan())
    apart = torch.where(same, 0.0, apart).pow(2).mean(-1).sqrt()
    return bool((apart <= TOLERANCE.get(states.dtype, HALF)).all())
