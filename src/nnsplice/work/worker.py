"""A worker: runs units of a run folder until none is left."""

from __future__ import annotations

import os
import platform
import random
import signal
import time
import traceback
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

from nnsplice.errors import BadArgument, NnspliceError
from nnsplice.locks import Heartbeat, this_process
from nnsplice.work.claims import Claims
from nnsplice.work.run_folder import RunFolder, UnitTask

#: Signals that stop a worker after its current unit: preemption by Slurm, submitit's own signal, Ctrl-C.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR2", "SIGINT") if hasattr(signal, name))
#: Seconds between two checks of the claims of others, when no unit is free.
PAUSE = 0.2
#: Exit codes: no unit is left; this process would compute other numbers; an error that another process may not have.
DONE, REFUSED, BROKEN = 0, 3, 4


class Worker:
    """One process that runs units."""

    def __init__(self, folder: RunFolder, *, name: str | None = None, parent: int | None = None) -> None:
        """A worker of a run; `work` starts it.

        Args:
            name: the name of its files; from the machine and the process if left out.
            parent: the id of the parent process: the worker stops after its unit when this process has ended.
        """
        self.folder: RunFolder = folder
        self.parent: int | None = parent
        self.name: str = name or f"{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self.claims: Claims = Claims(folder, self.name)
        self.record: dict[str, Any] = {"worker": self.name, **this_process(), "units": 0, "seconds": 0.0}
        self.file: str = f"workers/{self.name}"
        self.stopping: bool = False
        self._written_at: float = 0.0

    def work(self) -> int:
        """Run units until none is left; returns the exit code."""
        heartbeat = Heartbeat(self._sign, self.folder.header["lease"] / 6)
        try:
            with self._signals():
                return self._work()
        finally:
            heartbeat.stop()
            with suppress(OSError):  # only the last status is lost
                self.folder.store.flush()

    def _sign(self) -> None:
        self.claims.sign()
        self.folder.store.touch(f"{self.file}.json")
        self.folder.store.flush()

    def _work(self) -> int:
        self._report("loading")
        try:
            task = self.folder.task()
        except BadArgument as error:
            self._report("refused", reason=str(error))
            return REFUSED
        except Exception as error:
            self.log(traceback.format_exc())
            self._report("broken", reason=f"{type(error).__name__}: {error}")
            return BROKEN
        self._report("running")
        for number in self._numbers():
            code = self._unit(task, number)
            if code != DONE:
                return code
            if self._should_stop():
                self.log("left")
                self._report("left")
                return DONE
        self._report("done")
        return DONE

    def _unit(self, task: UnitTask, number: int) -> int:
        if self.folder.store.has(self.folder.unit_file(number)):
            self.claims.claimed = None
            return DONE
        start = time.perf_counter()
        try:
            arrays = task.run(number)
            seconds = time.perf_counter() - start
            self.folder.keep(number, arrays, {"worker": self.name, "seconds": seconds})
        except OSError as error:  # the disk is full or gone; the unit is not to blame
            self.claims.release()
            return self._broken(number, error)
        except NnspliceError as error:  # another attempt would fail too
            self.log(traceback.format_exc())
            self.folder.fail(number, str(error))
        except Exception as error:  # the device may be broken, so another process tries
            self.claims.strike(f"{type(error).__name__}: {error}")
            return self._broken(number, error)
        else:
            self.record["units"] += 1
            self.record["seconds"] += seconds
            self.log(f"unit {number} in {seconds:.3f} s")
            self._report("running")
        self.claims.claimed = None  # the claim's file stays, so that no worker takes the unit again
        return DONE

    def _broken(self, number: int, error: Exception) -> int:
        self.log(traceback.format_exc())
        self._report("broken", reason=f"unit {number}: {type(error).__name__}: {error}")
        return BROKEN

    def _numbers(self) -> Iterator[int]:
        """Claim and yield units: first those without a claim, then those of dead workers."""
        yield from self._free()
        while left := self._left():
            found = False
            for number in sorted(left):
                if self.claims.take_over(number):
                    found = True
                    yield number
            if not found:
                if self._should_stop():
                    return
                time.sleep(max(PAUSE, self.folder.store.pause))

    def _free(self) -> Iterator[int]:
        """Claim and yield units without a claim."""
        if not self.folder.store.pause:
            yield from filter(self.claims.take, range(self.folder.units))
            return
        # In an object store an attempt costs as much as a list of all claims, so claimed units are skipped.
        chosen = random.Random(self.name)
        while free := sorted(set(range(self.folder.units)) - self.folder.numbers("claims")):
            chosen.shuffle(free)
            for number in free:
                if not self.claims.take(number):
                    break
                yield number

    def _left(self) -> set[int]:
        return set(range(self.folder.units)) - self.folder.done() - set(self.folder.failures())

    def _should_stop(self) -> bool:
        return self.stopping or (self.parent is not None and os.getppid() != self.parent)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """In this block the first signal stops the worker after its unit; the second has its usual effect."""
        before: dict[int, Any] = {}

        def stop(number: int, _frame: Any) -> None:
            self.stopping = True
            self.log(f"signal {number}: leaves after this unit")
            signal.signal(number, before[number] if before[number] is not None else signal.SIG_DFL)

        try:
            for number in SIGNALS:
                before[number] = signal.signal(number, stop)
        except ValueError:  # not in the main thread
            before = {}
        try:
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, old if old is not None else signal.SIG_DFL)

    def _report(self, state: str, **more: Any) -> None:
        changed = state != self.record.get("state")
        if changed:
            self.log(f"{state}{': ' + more['reason'] if 'reason' in more else ''}")
        self.record.update(state=state, **more)
        now = time.monotonic()
        if changed or now - self._written_at >= self.folder.store.pause:
            self.folder.write_json(f"{self.file}.json", self.record)
            self.folder.store.flush()
            self._written_at = now

    def log(self, line: str) -> None:
        """Append a line to this worker's log."""
        self.folder.store.append(f"{self.file}.log", f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {line}\n")
