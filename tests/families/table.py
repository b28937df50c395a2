"""Judge every family and write the table: `make families`, or `python tests/families/table.py --only llama`."""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers

import nnsplice as ns
from families import expected
from families.build import FAMILIES, aliases, names
from families.judge import Judgement, judge
from families.sizes import NOT_BUILT

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs" / "families.md"
_HEAD = """# What nnsplice gives of each model family

Made by `make families` with transformers {transformers}, torch {torch}; do not edit. Every family of the table behind
`AutoModelForCausalLM` is built as a tiny random model, and all that nnsplice gives of it is compared with plain torch
hooks, gradients and arithmetic (`tests/families/`). **exact**: every number that is given is right; what cannot be
given is refused with an error that says so. **refused**: nothing is given.

{counts}

| family | verdict | layers | heads | kv | sweeps run | refused |
|---|---|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", help="these families alone; nothing is written")
    parser.add_argument("--all-findings", action="store_true", help="print what is exact and refused too")
    parser.add_argument("--record", action="store_true", help="expect from now on what is found")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    found: list[Judgement] = []
    for name in options.only or names():
        start = time.process_time()
        one = judge(name)
        found.append(one)
        print(f"{one.verdict:8} {name}  {time.process_time() - start:.1f}s", flush=True)
        for finding in one.findings if options.all_findings else one.bad():
            number = "" if finding.number is None else f" {finding.number:.2g}"
            print(f"    {finding.check}: {finding.state}{number}  {finding.text}", flush=True)
    if options.record:
        kept = expected.read() if options.only else {}
        expected.write({**kept, **{one.family: expected.of(one) for one in found}})
    if not options.only:
        FILE.parent.mkdir(exist_ok=True)
        FILE.write_text(table(found))


def table(found: Iterable[Judgement]) -> str:
    """The whole document."""
    found = list(found)
    verdicts = [one.verdict for one in found]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in ("exact", "refused", "wrong", "crash") if v in verdicts)
    wirings = sum("/" in one.family for one in found)
    wirings = sum("/" in one.family for one in found)
    others = f"{len(aliases())} the same as another, {len(NOT_BUILT)} not built"
    counts = f"{len(FAMILIES)} families, and {wirings} other wirings of some: {counts}; {others}."
    head = _HEAD.format(transformers=transformers.__version__, torch=torch.__version__, counts=counts)
    rows = {one.family: _row(one) for one in found}
    rows |= {name: f"| {name} | the same as {other} | | | | | |" for name, other in aliases().items()}
    rows |= {name: f"| {name} | not built | | | | | {reason} |" for name, reason in NOT_BUILT.items()}
    return head + "\n".join(rows[name] for name in sorted(rows)) + "\n"


def _row(one: Judgement) -> str:
    layers, heads, kv = (str(number) if number else "" for number in one.shape)
    verdict = one.verdict if not one.bad() else f"**{one.verdict}**: {'; '.join(f.check for f in one.bad())}"
    return f"| {one.family} | {verdict} | {layers} | {heads} | {kv} | {one.executor} | {_refused(one)} |"


def _refused(one: Judgement) -> str:
    """What is refused, with the reason; one reason for many places is said once."""
    by_text: dict[str, list[str]] = {}
    for finding in one.findings:
        if finding.state == "refused":
            text = finding.text.partition(": ")[2] if finding.text.startswith("layer ") else finding.text
            places = by_text.setdefault(_general(text), [])
            name = finding.check.removeprefix("served ").replace("[:]", "").replace("layers.", "")
            if name not in places:
                places.append(name)
    return "; ".join(f"{', '.join(places)}: {text}" for text, places in by_text.items()).replace("|", "\\|")


def _general(text: str) -> str:
    import re

    return re.sub(r"\blayer \d+\b", "a layer", re.sub(r"layers?[.\[]\d+\]?", "layers[i]", text))


if __name__ == "__main__":
    assert ns
    main()
