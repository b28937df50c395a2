"""Sweeps: activation patching, ablation and causal tracing at every site.

plan             Plan: the cells that will run, as plain data
planned_cells    the fields of a plan, and the tokens that each cell changes
planning         plan_sweep: prompts paired, sites expanded, cells that cannot change set apart
expansion        sites -> targets, in execution order
targets          a cell with the sites and tokens that are changed for it
sets             cells that change several sites together
role_alignment   corresponding tokens of a pair by their roles
corruption       embeddings changed in every edited run
operations       what is done to a site
subspace_fit     whether a subspace fits every site
knockouts        cells in which queries do not attend to some keys
sources          the values that are written: of the clean run, of a reference, drawn
pruning          cells that cannot change what the metric reads
jobs             the cells of a plan as ranges
identity         the request of a sweep as plain data, for results and journals

sweeping         sweep: plan and run in one call
running          a plan run in this process
chunking         jobs in chunks, and less at once when memory runs out
collecting       the values while a sweep runs, with those of a journal
unedited         the clean and the corrupted run
sequences        answers of several tokens
executors        the reference and the batched executor
packing          the packed executor
choosing         the choice of an executor
probing          the trial behind it: a few cells in every executor
probe_cells      the cells of the trial
rounding         how far equal numbers may lie apart
reading          the token whose logits a metric reads

dispatching      run: in this process, or in units by others
distributed      a sweep's run folder: its workers, and its result
pieces           a plan cut into units
plan_files       a plan as files for other processes
stored           values that go to a Zarr store
tables           other requests over a plan's cells, in units of prompts

recipes          ablate, causal_trace
other_model      values of another model: what has to fit
crossing         crossings: input or weights, of two models
revisions        over_revisions: one job over checkpoints
weights          sweep_weights: a tuned model's weights in its base, site by site
weight_runs      the forward passes of that
weight_units     the same in units of prompts
prefix           runs that start at the first layer that differs
"""

from nnsplice.sweeps.crossing import crossings
from nnsplice.sweeps.dispatching import run
from nnsplice.sweeps.plan import Plan
from nnsplice.sweeps.planning import plan_sweep
from nnsplice.sweeps.recipes import ablate, causal_trace
from nnsplice.sweeps.revisions import Revisions, over_revisions
from nnsplice.sweeps.sweeping import sweep
from nnsplice.sweeps.weights import sweep_weights

__all__ = [
    "Plan",
    "Revisions",
    "ablate",
    "causal_trace",
    "crossings",
    "over_revisions",
    "plan_sweep",
    "run",
    "sweep",
    "sweep_weights",
]
