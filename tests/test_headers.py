"""Damaged and hostile safetensors files: what safetensors refuses is refused by an error of ours, the rest is equal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import nnsplice as ns
from nnsplice.errors import FileError, NnspliceError
from nnsplice.headers import read_header

#: A header in pieces, so that it can be written as no library would: (name, fields), each of them JSON already.
Pieces = list[tuple[str, list[tuple[str, str]]]]

SIZES = {"F32": 4, "F16": 2, "I64": 8, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F4": 0.5, "F6_E2M3": 0.75, "C64": 8}
STRANGE = [
    "Infinity", "-Infinity", "NaN", "9223372036854775808", "18446744073709551616", "1e400", "9" * 5000, "1.5", "2.0",
    "-1", "-0", "1e2", '"3"', "null", "true", "[]", "[2]", "{}", "0", "1", "2", "4", "4611686018427387904",
]  # fmt: skip


def written(pieces: Pieces) -> bytes:
    told = (f"{name}:{{{','.join(f'{key}:{value}' for key, value in fields)}}}" for name, fields in pieces)
    return f"{{{','.join(told)}}}".encode("utf-8", "surrogatepass")


def file_of(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def good(tensors: list[tuple[str, tuple[int, ...]]]) -> tuple[Pieces, int]:
    pieces, at = [], 0
    for number, (kind, shape) in enumerate(tensors):
        size = int(torch.Size(shape).numel() * SIZES[kind])
        fields = [('"dtype"', f'"{kind}"'), ('"shape"', json.dumps(shape)), ('"data_offsets"', f"[{at},{at + size}]")]
        pieces.append((f'"t{number}"', fields))
        at += size
    return pieces, at


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A file that was right, changed in a few sites, each in a way of its own."""
    shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
    pieces, size = good(draw(st.lists(st.tuples(st.sampled_from(sorted(SIZES)), shapes), max_size=4)))
    data = bytes(range(256)) * (size // 256 + 1)
    data = data[:size]
    for _ in range(draw(st.integers(0, 2))):
        way = draw(st.sampled_from(["number", "offset", "dtype", "drop", "more", "twice", "field", "order", "name"]))
        if not pieces:
            break
        at = draw(st.integers(0, len(pieces) - 1))
        name, fields = pieces[at]
        fields = list(fields)
        if way == "number":
            where = draw(st.integers(0, len(fields) - 1))
            key, value = fields[where]
            inside = value.strip("[]").split(", " if "shape" in key else ",")
            inside[draw(st.integers(0, len(inside) - 1))] = draw(st.sampled_from(STRANGE))
            fields[where] = key, f"[{','.join(inside)}]"
        elif way == "offset":
            begin, end = draw(st.integers(-1, size + 2)), draw(st.integers(-1, size + 2))
            fields = [(key, f"[{begin},{end}]" if "offsets" in key else value) for key, value in fields]
        elif way == "dtype":
            kind = draw(st.sampled_from([*(f'"{kind}"' for kind in SIZES), '"F9"', '"f32"', "3", "null", "[]"]))
            fields = [(key, kind if "dtype" in key else value) for key, value in fields]
        elif way == "drop":
            del fields[draw(st.integers(0, len(fields) - 1))]
        elif way == "more":
            fields.append((draw(st.sampled_from(['"more"', '"dtype"', '"shape"'])), draw(st.sampled_from(STRANGE))))
        elif way == "name":
            name = draw(st.sampled_from(['"\\ud800"', '"\\u001b[31m"', '""', '"a\\u0000b"', '"\t"', "3", '"é"', "'a'"]))
        pieces[at] = name, fields
        if way == "twice":
            pieces.insert(draw(st.integers(0, len(pieces))), pieces[at])
        elif way == "order":
            pieces = draw(st.permutations(pieces))
    header = written(pieces)
    metadata = draw(st.sampled_from([
        None, None, None, '{"format":"pt"}', "[]", "null", '"text"', '{"a":1}', '{"a":null}', '{"a":{}}', "3",
        '{"a":"1","a":"2"}', "[" * 200 + "]" * 200, "[" * 100_000 + "]" * 100_000, '{"a":"\\ud800"}',
    ]))  # fmt: skip
    if metadata is not None:
        header = b'{"__metadata__":' + metadata.encode() + (b"," if pieces else b"") + header[1:]
    ending = draw(st.sampled_from(["", "", "", "spaces", "before", "mark", "utf-16", "after", "less", "long", "short"]))
    length = None
    if ending == "spaces":
        header += b" " * 5
    elif ending == "before":
        header = b" " + header
    elif ending == "mark":
        header = b"\xef\xbb\xbf" + header
    elif ending == "utf-16":
        header = header.decode("utf-8", "replace").encode("utf-16")
    elif ending == "after":
        data += b"more"
    elif ending == "less":
        data = data[:-1]
    elif ending in ("long", "short"):
        length = len(header) + (1 if ending == "long" else -1) * draw(st.sampled_from([1, 2, 1000, 1 << 40, 1 << 62]))
        length = max(length, 0)
    content = file_of(header, data, length)
    if draw(st.booleans()) and draw(st.booleans()):
        spot = draw(st.integers(0, len(content) - 1))
        content = content[:spot] + draw(st.binary(min_size=1, max_size=3)) + content[spot + 1 :]
    return content


def theirs(path: Path) -> tuple[bool, dict[str, Tensor] | None]:
    """Whether safetensors opens a file, and its tensors where it has them all."""
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            names = list(file.keys())
            try:
                return True, {name: file.get_tensor(name) for name in names}
            except BaseException:
                return True, None
    except BaseException:
        return False, None


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@settings(max_examples=400)
@given(mutated())
def test_what_safetensors_refuses_is_refused_and_what_it_reads_is_equal(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
):
    folder = tmp_path_factory.mktemp("header")
    path = folder / "model.safetensors"
    path.write_bytes(content)
    opens, tensors = theirs(path)
    found: dict[str, Tensor] | None = None
    try:
        checkpoint = ns.checkpoints.Checkpoint.open(folder)
        found = {name: checkpoint.tensor(name) for name in checkpoint.files}
        said = "model.safetensors"
    except FileError as error:
        said = str(error)
    assert "model.safetensors" in said
    if not opens:
        assert found is None
    elif tensors is not None:
        assert found is not None and found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
            assert raw(found[name]) == raw(tensor)


def one(fields: str, data: int = 0, name: str = '"a"') -> bytes:
    return file_of(f"{{{name}:{{{fields}}}}}".encode(), bytes(data))


def two(first: str, second: str, names: tuple[str, str] = ("a", "b"), data: int = 8) -> bytes:
    told = (
        f'"{n}":{{"dtype":"U8","shape":[4],"data_offsets":{o}}}' for n, o in zip(names, (first, second), strict=True)
    )
    return file_of(f"{{{','.join(told)}}}".encode(), bytes(data))


#: What is wrong with a file -> the file.
HOSTILE: dict[str, bytes] = {
    "deep": file_of(b"[" * 200_000 + b"]" * 200_000, b""),
    "deep metadata": file_of(b'{"__metadata__":' + b"[" * 200_000 + b"]" * 200_000 + b"}", b""),
    "a list": file_of(b"[]", b""),
    "metadata a list": file_of(b'{"__metadata__":["a"]}', b""),
    "metadata of numbers": file_of(b'{"__metadata__":{"a":1}}', b""),
    "infinity": one('"dtype":"F32","shape":[Infinity],"data_offsets":[0,4]', 4),
    "2**63": one('"dtype":"F32","shape":[9223372036854775808],"data_offsets":[0,4]', 4),
    "2**63 beside none": one('"dtype":"F32","shape":[0,9223372036854775808],"data_offsets":[0,0]'),
    "2**64 beside none": one('"dtype":"F32","shape":[4294967296,0,4294967296],"data_offsets":[0,0]'),
    "thousands of digits": one(f'"dtype":"F32","shape":[{"9" * 5000}],"data_offsets":[0,4]', 4),
    "fractions": one('"dtype":"F32","shape":[1.0],"data_offsets":[0,4]', 4),
    "below zero": one('"dtype":"F32","shape":[-1,-1],"data_offsets":[0,4]', 4),
    "halves of a byte": one('"dtype":"F4","shape":[3],"data_offsets":[0,1]', 1),
    "no type": one('"dtype":"F9","shape":[1],"data_offsets":[0,4]', 4),
    "an entry of text": file_of(b'{"a":"b"}', b""),
    "overlap": two("[0,4]", "[2,6]", data=6),
    "the same bytes": two("[0,4]", "[0,4]", data=4),
    "a hole": two("[0,4]", "[5,9]", data=9),
    "a name twice": two("[0,4]", "[4,8]", names=("a", "a")),
    "turned offsets": two("[4,0]", "[4,8]"),
    "more bytes": two("[0,4]", "[4,8]", data=12),
    "fewer bytes": two("[0,4]", "[4,8]", data=7),
    "longer than the file": file_of(b"{}", b"", 1 << 40),
    "longer than 2**63": file_of(b"{}", b"", (1 << 64) - 1),
    "not text": file_of(b'{"\xff":{}}', b""),
    "empty": b"",
}


def capture(path: Path) -> object:
    return ns.SavedActivation.from_file(path)


def adapter(path: Path) -> object:
    inside = path.with_name("adapter_model.safetensors")
    inside.write_bytes(path.read_bytes())
    return ns.adapters.map_param_ids_to_layers(path.parent, 4)


def factors(path: Path) -> object:
    path.with_name("adapter_model.safetensors").write_bytes(path.read_bytes())
    path.with_name("adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    return ns.adapters.ExpertAdapter.from_peft(path.parent)


DOORS: dict[str, Callable[[Path], object]] = {
    "header": read_header,
    "checkpoint": lambda path: ns.checkpoints.Checkpoint.open(path.parent),
    "capture": capture,
    "result": ns.SweepResult.from_file,
    "vector": ns.steering.SteeringVector.from_file,
    "steering sweep": ns.steering.SteeringSweep.from_file,
    "adapter": adapter,
    "factors": factors,
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("wrong", HOSTILE)
def test_a_hostile_file_is_refused_at_every_door(tmp_path: Path, door: str, wrong: str):
    (tmp_path / "model.safetensors").write_bytes(HOSTILE[wrong])
    if wrong not in ("2**63 beside none", "2**64 beside none"):
        assert not theirs(tmp_path / "model.safetensors")[0]
    with pytest.raises(NnspliceError, match=r"model\.safetensors") as caught:
        DOORS[door](tmp_path / "model.safetensors")
    assert len(str(caught.value)) < 1500


def test_what_a_header_of_ours_holds_besides_may_be_damaged_too(tmp_path: Path):
    text = json.dumps("[" * 200_000)
    for name in ("model.safetensors", "x"):
        (tmp_path / name).write_bytes(file_of(f'{{"__metadata__":{{"nnsplice":{text}}}}}'.encode(), b""))
    for door in ("capture", "result", "vector", "steering sweep"):
        with pytest.raises(FileError, match=r"deeper|damaged"):
            DOORS[door](tmp_path / "x")


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({"weight_map": {"a": "b" * 5000 + ".safetensors"}}, r"File name too long"),
        ({"weight_map": {"a": "b\0.safetensors"}}, r"b\\x00\.safetensors(.|\n)*inside the folder"),
        ({"weight_map": {"a": 5}}, "says 5 of a"),
        ({"weight_map": {"a": ["x.safetensors"]}}, "of a"),
        ({"weight_map": ["a"]}, "damaged"),
        ({"weight_map": {"a": "x.safetensors"}, "metadata": {"tied": {"b": []}}}, r"says \[\] of b"),
        ({"weight_map": {"a": "x.safetensors"}, "metadata": {"tied": ["b"]}}, "damaged"),
        ({"weight_map": {"a": "x.safetensors"}, "metadata": 3}, "damaged"),
        ({"weight_map": {"a": "inner/../../x.safetensors"}}, "inside the folder"),
        ([], "damaged"),
    ],
)
def test_an_index_of_odd_things_is_refused(tmp_path: Path, index: Any, said: str):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileError, match=said) as caught:
        ns.checkpoints.Checkpoint.open(tmp_path).sizes()
    assert len(str(caught.value)) < 1000


def test_a_deep_index_is_refused(tmp_path: Path):
    (tmp_path / "model.safetensors.index.json").write_text("[" * 200_000)
    with pytest.raises(FileError, match=r"index\.json is damaged: it is nested deeper"):
        ns.checkpoints.Checkpoint.open(tmp_path)
