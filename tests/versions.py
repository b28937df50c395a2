"""The two ends of the ranges in pyproject.toml, for `make versions`. Needs nothing but Python.

`lowest` and `newest` print what pip is to be bound by, `installed` what the running Python has.
"""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
#: With the extras that `all` names, as the tests need them.
REQUIREMENTS = [
    *PROJECT["dependencies"],
    *(line for extra in re.findall(r"\w+", EXTRAS["all"][0])[1:] for line in EXTRAS[extra]),
]
#: One build of torch serves both ends: another is large, and may be one for another kind of machine.
PINNED = "torch"


def name_of(requirement: str) -> str:
    """`"peft>=0.21"` -> `"peft"`."""
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0]


def lowest_of(requirement: str) -> str:
    """`"lark>=1.3"` -> `"lark==1.3"`."""
    bound = re.search(r">=\s*([\w.]+)", requirement)
    if bound is None:
        sys.exit(f"pyproject.toml: {requirement!r} has no lowest version to test; write '{name_of(requirement)}>=...'")
    return f"{name_of(requirement)}=={bound[1]}"


def pin() -> str:
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith(f"{PINNED}==")]
    if not pins:
        sys.exit(f"constraints.txt has no line '{PINNED}==...'; without one pip would choose a build by itself")
    return pins[0]


def constraints(end: str) -> list[str]:
    if end == "newest":
        return [pin()]
    return [pin(), *(lowest_of(each) for each in REQUIREMENTS if name_of(each) != PINNED)]


def installed() -> str:
    return ", ".join(f"{name} {version(name)}" for name in map(name_of, REQUIREMENTS))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["lowest" | "newest" as end]:
            print(*constraints(end), sep="\n")
        case ["installed"]:
            print(installed())
        case other:
            sys.exit(f"found {' '.join(other) or 'nothing'}; write one of: lowest, newest, installed")
