"""What tells tensors and functions apart."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from nnsplice.digests import digest_of, function_digest

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
