"""Values without a tensor of their own: attention patterns, slices before a gate, single experts.

A **pattern** is read from the output of the attention module. It has then already been used, so to write one, the slice
of the head before the output projection is replaced by `pattern @ v`.

A **slice before its gate** is the slice before the output projection, divided by the sigmoid of the gate. To write one,
its product with the sigmoid is written.

An **expert** has no module: its contribution is the output of the experts' own code with every other expert's weight at
zero. To write one, the difference is added to the output of all experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nnsplice import engine, wire
from nnsplice.activations.access import Access, site_of
from nnsplice.atlas import Block, Site
from nnsplice.errors import RefusedPlace, ShapeError, UnknownPath
from nnsplice.paths import Path
from nnsplice.tokens import Rows


def block_of(model: engine.Model, site: Site) -> Block:
    """The block of a derived value."""
    for tower in engine.map_of(model).atlas.towers.values():
        for block in (one for layer in tower.blocks for one in layer.attentions):
            homes = (block.pattern and block.pattern[0], block.experts, block.mlp, block.o)
            if tower.name == site.tower and site.module in homes and site.occurrence == block.occurrence:
                return block
    raise UnknownPath(f"no layer of this model has {site.module}")


# --- patterns ---------------------------------------------------------------------------------------------------------


def require_eager(model: engine.Model, path: Path) -> None:
    """Raise if the model's attention implementation does not compute the probabilities."""
    used = engine.attention_of(model)
    if used not in (None, "eager"):
        raise RefusedPlace(
            f"this model computes attention with {used!r}, which never makes the probabilities",
            path=path,
            expected="eager attention",
            write='model.set_attn_implementation("eager"), or ns.load(name, attn_implementation="eager")',
        )


def key_tower(model: engine.Model, access: Access) -> str:
    """The tower whose tokens are the keys of a pattern."""
    site = site_of(access.paths[0])
    return block_of(model, site).key_tower or site.tower


def patterns(access: Access, mediator: Any, rows: Rows) -> dict[int | None, Tensor]:
    """Each wanted head's probabilities `[prompt, query, key]`, the keys counted from each prompt's first own token.

    Args:
        rows: the rows of the keys' tower.
    """
    site = site_of(access.paths[0])
    raw = access.place.read(mediator)
    try:
        weights = wire.unpack(raw, site.item)
    except (ValueError, IndexError):
        weights = None
    if weights is None or weights.dim() != 4:
        raise RefusedPlace(
            "the attention module returned no probabilities",
            path=access.name,
            expected="eager attention, and an attention module that returns what it computed",
        )
    return {
        index: _from_own_start(weights[:, index], rows)
        for index in sorted({site_of(path).index or 0 for path in access.paths})
    }


def _from_own_start(pattern: Tensor, rows: Rows) -> Tensor:
    """Shift the keys so that key 0 is the prompt's first own token; keys past its last are zero."""
    if rows.starts is None or not any(rows.starts):
        return pattern
    shifted = torch.zeros_like(pattern)
    for row, start in enumerate(rows.starts):
        shifted[row, :, : pattern.shape[-1] - start] = pattern[row, :, start:]
    return shifted


def mixed(pattern: Tensor, values: Tensor, rows: Rows) -> Tensor:
    """`pattern @ values`, for patterns whose keys count each prompt's own tokens.

    Args:
        pattern: `[prompt or 1, position, key]`, keys counted from each prompt's first own token.
        values: `[prompt, token, head width]`, padding included.
    """
    keys = values.shape[1]
    pattern = pattern.to(values)
    if pattern.shape[-1] > keys:
        if bool((pattern[..., keys:] != 0).any()):
            raise ShapeError(
                f"a pattern over {pattern.shape[-1]} keys, where the run has {keys}", expected="prompts as long"
            )
        pattern = pattern[..., :keys]
    if pattern.shape[-1] < keys:
        pattern = torch.nn.functional.pad(pattern, (0, keys - pattern.shape[-1]))
    if rows.starts is not None and any(rows.starts):
        pattern = torch.stack(
            [p.roll(start, -1) for p, start in zip(pattern.expand(values.shape[0], -1, -1), rows.starts, strict=True)]
        )
    return pattern @ values


def pattern_places(model: engine.Model, path: Path) -> tuple[Path, Path]:
    """For a pattern to write: the site of the head's values `v`, and of its slice `pattern @ v`."""
    site = site_of(path)
    block = block_of(model, site)
    layout = block.layout
    assert layout is not None and block.o is not None and site.index is not None
    module = block.source("v")
    assert module is not None
    group = layout.group_of(site.index)
    common: dict[str, Any] = {"occurrence": site.occurrence, "tower": site.tower}
    of_values = {**common, "tower": block.key_tower or site.tower}
    read = Site(module, "output", columns=layout.range("v", group), **of_values)
    width = layout.head_dim
    written = Site(block.o, "input", columns=(site.index * width, (site.index + 1) * width), **common)
    return replace(path, site=read, position=None), replace(path, site=written)


# --- gates ------------------------------------------------------------------------------------------------------------


def gate_place(model: engine.Model, path: Path) -> Path:
    """The site of the gate of a head's slice."""
    site = site_of(path)
    assert site.index is not None
    gate = block_of(model, site).gate_of(site.index)
    assert gate is not None
    module, columns = gate
    found = Site(module, "output", columns=columns, occurrence=site.occurrence, tower=site.tower)
    return replace(path, value="gate", site=found, position=None)


def slice_place(path: Path) -> Path:
    """The site that is written for a slice before its gate: the slice after the gate."""
    return replace(path, site=replace(site_of(path), kind="plain", index=None))


def before_gate(path: Path, slices: Tensor, gate: Tensor) -> Tensor:
    """A head's slice before its gate, `[prompt, token, head width]`.

    Args:
        slices: `[prompt, token, width]` of all heads, after the gates.
        gate: `[prompt, token, head width or 1]` of this head.
    """
    start, stop = site_of(path).columns or (0, slices.shape[-1])
    return slices[..., start:stop] / gate.sigmoid().to(slices)


def check_open(path: Path, found: Tensor) -> None:
    """Raise if a gate is closed, so that the slice before it cannot be computed."""
    if not bool(found.isfinite().all()):
        raise RefusedPlace(
            "a gate is closed (its sigmoid rounds to 0), and what stands before it cannot be told from what is behind",
            path=path,
            expected="tokens at which the gate is open, or a model in float64",
            write=str(replace(path, value="output")),
        )


# --- experts ----------------------------------------------------------------------------------------------------------


def experts(access: Access, mediator: Any, rows: Rows) -> dict[int | None, Tensor]:
    """Each wanted expert's contribution `[prompt, token, width]`, computed from the inputs of the experts' module."""
    args, kwargs = access.place.read(mediator)
    wanted = sorted({site_of(path).index or 0 for path in access.paths})
    return {index: _contribution(access, mediator, args, kwargs, index, rows.batch) for index in wanted}


def _contribution(access: Access, mediator: Any, args: tuple, kwargs: dict, expert: int, batch: int | None) -> Tensor:
    given = [*args, *kwargs.values()]
    chosen = [value for value in given if isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32)]
    if len(given) != 3 or len(chosen) != 1 or not isinstance(given[2], Tensor) or chosen[0] is not given[1]:
        raise RefusedPlace(
            "these experts are not given the chosen experts and their weights, so one cannot be told apart",
            path=access.name,
            write=f"{access.name.split('.experts')[0]}.mlp.output",
        )
    tokens, numbers, weights = given
    # The experts' own code with all other weights at zero, which is right for every activation, limit and layout.
    own = torch.where(numbers == expert, weights, torch.zeros_like(weights))
    contribution = access.place.envoy(tokens, numbers, own)
    scope = engine.scope_of(mediator)
    if scope is not None and contribution.shape[0] >= scope.total:
        return contribution.unflatten(0, (scope.total, -1))[scope.start : scope.start + scope.size]
    return wire.as_rows(contribution, batch)


def expert_output(path: Path) -> Path:
    """The site where the difference of a written expert is added: the output of all experts."""
    site = site_of(path)
    return replace(path, site=replace(site, end="output", kind="plain", index=None))


def refuse_routers(model: engine.Model, paths: Iterable[Path]) -> None:
    """Raise for a write to a router's logits, after which the model would still use the experts chosen before."""
    towers = engine.map_of(model).atlas.towers.values()
    routers = {block.router: block.index for tower in towers for block in tower.blocks if block.router is not None}
    for path in paths if routers else ():
        site = site_of(path)
        if site.module not in routers or site.end != "output" or site.item:
            continue
        raise RefusedPlace(
            "the experts are chosen inside the router, so writing its logits would change nothing",
            path=path,
            write=f"layers[{routers[site.module]}].experts[0].output, or the router's input",
        )
