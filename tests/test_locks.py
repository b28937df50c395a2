"""A lock is held by one process, judged by what it says, and taken over from a process that is gone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from nnsplice.errors import FileError
from nnsplice.locks import LEASE, Lock, this_process


def _there(folder: Path, **told: Any) -> Path:
    words = {"pid": os.getpid(), "host": this_process()["host"], "began": None, "lock": "0", **told}
    path = folder / "run.jsonl.lock"
    path.write_text(json.dumps(words))
    return path


def _gone() -> int:
    told = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    return int(told.stdout)


def test_a_lock_is_given_back(tmp_path: Path) -> None:
    lock = Lock(tmp_path / "run.jsonl")
    assert json.loads(lock.path.read_text())["pid"] == os.getpid()
    assert [p.name for p in tmp_path.iterdir()] == ["run.jsonl.lock"]
    with pytest.raises(FileError, match=rf"process {os.getpid()}, this one[\s\S]*rm .*run\.jsonl\.lock"):
        Lock(tmp_path / "run.jsonl")
    lock.release()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_process_of_another_machine_cannot_be_judged_from_here(tmp_path: Path) -> None:
    path = _there(tmp_path, pid=_gone(), host="elsewhere")
    with pytest.raises(FileError, match=r"process \d+ on elsewhere"):
        Lock(tmp_path / "run.jsonl")
    assert path.exists()


def test_a_lock_of_another_machine_without_a_sign_for_long_is_taken_over(tmp_path: Path) -> None:
    path = _there(tmp_path, host="elsewhere")
    past = path.stat().st_mtime - LEASE - 1
    os.utime(path, (past, past))
    lock = Lock(tmp_path / "run.jsonl")
    assert json.loads(path.read_text())["host"] != "elsewhere"
    lock.release()


def test_a_lock_is_renewed_while_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nnsplice.locks.LEASE", 0.6)
    lock = Lock(tmp_path / "run.jsonl")
    os.utime(lock.path, (0, 0))
    deadline = time.monotonic() + 10
    while lock.path.stat().st_mtime == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert lock.path.stat().st_mtime > 0
    lock.release()


def test_a_process_that_has_the_number_of_a_dead_one_is_not_the_holder(tmp_path: Path) -> None:
    _there(tmp_path, began="1")  # this very number, but not this process
    Lock(tmp_path / "run.jsonl").release()
    if not Path("/proc/self/stat").exists():
        pytest.skip("this system does not tell when a process began")
    _there(tmp_path, pid=os.getppid(), began="1")
    Lock(tmp_path / "run.jsonl").release()


def test_only_one_takes_over(tmp_path: Path) -> None:
    gone = _gone()
    for _ in range(30):
        _there(tmp_path, pid=gone)

        def take(_: int) -> Lock | None:
            try:
                return Lock(tmp_path / "run.jsonl")
            except FileError:
                return None

        with ThreadPoolExecutor(8) as pool:
            locks = [lock for lock in pool.map(take, range(8)) if lock]
        assert len(locks) == 1
        locks[0].release()
        assert list(tmp_path.iterdir()) == []


def test_the_lock_of_another_is_not_given_back(tmp_path: Path) -> None:
    lock = Lock(tmp_path / "run.jsonl")
    path = _there(tmp_path, host="elsewhere")  # someone removed ours by hand
    lock.release()
    assert path.exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_does_not_give_back_what_its_parent_holds(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom nnsplice.locks import Lock\n"
        "lock = Lock(Path(sys.argv[1]))\nif os.fork() == 0:\n    lock.release()\n    os._exit(0)\n"
        "os.wait()\nprint(lock.path.exists())\nlock.release()\nprint(lock.path.exists())"
    )
    told = subprocess.run([sys.executable, "-c", code, tmp_path / "run"], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["True", "False"]


def test_a_file_system_without_links_has_locks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", fails)
    lock = Lock(tmp_path / "run.jsonl")
    with pytest.raises(FileError, match="this one"):
        Lock(tmp_path / "run.jsonl")
    lock.release()
    assert list(tmp_path.iterdir()) == []
