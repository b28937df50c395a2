"""Reading and writing tokens of one value, as plain functions that a remote run can execute.

These functions are the whole of what a remote run executes, so they travel to a server as source: they use torch and
the standard library only, know no other part of nnsplice, and take and return plain tensors, numbers, strings, tuples.
Local runs use the very same functions.

    unpack / repack     the tensor in a module's value, and the value again around another tensor
    sharding_text       how a tensor is sharded over processes
    as_rows             [prompt, token, width], also where a model keeps its tokens flat; as_held is the way back
    pick / put          chosen tokens and columns out of a tensor, and into a copy of it
    read_all, write_all what a remote run does: all the accesses of a plan, in order
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

#: Tokens of every row: None for all, the same numbers for each row, or a `[prompt, position]` tensor of them.
Tokens = Sequence[int] | Tensor | None


def unpack(value: Any, item: int | None = None) -> Tensor:
    """The tensor in a module's value: element `item` of a container, its first where `item` is None."""
    if isinstance(value, Mapping):  # what Hugging Face models return
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        value = value[item or 0]
    elif item is not None:
        # A user who writes [0] on a tensor would get its first row, which no address means.
        raise ValueError(f"element [{item}] was asked for, but the value is no container: {type(value).__name__}")
    if not isinstance(value, Tensor):
        raise ValueError(f"a {type(value).__name__} stands there, not a tensor")
    how = sharding_text(value)
    if how:
        raise ValueError(f"the value is {how}, of which this process may have a part only: take its full_tensor()")
    return value


def sharding_text(tensor: Any) -> str:
    """How a tensor is sharded over processes, for a message; empty for a whole tensor."""
    if hasattr(tensor, "full_tensor") and hasattr(tensor, "placements"):
        placed = ", ".join(map(str, tensor.placements))
        return f"a DTensor over {tensor.device_mesh.size()} process(es), placed {placed}"
    if getattr(tensor, "_is_flat_param", False) or getattr(tensor, "_fsdp_flattened", False):
        return "a part of the flat parameter of FullyShardedDataParallel"
    return ""


def repack(value: Any, item: int | None, tensor: Tensor) -> Any:
    """A value like `value` with `tensor` in the site that `unpack` reads; `value` itself stays as it is."""
    if isinstance(value, Mapping):
        copied = value.copy()  # type: ignore[attr-defined]  # ModelOutput is a dict
        copied[list(value)[item or 0]] = tensor
        return copied
    if isinstance(value, tuple | list):
        parts = list(value)
        parts[item or 0] = tensor
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return tensor


def as_rows(tensor: Tensor, batch: int | None, part: bool = False) -> Tensor:
    """`[prompt, token, width]` of a tensor that has that shape, or keeps its tokens flat as `[token, width]`.

    Args:
        part: columns of it are meant. Latent attention gives what all heads have in common an axis of one head,
            `[prompt, 1, token, width]`; of a whole value with four axes nobody knows which one has the tokens.
    """
    if part and tensor.dim() == 4 and tensor.shape[1] == 1:
        tensor = tensor[:, 0]
    if tensor.dim() == 3:
        if batch in (None, tensor.shape[0]):
            return tensor
        if tensor.shape[0] != 1:
            raise ValueError(f"a value of shape {list(tensor.shape)} has no row for each of {batch} prompts")
        return tensor.expand(batch, -1, -1)
    if tensor.dim() == 2 and batch and tensor.shape[0] % batch == 0:
        return tensor.unflatten(0, (batch, -1))
    raise ValueError(f"a value of shape {list(tensor.shape)} is not [prompt, token, width]")


def as_held(rows: Tensor, held: Tensor) -> Tensor:
    """`[prompt, token, width]` in the shape in which the model keeps it: what `as_rows` did, undone."""
    if held.dim() == 4:
        return rows[:, None]
    return rows if held.dim() == 3 else rows.flatten(0, 1)


def pick(values: Tensor, tokens: Tokens, columns: tuple[int, int] | None) -> Tensor:
    """The chosen tokens and columns of `[prompt, token, width]`: `[prompt, position, width]` in memory of their own."""
    if columns is not None:
        values = values[..., columns[0] : columns[1]]
    if tokens is None:
        return values.clone(memory_format=torch.contiguous_format)
    if isinstance(tokens, Tensor):
        tokens = tokens.to(values.device)
        return values[torch.arange(values.shape[0], device=values.device)[:, None], tokens]
    if len(tokens) <= 8:
        # Slices instead of an index tensor: building one on a GPU would wait for everything queued before it.
        return torch.cat([values[:, token : token + 1] for token in tokens], dim=1)
    return values[:, torch.tensor(list(tokens), device=values.device)]


def put(values: Tensor, tokens: Tokens, columns: tuple[int, int] | None, new: Tensor) -> Tensor:
    """A copy of `values` with `new` at the chosen tokens and columns; one row of `new` serves every prompt."""
    out = values.clone(memory_format=torch.contiguous_format)
    part = out if columns is None else out[..., columns[0] : columns[1]]
    new = new.to(out)
    if tokens is None:
        part.copy_(new.expand_as(part))
    elif isinstance(tokens, Tensor):
        tokens = tokens.to(out.device)
        part[torch.arange(out.shape[0], device=out.device)[:, None], tokens] = new.expand(out.shape[0], -1, -1)
    else:
        for index, token in enumerate(tokens):
            part[:, token] = new[:, index]
    return out


# What a remote run executes. A recipe is plain data: one stop for each value of the run, in execution order,
#     (attribute names from the model down, "input" or "output", element of a container, number of prompts, parts)
# and each part is (name, tokens, columns), its tokens a list of columns, or one list for each prompt.
Part = tuple[str, list[int] | list[list[int]] | None, tuple[int, int] | None]
Stop = tuple[tuple[str, ...], str, int | None, int | None, list[Part]]


def _tokens(tokens: list[int] | list[list[int]] | None) -> Tokens:
    return torch.tensor(tokens) if tokens and isinstance(tokens[0], list) else tokens  # type: ignore[return-value]


def read_all(model: Any, recipe: Sequence[Stop]) -> dict[str, Tensor]:
    """Inside a trace: every part of the recipe, by name, `[prompt, position, width]` on the CPU."""
    found = {}
    for names, end, item, batch, parts in recipe:
        envoy = model
        for name in names:
            envoy = getattr(envoy, name)
        part = any(columns for _, _, columns in parts)
        values = as_rows(unpack(getattr(envoy, end), item), batch, part).detach()
        for name, tokens, columns in parts:
            found[name] = pick(values, _tokens(tokens), columns).cpu()
    return found


def write_all(model: Any, recipe: Sequence[Stop], tensors: Mapping[str, Tensor], add: bool) -> None:
    """Inside a trace: put the tensors into the parts of the recipe, or add them to what stands there."""
    for names, end, item, batch, parts in recipe:
        envoy = model
        for name in names:
            envoy = getattr(envoy, name)
        value = getattr(envoy, end)
        held = unpack(value, item)
        values = as_rows(held, batch, any(columns for _, _, columns in parts))
        for name, tokens, columns in parts:
            new = tensors[name].to(values)
            width = values.shape[-1] if columns is None else columns[1] - columns[0]
            if new.shape[-1] != width:  # a width of 1 would be spread over all of them
                raise ValueError(f"the capture is {new.shape[-1]} wide, the site {width}")
            if add:
                new = new + pick(values, _tokens(tokens), columns)
            values = put(values, _tokens(tokens), columns, new)
        setattr(envoy, end, repack(value, item, as_held(values, held)))


def logits_of(model: Any) -> Tensor:
    """Inside a trace: what the model returns for each token, `[prompt, token, vocab]`."""
    output = model.output
    return output.logits if hasattr(output, "logits") else unpack(output)
