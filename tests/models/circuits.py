"""Circuits as data: which head looks where and carries what, which words an MLP looks up, what a patch restores."""

from __future__ import annotations

from dataclasses import dataclass

#: The token that every prompt starts with.
START = 0


@dataclass(frozen=True)
class Flag:
    """Look at positions where these numbers of a part are set."""

    part: str
    indices: tuple[int, ...] | None
    weight: float


@dataclass(frozen=True)
class Match:
    """Look at positions whose word is the one that a part of this position names."""

    query: str
    key: str
    indices: tuple[int, ...]
    weight: float


@dataclass(frozen=True)
class Offset:
    """Look so many positions back; the start token does not count."""

    distance: int
    weight: float


@dataclass(frozen=True)
class Head:
    """A working head: where it looks, and which numbers it carries from which part to which."""

    layer: int
    head: int
    looks: tuple[Flag | Match | Offset, ...]
    reads: str
    writes: str
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Lookup:
    """A working MLP: where both words stand, it writes a third."""

    layer: int
    parts: tuple[str, str]
    writes: str
    table: dict[tuple[int, int], int]


@dataclass(frozen=True)
class Circuit:
    """What works in a model, prompts for it, and every site where a patch restores the answer."""

    heads: tuple[Head, ...]
    lookups: tuple[Lookup, ...]
    clean: tuple[tuple[int, ...], ...]
    corrupted: tuple[tuple[int, ...], ...]
    answers: tuple[int, ...]
    wrong: tuple[int, ...]
    on: frozenset[str]


FIRSTS, KINDS, FACTS = (1, 2, 3), (4, 5, 6), (7, 8, 9, 10, 11, 12)
#: First word and kind -> answer; neither word alone tells it.
KNOWN = {(f, k): FACTS[(2 * f + k + (f == k - 3)) % 6] for f in FIRSTS for k in KINDS}
_SUBJECTS = [(f, k, other) for f in FIRSTS for k in KINDS for other in FIRSTS if KNOWN[f, k] != KNOWN[other, k]]

#: "<start> the FIRST KIND stands in": gathered at the subject's last word, looked up there, carried to the end.
FACT = Circuit(
    heads=(
        Head(0, 1, (Offset(1, 100.0),), "token", "first", FIRSTS),
        Head(2, 2, (Flag("token", KINDS, 60.0),), "second", "out", FACTS),
    ),
    lookups=(Lookup(1, ("first", "token"), "second", KNOWN),),
    clean=tuple((START, 13, f, k, 14, 15) for f, k, _ in _SUBJECTS),
    corrupted=tuple((START, 13, other, k, 14, 15) for _, k, other in _SUBJECTS),
    answers=tuple(KNOWN[f, k] for f, k, _ in _SUBJECTS),
    wrong=tuple(KNOWN[other, k] for _, k, other in _SUBJECTS),
    on=frozenset({
        # the first word, until the previous-token head has read it
        "embed.output[2]", "layers[0].input[2]",
        # the head, and what it wrote at the subject's last word
        "layers[0].heads[1].output[3]", "layers[0].attn.output[3]", "layers[0].mid[3]", "layers[0].output[3]",
        "layers[1].input[3]", "layers[1].mid[3]",
        # the lookup, and what it wrote there
        "layers[1].mlp.output[3]", "layers[1].output[3]", "layers[2].input[3]",
        # the mover, and the end
        "layers[2].heads[2].output[5]", "layers[2].attn.output[5]", "layers[2].mid[5]", "layers[2].output[5]",
        "layers[3].input[5]", "layers[3].mid[5]", "layers[3].output[5]", "final_norm.output[5]",
    }),
)  # fmt: skip

NAMES = (1, 2, 3, 4)
_PAIRS = [(a, b) for a in NAMES for b in NAMES if a < b]


def _two(a: int, b: int, again: int) -> tuple[int, ...]:
    return (START, a, 7, b, 8, again, 9, 10)


#: "<start> A and B , S gave to": S is found again, the end is told, and takes the name that was not.
IOI = Circuit(
    heads=(
        # Equal words attract; itself is out of the question; and the start token is there for those that find nothing.
        Head(0, 3, (Match("token", "token", NAMES, 200.0), Offset(0, -80.0), Flag("token", (START,), 160.0)),
             "token", "first", NAMES),
        Head(1, 0, (Flag("first", None, 60.0),), "first", "second", NAMES),
        Head(2, 2, (Flag("token", NAMES, 60.0), Match("second", "token", NAMES, -120.0)), "token", "out", NAMES),
    ),
    lookups=(),
    clean=tuple(_two(a, b, b) for a, b in _PAIRS) + tuple(_two(a, b, a) for a, b in _PAIRS),
    corrupted=tuple(_two(a, b, a) for a, b in _PAIRS) + tuple(_two(a, b, b) for a, b in _PAIRS),
    answers=tuple(a for a, _ in _PAIRS) + tuple(b for _, b in _PAIRS),
    wrong=tuple(b for _, b in _PAIRS) + tuple(a for a, _ in _PAIRS),
    on=frozenset({
        # the second mention
        "embed.output[5]", "layers[0].input[5]",
        # the duplicate-token head
        "layers[0].heads[3].output[5]", "layers[0].attn.output[5]", "layers[0].mid[5]", "layers[0].output[5]",
        "layers[1].input[5]",
        # the S-inhibition head
        "layers[1].heads[0].output[7]", "layers[1].attn.output[7]", "layers[1].mid[7]", "layers[1].output[7]",
        "layers[2].input[7]",
        # the name mover
        "layers[2].heads[2].output[7]", "layers[2].attn.output[7]", "layers[2].mid[7]", "layers[2].output[7]",
        "layers[3].input[7]", "layers[3].mid[7]", "layers[3].output[7]", "final_norm.output[7]",
    }),
)  # fmt: skip

CIRCUITS = {"fact": FACT, "ioi": IOI}
