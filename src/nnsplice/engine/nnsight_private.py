"""The private names of nnsight that `tracing` uses: a table with the modules that define them.

nnsight moves private names between versions. A name is looked up in the modules of its row, in order; if it moves, the
row gets a new entry. A missing name is an error at import, with the installed version.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from nnsplice.errors import MissingPackage

#: Name -> the modules that may hold it, the newest first.
PLACES: dict[str, tuple[str, ...]] = {
    "Mediator": ("nnsight.intervention.interleaver",),
    "STATE": ("nnsight.intervention.source",),
    "Controller": ("nnsight.intervention.source",),
    "_framework_forward": ("nnsight.intervention.source",),
    "BackwardTracer": ("nnsight.intervention.backward",),
    "WithBlockNotFoundError": ("nnsight.intervention.backward",),
    "_original_backward": ("nnsight.intervention.backward",),
}
#: Class -> the attributes used of it, without those that only instances have.
USED: dict[str, tuple[str, ...]] = {
    "Mediator": ("current", "occurrence", "wanted"),
    "BackwardTracer": ("capture",),
}


def find(name: str) -> Any:
    """A private name of nnsight, from the first module that has it.

    >>> from nnsplice.engine import nnsight_private
    >>> nnsight_private.find("Mediator").__name__
    'Mediator'

    Raises:
        MissingPackage: none of them has it, or it lacks an attribute.
    """
    for place in PLACES[name]:
        try:
            found = getattr(import_module(place), name)
        except (ImportError, AttributeError):
            continue
        lacks = [used for used in USED.get(name, ()) if not hasattr(found, used)]
        if not lacks:
            return found
        raise _moved(f"{name}.{lacks[0]}", place)
    raise _moved(name, " or ".join(PLACES[name]))


def _moved(name: str, place: str) -> MissingPackage:
    try:
        which = version("nnsight")
    except PackageNotFoundError:
        which = "of an unknown version"
    return MissingPackage(
        f"nnsight {which} has no {name} in {place}, which nnsplice cannot run without",
        expected="a version of nnsight that nnsplice was tested with",
        write='pip install "nnsight>=0.8.1,<0.9"',
    )


if TYPE_CHECKING:
    from nnsight.intervention.backward import BackwardTracer, WithBlockNotFoundError, _original_backward
    from nnsight.intervention.interleaver import Mediator as Mediator
    from nnsight.intervention.source import STATE, Controller, _framework_forward
else:
    Mediator, STATE, Controller = find("Mediator"), find("STATE"), find("Controller")
    _framework_forward, _original_backward = find("_framework_forward"), find("_original_backward")
    BackwardTracer, WithBlockNotFoundError = find("BackwardTracer"), find("WithBlockNotFoundError")

original_backward: Callable[..., Any] = _original_backward
framework_forward: Callable[..., Any] = _framework_forward
