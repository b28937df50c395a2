"""What a block asked of the simulated devices: launches, waits, copies and memory, and at which lines of the code."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field

#: A file whose path has this in it is code under test: what is spent is put down to its lines.
WITHIN = "/nnsplice/"


@dataclass
class Spent:
    """Counts of a block. Copies are `h2d`, `d2h` and `d2d`, where the host is `h`."""

    launches: int = 0
    waits: int = 0
    copies: Counter[str] = field(default_factory=Counter)
    copied_bytes: Counter[str] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)
    #: Device -> bytes: the most that was alive at once, and what was alive when the block began.
    peak: dict[str, int] = field(default_factory=dict)
    before: dict[str, int] = field(default_factory=dict)
    #: What was spent (`launches`, `waits`, `h2d`, ...) -> line of code -> how often.
    lines: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    def extra(self, device: str = "cuda:0") -> int:
        """The bytes that were alive at most beside those that were alive before."""
        return self.peak[device] - self.before[device]

    def within(self, what: str, folder: str) -> dict[str, int]:
        """The lines of a folder of the code under test that spent something, and how often: `("d2h", "packed/")`."""
        return {line: number for line, number in self.lines[what].items() if line.startswith(folder)}


def line_of_code() -> str:
    """The innermost line of the code under test that runs now: `packed/forward.py:120 _call`."""
    frame = sys._getframe(1)
    while frame.f_back is not None and WITHIN not in frame.f_code.co_filename:
        frame = frame.f_back
    code = frame.f_code
    return f"{code.co_filename.rpartition(WITHIN)[2]}:{frame.f_lineno} {code.co_name}"
