"""Processes that write and read one checkpoint together, on gloo: two and four of them, each test with a time limit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "checkpoint_team.py"

Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module", params=[2, 4])
def team(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ranks]:
    """What every scenario said, rank by rank. A process that hangs is ended after a minute."""
    folder = tmp_path_factory.mktemp("team")
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(folder), str(request.param)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    found: dict[str, Ranks] = {}
    for line in done.stdout.splitlines():
        told = json.loads(line)
        last = told["scenario"].startswith("killed") and told["rank"] == request.param - 1
        assert told["code"] == (-signal.SIGKILL if last else 0), (told, done.stderr)
        found.setdefault(told["scenario"], []).append(told)
    assert len(found) == 12 and all(len(ranks) == request.param for ranks in found.values()), done.stderr
    return found


def test_each_writes_its_share_and_reads_another(team: dict[str, Ranks]):
    for rank in team["shards"]:
        assert rank["same"]
        # Every process works out the same partition without asking the others.
        names = [name for share in rank["shares"] for name in share]
        assert sorted(names) == [f"made.t{i}" for i in range(8)] and all(rank["shares"])
        assert rank["files"][-2:] == ["model-00008-of-00008.safetensors", "model.safetensors.index.json"]


def raised(ranks: Ranks, error: str) -> None:
    """One process raised its own error, all others say whose it was."""
    (own,) = [rank["rank"] for rank in ranks if rank["said"].startswith(error)]
    for rank in ranks:
        assert rank["rank"] == own or rank["said"].startswith(f"TeamError: process {own} failed: {error}"), rank


def test_one_fails_and_all_raise(team: dict[str, Ranks]):
    raised(team["one fails"], "RuntimeError: no more memory")
    for rank in team["one fails"]:
        assert rank["same"] and rank["left"] == []


@pytest.mark.parametrize("scenario", ["killed", "killed before it is gathered"])
def test_one_is_killed_and_all_others_say_so(team: dict[str, Ranks], scenario: str):
    for rank in team[scenario][:-1]:
        assert rank["said"].startswith("TeamError: a process of the team cannot be reached"), rank
        assert "pair.cc" not in rank["said"] and rank["same"]
    assert team[scenario][0]["left"] == []  # the one that cleans up


def test_all_go_on_with_what_was_finished(team: dict[str, Ranks]):
    for rank in team["goes on"]:
        assert rank["said"] and rank["kept"] > 0 and rank["same"] and rank["left"] == []


def test_a_name_from_two_processes_is_refused(team: dict[str, Ranks]):
    for rank in team["collide"]:
        assert rank["said"].startswith("MapperError: colliding output key a: processes 0 and 1") and not rank["there"]


def test_distribute_sends_nothing_and_gather_gets_everything(team: dict[str, Ranks]):
    for rank in team["leaves"]:
        assert rank["results"] == [True] * 6 and rank["alone"] and "x is no DTensor" in rank["said"]


def test_a_dtensor_reads_its_own_piece_and_no_more(team: dict[str, Ranks]):
    for rank in team["own slice"]:
        assert all(rank["same"].values())
        # Beside the piece itself the same is read each time, however large the piece is: index and header (and the
        # count itself, which may grow by a digit).
        extra = rank["extra"].values()
        assert max(extra) - min(extra) < 8 and max(extra) < 5000


@pytest.mark.parametrize("where", ["first", "last"])
def test_a_pipeline_is_saved_wherever_it_lies_in_the_mesh(team: dict[str, Ranks], where: str):
    for rank in team[f"pipeline {where}"]:
        assert rank["said"] == "" and rank["same"]
        assert rank["names"] == ["stage0.a", "stage0.c", "stage1.a", "stage1.c"]


@pytest.mark.parametrize("scenario", ["pipeline fails", "pipeline fails last"])
def test_a_stage_that_cannot_write_stops_all(team: dict[str, Ranks], scenario: str):
    raised(team[scenario], "OSError: [Errno 28]")
    for rank in team[scenario]:
        assert not rank["there"] and rank["left"] == []
