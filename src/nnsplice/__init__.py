"""nnsplice: causal questions about transformers, on top of nnsight.

One address language for every part of a model, and many views of an address. The public names, by room:

    load, models                                  a model, ready for tracing; the embedded toy models and their prompts
    parse_path, Path, expand, Atlas               the language, and what it means in a model
    SavedActivation, save_activations, capture,   pieces of a run: taken out,
    updates, patched_logits                       and written into another run
    sweep, causal_trace, ablate, sweep_weights,   one causal question asked of every site,
    plan_sweep, Plan, run, SweepResult            planned, run, and its result
    attribute, path_patch                         estimates by gradients; what a place does through chosen others
    Metric, logit_diff, probability,              from the logits of a run to one number per row
    log_probability, rank, kl_divergence
    steering                                      directions fitted, applied, swept and saved
    weights                                       which parameters a place has; swapped, ablated, frozen, compared
    adapters                                      what a LoRA did, by layer: optimizer state, profile, alignment
    checkpoints                                   files of weights: declared, checked, streamed
    errors, plots                                 every exception; figures of labelled arrays
"""

from nnsplice import adapters, checkpoints, errors, models, plots, steering, weights
from nnsplice.activations import SavedActivation, capture, patched_logits, save_activations, updates
from nnsplice.atlas import Atlas
from nnsplice.attribution import attribute, path_patch

# What nnsight answers when a remote trace names this package: see engine/tracing.py.
from nnsplice.engine import ONLY_LOCAL as _persistent_id  # noqa: N811
from nnsplice.engine import expand
from nnsplice.metrics import Metric, kl_divergence, log_probability, logit_diff, probability, rank
from nnsplice.models import load
from nnsplice.paths import Path, parse_path
from nnsplice.results import SweepResult
from nnsplice.sweeps import Plan, ablate, causal_trace, plan_sweep, run, sweep, sweep_weights

__all__ = [
    "Atlas",
    "Metric",
    "Path",
    "Plan",
    "SavedActivation",
    "SweepResult",
    "ablate",
    "adapters",
    "attribute",
    "capture",
    "causal_trace",
    "checkpoints",
    "errors",
    "expand",
    "kl_divergence",
    "load",
    "log_probability",
    "logit_diff",
    "models",
    "parse_path",
    "patched_logits",
    "path_patch",
    "plan_sweep",
    "plots",
    "probability",
    "rank",
    "run",
    "save_activations",
    "steering",
    "sweep",
    "sweep_weights",
    "updates",
    "weights",
]


def __dir__() -> list[str]:  # what <TAB> shows: the contents, and not the rooms behind them
    return __all__
