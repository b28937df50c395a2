"""Sweeps: activation patching, ablation and causal tracing at every site.

plan          what will be run, as pure data: Plan
planning      plan_sweep: prompts paired, sites made targets, what need not run told apart
targets       every cell with the sites that it changes
sets          cells that change several sites together
running       a plan in this process, and sweep: chunks, and less at once when memory is short
distributed   run: here, or in units by other processes
plan_files    a plan as files for them
ledger        values as they come in: known ones, a journal's, new ones
executors     the same numbers at different cost
cost          what that is: passes, calls of blocks, tokens, operations
operations    what is done to a site
parts         sweeps of a part of each site, in a subspace
knockouts     cells in which queries do not see some of their keys
sources       where the values come from
recipes       ablate, causal_trace
foreign       values of another model: what has to fit
crossing      crossings: fed or computed, of two models
revisions     over_revisions: one job over checkpoints
weights       sweep_weights: a tuned model's weights in its base, site by site
weight_units  the same in units of prompts
tables        other questions about a plan's cells, in units of prompts
jobs          the cells of a plan as ranges
cutting       a plan in units of work
prefix        what need not be computed again
identity      what makes two sweeps the same
"""

from nnsplice.sweeps.crossing import crossings
from nnsplice.sweeps.distributed import run
from nnsplice.sweeps.plan import Plan
from nnsplice.sweeps.planning import plan_sweep
from nnsplice.sweeps.recipes import ablate, causal_trace
from nnsplice.sweeps.revisions import Revisions, over_revisions
from nnsplice.sweeps.running import sweep
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
