"""The engine: the only room that uses nnsight.

tracing     the only file that imports it: wrap, run, wait for a value, write a value, remote runs
models      what is asked of a model as a whole
digest      what tells its weights from those of another of its name
memory      how much of it runs at once
recording   the order of its modules, recorded once
places      paths -> sites of the model, in that order
anyio_first what has to be imported before nnsight
arguments   what a call was given, by name, and how many tokens came before
batch       where the prompts' own tokens stand in a run
signatures  what a module's call takes
proof       whether the recorded order agrees with the atlas
causality   whether tokens depend on those before them alone
calls       the same outside a trace, from pass to pass of a generation
intercept   change a value wherever the model is called from
module_ends read or change what a module reads or returns, outside of traces
hooks       which hooks and replaced forwards stand around modules
roots       what they make of values after these were read
turns       what threads share and take turns with
"""

import nnsplice.engine.anyio_first  # noqa: F401  # before nnsight
from nnsplice.engine.arguments import BLOCK_CACHE_NAMES, CACHE_NAMES, cache_argument, cache_of, tokens_before
from nnsplice.engine.batch import Batch, batch_of
from nnsplice.engine.calls import Call, Sequence, Watch, unwatch, watch
from nnsplice.engine.causality import after_last_attention, is_causal, is_causal_for
from nnsplice.engine.digest import weights_digest
from nnsplice.engine.hooks import has_code_around, has_own_code, hooks_of, replaced_in
from nnsplice.engine.intercept import Interception
from nnsplice.engine.memory import is_memory, room
from nnsplice.engine.models import (
    as_model,
    attention_of,
    check_tokens,
    decoder_start,
    in_training,
    is_edited,
    is_encoder_decoder,
    keeps_logits,
    name_of,
    refuse_edits,
    token_texts,
    tokenizer_of,
)
from nnsplice.engine.module_ends import changing, reading
from nnsplice.engine.places import Known, Rank, expand, known, listed
from nnsplice.engine.recording import example_of, offer_probe, order_of, record, undisturbed
from nnsplice.engine.roots import refuse_changed_logits, refuse_replaced, runs_alone
from nnsplice.engine.signatures import ANY, Taken, as_taken, taken_by
from nnsplice.engine.spread import gathered, meshes, read_logits, spread_like, whole
from nnsplice.engine.team import Team
from nnsplice.engine.tracing import (
    ONLY_LOCAL,
    Model,
    Place,
    Scope,
    callable_of,
    first_input,
    is_inside,
    keep,
    only_local,
    place,
    read_remote,
    run,
    scope_of,
    with_first_input,
    worker,
    wrap,
    wrap_bare,
    write_remote,
)
from nnsplice.engine.turns import Home, elsewhere, home, is_aside, other_attention, turn

__all__ = [
    "ANY",
    "BLOCK_CACHE_NAMES",
    "CACHE_NAMES",
    "ONLY_LOCAL",
    "Batch",
    "Call",
    "Home",
    "Interception",
    "Known",
    "Model",
    "Place",
    "Rank",
    "Scope",
    "Sequence",
    "Taken",
    "Team",
    "Watch",
    "after_last_attention",
    "as_model",
    "as_taken",
    "attention_of",
    "batch_of",
    "cache_argument",
    "cache_of",
    "callable_of",
    "changing",
    "check_tokens",
    "decoder_start",
    "elsewhere",
    "example_of",
    "expand",
    "first_input",
    "gathered",
    "has_code_around",
    "has_own_code",
    "home",
    "hooks_of",
    "in_training",
    "is_aside",
    "is_causal",
    "is_causal_for",
    "is_edited",
    "is_encoder_decoder",
    "is_inside",
    "is_memory",
    "keep",
    "keeps_logits",
    "known",
    "listed",
    "meshes",
    "name_of",
    "offer_probe",
    "only_local",
    "order_of",
    "other_attention",
    "place",
    "read_logits",
    "read_remote",
    "reading",
    "record",
    "refuse_changed_logits",
    "refuse_edits",
    "refuse_replaced",
    "replaced_in",
    "room",
    "run",
    "runs_alone",
    "scope_of",
    "spread_like",
    "taken_by",
    "token_texts",
    "tokenizer_of",
    "tokens_before",
    "turn",
    "undisturbed",
    "unwatch",
    "watch",
    "weights_digest",
    "whole",
    "with_first_input",
    "worker",
    "wrap",
    "wrap_bare",
    "write_remote",
]
