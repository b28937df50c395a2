"""For one family: what is exact, what is refused, and what is wrong or crashes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from families.build import FAMILIES
from families.images import INPUTS
from families.images_of import judge_images
from families.patterns_of import judge_patterns
from families.recognition import recognise
from families.sizes import FLOAT32
from families.subject import Finding, State, Subject
from families.sweeps_of import judge_sweeps
from families.values_of import judge_values, serve
from families.weights_of import judge_weights


@dataclass(frozen=True)
class Judgement:
    """All that was found of one family."""

    family: str
    findings: tuple[Finding, ...]
    #: Layers, heads, key/value heads of the first layer that has some.
    shape: tuple[int, int, int]
    #: The executor that `auto` ran, and why no faster one.
    executor: str
    note: str
    tolerance: float

    @property
    def verdict(self) -> State:
        """`wrong` or `crash` if anything is; else `exact`, or `refused` where nothing is served."""
        states = {finding.state for finding in self.findings}
        if "wrong" in states:
            return "wrong"
        if "crash" in states:
            return "crash"
        served = any(f.state == "exact" and f.check.startswith(("capture", "sweep", "replay")) for f in self.findings)
        return "exact" if served else "refused"

    def bad(self) -> list[Finding]:
        """What is wrong or crashes, the worst of each check."""
        worst: dict[tuple[str, str], Finding] = {}
        for finding in self.findings:
            if finding.state in ("wrong", "crash"):
                known = worst.get((finding.check, finding.state))
                if known is None or (finding.number or 0) > (known.number or 0):
                    worst[finding.check, finding.state] = finding
        return list(worst.values())


def judge(family: str) -> Judgement:
    """Ask one family everything."""
    assert family.partition("/")[0] in FAMILIES
    subject = Subject(family)
    executor = note = ""
    shape = (0, 0, 0)
    if recognise(subject):
        heads = next((b for b in subject.blocks if b.layout is not None), None)
        shape = (len(subject.blocks), heads.n_heads if heads else 0, heads.n_kv if heads else 0)
        judge_weights(subject)
        served = serve(subject)
        judge_values(subject, served)
        judge_patterns(subject, served)
        executor, note = judge_sweeps(subject, served, ("packed", "auto"))
        if family in INPUTS:
            executor = f"{executor}, with images {judge_images(subject, served)}"
        if family.partition("/")[0] not in FLOAT32:
            # In float64 what is rounded in float32 on the way is enough to send `auto` to a slower executor.
            judge_sweeps(Subject(family, torch.float32, subject.findings), served, ("auto",))
    return Judgement(family, tuple(subject.findings), shape, executor, note, subject.tolerance)
