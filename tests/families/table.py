"""Judge every family and write the table: `make families`, or `python tests/families/table.py --only llama`."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers

from families import expected
from families.build import aliases, names
from families.judge import Judgement, judge
from families.sizes import NOT_BUILT

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs" / "families.md"
_WORDS = ("exact", "refused", "wrong", "crash", "the same", "not built")
_HEAD = """# What nnsplice gives of each model family

Made by `make families` with {made}; do not edit. Every family of the table behind
`AutoModelForCausalLM`, and some of those behind `AutoModelForImageTextToText`, is built as a tiny random model, and all
that nnsplice gives of it is compared with plain torch hooks, gradients and arithmetic (`tests/families/`); for those
with `with images` in the table, of prompts that hold images too. **exact**: every number that is given is right; what
cannot be given is refused with an error that says so. **refused**: nothing is given.

{counts}

| family | verdict | layers | heads | kv | sweeps run | refused |
|---|---|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", help="judge these alone, and change their rows")
    parser.add_argument("--all-findings", action="store_true", help="print what is exact and refused too")
    parser.add_argument("--record", action="store_true", help="expect from now on what is found")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    if unknown := [name for name in options.only or () if name not in names()]:
        sys.exit(
            f"transformers {transformers.__version__} has no family {', '.join(unknown)} that is built here; "
            "which version is installed, constraints.txt says"
        )
    rows, made = _kept() if options.only else _others(), _versions(bool(options.only))
    record = expected.read() if options.only else {}
    for name in options.only or names():
        start = time.process_time()
        one = judge(name)
        print(f"{one.verdict:8} {name}  {time.process_time() - start:.1f}s", flush=True)
        for finding in one.findings if options.all_findings else one.bad():
            number = "" if finding.number is None else f" {finding.number:.2g}"
            print(f"    {finding.check}: {finding.state}{number}  {finding.text}", flush=True)
        # Written after each, so that what was judged before a stop is kept.
        rows[name], record[name] = _row(one), expected.of(one)
        FILE.parent.mkdir(exist_ok=True)
        FILE.write_text(_table(rows, made))
        if options.record:
            expected.write(record)


def _kept() -> dict[str, str]:
    """The rows that are there, by family."""
    lines = FILE.read_text().splitlines() if FILE.exists() else []
    rows = (line for line in lines if line.startswith("| ") and not line.startswith("| family"))
    return {line.split(" | ")[0].removeprefix("| "): line for line in rows}


def _others() -> dict[str, str]:
    """The rows of families that are not judged."""
    rows = {name: f"| {name} | the same as {other} | | | | | |" for name, other in aliases().items()}
    return rows | {name: f"| {name} | not built | | | | | {reason} |" for name, reason in NOT_BUILT.items()}


def _versions(only: bool) -> str:
    """What the rows were made with; where some are judged alone, what the others were made with stays."""
    now = f"transformers {transformers.__version__}, torch {torch.__version__}"
    before = re.search(r"^Made by `make families` with ([^;]*);", FILE.read_text()[:2000], re.M) if only else None
    if before is None or now in before[1]:
        return now if before is None else before[1]
    return f"{before[1]}, and single rows since with {now}"


def _table(rows: Mapping[str, str], made: str) -> str:
    """The whole document."""
    verdicts = Counter(re.findall(r"[a-z ]+", line.split(" | ")[1])[0].partition(" as ")[0] for line in rows.values())
    counts = ", ".join(f"{verdicts[word]} {word}" for word in _WORDS if verdicts[word])
    wirings = sum("/" in name for name in rows)
    counts = f"{len(rows) - wirings} families, and {wirings} other wirings of some: {counts}."
    head = _HEAD.format(made=made, counts=counts)
    return head + "\n".join(rows[name] for name in sorted(rows)) + "\n"


def _row(one: Judgement) -> str:
    layers, heads, kv = (str(number) if number else "" for number in one.shape)
    verdict = one.verdict if not one.bad() else f"**{one.verdict}**: {'; '.join(f.check for f in one.bad())}"
    return f"| {one.family} | {verdict} | {layers} | {heads} | {kv} | {one.executor} | {_refused(one)} |"


def _refused(one: Judgement) -> str:
    """What is refused, with the reason; one reason for many sites is said once."""
    by_text: dict[str, list[str]] = {}
    for finding in one.findings:
        if finding.state == "refused":
            places = by_text.setdefault(_general(finding.text), [])
            name = finding.check.removeprefix("served ").replace("[:]", "").replace("layers.", "")
            if name not in places:
                places.append(name)
    said = (f"{', '.join(places) if len(places) < 12 else 'all'}: {text}" for text, places in by_text.items())
    return "; ".join(said).replace("|", "\\|")


def _general(text: str) -> str:
    """A reason without the number of a layer or a head."""
    text = re.sub(r" \(by [^)]*\)", "", text)
    text = re.sub(r"^layer \d+: ", "", text)
    text = re.sub(r"\blayer \d+\b", "a layer", re.sub(r"layers[.\[]\d+\]?", "layers[i]", text))
    return re.sub(r"\bhead \d+\b", "a head", text)


if __name__ == "__main__":
    main()
