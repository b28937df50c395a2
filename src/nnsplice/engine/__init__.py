"""The engine: the only room that uses nnsight.

tracing           the only file that imports it: wrap, run, wait for a value, write a value, remote runs
nnsight_private   its private names
anyio_first       imports that must come before nnsight
models            properties of a whole model
digest            the digest of its weights
memory            how many tokens run at once
recording         the order in which its modules run, recorded in one forward pass
model_map         paths -> sites of the model, in this order
order_checks      whether the recorded order agrees with the atlas
signatures        the arguments of a module's `forward`
arguments         the arguments of a call by name, and the number of cached tokens
batch             padding and token positions, in a trace
calls             the same outside a trace, for each pass of a generation
causality         whether later tokens change earlier ones
intercept         change a value however the model is called
module_ends       read or change a module's input or output with torch hooks
hooks             user code around modules: hooks, replaced forwards
outer_code        user code that changes values after nnsight has read them
model_lock        locks on models that several threads run
threads           the current thread and task, and whether it only probes a model
sharding          models over several processes: gather and shard values
process_group     agreement between these processes
"""

import nnsplice.engine.anyio_first  # noqa: F401  # before nnsight
from nnsplice.engine.arguments import (
    BLOCK_CACHE_NAMES,
    CACHE_NAMES,
    arguments_of,
    cache_argument,
    cache_of,
    parameters_of,
    tokens_before,
)
from nnsplice.engine.batch import Batch, batch_of
from nnsplice.engine.calls import CallWatcher, ForwardCall, Generation, unwatch_calls, watch_calls
from nnsplice.engine.causality import after_last_attention, is_causal, is_causal_for
from nnsplice.engine.digest import weights_digest
from nnsplice.engine.hooks import has_code_around, has_code_by_row, has_own_code, hooks_of, replaced_in
from nnsplice.engine.intercept import Interception
from nnsplice.engine.memory import is_out_of_memory, tokens_at_once
from nnsplice.engine.model_lock import locked, other_attention, other_thread_error
from nnsplice.engine.model_map import ModelMap, Rank, expand, listed, map_of
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
from nnsplice.engine.outer_code import refuse_changed_logits, refuse_replaced, runs_alone
from nnsplice.engine.process_group import ProcessGroup
from nnsplice.engine.recording import example_of, offer_probe, order_of, record, undisturbed
from nnsplice.engine.sharding import accepting_sharded, gather, meshes_of, read_logits, shard_like
from nnsplice.engine.signatures import ANY_SIGNATURE, Signature, fitted_inputs, signature_of
from nnsplice.engine.threads import ThreadAndTask, current_task, is_probing
from nnsplice.engine.tracing import (
    ONLY_LOCAL,
    Model,
    Scope,
    TracedEnd,
    callable_of,
    first_input,
    is_inside,
    keep,
    only_local,
    read_remote,
    run,
    scope_of,
    traced_end,
    with_first_input,
    worker,
    wrap,
    wrap_bare,
    write_remote,
)

__all__ = [
    "ANY_SIGNATURE",
    "BLOCK_CACHE_NAMES",
    "CACHE_NAMES",
    "ONLY_LOCAL",
    "Batch",
    "CallWatcher",
    "ForwardCall",
    "Generation",
    "Interception",
    "Model",
    "ModelMap",
    "ProcessGroup",
    "Rank",
    "Scope",
    "Signature",
    "ThreadAndTask",
    "TracedEnd",
    "accepting_sharded",
    "after_last_attention",
    "arguments_of",
    "as_model",
    "attention_of",
    "batch_of",
    "cache_argument",
    "cache_of",
    "callable_of",
    "changing",
    "check_tokens",
    "current_task",
    "decoder_start",
    "example_of",
    "expand",
    "first_input",
    "fitted_inputs",
    "gather",
    "has_code_around",
    "has_code_by_row",
    "has_own_code",
    "hooks_of",
    "in_training",
    "is_causal",
    "is_causal_for",
    "is_edited",
    "is_encoder_decoder",
    "is_inside",
    "is_out_of_memory",
    "is_probing",
    "keep",
    "keeps_logits",
    "listed",
    "locked",
    "map_of",
    "meshes_of",
    "name_of",
    "offer_probe",
    "only_local",
    "order_of",
    "other_attention",
    "other_thread_error",
    "parameters_of",
    "read_logits",
    "read_remote",
    "reading",
    "record",
    "refuse_changed_logits",
    "refuse_edits",
    "refuse_replaced",
    "replaced_in",
    "run",
    "runs_alone",
    "scope_of",
    "shard_like",
    "signature_of",
    "token_texts",
    "tokenizer_of",
    "tokens_at_once",
    "tokens_before",
    "traced_end",
    "undisturbed",
    "unwatch_calls",
    "watch_calls",
    "weights_digest",
    "with_first_input",
    "worker",
    "wrap",
    "wrap_bare",
    "write_remote",
]
