"""The pages of the site that nobody writes by hand: notebooks, a page for every public name, the commands.

They are written below `docs/tutorials/made` and `docs/reference/made` each time the site is built.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import GenericAlias
from typing import Any

#: Links of notebooks and of pages outside of the site, by how they begin.
REPOSITORY = ("../docs/", "docs/")


@dataclass(frozen=True)
class Group:
    """Names of the reference that belong together."""

    title: str
    about: str
    names: tuple[str, ...]

    @property
    def file(self) -> str:
        """The name of its page."""
        return re.sub(r"\W+", "-", self.title.lower()).strip("-")


def groups(docs: Path) -> list[Group]:
    """What `reference.toml` lists; a room stands for all names that it offers."""
    found = tomllib.loads((docs / "reference.toml").read_text(encoding="utf-8"))["group"]
    return [Group(one["title"], one["about"], tuple(_spelled(one["names"]))) for one in found]


def _spelled(names: list[str]) -> Iterator[str]:
    for name in names:
        if name.endswith(".*"):
            room = importlib.import_module(name[:-2])
            yield from (f"{name[:-2]}.{one}" for one in room.__all__)
        else:
            yield name


def value_of(name: str) -> Any:
    """What a dotted name stands for."""
    module, _, last = name.rpartition(".")
    return getattr(importlib.import_module(module), last)


def summary(name: str) -> str:
    """The first sentence of a docstring."""
    return marked((inspect.getdoc(value_of(name)) or "").split("\n\n")[0].replace("\n", " "))


def write(docs: Path) -> None:
    """Write all of them anew."""
    for folder in (docs / "tutorials" / "made", docs / "reference" / "made"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    for notebook in sorted((docs.parent / "notebooks").glob("*.ipynb")):
        (docs / "tutorials" / "made" / notebook.name).write_text(_linked(notebook.read_text("utf-8")), "utf-8")
    for group in groups(docs):
        _write_group(docs / "reference" / "made", group)
    (docs / "reference" / "made" / "commands.md").write_text(commands(), "utf-8")


def _linked(notebook: str) -> str:
    """A notebook whose links to pages of the site and to other notebooks lead there."""
    told = json.loads(notebook)
    for cell in told["cells"]:
        if cell["cell_type"] == "markdown":
            text = "".join(cell["source"])
            cell["source"] = re.sub(r"\]\(\.\./(?:docs/)?([\w/]+)\.md", r"](../../\1.md", text)
    return json.dumps(told)


def _write_group(folder: Path, group: Group) -> None:
    rows, pages = [], []
    for name in group.names:
        page = f"{group.file}/{name}"
        rows.append(f"   * - :doc:`{name} <{page}>`\n     - {summary(name)}")
        pages.append(page)
        target = folder / f"{page}.md"
        target.parent.mkdir(exist_ok=True)
        target.write_text(_page(name), "utf-8")
    table = ".. list-table::\n   :widths: 40 60\n\n" + "\n".join(rows)
    tree = "\n".join(pages)
    text = f"# {group.title}\n\n{group.about}\n\n```{{eval-rst}}\n{table}\n```\n\n"
    (folder / f"{group.file}.md").write_text(f"{text}```{{toctree}}\n:hidden:\n\n{tree}\n```\n", "utf-8")


def _page(name: str) -> str:
    value = value_of(name)
    if inspect.isclass(value):
        directive, options = (
            "autoclass",
            "\n   :members:\n   :inherited-members: BaseException, Mapping, dict, str, tuple",
        )
    elif callable(value):
        directive, options = "autofunction", ""
    else:
        directive, options = "autodata", ""
    return f"# {name.rpartition('.')[2]}\n\n```{{eval-rst}}\n.. {directive}:: {name}{options}\n```\n"


# --- the commands -----------------------------------------------------------------------------------------------------


def commands() -> str:
    """A page of every command with its options, from the commands themselves."""
    import typer

    from nnsplice.cli import app

    lines = ["# Commands", "", "`nnsplice COMMAND --help` says the same in a terminal.", ""]
    lines += _command(typer.main.get_command(app), "nnsplice", 2)
    return "\n".join(lines) + "\n"


def _command(command: Any, name: str, depth: int) -> list[str]:
    inner = getattr(command, "commands", None)
    if inner:
        return [line for key in sorted(inner) for line in _command(inner[key], f"{name} {key}", depth)]
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name == "option" and not one.hidden]
    usage = " ".join([name, *((one.metavar or one.name or "").upper() for one in arguments), "[OPTIONS]"])
    lines = [f"{'#' * depth} {name}", "", "```text", usage, "```", "", *_plain(command.help or ""), ""]
    if options:
        lines += ["| option | what it does |", "|---|---|"]
        lines += [f"| `{', '.join(one.opts)}` | {_cell(getattr(one, 'help', None) or '')} |" for one in options]
    return [*lines, ""]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[")


def _plain(text: str) -> list[str]:
    """Help as a page: what keeps its lines in a terminal is code, the rest is prose."""
    lines: list[str] = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        if paragraph.startswith("\b"):
            lines += ["```text", *inspect.cleandoc(paragraph.lstrip("\b\n")).splitlines(), "```", ""]
        else:
            lines += [" ".join(paragraph.split()).replace("<", "&lt;"), ""]
    return lines


# --- what is read -----------------------------------------------------------------------------------------------------


def sessions(_app: Any, _name: str, source: list[str]) -> None:
    """Show blocks of Python with prompts as the sessions that they are."""
    source[0] = re.sub(r"```python\n(?=>>> )", "```pycon\n", source[0])


def docstrings(_app: Any, _what: str, _name: str, value: Any, _options: Any, lines: list[str]) -> None:
    """Mark code as reStructuredText does: docstrings are written for `help()`, with single backticks."""
    if isinstance(value, GenericAlias):  # which says what `dict` says
        lines.clear()
    session = False
    for number, line in enumerate(lines):
        session = line.lstrip().startswith(">>>") or (session and bool(line.strip()))
        if not session:
            lines[number] = marked(line)


def marked(line: str) -> str:
    """A line of prose whose code is code, and whose other signs are only signs; a star in front begins an item."""
    item = re.match(r"\s*\* ", line)
    start = item.end() if item else 0
    parts = re.split(r"(``?[^`]+``?)", line[start:])
    return line[:start] + "".join(
        f"``{part.strip('`')}``" if part.startswith("`") else re.sub(r"([|*])", r"\\\1", part) for part in parts
    )
