"""Who is at which unit: a file made exclusively, renewed while its process lives, taken over when that is gone."""

from __future__ import annotations

import json
import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from nnsplice.locks import age_of, is_gone, this_process
from nnsplice.work.run_folder import STRIKES, RunFolder


class Claims:
    """The claims of one worker."""

    def __init__(self, folder: RunFolder, worker: str) -> None:
        """Nothing is claimed yet."""
        self.folder: RunFolder = folder
        self.worker: str = worker
        #: The unit that is claimed now.
        self.held: int | None = None

    def path(self, number: int) -> Path:
        """The claim of a unit."""
        return self.folder.path / "claims" / f"{number:06}"

    def take(self, number: int) -> bool:
        """Claim a unit that nobody has; False where somebody has, or had, it."""
        try:
            handle = os.open(self.path(number), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(self._words())
        self.held = number
        return True

    def take_over(self, number: int) -> bool:
        """Claim a unit whose worker is gone, which is a strike against the unit; the third leaves it out."""
        path = self.path(number)
        there = _read(path)
        if there is None:
            return self.take(number)
        if not self._is_dead(there, path):
            return False
        strike = self.folder.path / "strikes" / f"{number:06}.{there.get('token', 'unreadable')}"
        try:
            with strike.open("x", encoding="utf-8") as file:
                file.write(f"{there.get('worker', 'a worker')} ended")
        except FileExistsError:
            # Another one judged this claim before. It takes the unit at once, unless it died on the way.
            if age_of(strike) < self.folder.told["lease"]:
                return False
        strikes = self.folder.strikes(number)
        if len(strikes) >= STRIKES:
            lines = "; ".join(strikes)
            self.folder.fail(number, f"{len(strikes)} workers ended while they ran it: {lines}")
            return False
        own = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        own.write_text(self._words(), encoding="utf-8")
        own.replace(path)
        self.held = number
        return True

    def release(self) -> None:
        """Give a claimed unit back, for others to take."""
        if self.held is not None:
            self.path(self.held).unlink(missing_ok=True)
        self.held = None

    def strike(self, reason: str) -> None:
        """Count an error of this worker against the unit, and give it back."""
        number = self.held
        assert number is not None
        strike = self.folder.path / "strikes" / f"{number:06}.{uuid.uuid4().hex}"
        strike.write_text(f"{self.worker}: {reason}", encoding="utf-8")
        if len(strikes := self.folder.strikes(number)) >= STRIKES:
            self.folder.fail(number, f"{len(strikes)} workers had an error at it: {strikes[-1]}")
            self.held = None  # the claim stays, so that nobody takes the unit again
        self.release()

    def signs(self) -> list[Path]:
        """The files that a sign of life touches."""
        return [] if self.held is None else [self.path(self.held)]

    def _words(self) -> str:
        return json.dumps({**this_process(), "worker": self.worker, "token": uuid.uuid4().hex})

    def _is_dead(self, told: dict[str, Any], path: Path) -> bool:
        lease = self.folder.told["lease"]
        try:
            gone = is_gone(told)
        except (KeyError, ValueError, TypeError):
            gone = None  # a worker that died while it wrote its claim, or is just writing it
        with suppress(FileNotFoundError):
            return gone if gone is not None else age_of(path) > lease
        return False


def _read(path: Path) -> dict[str, Any] | None:
    """What a claim says, nothing where it was cut off; None where there is none."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}
