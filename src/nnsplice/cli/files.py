"""Files that commands read and write: prompts from a file, and folders that have to exist before anything runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from nnsplice.errors import FileError
from nnsplice.files import local_folder, text_of


def prompts_of(given: Iterable[str]) -> list[str]:
    """Prompts, with each line of a file for `@FILE`.

    Raises:
        FileError: a file that cannot be read.
    """
    found: list[str] = []
    for text in given:
        if not text.startswith("@"):
            found.append(text)
            continue
        try:
            lines = text_of(text[1:]).splitlines()
        except (OSError, FileError) as error:
            raise FileError(
                f"{text[1:]} cannot be read: {error}", expected="a file with a prompt in each line"
            ) from None
        found += [line for line in lines if line.strip()]
    return found


def require_folder_of(file: Path | None, option: str = "--out") -> None:
    """Raise, before anything is computed, if the folder of a file to write does not exist.

    Raises:
        FileError: there is no such folder.
        BadArgument: the address of an object store.
    """
    if file is not None and not local_folder(file).absolute().parent.is_dir():
        raise FileError(f"there is no folder {file.absolute().parent}", expected=f"{option} in a folder that exists")
