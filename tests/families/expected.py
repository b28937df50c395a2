"""What is expected of every family, as recorded by `make families`; read from `expected.json` beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from families.judge import Judgement

FILE = Path(__file__).parent / "expected.json"


@dataclass(frozen=True)
class Expectation:
    """What a family gave when it was last looked at."""

    verdict: str
    #: Checks of which some part is refused: what silently joins them is lost to users.
    refused: tuple[str, ...]
    #: Why it is wrong or crashes today, where it does; the test expects it to fail, and fails once it does not.
    today: str = ""


def of(judgement: Judgement) -> Expectation:
    """A judgement as it is recorded."""
    refused = sorted({f.check for f in judgement.findings if f.state in ("refused", "absent")})
    today = "; ".join(f"{f.check}: {f.state}" for f in judgement.bad())
    return Expectation(judgement.verdict, tuple(refused), today)


def read() -> dict[str, Expectation]:
    """All that is recorded."""
    held = json.loads(FILE.read_text()) if FILE.exists() else {}
    return {
        name: Expectation(one["verdict"], tuple(one["refused"]), one.get("today", "")) for name, one in held.items()
    }


def write(expected: Mapping[str, Expectation]) -> None:
    """Record it, a line for each family."""
    lines = []
    for name in sorted(expected):
        one = expected[name]
        held = {"verdict": one.verdict, "refused": list(one.refused), **({"today": one.today} if one.today else {})}
        lines.append(f"  {json.dumps(name)}: {json.dumps(held)}")
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
