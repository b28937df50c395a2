"""The engine under every exact question: tokens of many edited runs packed into one sequence, each block called once.

An edit changes nothing before its layer and before its token. So its row begins there: what enters that layer is taken
from the recorded run, and the tokens before come in as recorded keys and values. Rows stand side by side without
padding, and each block is called once for all of them. In the last block a row needs its keys and values, and then one
token: the one whose state is wanted.

rows         what is asked: a prompt, edits, reads, an end; and where each row begins
base         the runs that rows are edits of
recording    one pass of these runs: what enters every block, keys and values
layout       where every token stands, and which rows attend together
attention    attention of packed rows, through transformers' public registry
masks        which token sees which, as the model's own masks say
cutting      edges of attention taken out of that
whole        attention modules with code of their own, which run whole prompts
wave         the way through the blocks
edits        writing into packed tokens, and reading them
parts        edits of features of an SAE, and of its error
heads        from final states to logits
run          rows in, final states and readings out
still        rows of which every branch but the edited one adds what it added before
cost         what that is: passes, calls of blocks, tokens, operations
"""

from nnsplice.packed.base import Base
from nnsplice.packed.cost import Cost, Law
from nnsplice.packed.cutting import cut, knockout
from nnsplice.packed.heads import LOGITS, Head
from nnsplice.packed.recording import padded_at_most, ways
from nnsplice.packed.rows import Cut, Edit, Read, Row, replaced
from nnsplice.packed.run import Ran, recorded, run
from nnsplice.packed.still import Branch, StillRow, run_still

__all__ = [
    "LOGITS",
    "Base",
    "Branch",
    "Cost",
    "Cut",
    "Edit",
    "Head",
    "Law",
    "Ran",
    "Read",
    "Row",
    "StillRow",
    "cut",
    "knockout",
    "padded_at_most",
    "recorded",
    "replaced",
    "run",
    "run_still",
    "ways",
]
