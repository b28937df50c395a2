"""GGUF files as checkpoints: their weights as plain numbers, converted once and kept."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import torch

from nnsplice.errors import FileError, MissingPackage
from nnsplice.gguf import GgufHeader, read_gguf_header
from nnsplice.models.conversion_cache import check_room, converted_folder, sha256
from nnsplice.models.hub import check_reachable
from nnsplice.progress import bar

#: The key of a converted model's config with the source file and its types.
KEY = "dequantised_from"
#: The file name of one shard, as llama.cpp splits models.
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
#: Number types that are not quantised.
_UNQUANTISED = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True, slots=True)
class Quantised:
    """One GGUF file, or the pieces that it was cut into."""

    #: The model's name in results.
    name: str
    pieces: tuple[Path, ...]
    #: The expected digest of the whole file, if known.
    sha256: str | None = None


@contextmanager
def checkpoint(quantised: Quantised, *, cache: bool = True) -> Iterator[Path]:
    """A folder with the model as transformers saves one, in single precision, while the block is open.

    Raises:
        FileError: the file is missing or damaged, or transformers cannot read all of it.
        MissingPackage: gguf is not installed.
        WriteFailed: the disk does not take the converted model.
    """
    _check(quantised)

    def make(folder: Path) -> Mapping[str, Any]:
        return _convert(quantised, folder)

    if cache:
        tool = f"transformers {importlib.metadata.version('transformers')}"
        yield converted_folder(quantised.pieces, _title(quantised).removesuffix(".gguf"), tool, make, quantised.sha256)
        return
    with tempfile.TemporaryDirectory(prefix="nnsplice-", ignore_cleanup_errors=True) as inside:
        _convert(quantised, Path(inside))
        yield Path(inside)


def _title(quantised: Quantised) -> str:
    """The file's name, without the number of a piece."""
    first = quantised.pieces[0].name
    return first if len(quantised.pieces) == 1 else first.rpartition(".")[0]


def types_of(outline: GgufHeader) -> dict[str, int]:
    """Type -> how many tensors have it, the most frequent first: `{"Q4_1": 210, "F32": 61}`."""
    from gguf import GGMLQuantizationType

    return dict(Counter(GGMLQuantizationType(tensor.kind).name for tensor in outline.tensors).most_common())


def types_text(types: Mapping[str, int]) -> str:
    """The quantised types as text: `"Q4_1 and Q8_0"`."""
    return " and ".join(name for name in types if name not in _UNQUANTISED) or " and ".join(types)


def _check(quantised: Quantised) -> None:
    """Refuse what cannot be converted, before anything is."""
    first = quantised.pieces[0]
    if not first.is_file():
        others = sorted(file.name for file in first.parent.glob("*.gguf")) if first.parent.is_dir() else []
        raise FileError(
            "there is no such file" if not first.is_dir() else "this is a folder, and a GGUF is a file",
            path=first,
            expected=f"one of {', '.join(others[:5])}" if others else "a GGUF file",
        )
    if _SHARD.search(first.name):
        raise FileError(
            "this is one of several files of a model, and transformers reads a GGUF that is whole",
            path=first,
            expected="one file",
            write="llama-gguf-split --merge FIRST.gguf WHOLE.gguf",
        )


# --- conversion -------------------------------------------------------------------------------------------------------


def _convert(quantised: Quantised, folder: Path) -> dict[str, Any]:
    """Write the model into a folder, and return its entries for source.json."""
    if find_spec("gguf") is None:
        raise MissingPackage(
            "reading GGUF files needs gguf, which is not installed", write='pip install "nnsplice[gguf]"'
        )
    file = first = quantised.pieces[0]
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        if len(quantised.pieces) > 1:
            file = _joined(quantised.pieces, Path(inside) / _title(quantised))
        if quantised.sha256 is not None and (found := sha256(file)) != quantised.sha256:
            raise FileError(
                f"the weights of {quantised.name} are damaged: their digest is {found}",
                path=first,
                expected=quantised.sha256,
                write=f"nnsplice fetch {quantised.name} --again",
            )
        outline = read_gguf_header(file)
        _check_length(file, outline)
        check_room(folder, sum(4 * prod(tensor.shape) for tensor in outline.tensors))
        types = types_of(outline)
        facts = {"file": _title(quantised), "types": types}
        with bar(f"{facts['file']}, {types_text(types)} to float32, once", 3, "step", None) as steps:
            module, tokenizer = _read(file)
            steps.update()
            converted = _without_quantisation(module, facts)
            steps.update()
            converted.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            steps.update()
    return {"types": types}


def _joined(pieces: Sequence[Path], into: Path) -> Path:
    """The pieces as one file."""
    with into.open("wb") as whole:
        for piece in pieces:
            with piece.open("rb") as part:
                shutil.copyfileobj(part, whole)
    return into


def _check_length(file: Path, outline: GgufHeader) -> None:
    """Raise for a truncated file; numpy would only say that a shape does not fit."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    size = file.stat().st_size
    for tensor in outline.tensors:
        try:
            block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.kind)]
        except (ValueError, KeyError):
            raise FileError(
                f"{tensor.name} is of type {tensor.kind}, which this version of gguf does not know", path=file
            ) from None
        end = tensor.start + prod(tensor.shape) // block * nbytes
        if end > size:
            raise FileError(
                f"the file is cut off: {tensor.name} ends at byte {end}, and the file has {size}",
                path=file,
                expected="a whole GGUF file",
            )


def _read(file: Path) -> tuple[Any, Any]:
    """The model and the tokenizer, as transformers reads them."""
    import transformers

    auto: Any = transformers.AutoModelForCausalLM  # with the info it returns a pair, which its types do not say
    # Code in the same folder is never run.
    source = {
        "pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name, "trust_remote_code": False,
    }  # fmt: skip
    try:
        module, info = auto.from_pretrained(**source, dtype=torch.float32, output_loading_info=True)
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(**source)
    except Exception as error:  # transformers and gguf raise many kinds of error for a bad file
        raise FileError(
            f"transformers {transformers.__version__} makes no model of this file: "
            f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}",
            path=file,
            expected="a GGUF of a language model whose architecture transformers reads",
        ) from error
    lost = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if found := "; ".join(f"{kind.replace('_', ' ')}: {', '.join(keys[:5])}" for kind, keys in lost.items() if keys):
        # Missing weights are random numbers in a model that runs.
        raise FileError(
            f"transformers {transformers.__version__} does not read all of this file: {found}",
            path=file,
            expected="a file whose tensors are those of the model",
        )
    return module, tokenizer


def _without_quantisation(module: Any, facts: Mapping[str, Any]) -> Any:
    """The model with a config that does not call it quantised, as transformers could not save it otherwise."""
    import transformers

    config = type(module.config).from_dict(
        {name: value for name, value in module.config.to_dict().items() if name != "quantization_config"}
    )
    setattr(config, KEY, dict(facts))
    with torch.device("meta"):
        plain: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(module.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = module.generation_config
    return plain


# --- the file of a name -----------------------------------------------------------------------------------------------


def gguf_source(name: str | os.PathLike[str], gguf_file: str | None, where: Mapping[str, Any]) -> Quantised | None:
    """The GGUF file of a name or path, local or on the hub; None for other kinds of model."""
    path = Path(name).expanduser()
    if gguf_file is None:
        return Quantised(str(name), (path,)) if path.suffix.lower() == ".gguf" and not path.is_dir() else None
    if path.is_file():
        raise FileError("this is a file, and gguf_file names one in a folder", path=path, write=f'ns.load("{path}")')
    title = f"{name}/{gguf_file}"
    if path.is_dir() or str(name).startswith(("/", "./", "../", "~")):
        return Quantised(title, (path / where.get("subfolder", "") / gguf_file,))
    from transformers.utils.hub import cached_file

    try:
        check_reachable(str(name), gguf_file, where)
        found = cached_file(str(name), gguf_file, **where)
    except OSError as error:
        raise FileError(
            f"{title} is neither here nor to be had from the hub: {str(error).strip().partition(chr(10))[0]}",
            expected="a folder of this machine, or a name on the hub that can be reached or is cached",
        ) from error
    return Quantised(title, (Path(str(found)),))
