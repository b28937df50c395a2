"""nnsplice: activation patching, steering and causal tracing for transformers, on nnsight.

One address language names every part of a model: activations, weights, adapters, checkpoint tensors. The public names:

    load, models                                  load a model for tracing; the embedded toy models and their prompts
    tasks                                         prompt pairs with answers, spans and causal variables
    parse_path, Path, expand, Atlas               addresses, and the sites and parameters that they name in a model
    SavedActivation, save_activations, capture,   activations: saved, of whole data sets too, edited,
    capture_to, updates, patched_logits, chat     and written into another run; chat messages as a prompt
    sweep, causal_trace, ablate, sweep_weights,   exact patching, tracing and ablation of every site,
    plan_sweep, Plan, plan, run, on, SweepResult  in one call, or planned and run in parts, here or elsewhere
    crossings, diff_lens, over_revisions,         comparing two models; one job over training checkpoints
    Revisions
    attribute, path_patch                         gradient estimates of a sweep; path patching
    lens                                          logit lens, direct logit attribution, fitted lenses, patchscopes
    Subspace, align, Alignment                    subspaces of activations: compared, interchanged, swept; trained
    SAE, load_sae, attach_sae, detach_sae         sparse autoencoders: features with addresses
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
    from nnsplice import adapters, checkpoints, checks, errors, lens, models, on, plots, steering, tasks, weights
    from nnsplice.activations import (
        SavedActivation,
        capture,
        capture_to,
        chat,
        patched_logits,
        save_activations,
        updates,
    )
    from nnsplice.alignment import Alignment, align
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
    from nnsplice.kinds import plan
    from nnsplice.lens import diff_lens
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
    from nnsplice.subspaces import SAE, Subspace, attach_sae, detach_sae, load_sae
    from nnsplice.sweeps import (
        Plan,
        Revisions,
        ablate,
        causal_trace,
        crossings,
        over_revisions,
        plan_sweep,
        run,
        sweep,
        sweep_weights,
    )

    __version__: str

__all__ = [
    "SAE",
    "Alignment",
    "Atlas",
    "Circuit",
    "Metric",
    "OptimalAblation",
    "Path",
    "Plan",
    "Revisions",
    "SavedActivation",
    "Subspace",
    "SweepResult",
    "ablate",
    "accuracy",
    "acdc",
    "adapters",
    "align",
    "attach_sae",
    "attribute",
    "capture",
    "capture_to",
    "causal_trace",
    "chat",
    "checkpoints",
    "checks",
    "completeness",
    "crossings",
    "detach_sae",
    "diff_lens",
    "errors",
    "expand",
    "faithfulness",
    "interactions",
    "js_divergence",
    "kl_divergence",
    "knockout",
    "lens",
    "load",
    "load_sae",
    "log_probability",
    "logit_diff",
    "minimality",
    "models",
    "on",
    "optimal_ablation",
    "over_revisions",
    "parse_path",
    "patched_logits",
    "path_patch",
    "plan",
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
    "": (
        "adapters",
        "checkpoints",
        "checks",
        "errors",
        "lens",
        "models",
        "on",
        "plots",
        "steering",
        "tasks",
        "weights",
    ),
    "activations": (
        "SavedActivation",
        "capture",
        "capture_to",
        "chat",
        "patched_logits",
        "save_activations",
        "updates",
    ),
    "alignment": ("Alignment", "align"),
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
    "kinds": ("plan",),
    "models": ("load",),
    "packed": ("knockout",),
    "paths": ("Path", "parse_path"),
    "results": ("SweepResult",),
    "lens": ("diff_lens",),
    "sweeps": (
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
    ),
    "subspaces": ("SAE", "Subspace", "attach_sae", "detach_sae", "load_sae"),
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
