"""Texts from files, printable without control characters."""

from __future__ import annotations

import re

#: Control characters but tab and line break, what turns the direction of writing round, and halves of pairs.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
#: How long a name may be in a message.
LONGEST = 200


def printable(text: str) -> str:
    r"""A text whose control characters are spelled out; line breaks and tabs stay.

    >>> from nnsplice.shown import printable
    >>> print(printable("layers.\x1b[31m0"))
    layers.\x1b[31m0
    """
    return _OBEYED.sub(_spelled, text)


def shown(name: object) -> str:
    r"""A name for a line of text: control characters and line breaks spelled out, and cut where it is very long.

    >>> from nnsplice.shown import shown
    >>> print(shown("a\nb"), len(shown("a" * 5000)))
    a\nb 221
    """
    text = str(name)
    if len(text) > LONGEST:
        text = f"{text[: LONGEST - 50]}...{text[-50:]} ({len(text)} characters)"
    return printable(text).replace("\n", r"\n").replace("\t", r"\t")


def counted(number: int, noun: str) -> str:
    """A number with its noun, in the plural unless it is one.

    >>> from nnsplice.shown import counted
    >>> counted(1, "cell"), counted(2, "cell")
    ('1 cell', '2 cells')
    """
    return f"{number} {noun}{'s' * (number != 1)}"


def _spelled(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
