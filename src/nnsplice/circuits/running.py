"""Runs of circuits: every receiver reads its own stream, with clean values of the senders of its edges.

What a sender gives is kept as its difference from the ablated value. So the stream that a receiver reads is the ablated
stream and the differences of its senders: one product of matrices for all receivers of a layer. Each block runs as it
is, once for each *different* stream up to the projections of queries, keys and values, and once through attention and
MLP with every head's columns put together from these.

Where a norm stands behind the output projection (Gemma, OLMo 2), what heads give to the stream is no sum. There the
heads' differences are kept before it, and every receiver has the norm of just its heads: what path patching writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnsplice import wire
from nnsplice.atlas import attached
from nnsplice.circuits.addresses import Piece
from nnsplice.circuits.columns import project, through
from nnsplice.circuits.recording import Frame, Recorded, ended, expert_of, given_to_experts, projected
from nnsplice.circuits.wiring import LayerWires, Wiring
from nnsplice.packed.cost import Cost, CostModel
from nnsplice.paths import Dictionary


@dataclass(frozen=True)
class Ablated:
    """What everything outside a circuit gives: for prompts of one length."""

    #: `[prompt, token, width]`
    values: Recorded
    #: What the output projection of each layer makes of them.
    projected: tuple[Tensor, ...]
    #: The stream that is made of them: as each layer's attention reads it and as its MLP does; at last, complete.
    streams: tuple[Tensor, ...]

    @classmethod
    def of(cls, root: nn.Module, wiring: Wiring, values: Recorded) -> Ablated:
        """The stream of these values."""
        made = [projected(root, layer, z) for layer, z in zip(wiring.layers, values.z, strict=True)]
        stream, streams = values.embed, []
        for layer, projection, mlp in zip(wiring.layers, made, values.mlp, strict=True):
            middle = stream + ended(root, layer, projection) * layer.block.scale
            streams += [stream, stream if layer.mid is None else middle]
            stream = middle + mlp * layer.block.scale
        return cls(values, tuple(made), (*streams, stream))


@dataclass(frozen=True)
class Slot:
    """What is kept of a sender: all that it gives, or a part of that."""

    sender: int
    #: An expert of an MLP, or a feature or the error of an SAE of what it adds.
    piece: Piece = None
    #: `[prompt, token, 1]`: 1 at the tokens that are meant; None for all of them.
    tokens: Tensor | None = None


class _Done(Exception):  # no error: the way out of a block when everything was seen
    pass


@dataclass
class Pass:
    """One pass of some circuits over prompts of one length; rows are circuit after circuit, each with all prompts."""

    root: nn.Module
    wiring: Wiring
    frame: Frame
    ablated: Ablated
    #: `[circuit, receiver, sender]`: the edges that are needed; see `masks.needed`.
    masks: np.ndarray
    cost_model: CostModel
    #: What is kept of senders, and `[circuit, receiver, slot]`: which of it each receiver reads. By itself all of every
    #: sender that an edge starts from.
    slots: Sequence[Slot] | None = None
    reads: np.ndarray | None = None
    #: Whether what comes out is tied to the ablated values, so that these get gradients; of one circuit alone, as a sum
    #: of a few senders then costs no memory, and one product for all circuits would keep every stream.
    tied: bool = False
    cost: Cost = field(default_factory=Cost)

    def __post_init__(self) -> None:
        self.circuits: int = len(self.masks)
        self.prompts: int
        self.tokens: int
        self.width: int
        self.prompts, self.tokens, self.width = self.ablated.values.embed.shape
        #: The senders that an edge starts from, and where each stands among them.
        if self.slots is None or self.reads is None:
            kept = np.flatnonzero(self.masks.any((0, 1)))
            self.slots, self.reads = [Slot(int(sender)) for sender in kept], self.masks[:, :, kept]
        self.kept: tuple[Slot, ...] = tuple(self.slots)
        self.chosen: np.ndarray = self.reads
        self.at: dict[int, list[int]] = {}
        for number, slot in enumerate(self.kept):
            self.at.setdefault(slot.sender, []).append(number)
        dtype = self.ablated.values.embed.dtype
        self.dtype: torch.dtype = dtype if dtype in (torch.float32, torch.float64) else torch.float32
        assert not self.tied or self.circuits == 1
        shape = (self.circuits, 0 if self.tied else len(self.kept), self.prompts, self.tokens, self.width)
        #: What each sender gives less what it gives when it is ablated; of heads before a norm, before that.
        self.moved: Tensor = self.ablated.values.embed.new_zeros(shape, dtype=self.dtype)
        #: The same by slot, where it is tied.
        self.parts: dict[int, Tensor] = {}
        self.edges: Tensor = torch.from_numpy(self.chosen).to(self.moved)
        self.mode: Callable[[], Any] | None = None
        self.seen: dict[str, Tensor] = {}
        self.given: dict[str, Tensor] = {}
        names = dict.fromkeys(name for layer in self.wiring.layers for name in layer.projections)
        self.projections: dict[str, Any] = {name: self.root.get_submodule(name) for name in names}
        self.forwards: dict[str, Callable[..., Tensor]] = {n: m.forward for n, m in self.projections.items()}

    @property
    def rows(self) -> int:
        """How many rows run."""
        return self.circuits * self.prompts

    def run(self, logits: Callable[[], Tensor]) -> Tensor:
        """Call the model while its blocks run circuits.

        Args:
            logits: calls the model on the prompts, once for each circuit, and returns what is wanted.
        """
        with torch.set_grad_enabled(self.tied), self._circuits():
            return logits()

    # --- blocks

    @contextmanager
    def _circuits(self) -> Iterator[None]:
        with ExitStack() as stack:
            for number, layer in enumerate(self.wiring.layers):
                block = self.root.get_submodule(layer.block.module)
                stack.enter_context(_forward(block, partial(self._block, number, block.forward)))
            for name, module in self.projections.items():
                stack.enter_context(_forward(module, partial(self._projection, name)))
            yield

    def _block(self, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What stands in a block's place: the circuits run in it, and the complete stream leaves the last one."""
        layer, (sender, receiver) = self.wiring.layers[number], self.wiring.shape.starts[number]
        hidden = args[0] if args else next(iter(kwargs.values()))
        if number == 0 and 0 in self.at:
            self._keep(0, self._apart(hidden, self.ablated.values.embed))

        def call(stream: Tensor) -> None:
            stream = stream.to(hidden).reshape(hidden.shape)
            with suppress(_Done):
                if args:
                    forward(stream, *args[1:], **kwargs)
                else:
                    forward(**{**kwargs, next(iter(kwargs)): stream})

        shape = self.wiring.shape.layers[number]
        heads = [head for head in range(shape.heads) if sender + head in self.at]
        has_mlp = sender + shape.heads in self.at
        mlp = receiver + shape.heads + 2 * shape.groups
        self.given = {}
        if heads:
            self._mix(number, layer, call, heads)
        parallel = layer.mid is None
        if heads or (has_mlp and not parallel):
            with self._inside(number, layer, heads, None if parallel or not has_mlp else mlp):
                call(self._streams(number, [], at=2 * number)[0])
        if has_mlp and parallel:
            self.given = {}
            with self._inside(number, layer, [], mlp):
                call(self._streams(number, [mlp], at=2 * number)[0])
        self.given = {}
        last = number == len(self.wiring.layers) - 1
        out = self._streams(number + 1, [len(self.wiring.shape.receivers) - 1], at=-1)[0] if last else hidden
        out = out.to(hidden).reshape(hidden.shape)
        returns = self.frame.returns[number]
        return out if returns is None else (out, *[None] * (returns - 1))

    def _mix(self, number: int, layer: LayerWires, call: Callable[[Tensor], None], heads: Sequence[int]) -> None:
        """Put the outputs of the projections together: each head's and group's columns of its own stream."""
        shape, (_, first) = self.wiring.shape.layers[number], self.wiring.shape.starts[number]
        sender = self.wiring.shape.starts[number][0]
        read = {r - first for head in heads for r in self.wiring.shape.reads_of(sender + head)}
        wanted = sorted(read) if not layer.heads_mix else list(range(shape.heads + 2 * shape.groups))
        asked = self.chosen[:, [first + n for n in wanted]].transpose(1, 0, 2)
        _, chosen, which = np.unique(asked.reshape(len(wanted), -1), axis=0, return_index=True, return_inverse=True)
        streams = self._streams(number, [first + wanted[n] for n in chosen], at=2 * number)
        sites = layer.receivers
        for variant, stream in enumerate(streams):
            self.seen = {}
            self.mode = partial(self._enough, layer.projections)
            try:
                call(stream)
            finally:
                self.mode = None
            mine = [sites[wanted[n]] for n in np.flatnonzero(which.reshape(-1) == variant)]
            for name in dict.fromkeys(site.module for site in mine):
                columns = [site.columns for site in mine if site.module == name and site.columns is not None]
                made = project(self.projections[name], self.forwards[name], self.seen[name], columns)
                self._put(name, columns, made)
            self.cost += self._spent(self.cost_model.per_token(*layer.projections) // max(len(streams), 1))
        self.seen = {}

    def _enough(self, projections: Sequence[str]) -> None:
        if len(self.seen) == len(projections):
            raise _Done

    def _put(self, name: str, columns: Sequence[Any], values: Tensor) -> None:
        if name not in self.given:
            self.given[name] = values.new_zeros(*values.shape[:-1], self.frame.widths[name])
        at = 0
        for start, stop in columns:
            self.given[name][..., start:stop] = values[..., at : at + stop - start]
            at += stop - start

    def _projection(self, name: str, states: Tensor) -> Tensor:
        """What stands in a projection's site: its input is kept, or what was put together comes out."""
        if self.mode is not None:
            self.seen[name] = states
            self.mode()
            return states.new_zeros(1).expand(*states.shape[:-1], self.frame.widths[name])
        if name in self.given:
            return self.given[name].reshape(*states.shape[:-1], -1)
        return states.new_zeros(*states.shape[:-1], self.frame.widths[name])

    @contextmanager
    def _inside(self, number: int, layer: LayerWires, heads: Sequence[int], mlp: int | None) -> Iterator[None]:
        """Keep what the heads and the MLP give, and let the MLP read its own stream."""
        sender = self.wiring.shape.starts[number][0]

        def brought(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            if heads:
                self._heads(number, layer, heads, args[0] if args else next(iter(kwargs.values())))
            if mlp is None:
                raise _Done

        def added(_module: nn.Module, _args: Any, output: Any) -> None:
            moved = self._apart(wire.unpack(output, layer.mlp_added.item), self.ablated.values.mlp[number])
            own: dict[Piece, Tensor] = {key: self._apart(expert_of(self.root, layer, given[number], key, self.rows),
                                    self.ablated.values.experts[number, key]) for key in experts}  # fmt: skip
            own |= self._features(sender + len(layer.q), moved, self.ablated.values.mlp[number])
            self._keep(sender + len(layer.q), moved * layer.block.scale,
                       {key: value * layer.block.scale for key, value in own.items()})  # fmt: skip
            raise _Done

        given: dict[int, tuple[Any, ...]] = {}
        experts = [] if mlp is None else self._experts(sender + len(layer.q))
        with ExitStack() as stack:
            if experts:
                stack.enter_context(given_to_experts(self.root, layer, number, given))
            before = self.root.get_submodule(layer.z[0].module).register_forward_pre_hook(brought, with_kwargs=True)
            stack.callback(before.remove)
            if mlp is not None:
                after = self.root.get_submodule(layer.mlp_added.module).register_forward_hook(added)
                stack.callback(after.remove)
            if mlp is not None and layer.mid is not None:
                stack.enter_context(self._middle(number, layer, mlp))
            self.cost += self._spent(self.cost_model.per_token(*layer.block.modules))
            yield

    @contextmanager
    def _middle(self, number: int, layer: LayerWires, mlp: int) -> Iterator[None]:
        """The stream that the MLP reads."""
        assert layer.mid is not None
        module, item = self.root.get_submodule(layer.mid.module), layer.mid.item

        def stream(like: Tensor) -> Tensor:
            made = self._streams(number, [mlp], at=2 * number + 1, own_heads=True)[0]
            return made.to(like).reshape(like.shape)

        def before(_module: nn.Module, args: tuple, kwargs: dict) -> Any:
            if args:
                return ((stream(args[0]), *args[1:]), kwargs)
            name = next(iter(kwargs))
            return (args, {**kwargs, name: stream(kwargs[name])})

        def after(_module: nn.Module, _args: Any, output: Any) -> Any:
            return wire.repack(output, item, stream(wire.unpack(output, item)))

        if layer.mid.end == "input":
            hook = module.register_forward_pre_hook(before, with_kwargs=True)
        else:
            hook = module.register_forward_hook(after)
        try:
            yield
        finally:
            hook.remove()

    # --- senders

    def _heads(self, number: int, layer: LayerWires, heads: Sequence[int], brought: Tensor) -> None:
        """Keep what some heads give: through the output projection, and to the stream where no norm is behind it."""
        sender = self.wiring.shape.starts[number][0]
        moved = self._apart(brought, self.ablated.values.z[number])
        scale = 1.0 if layer.norm else layer.block.scale
        project = self.root.get_submodule(layer.z[0].module)
        for head in heads:
            start, stop = layer.z[head].columns or (0, 0)
            part = through(project, moved[..., start:stop].to(brought), (start, stop), moved.shape[-1])
            self._keep(sender + head, part.to(self.moved) * scale)

    def _apart(self, values: Tensor, ablated: Tensor) -> Tensor:
        """`[circuit, prompt, token, width]`: how far values of all rows are from the ablated ones."""
        found = values.reshape(self.circuits, self.prompts, self.tokens, -1).to(self.dtype)
        return found - ablated.to(found)

    def _keep(self, sender: int, moved: Tensor, pieces: Mapping[Piece, Tensor] | None = None) -> None:
        for number in self.at[sender]:
            slot = self.kept[number]
            part = moved if slot.piece is None or pieces is None else pieces[slot.piece]
            part = part.to(self.moved) if slot.tokens is None else part.to(self.moved) * slot.tokens.to(self.moved)
            if self.tied:
                self.parts[number] = part
            else:
                self.moved[:, number] = part

    def _experts(self, sender: int) -> list[int]:
        """The experts of an MLP that are senders by themselves."""
        return sorted({one for one in self._pieces(sender) if isinstance(one, int)})

    def _features(self, sender: int, moved: Tensor, ablated: Tensor) -> dict[Piece, Tensor]:
        """How far the share of each feature, and of the error, is from the ablated one: `[circuit, prompt, ...]`.

        Args:
            moved: how far what the MLP adds is.
            ablated: `[prompt, token, width]`
        """
        wanted = list(dict.fromkeys(one for one in self._pieces(sender) if isinstance(one, Dictionary)))
        found: dict[Piece, Tensor] = {}
        for name in dict.fromkeys(one.name for one in wanted):
            sae, before = attached(self.root)[name].sae, ablated.to(moved)
            apart = sae.encode(before + moved) - sae.encode(before)
            # What all features and the error change by is what the MLP does.
            found[Dictionary(name)] = moved - sae.added(apart, None)
            for one in (one for one in wanted if one.name == name and isinstance(one.features, int)):
                found[one] = sae.added(apart[..., [one.features]], None, [one.features])  # type: ignore[list-item]
        return found

    def _pieces(self, sender: int) -> list[Piece]:
        return [self.kept[number].piece for number in self.at.get(sender, ())]

    # --- streams

    def _streams(self, number: int, receivers: Sequence[int], at: int, *, own_heads: bool = False) -> Tensor:
        """`[receiver, row, token, width]`: what each receiver reads; with none of them, the ablated stream.

        Args:
            number: the layers before this one have run.
            own_heads: and so has the attention of this one.
        """
        base = self.ablated.streams[at].to(self.dtype)
        if not receivers:
            return base.repeat(self.circuits, 1, 1)[None]
        edges = self.edges[:, list(receivers)]
        made = self._sums(edges).unflatten(-1, (self.prompts, self.tokens, self.width)) + base
        for before in range(number + own_heads):
            layer = self.wiring.layers[before]
            if layer.norm is not None:
                made += self._normed(before, layer, edges)
        return made.transpose(0, 1).flatten(1, 2)

    def _sums(self, edges: Tensor) -> Tensor:
        """`[circuit, receiver, prompt * token * width]`, of the senders whose differences are those of the stream."""
        edges = edges * self._direct
        used = edges.flatten(0, 1).any(0).nonzero().flatten()
        if not len(used):
            return self.moved.new_zeros(*edges.shape[:2], self.prompts * self.tokens * self.width)
        if self.tied:
            return self._few(edges, range(len(self.kept)))
        stop = int(used[-1]) + 1
        some = len(used) * 2 < stop
        edges, moved = (edges[..., used], self.moved[:, used]) if some else (edges[..., :stop], self.moved[:, :stop])
        self.cost += Cost(flops=2 * edges.numel() * moved[0, 0].numel())
        return torch.bmm(edges, moved.flatten(2))

    def _few(self, edges: Tensor, slots: Sequence[int]) -> Tensor:
        """What `bmm` would make of the edges `[1, receiver, slot]` and the differences, one sender after the other."""
        made: list[Tensor] = []
        for chosen in edges[0].bool().tolist():
            parts = [
                self.parts[slot] for slot, is_in in zip(slots, chosen, strict=True) if is_in and slot in self.parts
            ]
            made.append(sum(parts[1:], parts[0]) if parts else self.moved.new_zeros(1, *self.moved.shape[2:]))
        return torch.stack(made, 1).flatten(2)

    @cached_property
    def _direct(self) -> Tensor:
        """`[sender]`: 1 where what is kept is a difference of the stream, 0 where a norm comes first."""
        found = torch.ones(len(self.kept))
        for layer, (sender, _) in zip(self.wiring.layers, self.wiring.shape.starts, strict=True):
            for head in range(len(layer.q)) if layer.norm is not None else ():
                found[self.at.get(sender + head, [])] = 0.0
        return found.to(self.moved)

    def _normed(self, number: int, layer: LayerWires, edges: Tensor) -> Tensor:
        """`[circuit, receiver, prompt, token, width]`: how far the norm of a receiver's heads is from the ablated."""
        sender = self.wiring.shape.starts[number][0]
        slots = [number for head in range(len(layer.q)) for number in self.at.get(sender + head, ())]
        before = self.ablated.projected[number]
        if not slots:
            return before.new_zeros((), dtype=self.dtype)
        picked = edges[:, :, slots]
        different, which = torch.unique(picked.transpose(0, 1).flatten(1), dim=0, return_inverse=True)
        different = different.unflatten(1, (self.circuits, len(slots))).transpose(0, 1)
        moved = self._few(different, slots) if self.tied else torch.bmm(different, self.moved[:, slots].flatten(2))
        moved = moved.unflatten(-1, (self.prompts, self.tokens, self.width))
        ends = ended(self.root, layer, (before.to(moved) + moved).to(before)).to(moved)
        apart = (ends - ended(self.root, layer, before).to(moved)) * layer.block.scale
        return apart[:, which]

    def _spent(self, per_token: float) -> Cost:
        tokens = self.rows * self.tokens
        return Cost(tokens, block_calls=1, flops=tokens * per_token, peak=tokens)


@contextmanager
def _forward(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward for a module while this lasts."""
    before: Mapping[str, Any] = {name: value for name, value in module.__dict__.items() if name == "forward"}
    module.forward = forward
    try:
        yield
    finally:
        if before:
            module.forward = before["forward"]
        else:
            del module.forward
