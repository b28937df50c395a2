"""The choice of an executor: the fastest that reproduces the reference on this model and job.

A trial (`probing`) compares the executors with the reference on a few cells. Its result is remembered for the model
with its hooks, dtype and attention, the kinds of site, the operation, the metric, and prompts up to the tried length.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import nn

from nnsplice import engine
from nnsplice.activations import features
from nnsplice.activations.access import site_of
from nnsplice.atlas import DERIVED, fingerprint, unwrap
from nnsplice.errors import BadArgument, RefusedExecutor
from nnsplice.metrics import Bound, Several
from nnsplice.packed.cost import Cost
from nnsplice.sweeps.executors import Executor, Work, batched, reference
from nnsplice.sweeps.packing import packed
from nnsplice.sweeps.probe_cells import kinds_of_target
from nnsplice.sweeps.probing import ProbeResult, batches_differ, compare

EXECUTORS: dict[str, Executor] = {"reference": reference, "batched": batched, "packed": packed}


@dataclass(frozen=True)
class ChosenExecutor:
    """The executor of a whole plan, which the plan's units use without another trial."""

    name: str
    note: str = ""
    #: The way of the recording that packed rows start from: one of `packed.recording.WAYS`.
    way: str | None = None

    @classmethod
    def of(cls, name: str, work: Work) -> tuple[ChosenExecutor, Cost]:
        """The result of `choose` as plain data, for other processes."""
        found, note, cost = choose(name, work)
        return cls(found, note, work.memo.get("way") if found == "packed" else None), cost

    def prepare(self, work: Work) -> Executor:
        """The executor, for some work of the plan."""
        if self.way is not None:
            work.memo["way"] = self.way
        return EXECUTORS[self.name]


_trusted: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, ProbeResult]] = weakref.WeakKeyDictionary()


def choose(name: str, work: Work, trial_tokens: int = 0) -> tuple[str, str, Cost]:
    """The executor's name, the note of the result, and the cost of the trial.

    Args:
        trial_tokens: see `compare`.

    Raises:
        RefusedExecutor: the named executor gives other numbers here, or none.
    """
    if name not in (*EXECUTORS, "auto"):
        raise BadArgument(f"there is no executor {name!r}", expected=f"auto, {', '.join(EXECUTORS)}")
    targets = work.plan.targets
    kinds = {site_of(place).kind for target in targets for place in target.places}
    refused = {kind for kind in kinds & set(DERIVED) if name == "batched" or kind not in features.KINDS}
    derived = [t.cell.path for t in targets if any(site_of(p).kind in refused for p in t.places)]
    if derived and work.plan.operation.way != "cut" and name != "reference":
        note = f"{derived[0]} is derived from several values of a run, so each cell runs by itself"
        if name != "auto":
            others = '"reference" or "auto"' if refused - set(features.KINDS) else '"packed", "reference" or "auto"'
            raise BadArgument(note, expected=f"executor={others}")
        return "reference", note, Cost()
    own = engine.has_own_code(unwrap(work.model).modules())
    if name == "reference" or (name == "batched" and not own):
        return name, "", Cost()
    if not work.plan.jobs:
        return "batched", "", Cost()
    if name == "batched":  # a user's hook may be written for one row
        if differs := batches_differ(work):
            raise RefusedExecutor(
                f"rows of a batch do not give this job's numbers: {differs}",
                expected='executor="auto", which takes the fastest that does, and says in result.run.note why',
            )
        return name, "", Cost()
    found, cost = _probed(work, trial_tokens, own)
    if found.way is not None:
        work.memo["way"] = found.way
    if name == "packed" and found.executor != "packed":
        raise RefusedExecutor(
            f"packed rows do not give this job's numbers: {found.refused}",
            expected='executor="auto", which takes the fastest that does, and says in result.run.note why',
        )
    return found.executor, found.note, cost


def _probed(work: Work, trial_tokens: int, own: bool) -> tuple[ProbeResult, Cost]:
    """The result of the trial for this work, and the cost of the trial.

    Args:
        own: whether code of the user's runs in the model: its effect may depend on variables, so nothing is remembered.
    """
    if own:
        return compare(work, longest_prompt(work), trial_tokens)
    known = _trusted.setdefault(unwrap(work.model), {})
    key, longest = probe_key(work), longest_prompt(work)
    found = known.get(key)
    remembered = found is not None and longest <= found.longest
    if engine.ProcessGroup.of(work.model).minimum(int(remembered)):
        assert found is not None
        return found, Cost()
    if len(known) > 256:  # a metric that is defined again in a loop has a new key each time
        known.clear()
    known[key], cost = compare(work, longest, trial_tokens)
    return known[key], cost


def longest_prompt(work: Work) -> int:
    """The number of tokens of the longest prompt that has jobs."""
    encoder, decoder = work.plan.corrupted.lengths("encoder"), work.plan.corrupted.lengths("decoder")
    return max(max(encoder[prompt], decoder[prompt]) for prompt in work.plan.jobs.prompts)


def probe_key(work: Work) -> Hashable:
    """Everything that the result of a trial depends on, except the length of the prompts."""
    root, plan = unwrap(work.model), work.plan
    modules = list(root.modules())
    # A hook's id is never used again, so another hook makes another key.
    hooks = (engine.hooks_of(modules), engine.replaced_in(modules))
    configs = {id(c): c for m in modules if (c := getattr(m, "config", None)) is not None}
    attentions = tuple(str(getattr(config, "_attn_implementation", None)) for config in configs.values())
    devices = {"cpu", torch.device(work.model.device or "cpu").type}
    casts = tuple((d, torch.get_autocast_dtype(d)) for d in sorted(devices) if torch.is_autocast_enabled(d))
    metric, corruption = plan.metric.metric, plan.corruption
    encoder, decoder = plan.corrupted.lengths("encoder"), plan.corrupted.lengths("decoder")
    return (
        fingerprint(root),
        hooks,
        engine.is_edited(work.model),
        frozenset((p.dtype, p.device) for p in root.parameters()),
        attentions,
        casts,
        frozenset(kind for target in plan.targets for kind in kinds_of_target(target)),
        str(plan.operation.identity),
        None if corruption is None else corruption.overwrites,
        (metric.position, metric.local, metric.compares, _rules(plan.metric)),
        len(prompts := plan.jobs.prompts) > 1,
        len({(encoder[prompt], decoder[prompt]) for prompt in prompts}) > 1,
    )


def _rules(metric: Bound | Several) -> Hashable:
    """The name of each metric, and the digest of a user's function."""
    each = [bound for _, bound in metric.parts] if isinstance(metric, Several) else [metric]
    return tuple((bound.metric.name, bound.identity.get("source")) for bound in each)
