"""The fast exact executor: tokens of all cells packed into one sequence, every block called once for all.

A cell changes nothing before its layer and before its token. So its row begins there: what enters that layer is taken
from the recorded corrupted run, and the tokens before come in as recorded keys and values. Rows of all cells stand side
by side without padding, and each block is called once for all of them. In the last block a row needs its keys and
values, and then one token: the one that the metric reads.

executor     jobs in, values out
recording    one pass of the corrupted prompts: what enters every block, keys and values
rows         where each job's row begins, what is written on the way
layout       where every token stands, and which rows attend together
attention    attention of packed rows, through transformers' public registry
masks        which token sees which, as the model's own masks say
whole        attention modules with code of their own, which run whole prompts
wave         the way through the blocks
edits        writing into packed tokens
heads        from final states to what the metric reads
"""

from nnsplice.sweeps.executors import Executor
from nnsplice.sweeps.packed.executor import corrupted_logits, run_packed, tokens_of
from nnsplice.sweeps.packed.recording import WAYS

packed: Executor = Executor(run_packed, tokens_of, mixed=True, corrupted=corrupted_logits)

__all__ = ["WAYS", "packed"]
