"""Units for the tests of run folders, without any model: each is a little arithmetic, and some end their process."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from nnsplice.errors import BadArgument
from nnsplice.work import RunFolder

OPENER = "work_payload:opened"


class Arithmetic:
    """A unit's number, to powers; with `how` from payload.json some do worse."""

    def __init__(self, how: Mapping[str, Any]) -> None:
        self.how = how

    def run(self, number: int) -> Mapping[str, np.ndarray]:
        time.sleep(self.how.get("seconds", 0.0))
        if number in self.how.get("kills", ()):
            os.kill(os.getpid(), signal.SIGKILL)
        if number in self.how.get("refuses", ()):
            raise BadArgument(f"unit {number} asks for what is not there")
        if number in self.how.get("breaks", ()):
            raise RuntimeError("the device is lost")
        if number in self.how.get("full", ()):
            raise OSError(28, "No space left on device")
        return {"values": np.sqrt(np.arange(1, 1 + self.how.get("numbers", 8)) * float(number + 1))}


def opened(folder: RunFolder) -> Arithmetic:
    how = json.loads((folder.path / "payload.json").read_text())
    if how.get("digest") != os.environ.get("WORK_PAYLOAD_DIGEST", how.get("digest")):
        raise BadArgument(f"other weights: {os.environ['WORK_PAYLOAD_DIGEST']} here, {how['digest']} there")
    return Arithmetic(how)


def written(path: Any, units: int, *, lease: float = 60.0, **how: Any) -> RunFolder:
    """A run folder of such units."""

    def write(folder: Any) -> None:
        (folder / "payload.json").write_text(json.dumps(how))

    return RunFolder.create(path, OPENER, units, {"units": units, "how": how}, write, lease=lease)


def bits(folder: RunFolder) -> dict[int, bytes]:
    """Every outcome, as bytes."""
    return {number: folder.outcome(number)[0]["values"].tobytes() for number in sorted(folder.done())}


def alone(units: int) -> dict[int, bytes]:
    """What one process would find."""
    return {number: Arithmetic({}).run(number)["values"].tobytes() for number in range(units)}
