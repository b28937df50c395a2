"""Addresses of object stores."""

from __future__ import annotations

import os
import re

from nnsplice.errors import BadArgument

#: The schemes of stores with conditional puts, which fail if the object exists.
SCHEMES = ("s3", "gs")
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_CUT = re.compile(rf"({'|'.join(SCHEMES)}):/[^/]")


def is_address(path: str | os.PathLike[str]) -> bool:
    """Whether a text is an address of an object store, and not a path.

    Raises:
        BadArgument: an address with another scheme, or one that `pathlib` has changed.
    """
    text = os.fspath(path)
    if found := _ADDRESS.match(text):
        if found[1] not in SCHEMES:
            raise BadArgument(
                f"{text} is no address of an object store that is known here",
                expected=f"a folder, or {' or '.join(f'{name}://bucket/...' for name in SCHEMES)}",
            )
        return True
    if _CUT.match(text):
        raise BadArgument(
            f"{text} is an address of an object store of which pathlib has dropped a slash",
            expected="the address as a text",
            write=repr(text.replace(":/", "://", 1)),
        )
    return False


def split(address: str) -> tuple[str, str]:
    """The bucket (`s3://bucket`) and the prefix of an address.

    Raises:
        BadArgument: no bucket, or a path with an empty part, `.` or `..`.
    """
    scheme, _, rest = address.partition("://")
    bucket, _, prefix = rest.partition("/")
    parts = prefix.rstrip("/").split("/") if prefix.rstrip("/") else []
    if not bucket or any(part in ("", ".", "..") for part in parts):
        raise BadArgument(f"{address!r} is no address", expected=f"{scheme}://bucket/path")
    return f"{scheme}://{bucket}", "/".join(parts)
