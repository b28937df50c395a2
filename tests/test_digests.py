"""What tells tensors and functions apart."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from nnsplice import digests
from nnsplice.digests import checksum, digest_of, function_digest

ONE = {"w": torch.tensor([1.0, -2.0])}


@pytest.mark.parametrize(
    "other",
    [
        {"w": torch.tensor([1.0, -2.0]).double()},
        {"w": torch.tensor([[1.0, -2.0]])},
        {"w": torch.tensor([1.0, -2.0000002])},
        {"v": torch.tensor([1.0, -2.0])},
        {"w": torch.tensor([1.0, -2.0]), "v": torch.tensor([])},
        {},
    ],
    ids=["dtype", "shape", "last bit", "name", "one more", "none"],
)
def test_tensors_that_differ_in_anything_have_another_digest(other: dict[str, torch.Tensor]) -> None:
    assert digest_of(other) != digest_of(ONE)
    assert digest_of(dict(ONE)) == digest_of(ONE)


def test_how_a_tensor_lies_in_memory_is_no_part_of_it() -> None:
    square = torch.arange(6.0).reshape(2, 3)
    assert digest_of({"w": square.T}) == digest_of({"w": square.T.contiguous()}) != digest_of({"w": square})


def test_a_function_has_one_digest_in_every_process() -> None:
    script = "from nnsplice.digests import function_digest; print(function_digest(lambda x: x + 1.5))"
    told = {
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(told) == 1
    assert function_digest(lambda x: x + 1.5) != function_digest(lambda x: x + 2.5)


def test_what_a_function_takes_where_nothing_is_given_is_part_of_it() -> None:
    def by_place(factor: float) -> Any:
        def scaled(x: float, by: float = factor) -> float:
            return x * by

        return scaled

    def by_name(factor: float) -> Any:
        def scaled(x: float, *, by: float = factor) -> float:
            return x * by

        return scaled

    for made in (by_place, by_name):
        assert function_digest(made(2.0)) == function_digest(made(2.0)) != function_digest(made(3.0))


@dataclass(frozen=True, slots=True)
class Scale:
    """Something that a function holds, without a dictionary."""

    factor: float


def _times(scale: Any) -> Any:
    return lambda x: x * scale.factor


def test_what_a_function_holds_in_slots_is_part_of_it() -> None:
    assert function_digest(_times(Scale(2.0))) == function_digest(_times(Scale(2.0)))
    assert function_digest(_times(Scale(2.0))) != function_digest(_times(Scale(3.0)))


def test_a_pattern_is_part_of_a_function_that_holds_or_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def counting(pattern: re.Pattern[str]) -> Any:
        return lambda text: len(pattern.findall(text))

    assert function_digest(counting(re.compile("a"))) == function_digest(counting(re.compile("a")))
    assert function_digest(counting(re.compile("a"))) != function_digest(counting(re.compile("b")))
    assert function_digest(counting(re.compile("a"))) != function_digest(counting(re.compile("a", re.IGNORECASE)))
    before = function_digest(_matches)
    monkeypatch.setitem(globals(), "WORD", re.compile("w"))
    assert function_digest(_matches) != before


WORD = re.compile("v")


def _matches(text: str) -> bool:
    return bool(WORD.match(text))


def _checksum_by_hand(raw: np.ndarray) -> int:
    """Files hold checksums, so what they are may not change: words by factors, and lines of 2 ** 18 by odd numbers."""
    whole = len(raw) // 8 * 8
    words, rest = raw[:whole].view(np.uint64), raw[whole:].astype(np.uint64)
    factors = np.arange(1 << 18, dtype=np.uint64) * np.uint64(0x1E3779B97F4A7C15) + np.uint64(1)
    total = int((rest * factors[: len(rest)]).sum())
    for line, start in enumerate(range(0, len(words), 1 << 18)):
        part = words[start : start + (1 << 18)]
        total += int((part * factors[: len(part)]).sum()) * (2 * line + 1)
    return (total + (1 << 63)) % (1 << 64) - (1 << 63)


@pytest.mark.parametrize("size", [0, 5, 8, 1003, 8 << 18, (8 << 18) * 5 + 8 * 77 + 3])
@pytest.mark.parametrize("lines", [1, 2, 64])
def test_a_checksum_is_one_number_however_many_lines_are_read_at_once(size, lines, monkeypatch):
    raw = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    assert checksum(torch.from_numpy(raw)) == _checksum_by_hand(raw)
    # As other devices do it, some lines at once.
    monkeypatch.setitem(digests._LINES, "cpu", lines)
    monkeypatch.setattr(digests, "_summed_by_numpy", digests._summed_by_torch)
    assert checksum(torch.from_numpy(raw)) == _checksum_by_hand(raw)
    if size:
        raw[size // 2] ^= 1
        assert checksum(torch.from_numpy(raw)) == _checksum_by_hand(raw)
