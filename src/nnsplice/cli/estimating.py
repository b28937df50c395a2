"""`nnsplice trace --method`: estimates instead of a sweep, in the same folder and on the same page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnsplice.cli.table import TableRow
from nnsplice.errors import BadArgument, FileError

if TYPE_CHECKING:
    from nnsplice.metrics import Metric
    from nnsplice.results import SweepResult
    from nnsplice.sweeps import Plan

#: Methods that score edges, whose sites are senders.
EDGES = ("eap", "eap-ig", "relp", "ifr")
#: Options without effect on estimates, and those without effect on anything else.
NOT_FOR_ESTIMATES = ("operation", "reference", "window")
FOR_ESTIMATES = ("verify", "steps", "receivers")


def method_of(settings: dict[str, Any]) -> str | None:
    """The method of attribution; None for an exact sweep.

    Raises:
        BadArgument: an option that would do nothing.
    """
    method = settings.get("method", "exact")
    useless = [name for name in (FOR_ESTIMATES if method == "exact" else NOT_FOR_ESTIMATES) if name in settings]
    if useless:
        what = "an exact sweep" if method == "exact" else method
        raise BadArgument(f"--{useless[0]} says nothing to {what}", expected=f"--method other than {method}")
    return None if method == "exact" else method


def estimate(model: Any, settings: dict[str, Any], metric: Metric, journal: Path) -> SweepResult:
    """Compute the estimates; verified cells go to the journal."""
    import nnsplice as ns

    verify = settings.get("verify", 0)
    return ns.attribute(
        model, settings["clean"], settings["corrupted"], settings["sites"], metric, method=settings["method"],
        receivers=settings.get("receivers"), steps=settings.get("steps"), verify=verify,
        align=settings.get("align", "position"),
        seed=settings.get("seed", 0), executor=settings.get("executor", "auto"), max_tokens=settings.get("max-tokens"),
        journal=journal if verify else None, progress=sys.stderr.isatty(),
    )  # fmt: skip


def check_same(result: SweepResult, settings: dict[str, Any], model: Any, plan: Plan, path: Path) -> None:
    """Raise if a folder holds the estimates of another question."""
    from nnsplice.attribution import asked_of
    from nnsplice.results import plain

    identity = plain(asked_of(model, plan, settings["method"], settings.get("receivers"), settings.get("steps")))
    verify = result.asked.get("verify") or {}
    different = [name for name, value in identity.items() if result.asked.get(name) != value]
    different += ["verify"] * (verify.get("k", 0) != settings.get("verify", 0))
    if different:
        raise FileError(
            f"{path} holds the answer to another question: {', '.join(different)} differ", expected="another --out"
        )


def rows(result: SweepResult) -> tuple[list[TableRow], TableRow, list[dict[str, Any]]]:
    """The largest edges, as a table, and the same with unrounded numbers."""
    found = result.edges().head(10).to_dict("list")
    numbers = [name for name in ("score", "exact") if name in found]
    names = ("sender", "receiver", *numbers)
    columns = [found["sender"], found["receiver"], *([_number(one) for one in found[name]] for name in numbers)]
    values = [dict(zip(names, row, strict=True)) for row in zip(*(found[name] for name in names), strict=True)]
    return list(zip(*columns, strict=True)), ("sender", "receiver", *(f" {name}" for name in numbers)), values


def _number(value: float) -> str:
    return "" if value != value else f"{value: .4g}"


def about(result: SweepResult) -> list[str]:
    """Lines about the method and the verified estimates."""
    lines = [f"estimated by {result.method}, not measured"]
    return [*lines, str(result.verification)] if result.table.exact is not None else lines
