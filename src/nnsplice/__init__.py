"""nnsplice: causal questions about transformers, on top of nnsight.

One address language for every part of a model, and many views of an address. The public names, by room:

    load, models                                  a model, ready for tracing; the embedded toy models and their prompts
    tasks                                         pairs of prompts with answers, spans and variables for one's own model
    parse_path, Path, expand, Atlas               the language, and what it means in a model
    SavedActivation, save_activations, capture,   pieces of a run: taken out,
    updates, patched_logits, chat                 and written into another run; chat messages as its prompt
    sweep, causal_trace, ablate, sweep_weights,   one causal question asked of every site,
    plan_sweep, Plan, run, SweepResult            planned, run, and its result
    attribute, path_patch                         estimates by gradients; what a place does through chosen others
    knockout                                      a block in which queries do not see some of their keys
    Circuit, faithfulness, completeness,          nodes and edges of a model, and how much they do alone
    minimality, acdc, sweep_circuits,
    interactions                                  what two places do beyond what each does
    Metric, logit_diff, probability,              from the logits of a run to one number per row
    log_probability, sequence_log_probability,
    rank, accuracy, kl_divergence, js_divergence
    steering                                      directions fitted, applied, swept and saved
    weights                                       which parameters a place has; swapped, ablated, frozen, compared
    adapters                                      what a LoRA did, by layer: optimizer state, profile, alignment
    checkpoints                                   files of weights: declared, checked, streamed
    checks                                        whether addresses hold in one's own model, as `nnsplice check` asks
    errors, plots                                 every exception; figures of labelled arrays
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
        acdc,
        completeness,
        faithfulness,
        interactions,
        minimality,
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
    "circuits": ("Circuit", "acdc", "completeness", "faithfulness", "interactions", "minimality", "sweep_circuits"),
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
