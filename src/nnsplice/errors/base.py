"""The base class of all errors, and how a public function adds its circumstances to one raised further in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from nnsplice.shown import printable


class NnspliceError(Exception):
    """The base class of all errors of nnsplice; `str()` is the whole message, also of those that are a KeyError.

    >>> try:
    ...     ns.capture(model, "w3 w4", "layers[7].output[-1]")
    ... except IndexError as error:   # or ns.errors.NnspliceError, which every one of them is
    ...     print(error)
    layers[7] is past the last layer; this model has 3, so layers are layers[0] to layers[2]
        layers[7].output[-1]
        ^
      in: ns.capture
    """

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
        super().__init__(printable("\n".join(lines)))  # it may quote a name out of a file

    def __str__(self) -> str:
        # KeyError would show the repr of its message, with every line break escaped.
        return str(self.args[0])

    def __reduce__(self) -> tuple[object, ...]:
        # The message is already composed; a copy in another process must not compose it again.
        return (_restore, (type(self), self.args[0]))


def _restore(kind: type[NnspliceError], message: str) -> NnspliceError:
    return kind(message)


@contextmanager
def circumstances(text: str) -> Iterator[None]:
    """Add where it happened to an error raised inside, and hide the inner frames' chain from the reader."""
    try:
        yield
    except NnspliceError as error:
        error.args = (f"{error.args[0]}\n  in: {printable(text)}",)
        raise error from None
