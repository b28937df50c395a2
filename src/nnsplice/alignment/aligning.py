"""`align`: train a subspace at every site, and measure its accuracy on held-out pairs beside its controls."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

import numpy as np

from nnsplice import engine
from nnsplice.activations.prompts import PairSpanTexts, PromptsLike
from nnsplice.alignment.alignment import IIA, MEASURED, RANDOM, UNTRAINED, WHOLE, Alignment
from nnsplice.alignment.journal import AlignmentJournal, as_tensor
from nnsplice.alignment.measuring import accuracies
from nnsplice.alignment.pairs import PairRuns, PairSplit, check_sites, pair_runs, seeded, split
from nnsplice.alignment.parametrisations import METHODS
from nnsplice.alignment.training import AlignmentOptions, Recordings, train
from nnsplice.alignment.untrained import untrained
from nnsplice.errors import BadArgument, ShapeError, circumstances
from nnsplice.metrics import Answer, Bound, accuracy, log_probability
from nnsplice.packed import Cost
from nnsplice.progress import bar
from nnsplice.results import Run, SweepResult, Table
from nnsplice.subspaces import Subspace
from nnsplice.sweeps import plan_sweep
from nnsplice.sweeps.plan import Plan
from nnsplice.sweeps.running import check_mode
from nnsplice.sweeps.sets import Sites


def align(
    model: Any,
    base: PromptsLike,
    source: PromptsLike,
    answers: Answer,
    sites: Sites,
    *,
    k: int = 8,
    method: str = "das",
    held_out: float | Sequence[int] = 0.25,
    epochs: int = 20,
    batch_size: int = 32,
    learning_rate: float | None = None,
    patience: int = 3,
    seed: int = 0,
    spans: PairSpanTexts | None = None,
    align: str = "position",
    random_model: Any = None,
    max_tokens: int | None = None,
    journal: str | PathLike[str] | None = None,
    progress: bool = True,
) -> Alignment:
    """Find the subspace of every site that holds a variable: distributed alignment search (DAS).

    A pair is two prompts that differ in the variable. The base run is given the source run's value of it, in a subspace
    of one site, `h + Q Qᵀ (h' - h)`; where the subspace holds the variable, and the whole of it, the model then
    answers as the counterfactual says. Q is trained on some of the pairs and measured on the others. A subspace that
    was trained for an answer can give it without having stood for anything, so three numbers stand beside every
    accuracy: of a random subspace, of the same training on random weights, of the whole site.

    >>> base, source = ["w3 w4", "w5 w4", "w6 w4", "w7 w4"], ["w5 w4", "w6 w4", "w7 w4", "w3 w4"]
    >>> found = ns.align(model, base, source, ["w5", "w6", "w7", "w3"], "layers[0:2].output[0]", k=2, epochs=2,
    ...                  progress=False)
    >>> found.grid().dims, found.subspace("layers[1].output[0]").k
    (('layer', 'position'), 2)

    What stands before a site is run once and kept; training begins at the site's block, and gradients pass through the
    blocks behind it alone. Training stops early where the loss no longer falls.

    Args:
        model: a model from `ns.load`, in eval mode.
        base: the runs that are edited; a text, texts, or token ids.
        source: the runs that values are taken from; source i belongs to base i.
        answers: the counterfactual answer of each pair, one token: what the base prompt's answer would be with the
            source's value of the variable.
        sites: paths, `"layers[:].output[-1]"`, or `'layers[:].output["subject"][-1]'` for a role; each site at each
            token or span has a subspace of its own.
        k: the number of dimensions; for `"boundless"` the largest number, for `"mask"` the budget.
        method: `"das"`, a rotation; `"boundless"`, a rotation and how many of its directions; `"mask"`, some of the
            site's own numbers, by hard concrete gates.
        held_out: a share of the pairs that is measured on, or their numbers.
        epochs: passes over the training pairs, at most.
        batch_size: the number of pairs in a training step.
        learning_rate: the first learning rate of Adam, which falls to 0; by default 0.01 for rotations, 0.1 for masks.
        patience: after how many epochs without a better loss training stops.
        seed: the seed of the split into pairs, of the starting values, the order of batches and both controls.
        spans: where named spans stand, as for `ns.sweep`: `{"clean": source's, "corrupted": base's}` where they differ.
        align: how tokens of a pair correspond, as for `ns.sweep`.
        random_model: what the control of random weights is trained on; the same class and config with new weights, if
            left out.
        max_tokens: how many tokens run at once.
        journal: a folder that every finished layer is kept in; the same call after a stop goes on from there.
        progress: show a bar.

    Returns:
        The accuracy of every site on the held-out pairs beside its controls, and the subspaces.

    Raises:
        BadArgument: a model in train mode, an unknown method, a number that is not positive, no pairs to train on or
            none held out, a set of sites as a site, or pairs that are the same run at all sites or in all of one
            site's training pairs; or no twin with random weights can be made.
        FileError: the journal is of another alignment, or damaged.
        RefusedExecutor: packed rows do not give this model's numbers.
        RefusedPlace: a site that is derived from several values, such as a pattern.
        ShapeError: a site has fewer than `k` dimensions.
    """
    start = time.perf_counter()
    model = engine.as_model(model)
    with circumstances("ns.align"):
        setting = _setting(method, k, epochs, batch_size, learning_rate, patience, seed)
        check_mode(model)
        ask = _Request(base, source, answers, sites, spans, align, setting, engine.tokens_at_once(model, max_tokens))
        plan = ask.plan(model)
        check_sites(plan)
        pairs = split(len(plan.corrupted), held_out, seed)
        twin = untrained(model, seed) if random_model is None else engine.as_model(random_model)
        check_mode(twin)
    asked = {**plan.asked, "alignment": {**asdict(setting), "held_out": list(pairs.held_out)}}
    if random_model is not None:
        asked["alignment"]["random_model"] = engine.weights_digest(twin)
    units = AlignmentJournal.open(journal, asked)
    cells = sum(len(targets) for targets in ask.groups(plan).values())
    with bar("align", 2 * cells * epochs, "epoch", progress) as shown:
        own, cost = _searched(ask, "model", model, plan, pairs, units, shown.update)
        other, more = _searched(ask, "random model", twin, ask.plan(twin), pairs, units, shown.update)
    about = Run("packed", time.perf_counter() - start, **(cost + more).as_dict(), note=_note(own, other))
    return _alignment(plan, pairs, asked, own, other, about)


def _setting(
    method: str, k: int, epochs: int, batch_size: int, learning_rate: float | None, patience: int, seed: int
) -> AlignmentOptions:
    if method not in METHODS:
        raise BadArgument(f"method={method!r}", expected=", ".join(map(repr, METHODS)))
    for name, value in (("k", k), ("epochs", epochs), ("batch_size", batch_size), ("patience", patience)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise BadArgument(f"{name}={value!r}", expected="a whole number, at least 1")
    rate = METHODS[method].learning_rate if learning_rate is None else learning_rate
    if not rate > 0:
        raise BadArgument(f"learning_rate={rate!r}", expected="a positive number")
    return AlignmentOptions(method, k, epochs, batch_size, float(rate), patience, seed)


@dataclass(frozen=True)
class _Request:
    """The question, for any model."""

    base: PromptsLike
    source: PromptsLike
    answers: Answer
    sites: Sites
    spans: PairSpanTexts | None
    align: str
    setting: AlignmentOptions
    room: int

    def plan(self, model: engine.Model) -> Plan:
        """The pairs and sites in a model."""
        return plan_sweep(
            model, self.source, self.base, self.sites, accuracy(self.answers), spans=self.spans, align=self.align
        )

    def loss(self, model: engine.Model, plan: Plan) -> Bound:
        """The training objective."""
        return log_probability(self.answers).bind(engine.tokenizer_of(model), len(plan.corrupted), plan.corrupted.texts)

    @staticmethod
    def groups(plan: Plan) -> dict[int, list[int]]:
        """The sites of which something has to run, by their layer; -1 for those in none."""
        found: dict[int, list[int]] = {}
        for target in sorted({target for _, target in plan.jobs}):
            layer = plan.targets[target].cell.layer
            found.setdefault(-1 if layer is None else layer, []).append(target)
        return found


@dataclass(frozen=True)
class _Findings:
    """The measurements on one model."""

    side: PairRuns
    subspaces: Mapping[int, Subspace]
    #: Measure -> `[pair, site]`, of all pairs; NaN where nothing was measured.
    values: Mapping[str, np.ndarray]
    #: How often base prompts were recorded, batches of them.
    passes: int


def _searched(
    ask: _Request,
    name: str,
    model: engine.Model,
    plan: Plan,
    pairs: PairSplit,
    units: AlignmentJournal,
    finished: Callable[[int], Any],
) -> tuple[_Findings, Cost]:
    """Train and measure every site on one model, layer by layer."""
    setting = ask.setting
    with engine.locked(model):  # its attention is another one while packed rows run
        side = pair_runs(name, model, plan, ask.room)
        cost = side.cost
        widths = {target: side.width(target) for targets in ask.groups(plan).values() for target in targets}
        _check_k(setting, plan, widths)
        loss_of = ask.loss(model, plan)
        recordings = Recordings.of(side, pairs.training, setting, ask.room)
        subspaces: dict[int, Subspace] = {}
        values = {what: np.where(plan.exists(), side.corrupted[:, None], np.nan) for what in _measured(name)}
        for layer, targets in ask.groups(plan).items():
            unit = f"{name} layer {layer}".replace(" ", "-")
            known = units.read(unit)
            if known is None:
                trained, spent = train(recordings, targets, loss_of, setting, ask.room, finished)
                bases = {target: one.basis for target, one in trained.items()}
                losses = {str(target): list(one.losses) for target, one in trained.items()}
                made = {target: _subspace(plan, target, basis, setting, losses) for target, basis in bases.items()}
                measured, more = _numbers(side, made, pairs, ask)
                cost += spent + more
                tensors = {f"basis.{target}": basis for target, basis in bases.items()}
                units.write(unit, tensors | {w: as_tensor(v) for w, v in measured.items()}, {"losses": losses})
            else:
                tensors, about = known
                bases = {int(key.partition(".")[2]): t for key, t in tensors.items() if key.startswith("basis.")}
                made = {t: _subspace(plan, t, basis, setting, about["losses"]) for t, basis in sorted(bases.items())}
                measured = {what: tensors[what].numpy() for what in values if what in tensors}
                finished(len(made) * setting.epochs)
            subspaces |= made
            for what, found in measured.items():
                values[what][np.ix_(list(pairs.held_out), list(made))] = found
    return _Findings(side, subspaces, values, recordings.passes), cost


def _measured(name: str) -> tuple[str, ...]:
    return (IIA, RANDOM, WHOLE) if name == "model" else (UNTRAINED,)


def _numbers(
    side: PairRuns, made: Mapping[int, Subspace], pairs: PairSplit, ask: _Request
) -> tuple[dict[str, np.ndarray], Cost]:
    """`[held-out pair, site]` of everything that is measured on a model."""
    randoms = {
        target: one.random(seed=seeded(ask.setting.seed, "random", side.plan.targets[target].cell.path).initial_seed())
        for target, one in made.items()
    }
    each = {IIA: made, RANDOM: randoms, WHOLE: dict.fromkeys(made), UNTRAINED: made}
    found: dict[str, np.ndarray] = {}
    cost = Cost()
    for what in _measured(side.name):
        found[what], spent = accuracies(side, each[what], pairs.held_out, ask.room)
        cost += spent
    return found, cost


def _subspace(
    plan: Plan, target: int, basis: Any, setting: AlignmentOptions, losses: Mapping[str, Sequence[float]]
) -> Subspace:
    cell = plan.targets[target].cell
    place = str(plan.targets[target].places[0].place)
    own = losses[str(target)]
    about = {
        **asdict(setting), "site": cell.path, "epochs": len(own), "loss": own[-1], "model": plan.asked["model"],
        "weights": plan.asked["weights"],
    }  # fmt: skip
    return Subspace(place, Subspace.of(place, basis).basis, about)


def _check_k(setting: AlignmentOptions, plan: Plan, widths: Mapping[int, int]) -> None:
    for target, width in widths.items():
        if setting.k > width:
            raise ShapeError(
                f"k={setting.k}, and this site is {width} wide",
                path=plan.targets[target].cell.path,
                expected=f"k of at most {width}",
            )


def _note(own: _Findings, other: _Findings) -> str:
    return f"{own.passes} and {other.passes} batches of base prompts recorded, each for all layers and epochs"


def _alignment(
    plan: Plan, pairs: PairSplit, asked: Mapping[str, Any], own: _Findings, other: _Findings, about: Run
) -> Alignment:
    held = list(pairs.held_out)
    values = np.stack([(own if name in own.values else other).values[name][held] for name in MEASURED], -1)
    sides = [own.side if name in own.values else other.side for name in MEASURED]
    clean, corrupted = (np.stack([getattr(s, end)[held] for s in sides], -1) for end in ("clean", "corrupted"))
    exists = plan.exists()[held]
    tokens = tuple(plan.tokens[pair] for pair in held) if plan.tokens else ()
    cells = tuple(target.cell for target in plan.targets)
    table = Table(cells, values, exists, exists, clean, corrupted, tokens, asked, about, metrics=MEASURED)
    found = {plan.targets[target].cell.path: subspace for target, subspace in own.subspaces.items()}
    return Alignment(SweepResult(table), found)
