"""The engine under every exact question: tokens of many edited runs packed into one sequence, each block called once.

An edit changes nothing before its layer and before its token. So its row begins there: what enters that layer is taken
from the recorded run, and the tokens before come in as recorded keys and values. Rows stand side by side without
padding, and each block is called once for all of them. In the last block a row needs its keys and values, and then one
token: the one whose state is wanted.

rows             a prompt with edits, cuts and reads; and the block and token where each row begins
base             the model and the prompts that rows are edits of
recording        the recorded run of these prompts: inputs of every block, keys and values, masks
passes           one pass of a recording
layout           index maps of packed tokens, and the rows that attend together
indices          index tensors, sent to a device together
attention        attention of packed rows, through transformers' public registry
masks            which token sees which, from the model's own masks
knockouts        attention with edges cut
whole_prompts    attention modules with code of their own, which run whole prompts
forward          the forward pass of packed rows, block by block
own_code         hooks and classes of the user's, tried on packed tokens
edits            writing and reading packed tokens
sae_edits        edits of features of an SAE, and of its error
heads            final norm and logits
running          run: rows in, final states and readings out
frozen           run_frozen: rows in which every branch but the edited one adds what it added before
frozen_rows      these rows, and the tokens of each that an edit moves
frozen_forward   their way through the blocks
cost             passes, calls of blocks, tokens, operations
"""

from nnsplice.packed.base import Base
from nnsplice.packed.cost import Cost, CostModel
from nnsplice.packed.frozen import FrozenBranch, FrozenRow, run_frozen
from nnsplice.packed.heads import LOGITS, Head
from nnsplice.packed.knockouts import cut, knockout
from nnsplice.packed.recording import padded_at_most, ways
from nnsplice.packed.rows import Cut, Edit, Read, Row, replaced
from nnsplice.packed.running import PackedResult, recorded, run

__all__ = [
    "LOGITS",
    "Base",
    "Cost",
    "CostModel",
    "Cut",
    "Edit",
    "FrozenBranch",
    "FrozenRow",
    "Head",
    "PackedResult",
    "Read",
    "Row",
    "cut",
    "knockout",
    "padded_at_most",
    "recorded",
    "replaced",
    "run",
    "run_frozen",
    "ways",
]
