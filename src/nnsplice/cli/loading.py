"""Load the model that a command names: its device, dtype and attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from nnsplice.cli.options import DTYPES
from nnsplice.errors import BadArgument, NnspliceError

if TYPE_CHECKING:
    import torch


def loaded(
    name: str, device: str | None = None, dtype: str | None = None, attn: str | None = None, *, no_cache: bool = False
) -> Any:
    """Load a model with the options of a command."""
    from nnsplice import load

    options: dict[str, Any] = {"cache": False} if no_cache else {}
    if device is not None:
        options["device_map"] = _device(device)
    if dtype is not None:
        options["dtype"] = dtype_of(dtype)
    if attn is None:
        return load(name, **options)
    try:
        return load(name, attn_implementation=attn, **options)
    except (ValueError, ImportError) as error:
        if isinstance(error, NnspliceError):
            raise
        raise BadArgument(
            f"{name} cannot be loaded with {attn} attention",
            expected="an attention that transformers has for this model and this machine, such as eager or sdpa",
        ) from error


def dtype_of(name: str) -> torch.dtype:
    """The torch type of a `--dtype`."""
    import torch

    found = getattr(torch, DTYPES.get(name, name), None)
    if not isinstance(found, torch.dtype) or DTYPES.get(name, name) not in DTYPES.values():
        raise typer.BadParameter(f"{name!r} is no type; write {', '.join(DTYPES)}")
    return found


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return name
    try:
        kind = torch.device(name).type
    except RuntimeError:
        kind = ""
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not there.get(kind, bool(kind)):
        raise BadArgument(
            f"there is no device {name!r} on this machine",
            expected=", ".join([kind for kind, is_there in there.items() if is_there] + ["auto"]),
        )
    return name
