"""Claims of units: files created exclusively, renewed while their process lives, taken over after its death."""

from __future__ import annotations

import json
import uuid
from contextlib import suppress
from typing import Any

from nnsplice.locks import is_gone, this_process
from nnsplice.stores import Store
from nnsplice.work.run_folder import STRIKES, RunFolder


class Claims:
    """The claims of one worker."""

    def __init__(self, folder: RunFolder, worker: str) -> None:
        """Nothing is claimed yet."""
        self.folder: RunFolder = folder
        self.store: Store = folder.store
        self.worker: str = worker
        #: The unit that is claimed now.
        self.held: int | None = None

    def name(self, number: int) -> str:
        """The file that claims a unit."""
        return f"claims/{number:06}"

    def take(self, number: int) -> bool:
        """Claim a unit that nobody has; False where somebody has, or had, it."""
        if not self.store.create(self.name(number), self._words()):
            return False
        self.held = number
        return True

    def take_over(self, number: int) -> bool:
        """Claim a unit whose worker is gone, which is a strike against the unit; the third leaves it out."""
        there = self._read(number)
        if there is None:
            return self.take(number)
        if not self._is_dead(there, number):
            return False
        strike = f"strikes/{number:06}.{there.get('token', 'unreadable')}"
        ended = f"{there.get('worker', 'a worker')} ended\n{uuid.uuid4().hex}".encode()
        # Of several that judge this claim, the first takes the unit at once, unless it dies on the way.
        if not self.store.create(strike, ended) and self.store.age(strike) < self.folder.told["lease"]:
            return False
        strikes = self.folder.strikes(number)
        if len(strikes) >= STRIKES:
            lines = "; ".join(strikes)
            self.folder.fail(number, f"{len(strikes)} workers ended while they ran it: {lines}")
            return False
        self.store.write(self.name(number), self._words())
        self.held = number
        return True

    def release(self) -> None:
        """Give a claimed unit back, for others to take."""
        if self.held is not None:
            self.store.remove(self.name(self.held))
        self.held = None

    def strike(self, reason: str) -> None:
        """Count an error of this worker against the unit, and give it back."""
        number = self.held
        assert number is not None
        self.store.write(f"strikes/{number:06}.{uuid.uuid4().hex}", f"{self.worker}: {reason}".encode())
        if len(strikes := self.folder.strikes(number)) >= STRIKES:
            self.folder.fail(number, f"{len(strikes)} workers had an error at it: {strikes[-1]}")
            self.held = None  # the claim stays, so that nobody takes the unit again
        self.release()

    def sign(self) -> None:
        """Give a sign of life."""
        if self.held is not None:
            self.store.touch(self.name(self.held))

    def _words(self) -> bytes:
        return json.dumps({**this_process(), "worker": self.worker, "token": uuid.uuid4().hex}).encode()

    def _is_dead(self, told: dict[str, Any], number: int) -> bool:
        lease = self.folder.told["lease"]
        try:
            gone = is_gone(told)
        except (KeyError, ValueError, TypeError):
            gone = None  # cut off: by a worker that died, or by one that is just writing it
        with suppress(FileNotFoundError):
            return gone if gone is not None else self.store.age(self.name(number)) > lease
        return False

    def _read(self, number: int) -> dict[str, Any] | None:
        """What a claim says, nothing where it was cut off; None where there is none."""
        try:
            told = json.loads(self.store.read(self.name(number)))
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return told if isinstance(told, dict) else {}
