"""An optimizer's state as plain data: read from a file without unpickling, or taken from a `state_dict`."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from nnsplice.errors import BadType, FileError, named
from nnsplice.files import is_pickle, local_path

#: Keys of a checkpoint under which it may keep the optimizer's state.
_KEYS = ("optimizer", "optimizer_state_dict", "optimizer_states")
_EXPECTED = "what optimizer.state_dict() returns, or its 'state'"
#: Entries of a parameter's state that have the parameter's own shape, the likeliest first.
_SHAPED = ("exp_avg", "exp_avg_sq", "momentum_buffer", "sum", "square_avg", "state1")


@dataclass(frozen=True, slots=True)
class OptimizerState:
    """The state of an optimizer as plain data.

    Attributes:
        states: id -> its state; ids of parameters that never had a gradient are absent.
        groups: the ids of each parameter group, without empty ones.
        has_groups: whether the groups are the optimizer's; otherwise all ids with a state are one group.
        names: id -> parameter name, if the optimizer was given named parameters.
        shapes: id -> the shape of the parameter, where its state tells it.
        betas: id -> Adam's two decay rates.
    """

    states: Mapping[int, Mapping[str, Any]]
    groups: tuple[tuple[int, ...], ...]
    has_groups: bool
    names: Mapping[int, str] | None = None
    shapes: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    betas: Mapping[int, tuple[float, float]] = field(default_factory=dict)

    @property
    def trained(self) -> tuple[int, ...]:
        """The ids with a state, in the order of the groups."""
        return tuple(number for group in self.groups for number in group if number in self.states)


def as_optimizer_state(state: Mapping[Any, Any]) -> OptimizerState:
    """A `state_dict`, or its `"state"` alone, as plain data.

    Raises:
        BadType: something else.
    """
    if not isinstance(state, Mapping):
        raise BadType(f"{named(state)} is no optimizer's state", expected=_EXPECTED)
    if "state" not in state:
        if not all(isinstance(key, int) and isinstance(value, Mapping) for key, value in state.items()):
            raise BadType(f"a dictionary with {', '.join(map(str, list(state)[:4]))} is no state", expected=_EXPECTED)
        states, has_groups, names, betas = dict(state), False, {}, {}
        groups: list[tuple[int, ...]] = [tuple(sorted(states))]
    else:
        found = state["state"]
        states = dict(found)
        names: dict[int, str] = {}
        betas: dict[int, tuple[float, float]] = {}
        groups, has_groups = [], "param_groups" in state
        for group in state.get("param_groups", ()):
            ids = tuple(group["params"])
            groups.append(ids)
            betas.update(dict.fromkeys(ids, tuple(group["betas"])) if "betas" in group else {})
            names.update(zip(ids, group.get("param_names", ()), strict=False))
        strange = next((n for ids in (states, *groups) for n in ids if not isinstance(n, int)), None)
        if strange is not None:
            raise BadType(
                f"this state is kept by name ({strange}), as sharded training keeps it, and not by number",
                expected="the state_dict of the optimizer itself; what is kept by name needs no map",
            )
        if not has_groups:
            groups = [tuple(sorted(states))]
    shapes = {number: shape for number, one in states.items() if (shape := _shape(one)) is not None}
    return OptimizerState(states, tuple(group for group in groups if group), has_groups, names or None, shapes, betas)


def _shape(state: Mapping[str, Any]) -> tuple[int, ...] | None:
    tensors = [state[key] for key in _SHAPED if isinstance(state.get(key), torch.Tensor)]
    return tuple(tensors[0].shape) if tensors else None


def read_optimizer(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the `state_dict` of an optimizer from a file of `torch.save`, such as a checkpoint's `optimizer.pt`.

    Only tensors and plain data are read (`weights_only=True`): a file that would run code is refused.

    >>> from tempfile import TemporaryDirectory
    >>> optimizer = torch.optim.AdamW(ns.models.unwrap(model).parameters())
    >>> with TemporaryDirectory() as folder:
    ...     torch.save({"epoch": 3, "optimizer": optimizer.state_dict()}, f"{folder}/checkpoint.pt")
    ...     state = ns.adapters.read_optimizer(f"{folder}/checkpoint.pt")
    >>> sorted(state), len(state["param_groups"][0]["params"])
    (['param_groups', 'state'], 40)

    Args:
        path: the file.

    Returns:
        The state dict, with `state` and `param_groups`.

    Raises:
        FileError: no such file, a file with more than tensors and plain data, or no optimizer in it.
    """
    path = local_path(path)
    if path.is_dir():
        held = [name for name in ("optimizer.pt", "optimizer.bin") if (path / name).is_file()]
        raise FileError(
            "this is a folder, and the state of an optimizer is a file",
            path=path,
            write=f"{path / held[0]}" if held else None,
        )
    if not path.is_file():
        raise FileError("there is no such file", path=path, expected="a file of torch.save(...)")
    if not is_pickle(path):
        raise FileError(
            "this is no file of torch.save", path=path, expected="what torch.save(optimizer.state_dict(), path) writes"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such pickles are refused below
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise FileError(
            f"this file holds more than tensors and plain data, so it is not opened: {_reason(error)}",
            path=path,
            expected="what torch.save(optimizer.state_dict(), path) writes, without random states beside it",
            write='torch.save(torch.load(path, weights_only=False)["optimizer"], "optimizer.pt"), once and where you '
            "trust the file, as this runs what is in it",
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise FileError(
            f"this file cannot be read: {_reason(error)}", path=path, expected="a file of torch.save(...)"
        ) from None
    if isinstance(found, Mapping) and "state" not in found:
        inner = next((found[key] for key in _KEYS if key in found), found)
        found = inner[0] if isinstance(inner, list) and len(inner) == 1 else inner
    if not isinstance(found, dict) or not isinstance(found.get("state"), Mapping):
        what = f"keys {', '.join(map(str, list(found)[:4]))}" if isinstance(found, Mapping) else type(found).__name__
        raise FileError(f"this file holds no optimizer's state, but {what}", path=path, expected=_EXPECTED)
    return found


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "GLOBAL" in line or "Unsupported" in line), lines[0] if lines else "damaged")
