"""The run folder: numbered units, and a complete file for the outcome of each.

    run.json            what is run: who opens it, how many units, what all workers have in common
    ...                 what whoever opens it has written beside (a plan, a reference)
    units/000017...     the outcome of a unit, renamed into site
    claims/000017       who is at it, renewed every few seconds
    strikes/000017.*    a worker that died at it, one file for each
    failed/000017.json  why it is left out
    workers/NAME.json   what a worker does, and its log beside it

Nothing is unpickled, and doing a unit twice is harmless: both write the same. The folder may be an address of an object
store, where a put that fails if something is there makes a claim.
"""

from __future__ import annotations

import importlib
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

from nnsplice.errors import BadArgument, FileError
from nnsplice.files import from_json, is_pickle, whole
from nnsplice.stores import Store, opened, store_of

KIND, FORMAT = "nnsplice run", 1
FOLDERS = ("units", "claims", "strikes", "failed", "workers")
#: How often a unit may end its worker before it is left out.
STRIKES = 3
#: Seconds without a sign after which a worker on another machine is taken for dead.
LEASE = 60.0
#: What numbers may depend on; a worker with other versions is refused.
VERSIONS = ("nnsplice", "torch", "transformers", "nnsight")

#: The outcome of a unit.
Arrays = Mapping[str, np.ndarray]


class Task(Protocol):
    """What a worker has once it is ready, with its model in memory."""

    def run(self, number: int) -> Arrays:
        """The outcome of a unit."""
        ...


@dataclass(frozen=True)
class RunFolder:
    """A folder that holds a run; `create` writes one, `open` reads one."""

    #: Where all processes of the run see it.
    store: Store
    #: What stands in run.json.
    told: Mapping[str, Any]
    #: When the files in `path` that are in the store too were last written, where the two differ.
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
        """Write a run, or go on with the same one.

        Args:
            path: a folder, or an address of an object store.
            opener: `module:function` of what workers call with the folder to have a `Task`.
            units: how many there are.
            identity: plain data that tells this run from others: what is asked, how it is cut, what runs it.
            write: writes into a folder what the opener will need, which finds it in `folder.path`.
            lease: seconds without a sign after which a worker on another machine is taken for dead.

        Raises:
            FileError: the folder holds another run, or other files.
        """
        store = store_of(path)
        identity = json.loads(json.dumps(identity))
        if store.has("run.json"):
            found = cls.open(path)
            if other := [
                key for key in {**identity, **found.told["identity"]} if found.identity(key) != identity.get(key)
            ]:
                lines = [
                    f"  {key}: {_short(found.identity(key))} there, {_short(identity.get(key))} here" for key in other
                ]
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
        store.write(".begun", b"")  # a process that is killed before run.json is there has written all that is
        told = {
            "kind": KIND, "format": FORMAT, "opener": opener, "units": units, "lease": lease, "identity": identity,
            "versions": versions(),
        }  # fmt: skip
        new = cls(store, told)
        if store.folder is not None:
            for name in FOLDERS:
                (store.folder / name).mkdir(exist_ok=True)
        write(new.path)
        new.share()
        new.write_json("run.json", told)
        store.remove(".begun")
        return new

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunFolder:
        """A run that is there.

        Raises:
            FileError: it is none, or one that a newer nnsplice wrote.
        """
        store = store_of(path)
        try:
            told = from_json(store.read("run.json"), store.at("run.json"))
        except FileNotFoundError:
            raise FileError(
                f"{store.address} holds no run", expected='a folder that ns.run(..., out=folder) or on="folder" made'
            ) from None
        if not isinstance(told, dict) or told.get("kind") != KIND:
            raise FileError(f"{store.at('run.json')} says nothing of a run", expected="a run folder")
        if told["format"] > FORMAT:
            raise FileError(f"{store.address} has format {told['format']}; this nnsplice reads up to {FORMAT}")
        return cls(store, told)

    @property
    def address(self) -> str:
        """What `RunFolder.open` takes, in this process and in others."""
        return self.store.address

    @cached_property
    def path(self) -> Path:
        """What stands beside run.json (a plan, a reference), on this machine: the folder, or a copy of these files.

        What is written into the copy reaches the others with `share`.
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
        """Have others see what was written into `path` since."""
        if self.store.folder is not None:
            return
        for file in self.path.iterdir():
            written = file.stat().st_mtime_ns
            if self._shared.get(file.name) != written:
                self.store.write(file.name, file.read_bytes())
                self._shared[file.name] = written

    @property
    def units(self) -> int:
        """How many units there are."""
        return self.told["units"]

    def identity(self, key: str) -> Any:
        """What the run says of itself under this key."""
        return self.told["identity"].get(key)

    def task(self) -> Task:
        """What a worker runs; its model is loaded here.

        Raises:
            BadArgument: this process would compute other numbers.
        """
        there, here = self.told["versions"], versions()
        if there != here:
            each = [
                f"{name} {there.get(name)} there, {here[name]} here" for name in here if there.get(name) != here[name]
            ]
            raise BadArgument(
                f"this process would compute other numbers than the others of the run: {', '.join(each)}",
                expected="the same versions in all workers",
            )
        return imported(self.told["opener"])(self)

    # --- units

    def unit_file(self, number: int) -> str:
        """The name of a unit's outcome, once it is there."""
        return f"units/{number:06}.safetensors"

    def keep(self, number: int, arrays: Arrays, about: Mapping[str, Any]) -> None:
        """Write the outcome of a unit: the whole of it, or nothing."""
        from safetensors.numpy import save

        told = {"unit": str(number), "about": json.dumps(about)}
        self.store.write(self.unit_file(number), save(dict(arrays), metadata=told))

    def outcome(self, number: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """What was found of a unit, and what is told about its running.

        Raises:
            FileError: the file is damaged, or another unit's.
        """
        from safetensors import SafetensorError, safe_open

        path = self.store.at(self.unit_file(number))
        with opened(path) as found:
            if is_pickle(found.local):
                raise FileError(f"{path} looks like a pickle; it is left closed", expected="a file that a worker wrote")
            try:
                with safe_open(found.local, framework="np") as file:
                    told = file.metadata() or {}
                    arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            except SafetensorError as error:
                raise FileError(
                    f"{path} is damaged: {error}", expected="the file removed, and the unit run again"
                ) from None
        if told.get("unit") != str(number):
            raise FileError(f"{path} holds unit {told.get('unit')}", expected=f"unit {number}")
        return arrays, from_json(told.get("about", "{}"), path)

    def done(self) -> set[int]:
        """The units whose outcome is there."""
        return self.numbers("units")

    def finished(self, *, partial: bool) -> list[int]:
        """The units whose outcome is there, in order, for a result.

        Args:
            partial: whether units may be missing.

        Raises:
            FileError: units are missing, or there is none at all.
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
        """The units that are left out, and why."""
        return {number: self._json(f"failed/{number:06}.json")["reason"] for number in sorted(self.numbers("failed"))}

    def fail(self, number: int, reason: str) -> None:
        """Leave a unit out."""
        self.write_json(f"failed/{number:06}.json", {"unit": number, "reason": reason})

    def forgive(self) -> None:
        """Have units that were left out tried again: whatever ended their workers may be mended."""
        for folder in ("failed", "strikes"):
            for name in self.store.names(folder):
                self.store.remove(f"{folder}/{name}")

    def strikes(self, number: int) -> list[str]:
        """How workers ended at a unit, a line for each."""
        found = sorted(name for name in self.store.names("strikes") if name.startswith(f"{number:06}."))
        return [self.store.read(f"strikes/{name}").decode().partition("\n")[0] for name in found]

    def numbers(self, folder: str) -> set[int]:
        """The units that have a file there."""
        return {int(name[:6]) for name in self.store.names(folder) if name[:6].isdigit()}

    # --- what workers agree on, and tell

    def agree(self, name: str, mine: Callable[[], Any]) -> Any:
        """What all workers take for one thing: whoever says it first says it for all.

        Args:
            name: of the thing, and of the file that says it.
            mine: finds out what this worker would say.
        """
        if not self.store.has(f"{name}.json"):
            self.store.create(f"{name}.json", json.dumps({"agreed": mine()}).encode())
        return self.agreed(name)

    def agreed(self, name: str) -> Any:
        """What the workers have agreed on."""
        return self._json(f"{name}.json")["agreed"]

    def workers(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every worker that was ever here, by the name of its file, and what it told last."""
        for name in sorted(self.store.names("workers")):
            if name.endswith(".json") and not name.startswith("."):
                yield f"workers/{name}", self._json(f"workers/{name}")

    def write_json(self, name: str, told: Any) -> None:
        """Write plain data to a file that appears whole."""
        self.store.write(name, json.dumps(told).encode())

    def _json(self, name: str) -> Any:
        return from_json(self.store.read(name), self.store.at(name))


def versions() -> dict[str, str]:
    """The versions that numbers may depend on."""
    return {name: version(name) for name in VERSIONS}


def imported(name: str) -> Any:
    """What `module:function` names.

    Raises:
        BadArgument: there is no such function.
    """
    module, _, function = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in function.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadArgument(
            f"{name!r} cannot be imported here: {error}",
            expected="module:function, of a module that every worker finds (PYTHONPATH, or an installed package)",
        ) from error
    return found


def named(function: Any, what: str) -> str:
    """The `module:function` that other processes find a function by.

    Args:
        what: it is, for the message.

    Raises:
        BadArgument: they do not find it: a lambda, or a function of a notebook or within another.
    """
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    told = f"{what} is {getattr(function, '__name__', function)!r}"
    if not module or not name or module == "__main__" or "<" in name:
        raise BadArgument(
            f"{told}, which other processes cannot find",
            expected="a function in a file that can be imported",
            write="in my_module.py: def my_function(...): ...   then my_module.my_function, or 'my_module:my_function'",
        )
    if imported(f"{module}:{name}") is not function:
        raise BadArgument(f"{told}, and {module}:{name} is another one", expected="a function by its own name")
    return f"{module}:{name}"


def write_json(path: Path, told: Any) -> None:
    """Write plain data to a file that appears whole."""
    with whole(path) as temporary:
        temporary.write_text(json.dumps(told), encoding="utf-8")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
