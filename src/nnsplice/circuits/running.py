"""Runs of circuits: every receiver reads its own stream, with clean values of the senders of its edges.

Each block runs as it is, once for each *different* stream up to the projections of queries, keys and values, and once
through attention and MLP with every head's columns put together from these. The streams are made in `streams.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnsplice import engine, wire
from nnsplice.atlas import attached
from nnsplice.circuits.addresses import Piece
from nnsplice.circuits.columns import project, through
from nnsplice.circuits.recording import OutputFormat, expert_of, given_to_experts
from nnsplice.circuits.streams import AblatedStreams, SenderDifferences, Slot
from nnsplice.circuits.wiring import LayerWires, Wiring
from nnsplice.packed.cost import Cost, CostModel
from nnsplice.paths import Dictionary


class _BlockDone(Exception):  # no error: the way out of a block when everything was seen
    pass


class CircuitPass:
    """One pass of some circuits over prompts of one length; rows are circuit after circuit, each with all prompts."""

    def __init__(
        self,
        root: nn.Module,
        wiring: Wiring,
        frame: OutputFormat,
        ablated: AblatedStreams,
        cost_model: CostModel,
        slots: Sequence[Slot],
        reads: np.ndarray,
        *,
        keep_graph: bool = False,
    ) -> None:
        self.root: nn.Module = root
        self.wiring: Wiring = wiring
        self.frame: OutputFormat = frame
        self.ablated: AblatedStreams = ablated
        self.cost_model: CostModel = cost_model
        self.differences: SenderDifferences = SenderDifferences(root, wiring, ablated, slots, reads, keep_graph)
        self._cost = Cost()
        #: Called at each projection while only the inputs of projections are wanted; leaves the block after the last.
        self._on_input: Callable[[], None] | None = None
        #: By the name of a projection: its input in the run of one stream, and its output, put together from all.
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}
        names = dict.fromkeys(name for layer in wiring.layers for name in layer.projections)
        self._projections: dict[str, Any] = {name: root.get_submodule(name) for name in names}
        self._forwards: dict[str, Callable[..., Tensor]] = {n: m.forward for n, m in self._projections.items()}

    @property
    def cost(self) -> Cost:
        """The cost of the runs so far."""
        return self._cost + self.differences.cost

    def run(self, logits: Callable[[], Tensor]) -> Tensor:
        """Call the model while its blocks run circuits.

        Args:
            logits: calls the model on the prompts, once for each circuit, and returns what is wanted.
        """
        with torch.set_grad_enabled(self.differences.keep_graph), ExitStack() as stack:
            for number, layer in enumerate(self.wiring.layers):
                block = self.root.get_submodule(layer.block.module)
                stack.enter_context(_forward(block, partial(self._block, number, block.forward)))
            for name, module in self._projections.items():
                stack.enter_context(_forward(module, partial(self._projection, name)))
            return logits()

    # --- blocks

    def _block(self, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A block's forward: the circuits run in it, and the complete stream leaves the last one."""
        layer, (sender, receiver) = self.wiring.layers[number], self.wiring.shape.starts[number]
        kept = self.differences
        hidden = args[0] if args else next(iter(kwargs.values()))
        if number == 0 and 0 in kept.slots_of:
            kept.keep(0, kept.between(hidden, self.ablated.values.embed))

        def call(stream: Tensor) -> None:
            stream = stream.to(hidden).reshape(hidden.shape)
            with suppress(_BlockDone):
                if args:
                    forward(stream, *args[1:], **kwargs)
                else:
                    forward(**{**kwargs, next(iter(kwargs)): stream})

        shape = self.wiring.shape.layers[number]
        heads = [head for head in range(shape.heads) if sender + head in kept.slots_of]
        has_mlp = sender + shape.heads in kept.slots_of
        mlp = receiver + shape.heads + 2 * shape.groups
        self._outputs = {}
        if heads:
            self._assemble_projections(number, layer, call, heads)
        parallel = layer.mid is None
        if heads or (has_mlp and not parallel):
            with self._keeping_senders(number, layer, heads, None if parallel or not has_mlp else mlp):
                call(kept.streams(number, [], at=2 * number)[0])
        if has_mlp and parallel:
            self._outputs = {}
            with self._keeping_senders(number, layer, [], mlp):
                call(kept.streams(number, [mlp], at=2 * number)[0])
        self._outputs = {}
        last = number == len(self.wiring.layers) - 1
        out = kept.streams(number + 1, [len(self.wiring.shape.receivers) - 1], at=-1)[0] if last else hidden
        out = out.to(hidden).reshape(hidden.shape)
        returns = self.frame.returns[number]
        return out if returns is None else (out, *[None] * (returns - 1))

    def _assemble_projections(
        self, number: int, layer: LayerWires, call: Callable[[Tensor], None], heads: Sequence[int]
    ) -> None:
        """Put the outputs of the projections together: each head's and group's columns of its own stream."""
        shape, (sender, first) = self.wiring.shape.layers[number], self.wiring.shape.starts[number]
        read = {r - first for head in heads for r in self.wiring.shape.reads_of(sender + head)}
        wanted = sorted(read) if not layer.heads_mix else list(range(shape.heads + 2 * shape.groups))
        slots = self.differences.reads[:, [first + n for n in wanted]].transpose(1, 0, 2)
        _, chosen, which = np.unique(slots.reshape(len(wanted), -1), axis=0, return_index=True, return_inverse=True)
        streams = self.differences.streams(number, [first + wanted[n] for n in chosen], at=2 * number)
        sites = layer.receivers
        for variant, stream in enumerate(streams):
            self._inputs = {}
            self._on_input = partial(self._leave_after, len(layer.projections))
            try:
                call(stream)
            finally:
                self._on_input = None
            mine = [sites[wanted[n]] for n in np.flatnonzero(which.reshape(-1) == variant)]
            for name in dict.fromkeys(site.module for site in mine):
                columns = [site.columns for site in mine if site.module == name and site.columns is not None]
                made = project(self._projections[name], self._forwards[name], self._inputs[name], columns)
                self._put(name, columns, made)
            self._count(self.cost_model.per_token(*layer.projections) // max(len(streams), 1))
        self._inputs = {}

    def _leave_after(self, projections: int) -> None:
        if len(self._inputs) == projections:
            raise _BlockDone

    def _put(self, name: str, columns: Sequence[Any], values: Tensor) -> None:
        if name not in self._outputs:
            self._outputs[name] = values.new_zeros(*values.shape[:-1], self.frame.widths[name])
        at = 0
        for start, stop in columns:
            self._outputs[name][..., start:stop] = values[..., at : at + stop - start]
            at += stop - start

    def _projection(self, name: str, states: Tensor) -> Tensor:
        """A projection's forward: records its input, or returns the output that was computed from streams."""
        if self._on_input is not None:
            self._inputs[name] = states
            self._on_input()
            return states.new_zeros(1).expand(*states.shape[:-1], self.frame.widths[name])
        if name in self._outputs:
            return self._outputs[name].reshape(*states.shape[:-1], -1)
        return states.new_zeros(*states.shape[:-1], self.frame.widths[name])

    @contextmanager
    def _keeping_senders(self, number: int, layer: LayerWires, heads: Sequence[int], mlp: int | None) -> Iterator[None]:
        """Record the outputs of heads and MLP, and let the MLP read its own stream."""
        sender = self.wiring.shape.starts[number][0] + len(layer.q)
        ablated, kept = self.ablated.values, self.differences

        def heads_gave(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            if heads:
                self._keep_heads(number, layer, heads, args[0] if args else next(iter(kwargs.values())))
            if mlp is None:
                raise _BlockDone

        def mlp_gave(_module: nn.Module, _args: Any, output: Any) -> None:
            moved = kept.between(wire.unpack(output, layer.mlp_added.item), ablated.mlp[number])
            own: dict[Piece, Tensor] = {}
            for key in experts:
                made = expert_of(self.root, layer, given[number], key, kept.rows)
                own[key] = kept.between(made, ablated.experts[number, key])
            own |= self._features(sender, moved, ablated.mlp[number])
            kept.keep(sender, moved * layer.block.scale, {k: value * layer.block.scale for k, value in own.items()})
            raise _BlockDone

        given: dict[int, tuple[Any, ...]] = {}
        experts = [] if mlp is None else self._experts(sender)
        with ExitStack() as stack:
            if experts:
                stack.enter_context(given_to_experts(self.root, layer, number, given))
            project = self.root.get_submodule(layer.z[0].module)
            stack.callback(project.register_forward_pre_hook(heads_gave, with_kwargs=True).remove)
            if mlp is not None:
                added = self.root.get_submodule(layer.mlp_added.module)
                stack.callback(added.register_forward_hook(mlp_gave).remove)
            if mlp is not None and layer.mid is not None:
                stack.enter_context(self._mlp_reads(number, layer, mlp))
            self._count(self.cost_model.per_token(*layer.block.modules))
            yield

    @contextmanager
    def _mlp_reads(self, number: int, layer: LayerWires, mlp: int) -> Iterator[None]:
        """Let the MLP read its own stream."""
        assert layer.mid is not None

        def stream(like: Tensor) -> Tensor:
            made = self.differences.streams(number, [mlp], at=2 * number + 1, own_heads=True)[0]
            return made.to(like).reshape(like.shape)

        with engine.changing(self.root, layer.mid, stream):
            yield

    # --- senders

    def _keep_heads(self, number: int, layer: LayerWires, heads: Sequence[int], z: Tensor) -> None:
        """Record the outputs of some heads, through the output projection, and to the stream if no norm follows."""
        kept, sender = self.differences, self.wiring.shape.starts[number][0]
        moved = kept.between(z, self.ablated.values.z[number])
        scale = 1.0 if layer.norm else layer.block.scale
        project = self.root.get_submodule(layer.z[0].module)
        for head in heads:
            start, stop = layer.z[head].columns or (0, 0)
            part = through(project, moved[..., start:stop].to(z), (start, stop), moved.shape[-1])
            kept.keep(sender + head, part.to(kept.values) * scale)

    def _experts(self, sender: int) -> list[int]:
        """The experts of an MLP that are senders by themselves."""
        return sorted({one for one in self.differences.pieces_of(sender) if isinstance(one, int)})

    def _features(self, sender: int, moved: Tensor, ablated: Tensor) -> dict[Piece, Tensor]:
        """The difference of each feature, and of the error, from the ablated one: `[circuit, prompt, ...]`.

        Args:
            moved: the difference of the MLP's output from the ablated one.
            ablated: `[prompt, token, width]`
        """
        wanted = list(dict.fromkeys(one for one in self.differences.pieces_of(sender) if isinstance(one, Dictionary)))
        found: dict[Piece, Tensor] = {}
        for name in dict.fromkeys(one.name for one in wanted):
            sae, before = attached(self.root)[name].sae, ablated.to(moved)
            apart = sae.encode(before + moved) - sae.encode(before)
            # The changes of all features and the error sum to that of the MLP.
            found[Dictionary(name)] = moved - sae.added(apart, None)
            for one in (one for one in wanted if one.name == name and isinstance(one.features, int)):
                found[one] = sae.added(apart[..., [one.features]], None, [one.features])  # type: ignore[list-item]
        return found

    def _count(self, per_token: float) -> None:
        tokens = self.differences.rows * self.differences.tokens
        self._cost += Cost(tokens, block_calls=1, flops=tokens * per_token, peak=tokens)


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
