"""The engine under every exact question: tokens of many edited runs packed into one sequence, each block called once.

An edit has no effect before its layer and before its token. So its row starts there: the input of that layer is taken
from a recorded run, and earlier tokens are recorded keys and values. Rows are concatenated without padding to a pack,
and each block is called once for the pack. In the last block a row computes its keys and values, and the output of one
token only.

rows             a row: a prompt with edits, cuts and reads; the block and token where it starts
base_runs        the unedited runs that rows start from
recording        the recorded runs: inputs of every block, keys and values, masks
passes           one pass of a recording
layout           index maps of packed tokens, and the rows that attend together
indices          index tensors, copied to a device together
attention        attention of packed rows, through transformers' public registry
masks            attention masks of packed rows, from the recorded masks
knockouts        attention with cut edges
whole_prompts    attention modules that do not use the registry, which run whole prompts
forward          the forward pass of packed rows, block by block
own_code         the check of the user's hooks and classes on packed tokens
edits            edits and reads of packed tokens
sae_edits        edits of features of an SAE, and of its error
heads            final norm and logits
running          run: rows -> final states and reads
frozen           run_frozen: rows in which every branch but the edited one adds its recorded output
frozen_rows      these rows, and the tokens whose stream an edit changes
frozen_forward   the forward pass of these rows
cost             forward passes, block calls, tokens, floating point operations
"""

from nnsplice.packed.base_runs import BaseRuns
from nnsplice.packed.cost import Cost, CostModel
from nnsplice.packed.frozen import FrozenBranch, FrozenRow, run_frozen
from nnsplice.packed.heads import LOGITS, Head
from nnsplice.packed.knockouts import cut, knockout
from nnsplice.packed.recording import padded_at_most, ways
from nnsplice.packed.rows import Cut, Edit, Read, Row, replaced
from nnsplice.packed.running import PackedResult, recorded, run

__all__ = [
    "LOGITS",
    "BaseRuns",
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
