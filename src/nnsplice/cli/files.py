"""Files that commands read and write: prompts from a file, and folders that have to exist before anything runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from nnsplice.errors import BadArgument, FileError
from nnsplice.files import local_path, text_of


def prompts_of(given: Iterable[str]) -> list[str]:
    """Prompts, with each line of a file for `@FILE`.

    Raises:
        FileError: a file that cannot be read.
    """
    found: list[str] = []
    for text in given:
        found += prompts_in(text[1:]) if text.startswith("@") else [text]
    return found


def prompts_in(file: str | Path) -> list[str]:
    """The lines of a file that are not empty.

    Raises:
        FileError: a file that cannot be read, or has no line.
    """
    expected = "a text file with a prompt on each line"
    try:
        lines = [line for line in text_of(file).splitlines() if line.strip()]
    except (OSError, FileError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise FileError(f"{file} cannot be read: {reason}", expected=expected) from None
    if not lines:
        raise FileError(f"{file} has no prompt", expected=expected)
    return lines


def require_writable(file: Path | None, *endings: str, option: str = "--out") -> None:
    """Raise, before anything is computed, if a file to write has another ending or a folder that does not exist.

    Raises:
        FileError: there is no such folder, or a folder has the file's name.
        BadArgument: another ending, or the address of an object store.
    """
    if file is None:
        return
    if local_path(file).is_dir():
        raise FileError(f"{file} is a folder", expected=f"{option} with the name of a file")
    if not file.absolute().parent.is_dir():
        raise FileError(f"there is no folder {file.absolute().parent}", expected=f"{option} in a folder that exists")
    if file.suffix not in endings:
        raise BadArgument(
            f"{option} is {file}",
            expected=f"a file that ends with {' or '.join(endings)}",
            write=f"{option} {file.with_suffix(endings[0])}",
        )
