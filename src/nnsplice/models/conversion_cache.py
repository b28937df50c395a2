"""The cache of converted models: complete folders that may be deleted at any time.

    <cache>/CACHEDIR.TAG, README.txt      what this is
    <cache>/models/<name>-<digest>/       one checkpoint, with source.json beside it: the files it was made of

`<cache>` is `$NNSPLICE_CACHE`, or `nnsplice` in `$XDG_CACHE_HOME`, or `~/.cache/nnsplice`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from nnsplice.errors import WriteFailed

#: The file in each folder that names the source files.
SOURCE = "source.json"
#: Raised when older folders must not be used any more.
FORMAT = 1
#: Seconds after which an unfinished folder is taken for that of a killed process.
_STALE_AFTER = 24 * 3600
_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# This folder is a cache of nnsplice. See README.txt.\n"
_README = """Models that nnsplice converted, so that it need not do so again.

Each folder in models/ is a checkpoint as transformers saves one, and its source.json names the files that it was made
of. Everything here can be deleted at any time; what is needed is made anew.
"""


def cache_root() -> Path:
    """Where converted models are kept."""
    if folder := os.environ.get("NNSPLICE_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nnsplice"


def converted_folder(
    files: Sequence[Path], name: str, tool: str, make: Callable[[Path], Mapping[str, Any]], digest: str | None = None
) -> Path:
    """The cached folder converted from these files; converted now if it is missing or a file has changed.

    Args:
        name: the start of the folder's name.
        tool: the converter with its version; another version converts again.
        make: writes the checkpoint into an empty folder, and returns further entries of source.json.
        digest: the expected digest of the contents, if known: copies in several places then share a folder.

    Raises:
        WriteFailed: the disk does not take it.
    """
    paths = json.dumps([str(file.resolve()) for file in files])
    digest = digest or hashlib.sha256(paths.encode()).hexdigest()
    name = re.sub(r"[^\w.-]", "_", name)
    folder = cache_root() / "models" / f"{name}-{digest[:12]}"
    if not _is_fresh(folder, files, tool):
        try:
            _make(folder, files, tool, make)
        except OSError as error:
            if isinstance(error, WriteFailed):
                raise
            raise WriteFailed(
                f"the converted model cannot be kept in {folder.parent}: {error.strerror or error}",
                expected="a folder that can be written to, with room for the model",
                write="NNSPLICE_CACHE=/another/folder, or ns.load(..., cache=False)",
            ) from error
    return folder


def _is_fresh(folder: Path, files: Sequence[Path], tool: str) -> bool:
    """Whether a folder was made of these files as they are now."""
    try:
        record: Any = json.loads((folder / SOURCE).read_text(encoding="utf-8"))
        if (record["format"], record["tool"], len(record["files"])) != (FORMAT, tool, len(files)):
            return False
        for file, known in zip(files, cast("list[dict[str, Any]]", record["files"]), strict=True):
            # Equal size and times are enough; a copy has other times, so its digest is compared.
            same = known["stat"] == _stat(file)
            if not same and (known["stat"][0] != file.stat().st_size or known["sha256"] != sha256(file)):
                return False
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return False
    return True


def check_room(folder: Path, nbytes: int) -> None:
    """Raise if so many bytes do not fit on the folder's disk.

    Raises:
        WriteFailed: the disk has too little room.
    """
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise WriteFailed(
            f"the converted model takes {nbytes / 1e9:.2f} GB, and {folder.parent} has {free / 1e9:.2f} GB left",
            expected="a folder with room for it",
            write="NNSPLICE_CACHE=/another/folder",
        )


def _make(folder: Path, files: Sequence[Path], tool: str, make: Callable[[Path], Mapping[str, Any]]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _describe(folder.parent.parent)
    _clear(folder.parent)
    staged = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.part")
    staged.mkdir()
    try:
        # Before the conversion: a file that changes meanwhile is then noticed at the next load.
        known = [{"path": str(file.resolve()), "stat": _stat(file), "sha256": sha256(file)} for file in files]
        facts = make(staged)
        text = json.dumps({"format": FORMAT, "tool": tool, "files": known, **facts}, indent=2)
        (staged / SOURCE).write_text(text + "\n", encoding="utf-8")
        _publish(staged, folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _publish(staged: Path, folder: Path) -> None:
    """Rename a finished folder to its place, replacing an older one; keep an equal one of a faster process."""
    for _ in range(8):
        try:
            staged.rename(folder)
            return
        except OSError:
            if not folder.exists():
                raise
        if _source_text(staged) == _source_text(folder):
            return
        old = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.part")
        try:
            folder.rename(old)
        except FileNotFoundError:  # another process took it away just now
            continue
        shutil.rmtree(old, ignore_errors=True)
    raise WriteFailed(f"{folder} is being made by several processes", expected="one at a time")


def _source_text(folder: Path) -> str | None:
    try:
        return (folder / SOURCE).read_text(encoding="utf-8")
    except OSError:
        return None


def _describe(cache: Path) -> None:
    for name, text in (("CACHEDIR.TAG", _TAG), ("README.txt", _README)):
        if not (cache / name).exists():
            (cache / name).write_text(text, encoding="utf-8")


def _clear(models: Path) -> None:
    """Remove what killed processes left behind."""
    for part in models.glob(".*.part"):
        try:
            if time.time() - part.stat().st_mtime > _STALE_AFTER:
                shutil.rmtree(part, ignore_errors=True)
        except FileNotFoundError:
            continue


def _stat(file: Path) -> list[int]:
    found = file.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def sha256(file: Path) -> str:
    """The digest of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
