"""A checkpoint passes through memory piece by piece: one group at a time, in the order of the files, and no more."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoints.folders import KB, read, write
from nnsplice import checkpoints as ck
from nnsplice.errors import MapperError


class Live:
    """Counts the bytes of all tensors that are alive, large and made since, whoever holds them."""

    def __init__(self) -> None:
        self.most = 0
        # Held, so that no tensor made since can lie where one of these was.
        self.before = _large()

    def look(self) -> None:
        gc.collect()
        made = {at: storage.nbytes() for at, storage in _large().items() if at not in self.before}
        self.most = max(self.most, sum(made.values()))


def _large() -> dict[int, torch.UntypedStorage]:
    """Where the numbers of every large tensor lie."""
    tensors = [thing for thing in gc.get_objects() if type(thing) is Tensor]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.nbytes >= 40_000 and not tensor.is_meta]
    return {storage.data_ptr(): storage for storage in storages}


def test_no_more_than_one_group_is_alive(tmp_path: Path):
    each, count = 40_000, 12
    state = {f"e.{i}": torch.randn(each // 4) for i in range(count)}
    write(tmp_path / "src", state, 100 * KB)
    del state
    mapper = ck.Parallel(
        [ck.StackTensors([f"e.{i + j}" for j in range(3)], f"s.{i}", 0) for i in range(0, count // 2, 3)]
        + [ck.Rename(f"e.{i}", f"r.{i}") for i in range(count // 2, count)]
    )
    gc.collect()
    live = Live()

    def watched():
        for name, tensor in ck.read_model_state(tmp_path / "src", mapper, "cpu", show_progress=False):
            live.look()
            yield name, tensor
            del tensor
            live.look()

    ck.write_model_state_local(
        tmp_path / "dst", ck.identity_mapper_from_mapper_outputs(mapper), watched(), 500 * KB, show_progress=False
    )
    assert live.most <= 2 * 3 * each  # what is stacked and what it is stacked of
    assert len(read(tmp_path / "dst")) == count // 2 // 3 + count // 2


def test_groups_come_in_the_order_of_the_files(tmp_path: Path):
    names = [f"t{(i * 7) % 10}" for i in range(10)]
    write(tmp_path / "ck", {name: torch.ones(30) for name in names}, 0.3 * KB)
    assert list(read(tmp_path / "ck")) == names


def test_what_is_read_may_be_changed_and_the_file_stays(tmp_path: Path):
    write(tmp_path / "ck", {"big": torch.zeros(100_000), "small": torch.zeros(3)})
    for tensor in read(tmp_path / "ck").values():
        tensor.add_(1)
    assert all((tensor == 0).all() for tensor in read(tmp_path / "ck").values())


def test_more_tensors_than_descriptors(tmp_path: Path):
    import resource

    state = {f"t{i}": torch.full((20_000,), float(i)) for i in range(80)}
    write(tmp_path / "ck", state)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, hard))
    try:
        found = read(tmp_path / "ck")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_a_block_is_read_and_nothing_else(tmp_path: Path):
    tensor = torch.randn(40, 6, 50)
    write(tmp_path / "ck", {"other": torch.ones(5000), "x": tensor})
    checkpoint = ck.Checkpoint.open(tmp_path / "ck")
    checkpoint.entry("x")

    def rchar() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    cost = -(rchar() - rchar())  # of looking
    for ranges in (
        [(3, 9), (0, 6), (0, 50)],
        [(0, 40), (2, 4), (0, 50)],
        [(1, 5), (2, 3), (10, 20)],
        [(0, 40), (0, 6), (0, 50)],
        [(2, 2), (0, 6), (0, 50)],
    ):
        before = rchar()
        block = checkpoint.block("x", ranges)
        read_bytes = rchar() - before - cost
        assert torch.equal(block, tensor[tuple(slice(*pair) for pair in ranges)])
        assert read_bytes == block.nbytes
    with pytest.raises(MapperError, match="has no block"):
        checkpoint.block("x", [(0, 41), (0, 6), (0, 50)])
