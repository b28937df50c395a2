"""The fast exact executor: tokens of all cells packed into one sequence, every block called once for all.

executor     the wave through the blocks
rows         where each job's row begins, what is written on the way
recording    one pass of the corrupted prompts: what enters every block, keys and values
attention    attention of packed rows, through transformers' public registry
"""

from nnsplice.sweeps.packed.executor import packed

__all__ = ["packed"]
