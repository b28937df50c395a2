"""Digests: of tensors by their numbers, of functions by their code and the values that they use.

Results and journals are told apart by these, so a digest is the same in every process.
"""

from __future__ import annotations

import dis
import hashlib
import re
import sysconfig
from collections.abc import Mapping
from functools import cache, partial
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: So many words of eight bytes are a line: each is multiplied with a factor of its own, and each line with another.
_FACTORS = 1 << 18
#: Lines at once. A CPU is fastest with what fits its cache, a GPU with few launches (here of 128 MB).
_LINES = {"cuda": 64}
#: Where code stands that is nobody's experiment.
_LIBRARIES = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))


def checksum(tensor: Tensor) -> int:
    """A whole number that changes with a tensor's numbers and their order: the same on every device, at one reading."""
    return int(summed(tensor))


def summed(tensor: Tensor) -> Tensor:
    """`checksum` as a tensor where the numbers are, so that nobody waits for it yet."""
    if not tensor.numel():
        return torch.zeros((), dtype=torch.int64, device=tensor.device)
    raw = tensor.contiguous().flatten().view(torch.uint8)
    whole = len(raw) // 8 * 8
    words = (raw[:whole] if raw.storage_offset() % 8 == 0 else raw[:whole].clone()).view(torch.int64)
    rest = raw[whole:].long()
    return (_summed_by_numpy if raw.device.type == "cpu" else _summed_by_torch)(words, rest)


def _summed_by_torch(words: Tensor, rest: Tensor) -> Tensor:
    device = words.device
    factors = torch.arange(_FACTORS if len(words) else 8, device=device) * 0x1E3779B97F4A7C15 + 1
    total = (rest * factors[: len(rest)]).sum()
    lines = len(words) // _FACTORS
    step = _LINES.get(device.type, 1)
    for start in range(0, lines, step):
        some = words[start * _FACTORS : min(start + step, lines) * _FACTORS].view(-1, _FACTORS)
        turns = torch.arange(start, start + len(some), device=device) * 2 + 1
        total = total + ((some * factors).sum(1) * turns).sum()  # past 64 bits it begins anew, everywhere alike
    last = words[lines * _FACTORS :]
    return total + (last * factors[: len(last)]).sum() * (2 * lines + 1) if len(last) else total


def _array(tensor: Tensor) -> np.ndarray:
    """The memory of a tensor as an array. `tensor.numpy()` would keep `fully_shard` from freeing it later."""
    return np.from_dlpack(tensor)  # pyright: ignore[reportArgumentType]


def _summed_by_numpy(words: Tensor, rest: Tensor) -> Tensor:
    """The same on a CPU, where numpy's products of whole numbers read each word once and write nothing."""
    factors, held, bytes_left = _factors(), _array(words).view(np.uint64), rest.numpy().astype(np.uint64)
    lines = len(held) // _FACTORS
    last = held[lines * _FACTORS :]
    sums = held[: lines * _FACTORS].reshape(-1, _FACTORS) @ factors
    turns = np.arange(lines + 1, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    parts = np.array([*sums, last @ factors[: len(last)], bytes_left @ factors[: len(rest)]], np.uint64)
    parts[:-1] *= turns  # past 64 bits it begins anew, as there
    return torch.from_numpy(parts.sum(keepdims=True).view(np.int64))[0]


@cache
def _factors() -> np.ndarray:
    return np.arange(_FACTORS, dtype=np.uint64) * np.uint64(0x1E3779B97F4A7C15) + np.uint64(1)


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """A short digest of all of some named numbers, for what may differ in few of them."""
    summed = hashlib.sha256()
    for name, tensor in tensors.items():
        summed.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        summed.update(_array(tensor.detach().cpu().contiguous().flatten().view(torch.uint8)).data)
    return summed.hexdigest()[:16]


def arrays_digest(arrays: Mapping[str, np.ndarray], text: str = "") -> str:
    """A short digest of named arrays, and of a text that belongs to them."""
    summed = hashlib.sha256(text.encode())
    for name, array in sorted(arrays.items()):
        summed.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return summed.hexdigest()[:16]


def function_digest(rule: Any) -> str:
    """A function's identity: its code and what it was made with, so that a changed function is another metric."""
    return hashlib.sha256(repr(_made_of(rule)).encode()).hexdigest()[:16]


def _made_of(value: Any, within: tuple[int, ...] = ()) -> Any:
    """A value as plain data that is the same in every process; what cannot be told apart is its type's name."""
    if value is None or isinstance(value, str | int | float | complex | bytes):
        return value
    if id(value) in within:  # a function that speaks of itself
        return "itself"
    inner = (*within, id(value))
    if isinstance(value, Tensor):
        numbers = _array(value.detach().cpu().contiguous().flatten().view(torch.uint8)).tobytes()
        return str(value.dtype), list(value.shape), hashlib.sha256(numbers).hexdigest()
    if isinstance(value, np.generic | np.ndarray):
        return type(value).__name__, str(value.dtype), _made_of(value.tolist(), inner)
    if isinstance(value, range | slice | torch.dtype | torch.device):
        return str(value)
    if isinstance(value, list | tuple | set | frozenset):
        made = [_made_of(one, inner) for one in value]
        return made if isinstance(value, list | tuple) else sorted(made, key=repr)
    if isinstance(value, Mapping):
        return [(_made_of(key, inner), _made_of(one, inner)) for key, one in value.items()]
    if isinstance(value, CodeType):
        return value.co_code, value.co_names, [_made_of(one, inner) for one in value.co_consts]
    if isinstance(value, partial):
        return [_made_of(one, inner) for one in (value.func, value.args, value.keywords)]
    if isinstance(value, MethodType):
        return _made_of(value.__func__, inner), _made_of(value.__self__, inner)
    if isinstance(value, FunctionType):
        return _own(value, inner), _around(value, inner)
    if isinstance(value, re.Pattern):
        return value.pattern, value.flags
    held = {} if isinstance(value, type) else _attributes(value)
    if not held and (isinstance(value, type) or not hasattr(value, "__dict__")):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    call = vars(type(value)).get("__call__")  # an object that is called like a function
    own = _made_of(call, inner) if isinstance(call, FunctionType) else None
    return type(value).__qualname__, own, _made_of(held, inner)


def _attributes(value: Any) -> dict[str, Any]:
    """What an object holds, in its dictionary and in the slots of its classes."""
    held = dict(getattr(value, "__dict__", {}))
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            private = slot.startswith("__") and not slot.endswith("__")
            name = f"_{kind.__name__.lstrip('_')}{slot}" if private else slot
            if slot not in ("__dict__", "__weakref__") and hasattr(value, name):
                held[name] = getattr(value, name)
    return held


def _own(function: FunctionType, within: tuple[int, ...]) -> Any:
    """A function's code, defaults and closure."""
    cells = [_made_of(cell.cell_contents, within) for cell in function.__closure__ or () if _is_filled(cell)]
    parts = (function.__code__, function.__defaults__, function.__kwdefaults__)
    return [_made_of(one, within) for one in parts], cells


def _around(function: FunctionType, within: tuple[int, ...]) -> Any:
    """What a function reads of its module or notebook: values, and functions of the same, with what those read."""
    found: dict[str, Any] = {}
    if function.__code__.co_filename.startswith(_LIBRARIES):
        return found
    codes = [function.__code__]
    while codes:
        for name in _globals_of(codes.pop()):
            value = function.__globals__.get(name)
            if name in found or name not in function.__globals__:
                continue
            if isinstance(value, FunctionType) and value.__globals__ is function.__globals__:
                found[name] = _own(value, within)
                codes.append(value.__code__)
            else:
                found[name] = _made_of(value, within) if _is_plain(value) else type(value).__qualname__
    return sorted(found.items())


def _globals_of(code: CodeType) -> list[str]:
    inner = [one for one in code.co_consts if isinstance(one, CodeType)]
    names = [one.argval for one in dis.get_instructions(code) if one.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    return names + [name for one in inner for name in _globals_of(one)]


def _is_plain(value: Any) -> bool:
    """Whether a value is data; a model that stands in a notebook is not looked into."""
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    plain = str | int | float | complex | bytes | re.Pattern | Tensor | np.generic | np.ndarray
    return value is None or isinstance(value, plain)


def _is_filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
