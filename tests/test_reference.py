"""The reference is complete: `help()` of every public function has a summary, its arguments, result and errors."""

from __future__ import annotations

import builtins
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import nnsplice as ns

#: Results that need no words: nothing comes back, from a function or from a `with` block.
NOTHING = ("None", "Iterator[None]")
SECTIONS = ("Attributes", "Args", "Returns", "Yields", "Raises")
_ENTRY = re.compile(r"    (\*{0,2}[\w.]+): \S")


def rooms() -> dict[str, ModuleType]:
    """The package and its public modules, by the name that a user writes."""
    inner = {f"ns.{name}": getattr(ns, name) for name in ns.__all__}
    return {"ns": ns, **{name: value for name, value in inner.items() if inspect.ismodule(value)}}


def public() -> dict[str, Any]:
    """Every public name with its value."""
    return {f"{room}.{name}": getattr(module, name) for room, module in rooms().items() for name in module.__all__}


FUNCTIONS = {name: value for name, value in public().items() if inspect.isfunction(inspect.unwrap(value))}
CLASSES = {name: value for name, value in public().items() if inspect.isclass(value)}


def methods() -> Iterator[tuple[str, tuple[str, Callable[..., Any]]]]:
    """The public methods and properties that a public class defines: their text in `help()`, and the function."""
    for owner, cls in CLASSES.items():
        for name, member in vars(cls).items():
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if not name.startswith("_") and inspect.isfunction(function):
                yield f"{owner}.{name}", (inspect.getdoc(member) or "", function)


METHODS = dict(methods())


def sections(doc: str) -> dict[str, list[str]]:
    """The sections of a docstring in Google's style: their lines, by the section's name."""
    found: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in doc.splitlines():
        if line.removesuffix(":") in SECTIONS and line.endswith(":"):
            current = found[line.removesuffix(":")] = []
        elif line and not line.startswith(" "):
            current = None  # text that follows a section is no part of it
        elif current is not None:
            current.append(line)
    return found


def entries(lines: list[str]) -> list[str]:
    """The names that a section describes, without the stars of `*args`."""
    return [match[1].lstrip("*") for line in lines if (match := _ENTRY.match(line))]


def undocumented_fields(cls: type) -> list[str]:
    """The arguments that a data class has of its own, and that its docstring does not describe."""
    said = sections(inspect.getdoc(cls) or "")
    told = entries(said.get("Attributes", []) + said.get("Args", []))
    own, fields = inspect.get_annotations(cls), vars(cls).get("__dataclass_fields__", {})
    public = [name for name, field in fields.items() if name in own and field.init and not name.startswith("_")]
    return [name for name in public if name not in told]


def unknown(function: Callable[..., Any]) -> list[str]:
    """Documented arguments that the function does not have, and errors that there are not."""
    said = sections(inspect.getdoc(function) or "")
    known = inspect.signature(function).parameters
    return [
        *(f"documents {name}, which is no parameter" for name in entries(said.get("Args", [])) if name not in known),
        *(
            f"raises {name}, which is no error"
            for name in entries(said.get("Raises", []))
            if not hasattr(ns.errors, name) and not hasattr(builtins, name)
        ),
    ]


def faults(function: Callable[..., Any]) -> list[str]:
    """What the docstring of a function lacks, or says of parameters that there are not."""
    doc = inspect.getdoc(function) or ""
    summary, said, signature = doc.partition("\n")[0], sections(doc), inspect.signature(function)
    told = entries(said.get("Args", []))
    found = unknown(function)
    if not summary.endswith((".", ":")):
        found.append("has no summary of one line")
    found += [f"does not document {name}" for name in signature.parameters if name not in told]
    found += [f"documents {name} twice" for name in {name for name in told if told.count(name) > 1}]
    annotation = signature.return_annotation
    speaks = any("".join(said.get(name, [])).strip() for name in ("Returns", "Yields"))
    if (annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "None")) not in NOTHING:
        found += [] if speaks else ["does not say what it returns"]
    elif speaks:
        found.append("returns nothing, and documents a result")
    return found


def test_public_functions_are_found() -> None:
    """The lists below are not empty by mistake: functions, decorated ones and those of rooms are among them."""
    assert {"ns.sweep", "ns.knockout", "ns.steering.fit", "ns.models.toy_prompts", "ns.plots.heatmap"} <= set(FUNCTIONS)
    assert {"ns.SweepResult.grid", "ns.SweepResult.clean", "ns.SavedActivation.from_file"} <= set(METHODS)
    assert len(FUNCTIONS) > 80


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_is_documented(name: str) -> None:
    assert faults(FUNCTIONS[name]) == []


@pytest.mark.parametrize("name", CLASSES)
def test_class_has_a_summary(name: str) -> None:
    assert (vars(CLASSES[name]).get("__doc__") or "").partition("\n")[0].endswith((".", ":"))


@pytest.mark.parametrize("name", CLASSES)
def test_fields_are_documented(name: str) -> None:
    assert undocumented_fields(CLASSES[name]) == []


@pytest.mark.parametrize("name", METHODS)
def test_method_is_documented(name: str) -> None:
    doc, function = METHODS[name]
    told = entries(sections(doc).get("Args", []))
    assert doc.partition("\n")[0].endswith((".", ":"))
    assert unknown(function) == []
    assert [name for name in inspect.signature(function).parameters if name not in (*told, "self", "cls")] == []


# --- negative controls ------------------------------------------------------------------------------------------------


def _complete(one: int, *rest: int, **options: int) -> int:
    """Add numbers.

    >>> _complete(1, 2)
    3

    Args:
        one: the first number,
            which may be negative: or so.
        *rest: the others.
        **options: numbers by name.

    Returns:
        The sum.

    Raises:
        BadType: something that is no number.
        ValueError: never.
    """
    return one + sum(rest) + sum(options.values())


def _wanting(one: int, two: int) -> int:
    """Add numbers.

    Args:
        one: the first number.
        three: a number that there is not.

    Raises:
        BadNumber: an error that there is not.
    """
    return one + two


def _nothing(one: int) -> None:
    """Do nothing

    Args:
        one: a number.
        one: the same once more.

    Returns:
        A number.
    """


def _silent(one: int) -> int:
    return one


@dataclass(frozen=True)
class _Value:
    """A value.

    Attributes:
        one: a number.
    """

    one: int
    two: int
    _own: int = 0


def test_the_checker_accepts_a_complete_docstring() -> None:
    assert faults(_complete) == []


def test_the_checker_reports_missing_and_unknown_parts() -> None:
    assert faults(_wanting) == [
        "documents three, which is no parameter",
        "raises BadNumber, which is no error",
        "does not document two",
        "does not say what it returns",
    ]
    assert undocumented_fields(_Value) == ["two"]
    assert faults(_nothing) == [
        "has no summary of one line",
        "documents one twice",
        "returns nothing, and documents a result",
    ]
    assert faults(_silent) == [
        "has no summary of one line",
        "does not document one",
        "does not say what it returns",
    ]


def test_the_errors_page_has_cause_and_repair_of_every_error() -> None:
    page = (Path(__file__).parent.parent / "docs" / "reference" / "errors.md").read_text(encoding="utf-8")
    rows = {row.split("`")[1] for row in page.splitlines() if row.startswith("| `")}
    assert rows == set(ns.errors.__all__) - {"NnspliceError"}
