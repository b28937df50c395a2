"""A damaged file says so, and one that is being written is the old one or the new one."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

import nnsplice as ns
from activations.captures import hand, same
from nnsplice.activations.storage import HEADER
from nnsplice.errors import FileError
from zoo import wrap

KEYS = ("layers[0].output[0]", "layers[0].output[-1]", "layers[1].output[3]")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A capture on disk."""
    hand(*KEYS).to_file(tmp_path / "saved.safetensors")
    return tmp_path / "saved.safetensors"


def rewritten(file: Path, change: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """The file with some of its JSON header, or its tensors, replaced."""
    with safetensors.safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    header = {**json.loads(metadata[HEADER]), **change}
    header.pop("sum", None)  # as older versions wrote it: what does not fit is found without
    held = safetensors.torch.load_file(file) if tensors is None else tensors
    safetensors.torch.save_file(held, file, {HEADER: json.dumps(header)})
    return file


# ------------------------------------------------------------------------------------------------------- damaged files


def test_a_file_cut_short_anywhere_is_an_error_of_ours(file: Path) -> None:
    content = file.read_bytes()
    for length in [0, 1, 7, 8, 9, 50, *range(100, len(content), 61), len(content) - 1]:
        file.write_bytes(content[:length])
        with pytest.raises(FileError, match=r"saved\.safetensors"):
            ns.SavedActivation.from_file(file)
    file.write_bytes(content + b"more")
    with pytest.raises(FileError):
        ns.SavedActivation.from_file(file)


@given(st.binary(max_size=64), st.integers(0, 700))
def test_bytes_that_change_in_the_header_never_end_in_a_foreign_error(
    tmp_path_factory: pytest.TempPathFactory, junk: bytes, at: int
) -> None:
    file = tmp_path_factory.mktemp("files") / "saved.safetensors"
    hand(*KEYS).to_file(file)
    content = file.read_bytes()
    file.write_bytes(content[:at] + junk + content[at + len(junk) :])
    with contextlib.suppress(FileError):  # a change may also be one that means nothing
        ns.SavedActivation.from_file(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "Grid"}, '"kind": "SavedActivation"'),
        ({"kind": None}, "another kind"),
        ({"format": 2}, "format 2; this nnsplice reads up to 1"),
        ({"format": "1"}, "damaged"),
        ({"keys": ["layers[0].output[0]"]}, "damaged"),
        ({"keys": {}}, r"do not agree on layers\[0\]\.output, layers\[1\]\.output"),
        ({"keys": {"layers[0].output": ["layers[0].output[0]", "layers[0].output[1]"]}}, r"agree on layers\[1\]"),
        ({"keys": {"layers[0].output": [KEYS[0]], "layers[1].output": [KEYS[2]]}}, "the header lists 1 positions"),
        ({"keys": {"layers[0].output": 3, "layers[1].output": [KEYS[2]]}}, "the header lists no positions"),
        ({"keys": {"layers[0].output": [KEYS[0], 3], "layers[1].output": [KEYS[2]]}}, "no path of one token"),
        ({"keys": {"layers[0].output": [KEYS[0], "layer 0"], "layers[1].output": [KEYS[2]]}}, "no path of one token"),
        ({"keys": {"layers[0].output": [KEYS[0], "l0[1:3]"], "layers[1].output": [KEYS[2]]}}, "no path of one token"),
        ({"keys": {"layers[0].output": [KEYS[0], "layers[0]"], "layers[1].output": [KEYS[2]]}}, "no path of one token"),
        ({"keys": {"layers[0].output": [KEYS[0], KEYS[0]], "layers[1].output": [KEYS[2]]}}, "names a key twice"),
        ({"prompts": 3}, "provenance cannot be read"),
        ({"tokens": [1, 2]}, "provenance cannot be read"),
        ({"spans": [1]}, "provenance cannot be read"),
        ({"spans": {"s": [[1, 2, 3], [1, 2, 3]]}}, "provenance cannot be read"),
        ({"prompts": ["one"]}, "2 rows, and its header tells of another number of prompts"),
        ({"spans": {"s": [[0, 1]]}}, "another number of prompts"),
    ],
)
def test_a_header_that_does_not_fit_says_what_is_wrong(file: Path, change: dict[str, Any], message: str) -> None:
    rewritten(file, change)
    for paths in (None, []):
        with pytest.raises(FileError, match=message):
            ns.SavedActivation.from_file(file, paths)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"layers[0].output": (2, 2, 4), "layers[1].output": (2, 2, 4)}, r"shape \[2, 2, 4\], .* lists 1 positions"),
        ({"layers[0].output": (2, 2, 4), "layers[1].output": (2, 4)}, r"shape \[2, 4\]"),
        ({"layers[0].output": (2, 2, 4), "layers[1].output": (3, 1, 4)}, "have 2 and 3 rows"),
        ({"layers[0].output": (2, 2, 4)}, r"do not agree on layers\[1\]\.output"),
        (
            {"layers[0].output": (2, 2, 4), "layers[1].output": (2, 1, 4), "more": (1,)},
            "do not agree on more",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_keys_say_so(file: Path, tensors: dict[str, tuple[int, ...]], message: str) -> None:
    rewritten(file, {}, {name: torch.zeros(shape) for name, shape in tensors.items()})
    with pytest.raises(FileError, match=message):
        ns.SavedActivation.from_file(file)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {HEADER: "no json"}, {HEADER: "[]"}, {HEADER: "{}"}])
def test_a_safetensors_file_of_someone_else_is_no_capture(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    safetensors.torch.save_file({"weight": torch.zeros(2, 1, 4)}, tmp_path / "x", metadata)
    with pytest.raises(FileError, match="header"):
        ns.SavedActivation.from_file(tmp_path / "x")


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (os.mkdir, ("opened",))


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
def test_a_pickle_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a").write_bytes(pickle.dumps(Bomb(), protocol))
    torch.save({"x": Bomb()}, "b")
    torch.save({"x": Bomb()}, "c", _use_new_zipfile_serialization=False)
    for name in ("a", "b", "c"):
        with pytest.raises(FileError, match="looks like a pickle" if protocol else "no safetensors file|pickle"):
            ns.SavedActivation.from_file(name)
    assert not Path("opened").exists()


@pytest.mark.parametrize("length", [640, 896, 1152, 1408, 0x4B50])
def test_a_header_as_long_as_a_pickle_begins_is_no_pickle(tmp_path: Path, length: int) -> None:
    """The first bytes of a safetensors file are the length of its header, and may be those of a pickle."""
    file = tmp_path / "x"
    hand("layers[0].output[0]").to_file(file)
    short = int.from_bytes(file.read_bytes()[:8], "little")
    rewritten(file, {"version": "0" * (length - short)})
    rewritten(file, {"version": "0" * (2 * length - short - int.from_bytes(file.read_bytes()[:8], "little"))})
    assert int.from_bytes(file.read_bytes()[:8], "little") == length
    assert len(ns.SavedActivation.from_file(file)) == 1


def test_a_missing_file_and_a_folder_are_what_python_says(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ns.SavedActivation.from_file(tmp_path / "nothing.safetensors")
    with pytest.raises(IsADirectoryError):
        ns.SavedActivation.from_file(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere to write x in"):
        hand(*KEYS).to_file(tmp_path / "nowhere" / "x")
    with pytest.raises(IsADirectoryError):
        hand(*KEYS).to_file(tmp_path)
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------- interrupted writes


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("half", [b"", b"\x10\x00"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    file: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, half: bytes
) -> None:
    before = file.read_bytes()

    def failing(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(half)
        raise error

    monkeypatch.setattr(safetensors.torch, "save_file", failing)
    with pytest.raises(type(error)):
        hand("layers[7].output[0]").to_file(file)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_a_process_killed_while_it_writes_leaves_the_old_file_whole(file: Path) -> None:
    program = (
        "import sys, time, safetensors.torch, nnsplice as ns\n"
        "new = ns.SavedActivation.from_file(sys.argv[1]) * 2\n"
        "def stuck(tensors, path, metadata):\n"
        "    path.write_bytes(b'half of it')\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(600)\n"
        "safetensors.torch.save_file = stuck\n"
        "new.to_file(sys.argv[1])"
    )
    before = file.read_bytes()
    child = subprocess.Popen([sys.executable, "-c", program, str(file)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None and child.stdout.readline() == "writing\n"
    finally:
        child.kill()
        child.communicate()
    assert file.read_bytes() == before and same(ns.SavedActivation.from_file(file), hand(*KEYS))
    # What was half written has a name of its own, which no capture is read from, and the next write is not in its way.
    left = [other.name for other in file.parent.iterdir() if other != file]
    assert len(left) == 1 and left[0].startswith(".saved.safetensors.") and left[0].endswith(".part")
    hand("layers[7].output[0]").to_file(file)
    assert ns.SavedActivation.from_file(file).keys() == ["layers[7].output[0]"]


def test_a_reader_meets_one_capture_or_the_other_and_never_a_mixture(file: Path) -> None:
    captures = [hand(*KEYS), hand(*KEYS, rows=50) * -1]
    done = threading.Event()

    def write() -> None:
        for n in range(100):
            captures[n % 2].to_file(file)
        done.set()

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    met: list[ns.SavedActivation] = []
    while not done.is_set():
        try:
            met.append(ns.SavedActivation.from_file(file))
        except FileError as error:
            if "was replaced while it was read" not in str(error):
                raise
    for writer in writers:
        writer.join()
    assert all(any(same(one, capture) for capture in captures) for one in met)
    assert list(file.parent.iterdir()) == [file]


def test_a_file_replaced_between_its_header_and_its_numbers_is_not_mixed_up(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = safetensors.safe_open

    def replaced(path: str, framework: str) -> Any:
        (hand(*KEYS) * 2).to_file(path)
        return opened(path, framework)

    monkeypatch.setattr(safetensors, "safe_open", replaced)
    with pytest.raises(FileError, match="was replaced while it was read"):
        ns.SavedActivation.from_file(file)


@pytest.mark.skipif(not hasattr(os, "umask"), reason="modes of files are a matter of POSIX")
def test_a_file_is_as_readable_as_any_other_that_is_made_here(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    hand(*KEYS).to_file(tmp_path / "x")
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_shapes_turned_round_in_the_header_are_seen(tmp_path: Path) -> None:
    """The sizes still fit, the keys too: rows and width have changed sites."""
    path = tmp_path / "saved.safetensors"
    values = torch.arange(2 * 3 * 5.0).reshape(2, 3, 5)
    saved = ns.SavedActivation.from_pairs(*((f"layers[0].output[{p}]", values[:, p]) for p in range(3)))
    saved.to_file(path)
    content = path.read_bytes()
    turned = content.replace(b'"shape":[2,3,5]', b'"shape":[5,3,2]')
    assert turned != content
    path.write_bytes(turned)
    for paths in (None, "layers[0].output[1]"):
        with pytest.raises(
            FileError, match=r"layers\[0\].output has shape \[5, 3, 2\], and was written with \[2, 3, 5\]"
        ):
            ns.SavedActivation.from_file(path, paths)
    path.write_bytes(content.replace(b'"dtype":"F32"', b'"dtype":"I32"'))
    with pytest.raises(FileError, match="int32, and was written with float32"):
        ns.SavedActivation.from_file(path)
    flipped = bytearray(content)
    flipped[-1] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(FileError, match="checksum"):
        ns.SavedActivation.from_file(path)
    path.write_bytes(content)
    assert same(ns.SavedActivation.from_file(path), saved)


@pytest.mark.parametrize(("old", "new"), [(b"w3 w4", b"w3 w5"), (b"[1, 2]", b"[0, 2]"), (b"[3, 4]", b"[3, 5]")])
def test_prompts_spans_and_tokens_that_changed_in_the_header_are_seen(tmp_path: Path, old: bytes, new: bytes) -> None:
    path = tmp_path / "saved.safetensors"
    saved = ns.capture(wrap("gpt2"), "w3 w4", "layers[0].output[:]", spans={"subject": ["w4"]})
    saved.to_file(path)
    assert same(ns.SavedActivation.from_file(path), saved)
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))
    for paths in (None, "layers[0].output[1]"):
        with pytest.raises(FileError, match="its header is not what was written"):
            ns.SavedActivation.from_file(path, paths)


def test_files_without_these_notes_are_read_as_before(file: Path) -> None:
    """Files of versions that did not repeat shapes in the header."""
    before = ns.SavedActivation.from_file(file)
    with safetensors.safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()[HEADER])
    del header["tensors"], header["sum"]
    safetensors.torch.save_file(safetensors.torch.load_file(file), file, {HEADER: json.dumps(header)})
    assert same(ns.SavedActivation.from_file(file), before)


@pytest.mark.skipif(not hasattr(os, "umask"), reason="modes of files are a matter of POSIX")
def test_a_private_file_stays_private_when_it_is_written_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.chmod(0o600)
    meanwhile: list[int] = []
    real = safetensors.torch.save_file

    def looking(tensors: Any, path: Path, metadata: Any) -> None:
        meanwhile.append(path.stat().st_mode & 0o777)
        real(tensors, path, metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", looking)
    hand(*KEYS).to_file(file)
    assert file.stat().st_mode & 0o777 == 0o600 and meanwhile == [0o600]
