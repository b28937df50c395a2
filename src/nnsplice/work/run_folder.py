"""A run folder: work in numbered units that any process may take, each unit's outcome a file that appears whole.

    run.json            what is run: who opens it, how many units, what all workers have in common
    ...                 what whoever opens it has written beside (a plan, a reference)
    units/000017...     the outcome of a unit, renamed into place
    claims/000017       who is at it, renewed every few seconds
    strikes/000017.*    a worker that died at it, one file for each
    failed/000017.json  why it is left out
    workers/NAME.json   what a worker does, and its log beside it

Nothing is unpickled, and doing a unit twice is harmless: both write the same.
"""

from __future__ import annotations

import importlib
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nnsplice.errors import BadArgument, FileError
from nnsplice.files import from_json, is_pickle, local_folder, text_of, whole

KIND, FORMAT = "nnsplice run", 1
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

    path: Path
    #: What stands in run.json.
    told: Mapping[str, Any]

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
            opener: `module:function` of what workers call with the folder to have a `Task`.
            units: how many there are.
            identity: plain data that tells this run from others: what is asked, how it is cut, what runs it.
            write: writes into the folder what the opener will need.
            lease: seconds without a sign after which a worker on another machine is taken for dead.

        Raises:
            FileError: the folder holds another run, or other files.
        """
        folder = local_folder(path)
        identity = json.loads(json.dumps(identity))
        if (folder / "run.json").exists():
            found = cls.open(folder)
            if other := [
                key for key in {**identity, **found.told["identity"]} if found.identity(key) != identity.get(key)
            ]:
                lines = [
                    f"  {key}: {_short(found.identity(key))} there, {_short(identity.get(key))} here" for key in other
                ]
                raise FileError(
                    "\n".join([f"{folder} holds another run, or one that was cut differently", *lines]),
                    expected="an empty folder, or the one of this run",
                )
            return found
        begun = folder / ".begun"
        there = [one.name for one in folder.iterdir() if one.name != "driver.lock"] if folder.is_dir() else []
        if there and not begun.exists():
            raise FileError(
                f"{folder} holds {', '.join(sorted(there)[:3])}, and no run", expected="an empty folder, or this run's"
            )
        for name in ("units", "claims", "strikes", "failed", "workers"):
            (folder / name).mkdir(parents=True, exist_ok=True)
            begun.touch()  # a process that is killed before run.json is there has written all that is
        write(folder)
        told = {
            "kind": KIND, "format": FORMAT, "opener": opener, "units": units, "lease": lease, "identity": identity,
            "versions": versions(),
        }  # fmt: skip
        write_json(folder / "run.json", told)
        begun.unlink()
        return cls(folder, told)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunFolder:
        """A run that is there.

        Raises:
            FileError: it is none, or one that a newer nnsplice wrote.
        """
        folder = local_folder(path)
        if not (folder / "run.json").is_file():
            raise FileError(
                f"{folder} holds no run", expected='a folder that ns.run(..., out=folder) or on="folder" made'
            )
        told = from_json(text_of(folder / "run.json"), folder / "run.json")
        if not isinstance(told, dict) or told.get("kind") != KIND:
            raise FileError(f"{folder / 'run.json'} says nothing of a run", expected="a run folder")
        if told["format"] > FORMAT:
            raise FileError(f"{folder} has format {told['format']}; this nnsplice reads up to {FORMAT}")
        return cls(folder, told)

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

    def unit_file(self, number: int) -> Path:
        """Where the outcome of a unit stands, once it is there."""
        return self.path / "units" / f"{number:06}.safetensors"

    def keep(self, number: int, arrays: Arrays, about: Mapping[str, Any]) -> None:
        """Write the outcome of a unit: the whole of it, or nothing."""
        from safetensors.numpy import save_file

        with whole(self.unit_file(number)) as temporary:
            save_file(dict(arrays), temporary, metadata={"unit": str(number), "about": json.dumps(about)})

    def outcome(self, number: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """What was found of a unit, and what is told about its running.

        Raises:
            FileError: the file is damaged, or another unit's.
        """
        from safetensors import SafetensorError, safe_open

        path = self.unit_file(number)
        if is_pickle(path):
            raise FileError(f"{path} looks like a pickle; it is left closed", expected="a file that a worker wrote")
        try:
            with safe_open(path, framework="np") as file:
                told = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except SafetensorError as error:
            raise FileError(f"{path} is damaged: {error}", write=f"rm {path}   (and run the unit again)") from None
        if told.get("unit") != str(number):
            raise FileError(f"{path} holds unit {told.get('unit')}", expected=f"unit {number}")
        return arrays, from_json(told.get("about", "{}"), path)

    def done(self) -> set[int]:
        """The units whose outcome is there."""
        return _numbers(self.path / "units")

    def failures(self) -> dict[int, str]:
        """The units that are left out, and why."""
        found = {
            number: self.path / "failed" / f"{number:06}.json" for number in sorted(_numbers(self.path / "failed"))
        }
        return {number: from_json(text_of(path), path)["reason"] for number, path in found.items()}

    def fail(self, number: int, reason: str) -> None:
        """Leave a unit out."""
        write_json(self.path / "failed" / f"{number:06}.json", {"unit": number, "reason": reason})

    def forgive(self) -> None:
        """Have units that were left out tried again: whatever ended their workers may be mended."""
        for folder in ("failed", "strikes"):
            for path in (self.path / folder).iterdir():
                path.unlink(missing_ok=True)

    def strikes(self, number: int) -> list[str]:
        """How workers ended at a unit, a line for each."""
        found = sorted((self.path / "strikes").glob(f"{number:06}.*"))
        return [text_of(path) for path in found]

    # --- what workers agree on, and tell

    def agree(self, name: str, mine: Callable[[], Any]) -> Any:
        """What all workers take for one thing: whoever says it first says it for all.

        Args:
            name: of the thing, and of the file that says it.
            mine: finds out what this worker would say.
        """
        path = self.path / f"{name}.json"
        if not path.exists():
            own = path.with_name(f".{name}.{uuid.uuid4().hex}")
            write_json(own, {"agreed": mine()})
            try:
                os.link(own, path)
            except FileExistsError:
                pass
            except OSError:  # a file system without links
                if not path.exists():
                    own.replace(path)
            own.unlink(missing_ok=True)
        return from_json(text_of(path), path)["agreed"]

    def workers(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Every worker that was ever here, and what it told last."""
        for path in sorted((self.path / "workers").glob("*.json")):
            yield path, from_json(text_of(path), path)


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


def _numbers(folder: Path) -> set[int]:
    return {int(name[:6]) for name in os.listdir(folder) if name[:6].isdigit()}  # noqa: PTH208 (names alone, of many)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
