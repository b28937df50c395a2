"""Sweeps: activation patching, ablation and causal tracing at every site.

plan             Plan: the cells that will run, as plain data
planned_cells    the fields of a plan, and the tokens that each cell changes
planning         plan_sweep: pairs prompts, expands sites, separates cells that cannot change
expansion        sites -> targets, in execution order
targets          a cell with the sites and tokens that are changed for it
sets             cells that change several sites together
role_alignment   corresponding tokens of a pair by their roles
corruption       embeddings changed in every edited run
operations       patch, mean, zero, ...: the changes of a value
subspace_fit     the check that a subspace has the width of every site
knockouts        cells in which queries do not attend to some keys
sources          the values that are written: from the clean run, a reference, or noise
pruning          cells that cannot change what the metric reads
jobs             the cells of a plan, stored as ranges
identity         the identity of a sweep as plain data, for results and journals

sweeping         sweep: plan and run in one call
running          a plan run in this process
chunking         jobs in chunks that fit into memory
collecting       the values of a sweep while it runs, and its journal
unedited         the clean and the corrupted run
sequences        answers of several tokens
executors        the reference and the batched executor
packing          the packed executor
choosing         the choice of an executor
probing          the trial for that choice: a few cells in every executor
probe_cells      the cells of the trial
rounding         the tolerance of the trial
reading          the position whose logits a metric reads

dispatching      run: in this process, or in units by others
distributed      the run folder of a sweep: its units and its result
pieces           the cuts of a plan into units
plan_files       the files of a plan for other processes
stored           values that go to a Zarr store
tables           other questions about a plan's cells, in units of prompts

recipes          ablate, causal_trace
options          the options that they pass on
other_model      values from another model, and the checks that the models fit
crossing         crossings: the effect of tuning split into a site's input and weights
revisions        over_revisions: one job over training checkpoints
weights          sweep_weights: a tuned model's weights in its base model, site by site
weight_runs      the forward passes of sweep_weights
weight_units     sweep_weights in units of prompts
prefix           runs that skip the blocks before the first changed weights
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
