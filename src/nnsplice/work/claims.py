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
        """Claims without a claimed unit."""
        self.folder: RunFolder = folder
        self.store: Store = folder.store
        self.worker: str = worker
        #: The unit that is claimed now, if any.
        self.claimed: int | None = None

    def name(self, number: int) -> str:
        """The file that claims a unit."""
        return f"claims/{number:06}"

    def take(self, number: int) -> bool:
        """Claim a unit that has no claim yet; False if it has one."""
        if not self.store.create(self.name(number), self._content()):
            return False
        self.claimed = number
        return True

    def take_over(self, number: int) -> bool:
        """Claim a unit whose worker is dead. That is a strike against the unit, which fails after `STRIKES` of them."""
        there = self._read(number)
        if there is None:
            return self.take(number)
        if not self._is_dead(there, number):
            return False
        strike = f"strikes/{number:06}.{there.get('token', 'unreadable')}"
        ended = f"{there.get('worker', 'a worker')} ended\n{uuid.uuid4().hex}".encode()
        # Of several workers that see the dead claim, the first to write the strike takes the unit. If it dies here,
        # another one may go on when the strike is older than the lease.
        if not self.store.create(strike, ended) and self.store.age(strike) < self.folder.header["lease"]:
            return False
        strikes = self.folder.strikes(number)
        if len(strikes) >= STRIKES:
            lines = "; ".join(strikes)
            self.folder.fail(number, f"{len(strikes)} workers ended while they ran it: {lines}")
            return False
        self.store.write(self.name(number), self._content())
        self.claimed = number
        return True

    def release(self) -> None:
        """Give the claimed unit back."""
        if self.claimed is not None:
            self.store.remove(self.name(self.claimed))
        self.claimed = None

    def strike(self, reason: str) -> None:
        """Count an error of this worker against its unit, and give the unit back."""
        number = self.claimed
        assert number is not None
        self.store.write(f"strikes/{number:06}.{uuid.uuid4().hex}", f"{self.worker}: {reason}".encode())
        if len(strikes := self.folder.strikes(number)) >= STRIKES:
            self.folder.fail(number, f"{len(strikes)} workers had an error at it: {strikes[-1]}")
            self.claimed = None  # the claim's file stays, so that no worker takes the unit again
        self.release()

    def sign(self) -> None:
        """Renew the claim."""
        if self.claimed is not None:
            self.store.touch(self.name(self.claimed))

    def _content(self) -> bytes:
        return json.dumps({**this_process(), "worker": self.worker, "token": uuid.uuid4().hex}).encode()

    def _is_dead(self, claim: dict[str, Any], number: int) -> bool:
        lease = self.folder.header["lease"]
        try:
            gone = is_gone(claim)
        except (KeyError, ValueError, TypeError):
            gone = None  # an incomplete file: its worker died, or is still writing it
        with suppress(FileNotFoundError):
            return gone if gone is not None else self.store.age(self.name(number)) > lease
        return False

    def _read(self, number: int) -> dict[str, Any] | None:
        """The claim of a unit: empty if its file is incomplete, None if there is none."""
        try:
            claim = json.loads(self.store.read(self.name(number)))
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return claim if isinstance(claim, dict) else {}
