"""Files that appear complete or not at all; pickles are never opened."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nnsplice.errors import BadArgument, FileError

#: An address of an object store, also one of which pathlib has dropped a slash.
_ADDRESS = re.compile(r".*://|(s3|gs):/")


@contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A name beside `path` to write under; the file takes its place when the block ends well."""
    target = local_path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {target.parent} to write {target.name} in")
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        temporary.touch()
        # What every new file gets here (safetensors would let nobody else read it), or what the old one has.
        mode = (target if target.is_file() else temporary).stat().st_mode
        temporary.chmod(0o600)
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(mode)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def is_pickle(path: str | os.PathLike[str]) -> bool:
    """Whether a file that should be safetensors is a pickle, which safetensors would only call damaged."""
    with local_path(path).open("rb") as file:
        start = file.read(9)
    # The length of a safetensors header can begin with the very bytes of a pickle; the header itself begins with {.
    return start[8:] != b"{" and start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def from_json(text: str | bytes, of: object) -> Any:
    """What a JSON text says, whoever wrote it.

    Args:
        of: what the text is, for the message.

    Raises:
        FileError: it is no JSON.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise FileError(f"{of} is damaged: it is nested deeper than anything of use", expected="JSON") from None
    except ValueError as error:
        raise FileError(f"{of} is damaged, or no JSON: {error}", expected="JSON") from None


def text_of(path: str | os.PathLike[str]) -> str:
    """What stands in a file of text.

    Raises:
        FileError: it is no text.
        BadArgument: the address of an object store.
    """
    try:
        return local_path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is damaged, or no text: {error}", expected="text in UTF-8") from None


def local_path(path: str | os.PathLike[str]) -> Path:
    """A folder or a file on this machine's file system.

    Raises:
        BadArgument: the address of an object store, of which a path would be a folder of an odd name.
    """
    text = os.fspath(path)
    if _ADDRESS.match(text):
        raise BadArgument(
            f"{text} is an address of an object store, and this is read from and written to a file system alone",
            expected="a path on a file system",
        )
    return Path(text)
