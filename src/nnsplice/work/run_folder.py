"""The run folder: numbered units, and a file for the outcome of each.

    run.json            the header: the function that opens the run, the number of units, the identity of the run
    ...                 files of that function (a plan, a reference)
    units/000017...     the outcome of a unit, written atomically
    claims/000017       the worker of the unit, renewed every few seconds
    strikes/000017.*    one file for each worker that died at the unit
    failed/000017.json  the reason why the unit failed
    workers/NAME.json   the status of a worker, and its log beside it

Nothing is unpickled. A unit may be run twice, as both outcomes are identical. The folder may be an address of an object
store, where a claim is a put that fails if the object exists.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nnsplice.digests import arrays_digest
from nnsplice.errors import BadArgument, FileError
from nnsplice.files import from_json, is_pickle, whole
from nnsplice.stores import Store, opened, store_of
from nnsplice.work.importing import imported

KIND, FORMAT = "nnsplice run", 1
FOLDERS = ("units", "claims", "strikes", "failed", "workers")
#: The number of strikes, workers that died or failed at a unit, after which the unit fails.
STRIKES = 3
#: Seconds without a renewal of its claim after which a worker on another machine counts as dead.
LEASE = 60.0
#: Packages that results depend on; a worker with other versions is refused.
VERSIONS = ("nnsplice", "torch", "transformers", "nnsight")

#: The outcome of a unit.
Arrays = Mapping[str, np.ndarray]


class UnitTask(Protocol):
    """Runs units, with the model in memory."""

    def run(self, number: int) -> Arrays:
        """The outcome of a unit."""
        ...


@dataclass(frozen=True)
class RunFolder:
    """A folder that holds a run; `create` writes one, `open` reads one."""

    #: The folder, or a prefix in an object store.
    store: Store
    #: The contents of run.json.
    header: Mapping[str, Any]
    #: With an object store: the modification time of each file of the local copy when it was uploaded.
    _shared: dict[str, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        opener: str,
        units: int,
        identity: Mapping[str, Any],
        write: Callable[[Path], None],
        *,
        lease: float = LEASE,
    ) -> RunFolder:
        """Write a run, or resume the same one.

        Args:
            path: a folder, or an address of an object store.
            opener: `module:function`; workers call it with the folder to get a `UnitTask`.
            units: the number of units.
            identity: plain data that identifies the run: the question, its units, the models.
            write: writes the files that the opener needs into a folder; the opener finds them in `folder.path`.
            lease: seconds without a renewal of its claim after which a worker on another machine counts as dead.

        Raises:
            FileError: the folder holds another run, or other files.
        """
        store = store_of(path)
        identity = json.loads(json.dumps(identity))
        if store.has("run.json"):
            found = cls.open(path)
            different = [
                key for key in {**identity, **found.header["identity"]} if found.identity(key) != identity.get(key)
            ]
            if different:
                each = ((key, _shortened(found.identity(key)), _shortened(identity.get(key))) for key in different)
                lines = [f"  {key}: {there} there, {here} here" for key, there, here in each]
                raise FileError(
                    "\n".join([f"{store.address} holds another run, or one that was cut differently", *lines]),
                    expected="an empty folder, or the one of this run",
                )
            return found
        there = [name for name in store.names() if name not in ("driver.lock", ".begun")]
        if there and not store.has(".begun"):
            raise FileError(
                f"{store.address} holds {', '.join(sorted(there)[:3])}, and no run",
                expected="an empty folder, or this run's",
            )
        store.make()
        store.write(".begun", b"")  # if killed before run.json is written, the same call starts again
        header = {
            "kind": KIND, "format": FORMAT, "opener": opener, "units": units, "lease": lease, "identity": identity,
            "versions": versions(),
        }  # fmt: skip
        new = cls(store, header)
        if store.folder is not None:
            for name in FOLDERS:
                (store.folder / name).mkdir(exist_ok=True)
        write(new.path)
        new.share()
        new.write_json("run.json", header)
        store.remove(".begun")
        return new

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunFolder:
        """Read an existing run.

        Raises:
            FileError: there is no run, or a newer nnsplice wrote it.
        """
        store = store_of(path)
        try:
            header = from_json(store.read("run.json"), store.at("run.json"))
        except FileNotFoundError:
            raise FileError(
                f"{store.address} holds no run", expected='a folder that ns.run(..., out=folder) or on="folder" made'
            ) from None
        if not isinstance(header, dict) or header.get("kind") != KIND:
            raise FileError(f"{store.at('run.json')} says nothing of a run", expected="a run folder")
        if header["format"] > FORMAT:
            raise FileError(f"{store.address} has format {header['format']}; this nnsplice reads up to {FORMAT}")
        return cls(store, header)

    @property
    def address(self) -> str:
        """The argument of `RunFolder.open`, valid in every process."""
        return self.store.address

    @cached_property
    def path(self) -> Path:
        """A local folder with the files beside run.json (a plan, a reference): a copy if the run is in an object store.

        `share` uploads what is written into the copy.
        """
        if self.store.folder is not None:
            return self.store.folder
        copy = Path(tempfile.mkdtemp(prefix="nnsplice-run-"))
        weakref.finalize(self, shutil.rmtree, copy, ignore_errors=True)
        for name in self.store.names():
            if name not in FOLDERS and not name.startswith(".") and not name.endswith(".lock"):
                file = copy / name
                file.write_bytes(self.store.read(name))
                self._shared[name] = file.stat().st_mtime_ns
        return copy

    def share(self) -> None:
        """Upload new files of `path`, if it is a copy."""
        if self.store.folder is not None:
            return
        for file in self.path.iterdir():
            written = file.stat().st_mtime_ns
            if self._shared.get(file.name) != written:
                self.store.write(file.name, file.read_bytes())
                self._shared[file.name] = written

    @property
    def units(self) -> int:
        """The number of units."""
        return self.header["units"]

    def identity(self, key: str) -> Any:
        """A value of the run's identity."""
        return self.header["identity"].get(key)

    def task(self) -> UnitTask:
        """The task of the run; this loads the model.

        Raises:
            BadArgument: this process has other versions of packages, so results would differ.
        """
        there, here = self.header["versions"], versions()
        if there != here:
            each = [
                f"{name} {there.get(name)} there, {here[name]} here" for name in here if there.get(name) != here[name]
            ]
            raise BadArgument(
                f"this process would compute other numbers than the others of the run: {', '.join(each)}",
                expected="the same versions in all workers",
            )
        return imported(self.header["opener"])(self)

    # --- units

    def unit_file(self, number: int) -> str:
        """The file of a unit's outcome."""
        return f"units/{number:06}.safetensors"

    def keep(self, number: int, arrays: Arrays, about: Mapping[str, Any]) -> None:
        """Write the outcome of a unit, atomically."""
        from safetensors.numpy import save

        metadata = {"unit": str(number), "about": json.dumps(about), "sum": arrays_digest(arrays)}
        self.store.write(self.unit_file(number), save(dict(arrays), metadata=metadata))

    def outcome(self, number: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The outcome of a unit, and data about its run (worker, seconds).

        Raises:
            FileError: the file is damaged, or of another unit.
        """
        from safetensors import SafetensorError, safe_open

        path = self.store.at(self.unit_file(number))
        with opened(path) as found:
            if is_pickle(found.local):
                raise FileError(f"{path} looks like a pickle; it is left closed", expected="a file that a worker wrote")
            try:
                with safe_open(found.local, framework="np") as file:
                    metadata = file.metadata() or {}
                    arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            except SafetensorError as error:
                raise FileError(
                    f"{path} is damaged: {error}", expected="the file removed, and the unit run again"
                ) from None
        if metadata.get("unit") != str(number):
            raise FileError(f"{path} holds unit {metadata.get('unit')}", expected=f"unit {number}")
        written = metadata.get("sum")  # older files have none
        if written is not None and written != arrays_digest(arrays):
            raise FileError(
                f"{path} is damaged: its numbers are not those that were written",
                expected="the file removed, and the unit run again",
            )
        return arrays, from_json(metadata.get("about", "{}"), path)

    def done(self) -> set[int]:
        """The finished units."""
        return self.numbers("units")

    def finished(self, *, partial: bool) -> list[int]:
        """The finished units in order, for a result.

        Args:
            partial: allow missing units.

        Raises:
            FileError: units are missing, or no unit is done.
        """
        done = sorted(self.done())
        if len(done) < self.units and not partial:
            raise FileError(
                f"{self.units - len(done)} of {self.units} units are missing in {self.address}",
                expected="a run that is finished",
                write=f"nnsplice work {self.address}, or merge with partial=True (--partial) for what there is",
            )
        if not done:
            raise FileError(f"no unit of {self.address} is done yet", write=f"nnsplice status {self.address}")
        return done

    def failures(self) -> dict[int, str]:
        """The failed units, with the reason."""
        return {number: self._json(f"failed/{number:06}.json")["reason"] for number in sorted(self.numbers("failed"))}

    def fail(self, number: int, reason: str) -> None:
        """Mark a unit as failed."""
        self.write_json(f"failed/{number:06}.json", {"unit": number, "reason": reason})

    def forgive(self) -> None:
        """Forget failures and strikes, so that failed units are tried again."""
        for folder in ("failed", "strikes"):
            for name in self.store.names(folder):
                self.store.remove(f"{folder}/{name}")

    def strikes(self, number: int) -> list[str]:
        """One line for each worker that ended at a unit."""
        found = sorted(name for name in self.store.names("strikes") if name.startswith(f"{number:06}."))
        return [self.store.read(f"strikes/{name}").decode().partition("\n")[0] for name in found]

    def numbers(self, folder: str) -> set[int]:
        """The units that have a file in this folder."""
        return {int(name[:6]) for name in self.store.names(folder) if name[:6].isdigit()}

    # --- values shared by all workers, and their status

    def agree(self, name: str, compute: Callable[[], Any]) -> Any:
        """A value that all workers share; the first worker to need it computes it.

        Args:
            name: the name of the value and of its file.
            compute: computes the value in this worker.
        """
        if not self.store.has(f"{name}.json"):
            self.store.create(f"{name}.json", json.dumps({"agreed": compute()}).encode())
        return self.agreed(name)

    def agreed(self, name: str) -> Any:
        """A value that was shared with `agree`."""
        return self._json(f"{name}.json")["agreed"]

    def workers(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every worker that ever worked here: the name of its file, and its last status."""
        for name in sorted(self.store.names("workers")):
            if name.endswith(".json") and not name.startswith("."):
                yield f"workers/{name}", self._json(f"workers/{name}")

    def write_json(self, name: str, data: Any) -> None:
        """Write plain data to a file, atomically."""
        self.store.write(name, json.dumps(data).encode())

    def _json(self, name: str) -> Any:
        return from_json(self.store.read(name), self.store.at(name))


def versions() -> dict[str, str]:
    """The installed versions of `VERSIONS`."""
    return {name: version(name) for name in VERSIONS}


def write_json(path: Path, data: Any) -> None:
    """Write plain data to a file, atomically."""
    with whole(path) as temporary:
        temporary.write_text(json.dumps(data), encoding="utf-8")


def _shortened(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
