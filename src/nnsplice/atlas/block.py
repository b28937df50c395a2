"""One layer and one tower of a model, as the names of their parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from nnsplice.atlas.layouts import Layout, Role

TowerName = Literal["encoder", "decoder"]
End = tuple[str, Literal["input", "output"]]


@dataclass(frozen=True, slots=True)
class Block:
    """One layer of a tower: the dotted names of its parts, None for those it has not."""

    index: int
    module: str
    #: Which call of the module is this layer, where one module serves several layers.
    occurrence: int
    #: The attention module, and the one that returns the probabilities, with their index in its output.
    attn: str | None
    pattern: tuple[str, int] | None
    q: str | None
    k: str | None
    v: str | None
    #: The one projection of q, k and v, where they are fused (`q`, `k`, `v` are None then).
    fused: str | None
    o: str | None
    #: Layers whose output columns are the heads' own, in equal shares.
    head_gates: tuple[str, ...]
    #: How heads lie along those axes; None where the number of heads is unknown.
    layout: Layout | None
    #: The module that holds the MLP's layers.
    mlp: str | None
    #: Whether the MLP's layers stand in the block, beside the attention, so that `mlp` is no module of its own.
    mlp_is_bare: bool
    gate: str | None
    up: str | None
    down: str | None
    #: The one projection of gate and up, where they are fused.
    gate_up: str | None
    router: str | None
    experts: str | None
    n_experts: int
    #: Whether each expert is a module of its own, rather than a slice of fused tensors.
    experts_are_modules: bool
    #: Width between up and down of a dense MLP.
    n_neurons: int
    #: Whether attention and MLP read the same stream, so that nothing lies between them.
    parallel: bool
    #: The module that mixes tokens in a layer without attention: a state space, linear attention, a convolution.
    mixer: str | None
    #: Whether the layer is an MLP and norms, and no token of it sees another.
    only_mlp: bool
    #: Where the stream between attention and MLP is met: an end of a module.
    mid: End | None
    #: `stream` where the module only reads the stream there, beside the skip path; `plain` where all of it passes.
    mid_kind: Literal["plain", "stream"]
    #: Modules whose outputs are what is really added to the stream.
    attn_added: str | None
    mlp_added: str | None
    #: Whether the stream itself is normalised after each branch, so that the branches do not simply add up.
    post_norm: bool
    #: Whether the block also attends to another tower.
    has_cross: bool
    #: A number that scales the branches in code (1.0 in nearly every family).
    scale: float = 1.0
    #: Role -> (parameter, axis of heads or neurons), where projections are parameters of the attention and the MLP.
    stacked: Mapping[str, tuple[tuple[str, int], ...]] = field(default_factory=dict, hash=False)
    #: Modules of the layer beside `module`, where a layer is no module, and the one whose output is the layer's.
    beside: tuple[str, ...] = ()
    end: str | None = None
    #: ModelParts of the MLP beside `mlp`.
    mlp_beside: tuple[str, ...] = ()
    #: Layers behind the projections of keys and values, whose rows are the groups' -> the role.
    group_rows: tuple[tuple[str, str], ...] = ()
    #: Norms over all queries or keys of a token -> the role: one head's moves those of the others.
    joint_norms: tuple[tuple[str, Role], ...] = ()
    #: Layers of the attention that serve all heads alike: what latent queries, keys and values are made from.
    latents: tuple[str, ...] = ()
    #: The layer whose output scales the heads' slices, and how many of its columns are one head's; None where there is
    #: none, and where gates lie beside the queries.
    gate_layer: tuple[str, int] | None = None
    #: The layer whose keys and values this one reads, where it has none of its own, and the modules that make them.
    kv_layer: int | None = None
    kv_from: tuple[str, str] | None = None
    #: The layer's attention to the other tower, as a block without an MLP; None where there is none that is known.
    cross: Block | None = None
    #: The tower whose tokens the keys and values are of, where that is not the layer's own.
    key_tower: TowerName | None = None
    #: Why no head can be named, where heads share what they read; then there is no layout.
    mixed: str | None = None

    @property
    def attentions(self) -> tuple[Block, ...]:
        """The layer, and its attention to the other tower where it has one."""
        return (self,) if self.cross is None else (self, self.cross)

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that are the layer: one in nearly every family."""
        return (self.module, *self.beside)

    @property
    def has_attention(self) -> bool:
        """Whether the layer has queries, keys and values."""
        return self.o is not None or "o" in self.stacked

    @property
    def mixes(self) -> str | None:
        """The module that mixes tokens, whatever its kind."""
        return self.attn if self.has_attention else self.mixer

    @property
    def mixer_added(self) -> str | None:
        """The module whose output is what the mixing of tokens adds to the stream."""
        # (A norm behind the mixer is known in layers of both kinds.)
        return self.attn_added or (None if self.has_attention else self.mixer)

    @property
    def n_heads(self) -> int:
        """Query heads, 0 where unknown."""
        return self.layout.n_heads if self.layout else 0

    @property
    def n_kv(self) -> int:
        """Key/value heads, which the language calls groups."""
        return self.layout.n_kv if self.layout else 0

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.layout.head_dim if self.layout else 0

    @property
    def is_sparse(self) -> bool:
        """Whether the MLP is a mixture of experts."""
        return self.experts is not None

    def projection(self, role: str) -> str | None:
        """The module that computes q, k or v."""
        return self.fused or {"q": self.q, "k": self.k, "v": self.v}[role]

    @property
    def reads_beside(self) -> str | None:
        """What attention reads beside queries, keys and values of its own, in words; None in most families."""
        if self.head_gates or (self.layout is not None and self.layout.gate_dim):
            return f"its heads are gated by {self.head_gates[0] if self.head_gates else self.q}"
        if self.latents:
            return f"its keys have a part that all heads share, made by {self.latents[-1]}"
        return None if self.kv_layer is None else f"it reads the keys and values of layer {self.kv_layer}"

    def source(self, role: str) -> str | None:
        """The module that computes the q, k or v that this layer reads, which may be an earlier layer's."""
        if self.kv_from is not None and role != "q":
            return self.kv_from[role == "v"]
        return self.projection(role)

    def shares(self, role: Role) -> bool:
        """Whether that module computes something else beside it."""
        return self.fused is not None or (self.layout is not None and self.layout.shares(role))

    def gate_of(self, head: int) -> tuple[str, tuple[int, int]] | None:
        """The module and the columns that hold the gate of a head; None where heads have none."""
        if self.layout is not None and self.q is not None and (columns := self.layout.gate(head)):
            return self.q, columns
        if self.layout is None or self.gate_layer is None:
            return None
        module, width = self.gate_layer
        return module, (head * width, (head + 1) * width)


@dataclass(frozen=True, slots=True)
class Tower:
    """One stack of layers, with what stands before and after it."""

    name: TowerName
    #: Dotted name of the module that owns the list of blocks (`transformer`, `model.decoder`).
    prefix: str
    #: Dotted name of the list.
    stack: str
    blocks: tuple[Block, ...]
    embed: str | None
    final_norm: str | None
    unembed: str | None

    @property
    def n_layers(self) -> int:
        """How many layers the tower has."""
        return len(self.blocks)
