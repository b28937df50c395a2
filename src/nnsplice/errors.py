"""Every exception of nnsplice.

Each one is also the builtin that a caller would catch without knowing nnsplice:

    NnspliceError
    ├── PathError (ValueError)              a text is no path, or a path asks for what it cannot mean
    │   ├── MissingPosition                 a token position is needed here
    │   ├── OutOfRange (+ IndexError)       layer 12 of 12
    │   └── RefusedPlace                    the place exists, but has no honest value
    ├── UnknownPath (KeyError)              no such place in this model, no such key in this capture
    ├── UnknownParameter (AttributeError)   no such parameter in this model
    ├── UnrecognisedModel (ValueError)      the parts of this model cannot be told apart
    ├── ShortRow (IndexError)               a prompt has no token at this position
    ├── SpanError (ValueError)              a named span cannot be found in a prompt
    ├── ShapeError (ValueError)             a value is not [prompt, token, width]
    ├── KeyMismatch (ValueError)            two captures hold different places
    ├── DuplicatePath (ValueError)          the same place twice
    ├── OverlappingWrite (ValueError)       two writes meet in one value
    ├── LateUpdate (RuntimeError)           the run is already past the place
    ├── NeverFired (RuntimeError)           the forward pass does not reach the place
    ├── OutsideTrace (RuntimeError)         needs a running trace, or must not be in one
    ├── NeedsProbe (RuntimeError)           the model has to be run once, and no input is known
    ├── BadArgument (ValueError)            an argument out of its domain
    ├── BadType (TypeError)                 an argument of another type
    ├── MissingPackage (ImportError)        an extra that is not installed
    ├── ParamMappingError (ValueError)      parameters of an optimizer cannot be given to layers with certainty
    ├── FileError (ValueError)              a file that is no capture, or a damaged one
    ├── MapperError (ValueError)            mappers that do not fit together, or tensors that do not fit a mapper
    ├── MissingCheckpoint (FileNotFoundError)   a folder without weights, or a shard that is not there
    ├── WriteFailed (OSError)               the disk did not take a file
    └── TeamError (RuntimeError)            another process of those that do one thing together failed

A message says what was found, what was expected and what to write instead. Inner code raises the reason; the public
function adds the circumstances with `circumstances`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

__all__ = [
    "BadArgument",
    "BadType",
    "DuplicatePath",
    "FileError",
    "KeyMismatch",
    "LateUpdate",
    "MapperError",
    "MissingCheckpoint",
    "MissingPackage",
    "MissingPosition",
    "NeedsProbe",
    "NeverFired",
    "NnspliceError",
    "OutOfRange",
    "OutsideTrace",
    "OverlappingWrite",
    "ParamMappingError",
    "PathError",
    "RefusedPlace",
    "ShapeError",
    "ShortRow",
    "SpanError",
    "TeamError",
    "UnknownParameter",
    "UnknownPath",
    "UnrecognisedModel",
    "WriteFailed",
]


def __dir__() -> list[str]:  # what <TAB> shows
    return __all__


class NnspliceError(Exception):
    """The base of every error raised here; `str()` is the whole message, whatever builtin it also is."""

    def __init__(
        self,
        reason: str,
        *,
        path: object = None,
        column: int | None = None,
        expected: str | None = None,
        write: str | None = None,
    ) -> None:
        """Compose the message.

        Args:
            reason: what was found, in one sentence.
            path: the text or path it was found in, shown on a line of its own.
            column: where in `path`, shown as a caret below it.
            expected: what would have been right.
            write: the line to write instead.
        """
        lines = [reason]
        if path is not None:
            lines.append(f"    {path}")
            if column is not None:
                lines.append("    " + " " * column + "^")
        if expected is not None:
            lines.append(f"  expected: {expected}")
        if write is not None:
            lines.append(f"  write: {write}")
        super().__init__("\n".join(lines))

    def __str__(self) -> str:
        # KeyError would show the repr of its message, with every line break escaped.
        return str(self.args[0])

    def __reduce__(self) -> tuple:
        # The message is already composed; a copy in another process must not compose it again.
        return (_restore, (type(self), self.args[0]))


def _restore(kind: type[NnspliceError], message: str) -> NnspliceError:
    return kind(message)


class PathError(NnspliceError, ValueError):
    """A text is no path, or a path asks for what it cannot mean."""


class MissingPosition(PathError):
    """A token position is needed here."""


class OutOfRange(PathError, IndexError):
    """An index past the last layer, head, group, neuron or expert."""


class RefusedPlace(PathError):
    """The place exists, but reading or writing it would not mean what its name says."""


class UnknownPath(NnspliceError, KeyError):
    """No such place in this model, or no such key in this capture."""


class UnknownParameter(NnspliceError, AttributeError):
    """No such parameter in this model."""


class UnrecognisedModel(NnspliceError, ValueError):
    """The parts of this model cannot be told apart."""


class ShortRow(NnspliceError, IndexError):
    """A prompt has no token at this position."""


class SpanError(NnspliceError, ValueError):
    """A named span cannot be found in a prompt."""


class ShapeError(NnspliceError, ValueError):
    """A value is not `[prompt, token, width]`."""


class KeyMismatch(NnspliceError, ValueError):
    """Two captures hold different places."""


class DuplicatePath(NnspliceError, ValueError):
    """The same place twice."""


class OverlappingWrite(NnspliceError, ValueError):
    """Two writes meet in one value."""


class LateUpdate(NnspliceError, RuntimeError):
    """The run is already past the place."""


class NeverFired(NnspliceError, RuntimeError):
    """The forward pass does not reach the place."""


class OutsideTrace(NnspliceError, RuntimeError):
    """The call needs a running trace, or must not stand in one."""


class NeedsProbe(NnspliceError, RuntimeError):
    """The model has to be run once to learn its order, and no input for it is known."""


class BadArgument(NnspliceError, ValueError):
    """An argument out of its domain."""


class BadType(NnspliceError, TypeError):
    """An argument of another type than the function takes."""


class MissingPackage(NnspliceError, ImportError):
    """A package that one of the extras brings is not installed."""


class ParamMappingError(NnspliceError, ValueError):
    """Parameters of an optimizer cannot be given to layers with certainty."""


class FileError(NnspliceError, ValueError):
    """A file that is no capture, or a damaged one."""


class MapperError(NnspliceError, ValueError):
    """Mappers of a checkpoint that do not fit together, or tensors that do not fit a mapper."""


class MissingCheckpoint(NnspliceError, FileNotFoundError):
    """A folder without weights, or one whose index names a file that is not there."""


class WriteFailed(NnspliceError, OSError):
    """The disk did not take a file."""


class TeamError(NnspliceError, RuntimeError):
    """Another one of the processes that do one thing together failed."""


@contextmanager
def circumstances(text: str) -> Iterator[None]:
    """Add where it happened to an error raised inside, and hide the inner frames' chain from the reader."""
    try:
        yield
    except NnspliceError as error:
        error.args = (f"{error.args[0]}\n  in: {text}",)
        raise error from None


def closest(name: str, names: Iterable[str], n: int = 3) -> str:
    """The names most like `name`, as text for a message; all of them when there are few and none is close."""
    names = list(dict.fromkeys(names))
    near = get_close_matches(name, names, n=n, cutoff=0.5)
    shown = near or names[: 2 * n]
    more = "" if near or len(names) <= 2 * n else f", ... ({len(names)} in all)"
    return ", ".join(shown) + more if shown else "nothing"
