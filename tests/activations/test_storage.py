"""Captures on disk: what is written is read again, only what is asked for is read, and a damaged file says so."""

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
from activations.captures import captures, hand, same
from nnsplice.activations.storage import HEADER
from nnsplice.errors import FileError, UnknownPath
from nnsplice.paths import parse_path

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
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
    held = safetensors.torch.load_file(file) if tensors is None else tensors
    safetensors.torch.save_file(held, file, {HEADER: json.dumps(header)})
    return file


# --------------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    bits = torch.randint(0, 256, (3, 5 * dtype.itemsize), dtype=torch.uint8)
    entry = bits > 127 if dtype == torch.bool else bits.view(dtype)  # NaN and infinity among them
    entry = entry[:, :5].contiguous()
    ns.SavedActivation.from_pairs(("layers[0].output[-1]", entry)).to_file(tmp_path / "x")
    again = ns.SavedActivation.from_file(tmp_path / "x")["layers[0].output[-1]"]
    assert again.dtype == dtype and torch.equal(again.contiguous().view(torch.uint8), entry.view(torch.uint8))


@given(captures())
def test_keys_order_and_values_come_back(tmp_path_factory: pytest.TempPathFactory, saved: ns.SavedActivation) -> None:
    file = tmp_path_factory.mktemp("files") / "saved.safetensors"
    saved.to_file(file)
    again = ns.SavedActivation.from_file(file)
    assert again.keys() == saved.keys() and same(again, saved) and again.rows == saved.rows


def test_names_and_keys_of_every_kind_come_back(tmp_path: Path) -> None:
    saved = hand(
        'layers[0].output["a \\"quoted\\" größe\\n"][-1]',
        "model.transformer.h[2].attn.output[0][-1]",
        "encoder.layers[1].heads[3].q[0]",
    ).mean("position") | hand("unembed.output[-1]")
    saved.to_file(str(tmp_path / "größe and spaces"))
    assert same(ns.SavedActivation.from_file(str(tmp_path / "größe and spaces")), saved)


def test_provenance_comes_back(model, tmp_path: Path) -> None:
    saved = ns.capture(
        model, ["w3 w4 w5", "w6 w7"], ['layers[0].output["s"][-1]', "embed.output[0]"], spans={"s": ["w4", "w6"]}
    )
    saved.to_file(tmp_path / "x")
    again = ns.SavedActivation.from_file(tmp_path / "x")
    assert same(again, saved)
    assert (again.model, again.prompts, again.tokens) == (saved.model, saved.prompts, saved.tokens)
    assert again.positions == saved.positions == {'layers[0].output["s"][-1]': [1, 0], "embed.output[0]": [0, 0]}
    assert again.slice[1].prompts == ("w6 w7",)


def test_a_file_keeps_a_place_under_both_of_its_names(model, tmp_path: Path) -> None:
    saved = ns.capture(model, "w3 w4 w5", ["layers[0].output[0]", "model.transformer.h[0].output[2]"])
    saved.to_file(tmp_path / "x")
    again = ns.SavedActivation.from_file(tmp_path / "x")
    assert same(again, saved) and again.keys() == saved.keys()
    for name in ("layers[0].output[:]", "model.transformer.h[0].output[:]"):
        assert again[name].shape == ns.SavedActivation.from_file(tmp_path / "x", name)[name].shape == (1, 2, 16)


def test_an_empty_capture_is_a_file_too(tmp_path: Path) -> None:
    ns.SavedActivation().to_file(tmp_path / "x")
    assert ns.SavedActivation.from_file(tmp_path / "x").keys() == []


def test_a_captured_graph_is_left_behind(tmp_path: Path) -> None:
    leaf = torch.ones(1, 4, requires_grad=True)
    ns.SavedActivation.from_pairs(("layers[0].output[0]", leaf)).to_file(tmp_path / "x")
    assert not ns.SavedActivation.from_file(tmp_path / "x")["layers[0].output[0]"].requires_grad


def test_a_view_is_stored_without_the_tensor_it_is_a_view_of(tmp_path: Path) -> None:
    large = hand(*KEYS, rows=500, width=100)
    large.slice[3:5].to_file(tmp_path / "rows")
    large.subset(KEYS[1]).slice[7].map(lambda tensor: tensor[..., 5:9]).to_file(tmp_path / "columns")
    assert (tmp_path / "rows").stat().st_size < 3 * 2 * 100 * 8 + 2000
    assert (tmp_path / "columns").stat().st_size < 2000
    assert same(ns.SavedActivation.from_file(tmp_path / "rows"), large.slice[3:5])


def test_strided_and_expanded_tensors_are_stored(tmp_path: Path) -> None:
    saved = hand(*KEYS, width=6).map(lambda tensor: tensor[..., ::2].expand(2, -1, -1).flip(-1))
    one_row_twice = hand(*KEYS, rows=1).map(lambda tensor: tensor.expand(3, -1, -1))
    for made in (saved, one_row_twice):
        made.to_file(tmp_path / "x")
        assert same(ns.SavedActivation.from_file(tmp_path / "x"), made)


def test_a_file_is_read_in_another_process_without_unpickling(tmp_path: Path) -> None:
    saved = hand(*KEYS, dtype=torch.bfloat16)
    saved.to_file(tmp_path / "x")
    program = (
        "import pickle, sys\n"
        "pickle.Unpickler = pickle.load = pickle.loads = None\n"
        "import nnsplice as ns\n"
        "saved = ns.SavedActivation.from_file(sys.argv[1])\n"
        "(saved * 2).to_file(sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "x"), str(tmp_path / "y")], check=True)
    assert same(ns.SavedActivation.from_file(tmp_path / "y"), saved * 2)


# ------------------------------------------------------------------------------------------------------- partial reads


@given(captures(), st.data())
def test_a_partial_read_is_the_subset(
    tmp_path_factory: pytest.TempPathFactory, saved: ns.SavedActivation, data: st.DataObject
) -> None:
    file = tmp_path_factory.mktemp("files") / "saved.safetensors"
    saved.to_file(file)
    wanted = data.draw(st.lists(st.sampled_from(saved.keys())))
    again = ns.SavedActivation.from_file(file, wanted)
    assert again.keys() == saved.subset(wanted).keys() and same(again, saved.subset(wanted))


@pytest.mark.parametrize(
    ("paths", "keys"),
    [
        ("layers[:].output[3]", ["layers[1].output[3]"]),
        ("layers[0].output[:]", ["layers[0].output[0]", "layers[0].output[-1]"]),
        (["L1", "l0[-1,0]"], list(KEYS)),
        (parse_path("layers[0].output[-1]"), ["layers[0].output[-1]"]),
        ([], []),
    ],
)
def test_slices_lists_and_short_forms_say_what_to_read(file: Path, paths: Any, keys: list[str]) -> None:
    assert ns.SavedActivation.from_file(file, paths).keys() == keys


def test_a_slice_from_the_end_is_counted_by_the_prompts_tokens(model, tmp_path: Path) -> None:
    ns.capture(model, "w3 w4 w5 w6", "layers[0].output[0:3]").to_file(tmp_path / "x")
    part = ns.SavedActivation.from_file(tmp_path / "x", "layers[0].output[-2:]")
    assert part.keys() == ["layers[0].output[2]"]


def test_an_unknown_path_names_the_keys_of_the_file(file: Path) -> None:
    with pytest.raises(UnknownPath, match=r"layers\[1\]\.output\[3\]"):
        ns.SavedActivation.from_file(file, "layers[1].output[4]")


def test_a_partial_read_reads_no_other_tensor(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[str, Any]] = []
    opened = safetensors.safe_open

    class Counting:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.inner = opened(*args, **kwargs)

        def __enter__(self) -> Counting:
            self.file = self.inner.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.inner.__exit__(*error)

        def keys(self) -> list[str]:
            return self.file.keys()

        def metadata(self) -> dict[str, str]:
            return self.file.metadata()

        def get_slice(self, name: str) -> Any:
            part = self.file.get_slice(name)

            class Slice:
                get_shape = staticmethod(part.get_shape)

                def __getitem__(self, index: Any) -> torch.Tensor:
                    read.append((name, index))
                    return part[index]

            return Slice()

    monkeypatch.setattr(safetensors, "safe_open", Counting)
    ns.SavedActivation.from_file(file, "layers[0].output[-1]")
    assert read == [("layers[0].output", (slice(None), slice(1, 2)))]
    read.clear()
    ns.SavedActivation.from_file(file, [])
    assert read == []


def test_other_tensors_may_be_damaged_under_a_partial_read(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-2 * 4 * 8 :] = b"\xff" * (2 * 4 * 8)  # layers[1], written last
    file.write_bytes(content)
    expected = hand(*KEYS)
    assert same(ns.SavedActivation.from_file(file, "layers[0]"), expected.subset("layers[0]"))
    assert ns.SavedActivation.from_file(file)["layers[1].output[3]"].isnan().all()


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
