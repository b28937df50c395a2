"""The staging folder: a checkpoint is written beside the old one, and replaces it in one step when it is complete.

.NAME.part/             removed at the end
    asked.json          the digest of the job, so that another job does not resume it
    weights/            becomes NAME
    PREFIX.jsonl        the journal of a writer: its finished files, one line each
    names.json          temporary names of files -> final ones
    done.json           written when only the exchange is left
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from nnsplice.checkpoints.io.folder import INDEX, PICKLES, SINGLE
from nnsplice.checkpoints.io.shards import ShardFile, ShardWriter, disk, sync
from nnsplice.checkpoints.io.swap import exchange
from nnsplice.errors import FileError
from nnsplice.files import from_json
from nnsplice.headers import read_header
from nnsplice.locks import Lock

#: Endings of files with weights, besides pickles.
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin.index.json", ".gguf", ".h5", ".msgpack", ".onnx")


class Staging:
    """The staging folder of one process, which holds a lock; other processes may write files into it."""

    def __init__(self, dest: Path, asked: str, *, resume: bool) -> None:
        """Begin, or resume.

        Args:
            asked: the digest of the job.
            resume: continue an earlier call, and keep finished files if this one fails.

        Raises:
            FileError: another process writes this checkpoint, or the folder is of another job.
        """
        self.dest: Path = dest.resolve() if dest.is_symlink() else dest.absolute()
        if self.dest.exists() and not self.dest.is_dir():
            raise FileError(f"{dest} is a file", expected="a folder for a checkpoint, or a name that is free")
        if self.dest.is_dir() and os.path.ismount(self.dest):
            raise FileError(
                f"{dest} is where a disk is mounted, so it cannot be exchanged in one step",
                expected="a folder on it",
                write=f'"{dest / "checkpoint"}"',
            )
        with disk(self.dest, "the first files beside it"):
            self.dest.parent.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(self.dest)
        self.folder: Path = self.dest.with_name(f".{self.dest.name}.part")
        self.weights: Path = self.folder / "weights"
        self._trash = self.dest.with_name(f".{self.dest.name}.part.gone")
        self._resume = resume
        try:
            with disk(self.folder, "the first files in it"):
                self.published: bool = self._begin(asked)
        except BaseException:
            self._lock.release()
            raise

    def _begin(self, asked: str) -> bool:
        """Make the folder; True if only the clean-up of an earlier call was left."""
        shutil.rmtree(self._trash, ignore_errors=True)
        self._restore()
        if self.folder.is_dir():
            self.folder.chmod(0o700)
        if self.folder.exists() and self._resume and (self.folder / "asked.json").is_file():
            if _json(self.folder / "asked.json") != {"asked": asked}:
                raise FileError(
                    f"{self.folder} is of a job that asked for something else",
                    expected="the same mapper, source and shard size as in the call that was stopped",
                    write="resume=False   (begins anew)",
                )
            if done := _json(self.folder / "done.json"):
                self._exchange(done)
                return True
            self._restore_names()
            self._remove_unfinished()
            return False
        self._discard()
        self.folder.mkdir(0o700)  # until `publish` sets the permissions
        self.weights.mkdir()
        _write(self.folder / "asked.json", {"asked": asked})
        return False

    def _discard(self) -> None:
        """Remove the folder; it is renamed first, so that a half-removed one is never resumed."""
        if self.folder.exists():
            self.folder.rename(self._trash)
            shutil.rmtree(self._trash, ignore_errors=True)

    def _restore(self) -> None:
        """Put back the old checkpoint, if a process ended between the two renames of `swap.exchange`."""
        old = self.folder / "old"
        if old.is_dir() and not self.dest.exists():
            old.rename(self.dest)

    def _restore_names(self) -> None:
        """Give files the names of the journal again, if a process ended while they were renamed."""
        for old, new in _json(self.folder / "names.json").items():
            if (self.weights / new).exists():
                (self.weights / new).rename(self.weights / old)

    def _remove_unfinished(self) -> None:
        """Remove unfinished files."""
        kept = {shard.file for shard in self.finished()}
        for path in self.weights.iterdir():
            if path.name not in kept:
                path.unlink()

    def finished(self, prefix: str = "*") -> list[ShardFile]:
        """The finished files, of all writers or of one."""
        found: list[ShardFile] = []
        for journal in sorted(self.folder.glob(f"{prefix}.jsonl")):
            found += read_journal(journal, self.weights)
        return found

    # -- the end -------------------------------------------------------------------------------------------------------

    def publish(self, shards: Sequence[ShardFile], carry: Mapping[str, Path | str], like: Sequence[Path] = ()) -> None:
        """Replace the old checkpoint by the finished files.

        Args:
            shards: the files in their order.
            carry: other files of the new checkpoint: name -> a file to copy, or a text.
            like: the sources of the tensors; the new files are readable for users who can read all of these and the
                old checkpoint.
        """
        before = [path for name in sorted(weight_files(self.dest)) if (path := self.dest / name).is_file()]
        with disk(self.dest, "the files of the checkpoint"):
            names = _final_names(shards)
            _write(self.folder / "names.json", names)
            for old, new in names.items():
                (self.weights / old).rename(self.weights / new)
            (self.weights / INDEX).write_text(json.dumps(_index(shards, names), indent=2) + "\n", encoding="utf-8")
            for name in (*names.values(), INDEX):
                restrict_mode(self.weights / name, [*like, *before])
            for name, source in carry.items():
                if isinstance(source, str):
                    (self.weights / name).write_text(source, encoding="utf-8")
                    restrict_mode(self.weights / name, [*like, self.dest / name])
                else:
                    shutil.copy2(source, self.weights / name)
                    restrict_mode(self.weights / name, [self.dest / name])
            restrict_mode(self.weights, [path for path in like if path.is_dir()])
            if self.dest.is_dir():
                _carry_over(self.dest, self.weights)
                shutil.copymode(self.dest, self.weights)
            for path in self.weights.iterdir():
                sync(path)
            sync(self.weights)
            done = {"inode": self.weights.stat().st_ino}
            _write(self.folder / "done.json", done)
            self._exchange(done)

    def _exchange(self, done: dict[str, Any]) -> None:
        if not (self.dest.is_dir() and self.dest.stat().st_ino == done["inode"]):
            if self.dest.exists():
                exchange(self.weights, self.dest, self.folder / "old")
            else:
                self.weights.rename(self.dest)
            sync(self.dest.parent)
        for old in (self.weights, self.folder / "old"):
            if old.is_dir():
                _carry_over(old, self.dest)  # files that were added to the old folder meanwhile

    def close(self, *, failed: bool) -> None:
        """Clean up, and release the lock."""
        try:
            if failed and self._resume and self.weights.is_dir():
                self._restore_names()
                self._remove_unfinished()
            else:
                self._discard()
        finally:
            self._lock.release()


@contextmanager
def staged(dest: Path, asked: str, *, resume: bool) -> Generator[Staging]:
    """A `Staging` that is closed when the block ends."""
    staging, failed = Staging(dest, asked, resume=resume), True
    try:
        yield staging
        failed = False
    finally:
        staging.close(failed=failed)


def writer(folder: Path, prefix: str, limit: int, names: Iterable[str], first: int) -> ShardWriter:
    """A writer of files in a staging folder, with a journal of the finished ones."""
    journal = folder / f"{prefix}.jsonl"

    def note(shard: ShardFile) -> None:
        with journal.open("ab") as file:
            file.write(json.dumps(asdict(shard)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    return ShardWriter(folder / "weights", f"{prefix}-", limit, names, note, first)


def read_journal(journal: Path, weights: Path) -> list[ShardFile]:
    """The files of a journal that are there and complete; a truncated last line is skipped."""
    found: list[ShardFile] = []
    for line in journal.read_bytes().split(b"\n")[:-1] if journal.is_file() else ():
        fields: dict[str, Any] = from_json(line, journal)
        shard = ShardFile(**{**fields, "names": tuple(fields["names"])})
        path = weights / shard.file
        if shard.file and not (path.is_file() and path.stat().st_size == shard.size):
            continue
        if shard.file and set(read_header(path).entries) != set(shard.names):
            continue
        found.append(shard)
    return found


def _final_names(shards: Sequence[ShardFile]) -> dict[str, str]:
    """Temporary names -> final ones, which contain the number of files."""
    files = [shard.file for shard in shards if shard.file]
    return {file: f"model-{i:05d}-of-{len(files):05d}.safetensors" for i, file in enumerate(files, 1)}


def _index(shards: Sequence[ShardFile], names: Mapping[str, str]) -> dict[str, Any]:
    """The index of the checkpoint as transformers reads it, with the names of tied tensors in the metadata."""
    weight_map = {name: names[shard.file] for shard in shards if shard.file for name in shard.names}
    tied = {name: kept for shard in shards for name, kept in shard.tied.items()}
    metadata: dict[str, Any] = {"total_size": sum(shard.nbytes for shard in shards)}
    if tied:
        metadata["tied"] = dict(sorted(tied.items()))
    return {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}


def _carry_over(old: Path, new: Path) -> None:
    """Link or copy files that are no weights: the config, the tokenizer, a model card, folders."""
    stale = weight_files(old)
    made: list[tuple[Path, Path]] = []
    for path in sorted(old.rglob("*")):
        inside = path.relative_to(old)
        target = new / inside
        if str(inside) in stale or target.exists() or target.is_symlink():
            continue
        if path.is_dir() and not path.is_symlink():
            target.mkdir(0o700)
            made.append((path, target))
        elif path.is_symlink():
            target.symlink_to(path.readlink())
        else:
            try:
                os.link(path, target)
            except OSError:  # a file system without links
                shutil.copy2(path, target)
    for path, target in reversed(made):  # last, as a folder may be read-only
        shutil.copystat(path, target)


def restrict_mode(path: Path, like: Iterable[Path]) -> None:
    """Remove permissions of group and others that one of the files or folders in `like` does not have."""
    mode = path.stat().st_mode
    for one in like:
        if one.exists():
            granted = one.stat().st_mode & 0o077
            # A folder that may be read may be entered.
            mode &= ~0o077 | granted | (granted >> 2 if path.is_dir() else 0)
    path.chmod(mode & 0o7777)


def weight_files(folder: Path) -> set[str]:
    """The files of the weights of a folder, which the next checkpoint replaces."""
    stale = {INDEX, SINGLE}
    stale |= {path.name for path in folder.glob("model-*-of-*.safetensors")}
    weight_map = _json(folder / INDEX).get("weight_map")
    return stale | {str(file) for file in cast("dict[str, Any]", weight_map or {}).values()}


def other_files(folder: Path) -> dict[str, Path]:
    """The files of a checkpoint besides its weights: config, tokenizer, model card."""
    return {
        path.name: path
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith((*_WEIGHTS, *PICKLES))
    }


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none."""
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


def _write(path: Path, value: object) -> None:
    temporary = path.with_suffix(".new")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
