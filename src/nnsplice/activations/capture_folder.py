"""`capture_to`: captures of a whole data set, written into a folder in chunks."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from nnsplice import engine
from nnsplice.activations import features
from nnsplice.activations.access import require_positions
from nnsplice.activations.activation_folder import FORMAT, KIND, ActivationFolder, read_manifest
from nnsplice.activations.capture import captured_within
from nnsplice.activations.encoding import encode, one_by_one
from nnsplice.activations.messages import is_chat
from nnsplice.activations.prompts import Prompts, SpanTexts
from nnsplice.activations.saved_activation import SavedActivation
from nnsplice.errors import BadArgument, FileError, circumstances
from nnsplice.files import from_json
from nnsplice.paths import Path, Paths, Slice, parse_path
from nnsplice.progress import bar
from nnsplice.stores import Store, store_of

#: Defaults: prompts in a chunk, and tokens that run at once.
CHUNK, TOKENS = 256, 4096


def capture_to(
    folder: str | os.PathLike[str],
    model: Any,
    prompts: Iterable[Any],
    paths: Paths,
    *,
    spans: SpanTexts | None = None,
    column: str = "text",
    chunk: int = CHUNK,
    max_tokens: int = TOKENS,
    progress: bool = True,
) -> ActivationFolder[SavedActivation]:
    """Capture sites of many prompts into a folder, a chunk at a time; the same call resumes after an interruption.

    One chunk is in memory at a time. With `[:]` all tokens of prompts of any length are captured.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     captures = ns.capture_to(folder, model, ["w3 w4 w5", "w6 w7"], "layers[1:].output[:]")
    ...     sum(len(batch) for batch in captures.tokens("layers[2].output", batch_size=4))
    5

    Args:
        folder: the folder, which is made if needed; or an address of an object store (`"s3://bucket/a"`,
            `"gs://..."`; extra `cloud`).
        model: the model.
        prompts: any iterable: texts, lists of token ids, or the rows of a data set, whose `column` is read.
        paths: sites with token positions, as for `ns.capture`.
        spans: token spans by name, as for `ns.capture`: one for all prompts, or a list with one for each.
        column: the column of a data set that holds the prompts.
        chunk: how many prompts are captured and written together.
        max_tokens: how many tokens run at once.
        progress: show a progress bar.

    Returns:
        The folder, opened.

    Raises:
        BadArgument: no prompts, one prompt, or a number below 1.
        FileError: the folder holds another capture, or captures of other prompts.
    """
    if chunk < 1 or max_tokens < 1:
        raise BadArgument(f"chunk={chunk}, max_tokens={max_tokens}", expected="at least 1")
    if isinstance(prompts, str):
        raise BadArgument("one prompt, and a folder is for many", write="ns.capture(model, prompt, paths)")
    store = store_of(folder)
    model = engine.as_model(model)
    with circumstances("ns.capture_to"):
        places = _wanted(model, paths)
        wanted, saes = [str(path) for path in places], features.identities(model, places)
    store.make()
    lock = store.lock("capture")
    try:
        _begin(store, model, wanted, saes, chunk, max_tokens)
        # Encodings, tensors of token ids, texts with images and chats are not plain iterables of prompts.
        prompts = one_by_one(prompts) if isinstance(prompts, Mapping | Tensor) or is_chat(prompts) else prompts
        total = len(prompts) if isinstance(prompts, Sequence) else None
        rows = (_prompt_of_row(one, column) for one in prompts)
        files: list[dict[str, Any]] = []
        number = start = 0
        with bar("capture", total, "prompt", progress) as shown:
            while members := list(itertools.islice(rows, chunk)):
                count = len(members)
                part = spans and {name: _chunk_spans(of, start, count) for name, of in spans.items()}
                files += _chunk(store, model, encode(model, members, part), wanted, number, start, max_tokens)
                number, start = number + 1, start + count
                shown.update(count)
        if not number:
            raise BadArgument("no prompts", expected="at least one prompt")
        if store.has(f"chunk-{number:06}.json"):
            raise FileError(
                f"{store.address} holds more prompts than these {start}", expected="the prompts of that capture"
            )
        _write(store, "index.json", {"chunks": number, "rows": start, "files": files})
    finally:
        lock.release()
    return SavedActivation.open(folder)


def _wanted(model: engine.Model, paths: Paths) -> list[Path]:
    wanted = [parse_path(path) for path in engine.listed(paths)]
    found = [place.at(path.position) for path in wanted for place in engine.expand(model, path.place)]
    require_positions(found)
    if not found:
        raise BadArgument("no paths, so there is nothing to capture", expected="at least one path")
    return found


def _prompt_of_row(row: Any, column: str) -> Any:
    """The prompt in a row of a data set; a text with its image is a prompt by itself."""
    if isinstance(row, int):
        raise BadArgument("one prompt of token ids, and a folder is for many", write="ns.capture(model, ids, paths)")
    is_row = isinstance(row, Mapping) and column in row and set(row) != {"text", "images"}
    return row[column] if is_row else row


def _chunk_spans(of: Any, start: int, count: int) -> Any:
    """The spans of the prompts of a chunk; a single span is for all prompts."""
    one = isinstance(of, str) or (isinstance(of, tuple) and all(isinstance(n, int) for n in of))
    return of if one else of[start : start + count]


def _begin(
    store: Store, model: engine.Model, paths: list[str], saes: dict[str, Any], chunk: int, max_tokens: int
) -> None:
    name, revision = engine.name_of(model)
    manifest = {
        "kind": KIND, "format": FORMAT, "model": name, "revision": revision,
        "weights": engine.weights_digest(model, anew=True), "paths": paths, "chunk": chunk, "max_tokens": max_tokens,
        **({"saes": saes} if saes else {}),
    }  # fmt: skip
    if not store.has("capture.json"):
        _write(store, "capture.json", manifest)
        return
    existing = read_manifest(store)
    if other := [key for key in manifest if existing.get(key) != manifest[key]]:
        lines = [f"  {key}: {existing.get(key)} there, {manifest[key]} here" for key in other]
        raise FileError(
            "\n".join([f"{store.address} holds another capture", *lines]), expected="a new folder, or the same call"
        )


def _chunk(
    store: Store, model: engine.Model, given: Prompts, paths: list[str], number: int, start: int, max_tokens: int
) -> list[dict[str, Any]]:
    """Capture a chunk, unless it is complete, and return its files."""
    record_name = f"chunk-{number:06}.json"
    digest = hashlib.sha256(repr((given.ids, given.decoder_ids, given.spans)).encode()).hexdigest()[:16]
    if store.has(record_name):
        record = from_json(store.read(record_name), store.at(record_name))
        if record["prompts"] != digest:
            raise FileError(
                f"{store.address} was begun with other prompts: chunk {number} differs", expected="a new folder"
            )
        return record["files"]
    # With slices the tensors have the length of the prompts, so only prompts of one length share a file.
    ragged = any(isinstance(parse_path(path).position, Slice) for path in paths)
    groups = given.batches(model) if ragged else [list(range(len(given)))]
    files: list[dict[str, Any]] = []
    for at, rows in enumerate(groups):
        prompts = given.take(rows)
        name = f"chunk-{number:06}-{at}.safetensors"
        captured_within(model, prompts, paths, max_tokens).to_file(store.at(name))
        files.append({"name": name, "rows": [start + row for row in rows]})
    _write(store, record_name, {"rows": [start, start + len(given)], "prompts": digest, "files": files})
    return files


def _write(store: Store, name: str, record: Any) -> None:
    store.write(name, json.dumps(record).encode())
