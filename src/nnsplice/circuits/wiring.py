"""Where senders and receivers are in a model: modules, columns, and the norms before the stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from nnsplice import engine
from nnsplice.activations.access import site_of
from nnsplice.atlas import Block, Site, Tower, unwrap
from nnsplice.attribution.branches import Branch, branches_of
from nnsplice.attribution.edges import norm_behind
from nnsplice.circuits.shape import LayerShape, Shape
from nnsplice.errors import RefusedPlace
from nnsplice.paths import Path


@dataclass(frozen=True)
class LayerWires:
    """One layer's sites."""

    block: Block
    #: Where the queries of each head and the keys and values of each group are met: the module, and the columns.
    q: tuple[Site, ...]
    k: tuple[Site, ...]
    v: tuple[Site, ...]
    #: Each head's input of the output projection.
    z: tuple[Site, ...]
    #: The outputs of the branches, before `Block.scale`.
    attn_added: Site
    mlp_added: Site
    #: The stream that the MLP reads; None in parallel blocks.
    mid: Site | None
    #: The norm between the output projection and the stream, where the family has one.
    norm: str | None
    #: Whether something between projection and attention reads all heads at once (a norm over the whole projection).
    heads_mix: bool
    #: The norm between the MLP and the stream, where the family has one.
    mlp_norm: str | None

    @property
    def projections(self) -> tuple[str, ...]:
        """The modules that queries, keys and values come out of."""
        return tuple(dict.fromkeys(site.module for site in (*self.q, *self.k, *self.v)))

    @property
    def receivers(self) -> tuple[Site, ...]:
        """The receivers of the attention, in order."""
        return (*self.q, *self.k, *self.v)


@dataclass(frozen=True)
class Wiring:
    """All sites of a model's graph."""

    shape: Shape
    tower: Tower
    layers: tuple[LayerWires, ...]
    #: The stream that enters the first layer.
    embed: Path


def wiring_of(model: engine.Model) -> Wiring:
    """The graph of a model.

    Raises:
        RefusedPlace: its heads cannot be told apart, or something else than queries, keys, values and the MLP reads the
            stream.
    """
    root = unwrap(model)
    branches = branches_of(model)
    tower = branches.tower
    if any(block.occurrence for block in tower.blocks):
        raise RefusedPlace("its layers share modules, so a circuit cannot tell them apart")
    pairs = list(zip(branches.all[::2], branches.all[1::2], strict=True))
    layers = tuple(_layer(model, root, attn, mlp) for attn, mlp in pairs)
    shape = Shape(tuple(LayerShape(len(one.q), len(one.k), one.mid is None, one.heads_mix) for one in layers))
    (embed,) = engine.expand(model, "embed")
    return Wiring(shape, tower, layers, embed)


def _layer(model: engine.Model, root: nn.Module, attn: Branch, mlp: Branch) -> LayerWires:
    block = attn.block
    start = f"layers[{block.index}]"
    if block.reads_beside is not None:
        raise RefusedPlace(
            f"layer {block.index} reads more than queries, keys and values of its own ({block.reads_beside}), and a "
            "circuit has no name for that",
            path=f"{start}.heads[:]",
        )
    q, k, v, z = (
        _sites(engine.expand(model, f"{start}.{part}"))
        for part in ("heads[:].q", "groups[:].k", "groups[:].v", "heads[:].output")
    )
    for site in (*q, *k, *v, *z):
        if site.kind != "plain" or site.columns is None:
            raise RefusedPlace(f"the heads of layer {block.index} are no columns of a value", path=f"{start}.heads[:]")
    return LayerWires(
        block, q, k, v, z, site_of(attn.added), site_of(mlp.added),
        None if block.parallel else site_of(mlp.reads), norm_behind(attn), _heads_mix(root, block, q + k + v),
        norm_behind(mlp),
    )  # fmt: skip


def _sites(paths: Sequence[Path]) -> tuple[Site, ...]:
    return tuple(site_of(path) for path in paths)


def _heads_mix(root: nn.Module, block: Block, projected: Sequence[Site]) -> bool:
    """Whether a module of the attention, other than its projections, is as wide as several heads together.

    Then the queries of a head that is not in the circuit are read by those that are. Where in doubt, yes: it is never
    wrong, and takes more time.
    """
    if block.attn is None:
        return True
    width = max(site.columns[1] - site.columns[0] for site in projected if site.columns is not None)
    known = {*(site.module for site in projected), block.o}
    for name, module in root.get_submodule(block.attn).named_modules(prefix=block.attn):
        if name in known or name == block.attn or any(name.startswith(f"{one}.") for one in known if one):
            continue
        own = list(module.parameters(recurse=False))
        if any(p.shape[-1] > width for p in own) or (not own and "norm" in type(module).__name__.lower()):
            return True
    return False
