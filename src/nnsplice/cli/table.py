"""The output of commands: tables as aligned columns or as JSON, texts, warnings."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from nnsplice.shown import printable

TableRow = tuple[str, ...]

#: Words that are coloured where they fill a cell, on a terminal.
STYLES: dict[str, dict[str, Any]] = {
    "ok": {"fg": typer.colors.GREEN},
    "FAILED": {"fg": typer.colors.RED, "bold": True},
    "skipped": {"fg": typer.colors.YELLOW},
    "refused": {"fg": typer.colors.YELLOW},
}


def aligned(rows: Sequence[TableRow], head: TableRow | None = None) -> list[str]:
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


def _line(row: TableRow, widths: Sequence[int], *, bold: bool) -> str:
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


@dataclass
class _Output:
    """The form of the running command's output, and its tables so far where that is JSON."""

    json: bool = False
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


_output = _Output()


def begin() -> None:
    """A new command: text, until its `--json` is read."""
    _output.json = False
    _output.tables.clear()


def finish() -> None:
    """Print the tables as JSON: one table as a list of rows, several by their names."""
    if not _output.json or not _output.tables:
        return
    tables = list(_output.tables.values())
    text = json.dumps(tables[0] if len(tables) == 1 else _output.tables, indent=2, ensure_ascii=True, allow_nan=False)
    typer.echo(text)


def _as_json(wanted: bool) -> bool:
    _output.json = wanted
    return wanted


#: The option of every command that prints a table.
JsonOption = Annotated[
    bool,
    typer.Option("--json", callback=_as_json, is_eager=True, help="Print the table as JSON; all else goes to stderr."),
]


def tabulate(
    name: str, rows: Sequence[TableRow], head: Sequence[str], values: Sequence[Mapping[str, Any]] | None = None
) -> None:
    """Print a table: as aligned text, or with `--json` as JSON.

    Args:
        name: the name of the table, for a command that has several.
        rows: the cells as text.
        head: the names of the columns; columns without a name are not in the JSON.
        values: for JSON, the rows with unrounded numbers; read from the cells if left out.
    """
    if not _output.json:
        show(aligned(rows, tuple(head)))
        return
    if values is None:
        rows = _whole_names(rows)
        values = [{key.strip(): value_of(cell) for key, cell in zip(head, row, strict=False) if key} for row in rows]
    _output.tables[name] = [{key: _plain(value) for key, value in row.items()} for row in values]


def _whole_names(rows: Sequence[TableRow]) -> list[TableRow]:
    """Rows whose indented first cells have the names of the cells above them as a prefix."""
    above: list[str] = []
    found: list[TableRow] = []
    for first, *others in rows:
        depth = (len(first) - len(first.lstrip(" "))) // 2
        above = [*above[:depth], first.strip()]
        found.append((".".join(above), *others))
    return found


def value_of(cell: str) -> Any:
    """The value of a cell: a number where it is one, None where it is empty.

    >>> from nnsplice.cli.table import value_of
    >>> value_of("1.5e-3"), value_of(" 4"), value_of("layers[0]"), value_of("")
    (0.0015, 4, 'layers[0]', None)
    """
    text = cell.strip()
    if text.endswith("%"):
        share = value_of(text[:-1])
        return share / 100 if isinstance(share, int | float) else text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text or None


def _plain(value: Any) -> Any:
    """A value that JSON has: no NaN, and Python's own numbers."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def say(text: str = "", *, err: bool = False) -> None:
    """Print a text with its control characters spelled out; to stderr with `--json`."""
    typer.echo(printable(text), err=err or _output.json)


def show(lines: Iterable[str]) -> None:
    """Print lines; without colours where the output is no terminal."""
    for line in lines:
        typer.echo(line, color=False if os.environ.get("NO_COLOR") else None, err=_output.json)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Show a warning as its message; the line of nnsplice that gave it means nothing to a reader in a shell."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: say(str(message), err=True)
        yield
