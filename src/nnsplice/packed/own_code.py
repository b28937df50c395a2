"""The check that the user's code in the blocks of a model has the same effect on packed tokens as in a whole prompt.

A hook that changes the fifth token of a prompt would change the fifth token of a pack, which belongs to another row. So
the last token of the longest prompt is run as a pack of one row, and as one of as many equal rows as the real pack has
tokens: every row has to end with the recorded state of that token.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from nnsplice import engine
from nnsplice.packed.base_runs import BaseRuns
from nnsplice.packed.cost import Cost
from nnsplice.packed.forward import PackedForward
from nnsplice.packed.recording import Recording
from nnsplice.packed.rows import PreparedRow, Row

#: The allowed relative difference of states by rounding; parts of float64 models may compute in float32.
TOLERANCE = {torch.float64: 5e-6, torch.float32: 3e-4, torch.float16: 3e-2}
HALF = 1e-1
#: The most tokens of this check where attention runs the whole prompt of each row (`whole_prompts`).
MOST_TOKENS = 1 << 16
#: Key of `BaseRuns.memo`: the number of rows that passed the check, by the way of the recording.
TRIED = "rows tried"


def check_own_code(base: BaseRuns, recording: Recording, tokens: int, bucket: int) -> Cost:
    """Check the user's code in the blocks, if there is any; returns the cost of the check.

    Args:
        tokens: the number of tokens of the pack that is to run.

    Raises:
        NotImplementedError: a row does not end with the recorded state.
    """
    if not engine.has_own_code(module for block in recording.blocks for module in block.modules()):
        return Cost()
    base_of_longest, longest = _longest(recording)
    rows = max(longest, tokens) + 1
    if recording.whole.calls:
        rows = min(rows, MOST_TOKENS // longest)
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
        if not _all_equal(states, recording.entering[-1][row.base + row.last]):
            raise NotImplementedError(
                "code of yours in its blocks (a hook, a replaced forward, a class of your own) does not change a token "
                "by that token alone"
            )
    tried[recording.way] = rows
    return cost


def _longest(recording: Recording) -> tuple[int, int]:
    """The index of the longest prompt's first token among the recorded tokens, and its length."""
    ends = sorted((*recording.bases.values(), recording.total))
    return max(((start, end - start) for start, end in pairwise(ends)), key=lambda found: found[1])


def _last_token(recording: Recording, base: int, length: int) -> PreparedRow:
    """A row without edits: the last token of the prompt at this index, through all blocks."""
    prompt = next(prompt for prompt, start in recording.bases.items() if start == base)
    return PreparedRow(
        Row(prompt, (), length - 1), (), (), layer=0, start=length - 1, last=length - 1,
        prompt=list(recording.bases).index(prompt), base=base, changed_only=False, changed=(),
    )  # fmt: skip


def _all_equal(states: Tensor, expected: Tensor) -> bool:
    """Whether all rows equal the expected state up to rounding, number by number, so that outliers hide nothing."""
    wide, there = states.double(), expected.double().to(states.device)
    apart = (wide - there) / (there.abs() + there.abs().median().clamp_min(1e-300))
    same = (wide == there) | (wide.isnan() & there.isnan())
    apart = torch.where(same, 0.0, apart).pow(2).mean(-1).sqrt()
    return bool((apart <= TOLERANCE.get(states.dtype, HALF)).all())
