"""The journal of a sweep: a line for every finished chunk, from which the same call resumes.

The first line is the question; a journal of another question is refused. An incomplete last line is dropped; a damaged
line before it is an error. Numbers are written in hexadecimal, so that they are read back exactly. One process at a
time writes a journal.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from nnsplice.errors import BadArgument, FileError
from nnsplice.files import local_path
from nnsplice.locks import Lock
from nnsplice.results.files import canonical, differences, plain
from nnsplice.shown import counted

KIND = "nnsplice sweep journal"
FORMAT = 1
WRITTEN = "a new file, or the journal of the same sweep"

Records = dict[tuple[int, int], float]
Texts = dict[tuple[int, int], str]


class Journal:
    """An open journal; a context manager that closes it and gives its lock back.

    >>> from nnsplice.results import Journal
    >>> from tempfile import TemporaryDirectory
    >>> asked = {"model": "toy", "metric": "rank"}
    >>> with TemporaryDirectory() as folder:
    ...     with Journal.open(f"{folder}/run.jsonl", asked, total=3) as journal:
    ...         journal.append([0, 0], [0, 2], [0.5, 0.25])
    ...     with Journal.open(f"{folder}/run.jsonl", asked, total=3) as journal:
    ...         print(journal.done())
    {(0, 0): 0.5, (0, 2): 0.25}
    """

    def __init__(self, path: Path, lock: Lock, records: Records, texts: Texts, chunks: int) -> None:
        """Use `Journal.open`."""
        self.path = path
        self._lock, self._records, self._texts, self._chunks = lock, records, texts, chunks
        # Unbuffered, so that closing the file does not retry a failed write.
        self._file = path.open("ab", buffering=0)

    @classmethod
    def open(cls, path: str | os.PathLike[str], asked: Mapping[str, Any], total: int) -> Journal:
        """Begin a journal, or go on with one about the same question.

        Args:
            asked: the question, plain data.
            total: the number of values. Not part of the identity: the journal of a shard may be resumed by the whole.

        Raises:
            FileError: the file is about another question, is damaged, is no journal, or is being written.
        """
        target = local_path(path)
        if not target.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {target.parent} to write {target.name} in")
        header = _line({"kind": KIND, "format": FORMAT, "asked": plain(asked), "total": int(total)})
        lock = Lock(target)
        try:
            raw = target.read_bytes() if target.exists() else b""
            if b"\n" not in raw and header.startswith(raw[: header.rindex(b'"total"')]):
                _begin(target, header)  # the file is empty, or ends in the same first line
                return cls(target, lock, {}, {}, 0)
            records, texts, chunks, whole = _read(target, raw, asked)
            if whole < len(raw):  # an incomplete last line
                with target.open("r+b") as file:
                    file.truncate(whole)
                    os.fsync(file.fileno())
            return cls(target, lock, records, texts, chunks)
        except BaseException:
            lock.release()
            raise

    def done(self) -> Records:
        """(prompt, cell) -> value, for every cell in the journal."""
        return dict(self._records)

    def texts(self) -> Texts:
        """(prompt, cell) -> the text beside its value."""
        return dict(self._texts)

    def __len__(self) -> int:
        return len(self._records)

    def append(
        self, prompts: Sequence[int], cells: Sequence[int], values: Sequence[float], texts: Sequence[str] = ()
    ) -> None:
        """Write a finished chunk to the disk.

        Args:
            texts: a text for each value, or none.

        Raises:
            BadArgument: the lists are of different length, or a cell was written before with another value.
        """
        if self._file.closed:
            raise BadArgument(f"{self.path} is closed", write="with Journal.open(...) as journal:")
        record = {
            "n": self._chunks,
            "prompt": [int(prompt) for prompt in prompts],
            "cell": [int(cell) for cell in cells],
            "value": [float(value).hex() for value in values],
        }
        if texts:
            record["text"] = [str(text) for text in texts]
        columns = {"prompt": prompts, "cell": cells, "value": values, **({"text": texts} if texts else {})}
        if len(set(map(len, columns.values()))) > 1:
            raise BadArgument(
                ", ".join(counted(len(column), name) for name, column in columns.items()),
                expected="one value for each pair, and one text or none at all",
            )
        new = _values(record)
        if problem := _conflict(self._records, new):
            raise BadArgument(problem, expected="each cell once")
        self._write(_line(record))
        self._chunks += 1
        self._records.update(new)
        self._texts.update(zip(new, texts, strict=True) if texts else ())

    def _write(self, line: bytes) -> None:
        """Write a line to the disk, or nothing of it if that fails, as on a full disk."""
        end, rest = os.fstat(self._file.fileno()).st_size, memoryview(line)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except BaseException:
            with suppress(OSError):
                self._file.truncate(end)
            raise

    def close(self) -> None:
        """Close the file and let another process write it."""
        try:
            self._file.close()
        finally:
            self._lock.release()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps({**record, "sum": _sum(record)}, separators=(",", ":")) + "\n").encode()


def _sum(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical(record).encode()).hexdigest()[:12]


def _begin(path: Path, header: bytes) -> None:
    with path.open("wb") as file:
        file.write(header)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path, raw: bytes, asked: Mapping[str, Any]) -> tuple[Records, Texts, int, int]:
    """The values, their texts, the number of chunks, and the number of bytes in complete lines."""
    first, *lines = raw.split(b"\n")
    header = _parsed(first)
    if header is None or header.get("kind") != KIND or not lines:
        kind = "is no journal of a sweep" if not first.startswith(b'{"kind":"' + KIND.encode()) else "is damaged"
        raise FileError(f"{path} {kind}", expected=WRITTEN)
    if header.get("format") != FORMAT:
        raise FileError(f"{path} has format {header.get('format')}; this nnsplice reads {FORMAT}")
    if other := differences(header["asked"], asked):
        shown = "\n".join(f"  {line}" for line in other)
        raise FileError(f"{path} is the journal of another sweep\n{shown}", expected=WRITTEN)
    *complete, rest = lines
    records: Records = {}
    texts: Texts = {}
    for number, line in enumerate(complete):
        record = _parsed(line)
        new = None if record is None or record.get("n") != number else _values(record)
        if new is None or _conflict(records, new):
            raise FileError(
                f"line {number + 2} of {path} is damaged, and there are {len(complete) - number - 1} lines after it",
                expected="a journal as a sweep wrote it",
                write=f"head -n {number + 1} {path} > repaired.jsonl   (keeps what stands before it)",
            )
        records.update(new)
        texts.update(zip(new, record["text"], strict=True) if record is not None and "text" in record else ())
    return records, texts, len(complete), len(raw) - len(rest)


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A line with the right checksum, else None."""
    try:
        record = json.loads(line)
        checksum = record.pop("sum")
        return record if checksum == _sum(record) else None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None


def _values(record: Mapping[str, Any]) -> Records:
    values = [float.fromhex(value) for value in record["value"]]
    return dict(zip(zip(record["prompt"], record["cell"], strict=True), values, strict=True))


def _conflict(records: Records, new: Records) -> str | None:
    """A message about a cell that has another value in both, else None."""
    for key, value in new.items():
        if key in records and not np.array_equal(records[key], value, equal_nan=True):
            prompt, cell = key
            return f"cell {cell} of prompt {prompt} is there with {records[key]!r}, and now with {value!r}"
    return None
