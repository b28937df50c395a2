"""Rows of text as aligned columns."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import typer

from nnsplice.shown import printable

Row = tuple[str, ...]

#: Words that are coloured where they fill a cell, on a terminal.
STYLES: dict[str, dict[str, Any]] = {
    "ok": {"fg": typer.colors.GREEN},
    "FAILED": {"fg": typer.colors.RED, "bold": True},
    "skipped": {"fg": typer.colors.YELLOW},
    "refused": {"fg": typer.colors.YELLOW},
}


def aligned(rows: Sequence[Row], head: Row | None = None) -> list[str]:
    """The rows as lines, each column as wide as its widest cell.

    >>> from nnsplice.cli.table import aligned
    >>> aligned([("layers[0..5]", "64"), ("  attn", "64")])
    ['layers[0..5]  64', '  attn        64']
    """
    every = [*([head] if head else []), *(tuple(map(_cell, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*every, strict=True)] if every else []
    return [_line(row, widths, bold=row is head) for row in every]


def _cell(text: str) -> str:
    return printable(text).replace("\n", r"\n")


def _line(row: Row, widths: Sequence[int], *, bold: bool) -> str:
    # Padded before it is coloured, as the marks of a colour have a length too; nothing follows the last word.
    last = max((number for number, cell in enumerate(row) if cell), default=0)
    cells = [
        _styled(cell, "" if number == last else " " * (width - len(cell)), bold)
        for number, (cell, width) in enumerate(zip(row[: last + 1], widths, strict=False))
    ]
    return "  ".join(cells)


def _styled(cell: str, padding: str, bold: bool) -> str:
    style = {"bold": True} if bold else STYLES.get(cell)
    return (typer.style(cell, **style) if style and cell else cell) + padding


def say(text: str = "", *, err: bool = False) -> None:
    """Print a text, which may quote a file: whatever a terminal would obey is spelled out."""
    typer.echo(printable(text), err=err)


def show(lines: Iterable[str]) -> None:
    """Print lines; colours are left out where nobody would see them."""
    for line in lines:
        typer.echo(line, color=False if os.environ.get("NO_COLOR") else None)
