"""nnsplice: activation patching, steering and causal tracing for transformers, on nnsight.

One address language names every part of a model: activations, weights, adapters, checkpoint tensors. The public names:

    load, models                                  load a model for tracing; the embedded toy models and their prompts
    tasks                                         prompt pairs with answers, spans and causal variables
    parse_path, Path, expand, Atlas               addresses, and the sites and parameters that they name in a model
    SavedActivation, save_activations, capture,   activations: saved, edited,
    updates, patched_logits, chat                 and written into another run; chat messages as a prompt
    sweep, causal_trace, ablate, sweep_weights,   exact patching, tracing and ablation of every site,
    plan_sweep, Plan, run, SweepResult            in one call, or planned and run in parts; the result
    attribute, path_patch                         gradient estimates of a sweep; path patching
    knockout                                      attention knockout in a `with` block
    Circuit, faithfulness, completeness,          circuits of nodes or edges, and how they are found and evaluated
    minimality, acdc, sweep_circuits,
    optimal_ablation, OptimalAblation             constants for what is outside, trained to change the output least
    interactions                                  effects of pairs of sites beyond the sum of both
    Metric, logit_diff, probability,              metrics: a number for each row of logits
    log_probability, sequence_log_probability,
    rank, accuracy, kl_divergence, js_divergence
    steering                                      steering vectors: fit, apply, sweep, save
    weights                                       the weights of an address: select, swap, ablate, freeze, compare
    adapters                                      LoRA adapters by layer: optimizer state, profile, alignment
    checkpoints                                   convert, read and write checkpoints, tensor by tensor
    checks                                        whether addresses hold in a model, as `nnsplice check` measures
    errors, plots                                 all exceptions; figures of labelled arrays
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for readers and type checkers; at run time a name is imported when it is first asked for
    from nnsplice import adapters, checkpoints, checks, errors, models, plots, steering, tasks, weights
    from nnsplice.activations import SavedActivation, capture, chat, patched_logits, save_activations, updates
    from nnsplice.atlas import Atlas
    from nnsplice.attribution import attribute, path_patch
    from nnsplice.circuits import (
        Circuit,
        OptimalAblation,
        acdc,
        completeness,
        faithfulness,
        interactions,
        minimality,
        optimal_ablation,
        sweep_circuits,
    )
    from nnsplice.engine import expand
    from nnsplice.metrics import (
        Metric,
        accuracy,
        js_divergence,
        kl_divergence,
        log_probability,
        logit_diff,
        probability,
        rank,
        sequence_log_probability,
    )
    from nnsplice.models import load
    from nnsplice.packed import knockout
    from nnsplice.paths import Path, parse_path
    from nnsplice.results import SweepResult
    from nnsplice.sweeps import Plan, ablate, causal_trace, plan_sweep, run, sweep, sweep_weights

    __version__: str

__all__ = [
    "Atlas",
    "Circuit",
    "Metric",
    "OptimalAblation",
    "Path",
    "Plan",
    "SavedActivation",
    "SweepResult",
    "ablate",
    "accuracy",
    "acdc",
    "adapters",
    "attribute",
    "capture",
    "causal_trace",
    "chat",
    "checkpoints",
    "checks",
    "completeness",
    "errors",
    "expand",
    "faithfulness",
    "interactions",
    "js_divergence",
    "kl_divergence",
    "knockout",
    "load",
    "log_probability",
    "logit_diff",
    "minimality",
    "models",
    "optimal_ablation",
    "parse_path",
    "patched_logits",
    "path_patch",
    "plan_sweep",
    "plots",
    "probability",
    "rank",
    "run",
    "save_activations",
    "sequence_log_probability",
    "steering",
    "sweep",
    "sweep_circuits",
    "sweep_weights",
    "tasks",
    "updates",
    "weights",
]


#: Room -> the names that it gives to this page; the rooms that are names themselves stand under "".
_CONTENTS: dict[str, tuple[str, ...]] = {
    "": ("adapters", "checkpoints", "checks", "errors", "models", "plots", "steering", "tasks", "weights"),
    "activations": ("SavedActivation", "capture", "chat", "patched_logits", "save_activations", "updates"),
    "atlas": ("Atlas",),
    "attribution": ("attribute", "path_patch"),
    "circuits": (
        "Circuit",
        "OptimalAblation",
        "acdc",
        "completeness",
        "faithfulness",
        "interactions",
        "minimality",
        "optimal_ablation",
        "sweep_circuits",
    ),
    "engine": ("expand",),
    "metrics": (
        "Metric",
        "accuracy",
        "js_divergence",
        "kl_divergence",
        "log_probability",
        "logit_diff",
        "probability",
        "rank",
        "sequence_log_probability",
    ),
    "models": ("load",),
    "packed": ("knockout",),
    "paths": ("Path", "parse_path"),
    "results": ("SweepResult",),
    "sweeps": ("Plan", "ablate", "causal_trace", "plan_sweep", "run", "sweep", "sweep_weights"),
}
_ROOM_OF = {name: room for room, names in _CONTENTS.items() for name in names}


def __getattr__(name: str) -> Any:
    # torch, nnsight and transformers take seconds to import, and `nnsplice --help` needs none of them.
    if name == "__version__":  # written once, in pyproject.toml
        from importlib.metadata import version

        return version("nnsplice")
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'nnsplice' has no attribute {name!r}")
    room = _ROOM_OF[name]
    home = importlib.import_module(f"nnsplice.{room or name}")
    value = getattr(home, name) if room else home
    globals()[name] = value
    return value


def __dir__() -> list[str]:  # what <TAB> shows: the contents, and not the rooms behind them
    return __all__
