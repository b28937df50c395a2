"""A process of its own in which writes of a checkpoint end badly; prints what was left, a JSON line a trial.

python checkpoint_faults.py kills FOLDER     SIGKILL at every step of a write, each in a child of its own
python checkpoint_faults.py timed FOLDER N   SIGKILL at once, and after N random times
python checkpoint_faults.py full FOLDER      a disk of a few kilobytes (FOLDER), and a limit on the size of files
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from nnsplice import checkpoints as ck

COUNT, KB = 3, 1 / 1024**2
MAPPER = ck.Parallel([ck.Rename(f"t{i}", f"made.{i}") for i in range(COUNT)] + [ck.Copy("w", ["w", "tied"])])


def state(value: float) -> dict[str, Tensor]:
    return {f"t{i}": torch.full((16, 32), value + i) for i in range(COUNT)} | {"w": torch.full((8,), value)}


def write(folder: Path, value: float, resume: bool = False) -> None:
    carry: dict[str, Path | str] = {"config.json": "{}"}
    states = state(value).items()
    ck.write_model_state_local(folder, MAPPER, states, 2 * KB, False, resume=resume, source=str(value), carry=carry)


def holds(folder: Path) -> float | str:
    """The value that a folder's checkpoint was written with, all of it; else what is wrong."""
    try:
        names = [*(f"made.{i}" for i in range(COUNT)), "w", "tied"]
        found = dict(ck.read_model_state(folder, ck.Parallel([ck.Identity(name) for name in names]), "cpu", False))
    except Exception as error:
        return repr(error)
    value = float(found["w"][0])
    whole = all((found[f"made.{i}"] == value + i).all() for i in range(COUNT)) and (found["tied"] == value).all()
    return value if whole and (folder / "config.json").is_file() else "a mixture"


def in_child(work: Callable[[], object]) -> int:
    """The exit status of a child that does it: 0, or minus the signal."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def trial(folder: Path, old: bool, killed: Callable[[], int], **told: object) -> int:
    """One write that is killed, and one that goes on."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if old:
        write(folder / "ck", 100.0)
    code = killed()
    after = holds(folder / "ck")
    left = sum(1 for _ in folder.glob(".ck.part/weights/*.safetensors"))
    # A reader must find the one or the other; who goes on finds the rest.
    code_again = in_child(lambda: write(folder / "ck", 200.0, resume=True))
    print(json.dumps({
        **told, "old": old, "code": code, "after": after, "finished": left, "code again": code_again,
        "in the end": holds(folder / "ck"), "left": sorted(path.name for path in folder.iterdir() if path.name != "ck"),
        "inside": len(list((folder / "ck").iterdir())),
    }), flush=True)  # fmt: skip
    return code


def kills(folder: Path) -> None:
    """A kill before the first, the second, ... thing that the process does with the disk."""
    for old, by in ((True, 2), (False, 8)):
        step = 1 - by
        while True:
            step += by

            def killed(step: int = step) -> int:
                def work() -> None:
                    seen = 0

                    def watch(event: str, _: object) -> None:
                        nonlocal seen
                        if event == "open" or event.startswith(("os.", "shutil.")):
                            seen += 1
                            if seen == step:
                                os.kill(os.getpid(), signal.SIGKILL)

                    sys.addaudithook(watch)
                    write(folder / "ck", 200.0, resume=True)

                return in_child(work)

            if trial(folder, old, killed, step=step) == 0:
                break


def timed(folder: Path, count: int) -> None:
    """A kill after a random part of the time that a write takes."""
    folder.mkdir(exist_ok=True)
    times: list[float] = []
    for _ in range(3):
        started = time.perf_counter()
        in_child(lambda: write(folder / "measured", 1.0))
        times.append(time.perf_counter() - started)
    chance = random.Random(0)
    # One at once, as on a busy machine all others may come after the write.
    for share in (0.0, *(chance.uniform(0, 1) for _ in range(count))):
        after = share * min(times)

        def killed(after: float = after) -> int:
            child = os.fork()
            if child == 0:
                write(folder / "ck", 200.0, resume=True)
                os._exit(0)
            time.sleep(after)
            os.kill(child, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

        trial(folder, True, killed, seconds=round(after, 4))


def full(folder: Path) -> None:
    """Where there is no room: once with nothing kept, once to be gone on with."""
    for resume, free in product((False, True), range(12_000, 40_000, 4_000)):
        shutil.rmtree(folder / "ck", ignore_errors=True)
        write(folder / "ck", 100.0)
        ballast = folder / "ballast"
        with ballast.open("wb") as file:  # leave room for a few files, each of which takes whole pages
            while shutil.disk_usage(folder).free > free:
                file.write(b"\0" * 1024)
                file.flush()
        said = ""
        try:
            write(folder / "ck", 200.0, resume=resume)
        except OSError as error:
            said = str(error)
        between = holds(folder / "ck")
        left = sorted(path.name for path in folder.iterdir() if path.name not in ("ck", "ballast"))
        finished = sum(1 for _ in folder.glob(".ck.part/weights/*.safetensors"))
        ballast.unlink()
        write(folder / "ck", 200.0, resume=True)
        told = {
            "resume": resume,
            "said": said,
            "between": between,
            "left": left,
            "finished": finished,
            "in the end": holds(folder / "ck"),
            "at last": sorted(path.name for path in folder.iterdir()),
        }
        print(json.dumps(told))


def limited(folder: Path) -> None:
    """Where no file may be larger than a few kilobytes."""
    write(folder / "ck", 100.0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2500, limits[1]))
    try:
        write(folder / "ck", 200.0)
        said = ""
    except OSError as error:
        said = f"{type(error).__name__}: {error}"
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    print(json.dumps({"said": said, "after": holds(folder / "ck"), "there": sorted(p.name for p in folder.iterdir())}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    mode, where, *more = sys.argv[1:]
    if mode == "timed":
        timed(Path(where), int(more[0]))
    else:
        {"kills": kills, "full": full, "limited": limited}[mode](Path(where))
