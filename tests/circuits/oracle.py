"""What runs of circuits are checked against.

`by_hooks` runs a circuit on any bare model by hooks alone: for every receiver the whole model runs once, with every
sender written over as this receiver is to see it, and what it then reads is kept. It knows nothing of streams.

`by_hand` is the same for GPT-2 and Llama, written out as sums of what heads and MLPs add; it knows nothing of hooks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import nnsplice as ns
from attribution.oracle import Point, hooked, ids, kept, logit_diff

#: Edges as texts, sender and receiver.
Edges = set[tuple[str, str]]


def point(model: Any, path: str) -> Point:
    """Where a site of a wrapped model stands, as hooks know it."""
    (found,) = ns.expand(model, path)
    return Point(found.site.module, found.site.end, found.site.columns)


class Graph:
    """The sites of a wrapped model, by their addresses."""

    def __init__(self, model: Any, layers: int, heads: int, groups: int, parallel: bool) -> None:
        self.layers, self.heads, self.groups, self.parallel = layers, heads, groups, parallel
        self.points: dict[str, Point] = {"embed": Point(point(model, "layers[0].input").module, "input")}
        for n in range(layers):
            name = f"layers[{n}]"
            for h in range(heads):
                self.points[f"{name}.heads[{h}]"] = point(model, f"{name}.heads[{h}].output")
                self.points[f"{name}.heads[{h}].q"] = point(model, f"{name}.heads[{h}].q")
            for g in range(groups):
                for part in "kv":
                    self.points[f"{name}.groups[{g}].{part}"] = point(model, f"{name}.groups[{g}].{part}")
            self.points[f"{name}.mlp"] = branch(model, n)

    @property
    def senders(self) -> list[str]:
        parts = [f"layers[{n}].{part}" for n in range(self.layers) for part in self._parts()]
        return ["embed", *parts]

    def _parts(self) -> list[str]:
        return [*(f"heads[{h}]" for h in range(self.heads)), "mlp"]

    def before(self, receiver: str) -> list[str]:
        """The senders that a receiver may read."""
        if receiver == "unembed":
            return self.senders
        layer = int(receiver[len("layers[") : receiver.index("]")])
        found = ["embed", *(f"layers[{n}].{part}" for n in range(layer) for part in self._parts())]
        if receiver.endswith(".mlp") and not self.parallel:
            found += [f"layers[{layer}].heads[{h}]" for h in range(self.heads)]
        return found

    @property
    def receivers(self) -> list[str]:
        found: list[str] = []
        for n in range(self.layers):
            found += [f"layers[{n}].heads[{h}].q" for h in range(self.heads)]
            found += [f"layers[{n}].groups[{g}].{part}" for part in "kv" for g in range(self.groups)]
            found.append(f"layers[{n}].mlp")
        return [*found, "unembed"]

    def edges(self) -> list[tuple[str, str]]:
        return [(sender, receiver) for receiver in self.receivers for sender in self.before(receiver)]


def branch(model: Any, layer: int) -> Point:
    """What an MLP adds, also where the family scales it in code behind that, so that it has no address."""
    try:
        return point(model, f"layers[{layer}].mlp.output")
    except ns.errors.NnspliceError:
        return Point(f"model.layers.{layer}.mlp")


Values = Mapping[str, Tensor]


def recorded(module: nn.Module, tokens: Tensor, graph: Graph) -> dict[str, Tensor]:
    """What every sender gives in a run as it is: `[1, token, width]`."""
    points = {name: graph.points[name] for name in graph.senders}
    found = kept(module, tokens, list(points.values()))
    return {name: place.part(found[place]).reshape(1, tokens.shape[1], -1) for name, place in points.items()}


def writing(points: Mapping[str, Point], values: Values) -> list[tuple[Point, Callable[[Tensor], Tensor]]]:
    """Hooks that write these values."""

    def write(place: Point, value: Tensor) -> Callable[[Tensor], Tensor]:
        def change(tensor: Tensor) -> Tensor:
            tensor = tensor.clone()
            part = place.part(tensor)
            part.copy_(value.reshape(part.shape))
            return tensor

        return change

    return [(points[name], write(points[name], value)) for name, value in values.items()]


def by_hooks(
    module: nn.Module,
    graph: Graph,
    tokens: Tensor,
    ablated: Values,
    edges: Edges,
    at: Mapping[tuple[str, str], list[int]] | None = None,
) -> float:
    """The metric of a circuit, in one run of the model for every receiver and every sender.

    Args:
        at: of some edges, the tokens at which they are there.
    """
    running: dict[str, Tensor] = {"embed": recorded(module, tokens, graph)["embed"]}

    def seen(receiver: str) -> dict[str, Tensor]:
        """The senders as a receiver sees them."""
        found = {s: running[s] if (s, receiver) in edges else ablated[s] for s in graph.before(receiver)}
        for sender in found:
            if (chosen := (at or {}).get((sender, receiver))) is not None:
                found[sender] = ablated[sender].clone()
                found[sender][:, chosen] = running[sender][:, chosen]
        return found

    def read(place: Point, values: Values) -> Tensor:
        """What stands at a site while these are written."""
        found: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            found.append(place.part(tensor).clone().reshape(1, tokens.shape[1], -1))
            return tensor

        with torch.no_grad(), hooked(module, [*writing(graph.points, values), (place, keep)]):
            module(tokens)
        return found[-1]

    for n in range(graph.layers):
        names = [r for r in graph.receivers if r.startswith(f"layers[{n}].") and not r.endswith(".mlp")]
        inside = {name: read(graph.points[name], seen(name)) for name in names}
        for h in range(graph.heads):
            # All of its layer's queries, keys and values as their receivers have them; which it reads, the model knows.
            running[f"layers[{n}].heads[{h}]"] = read(graph.points[f"layers[{n}].heads[{h}]"], inside)
        running[f"layers[{n}].mlp"] = read(graph.points[f"layers[{n}].mlp"], seen(f"layers[{n}].mlp"))
    with torch.no_grad(), hooked(module, writing(graph.points, seen("unembed"))):
        return float(logit_diff(module, tokens))


def nodes_by_hooks(module: nn.Module, graph: Graph, tokens: Tensor, ablated: Values, nodes: set[str]) -> float:
    """The metric of a run in which every sender that is no node of the circuit is written over."""
    outside = {name: ablated[name] for name in graph.senders if name not in nodes}
    with torch.no_grad(), hooked(module, writing(graph.points, outside)):
        return float(logit_diff(module, tokens))


# --- by hand ----------------------------------------------------------------------------------------------------------


class ByHand:
    """GPT-2 or Llama (of the zoo) as what its parts add; a part is told what each of its receivers reads."""

    def __init__(self, family: str, module: nn.Module) -> None:
        self.gpt2, self.model = family == "gpt2", module
        self.heads, self.groups, self.width = (4, 4, 4) if self.gpt2 else (4, 2, 6)
        self.inner: Any = module.transformer if self.gpt2 else module.model
        self.blocks = self.inner.h if self.gpt2 else self.inner.layers

    def embed(self, tokens: Tensor) -> Tensor:
        if not self.gpt2:
            return self.inner.embed_tokens(tokens)
        return self.inner.wte(tokens) + self.inner.wpe(torch.arange(tokens.shape[1])[None])

    def project(self, layer: int, role: str, index: int, stream: Tensor) -> Tensor:
        block = self.blocks[layer]
        if self.gpt2:
            whole = block.attn.c_attn(block.ln_1(stream))
            start = {"q": 0, "k": 16, "v": 32}[role] + index * self.width
        else:
            whole = getattr(block.self_attn, f"{role}_proj")(block.input_layernorm(stream))
            start = index * self.width
        return whole[..., start : start + self.width]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[1]
        if not self.gpt2:
            cos, sin = self.inner.rotary_emb(q, torch.arange(length)[None])
            q, k = (t[:, 0] for t in apply_rotary_pos_emb(q[:, None], k[:, None], cos, sin))
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.width)
        hidden = torch.full((length, length), float("-inf"), dtype=q.dtype).triu(1)
        return (scores + hidden).softmax(-1) @ v

    def out(self, layer: int, head: int, z: Tensor) -> Tensor:
        """What a head's values add to the stream, without the bias."""
        columns = slice(head * self.width, (head + 1) * self.width)
        if self.gpt2:
            return z @ self.blocks[layer].attn.c_proj.weight[columns]
        return z @ self.blocks[layer].self_attn.o_proj.weight[:, columns].T

    def bias(self, layer: int) -> Tensor | float:
        return self.blocks[layer].attn.c_proj.bias if self.gpt2 else 0.0

    def mlp(self, layer: int, stream: Tensor) -> Tensor:
        block = self.blocks[layer]
        return block.mlp(block.ln_2(stream) if self.gpt2 else block.post_attention_layernorm(stream))

    def metric(self, stream: Tensor) -> float:
        logits = self.model.lm_head((self.inner.ln_f if self.gpt2 else self.inner.norm)(stream))[0, -1]  # type: ignore[operator]
        return float(logits[7] - logits[8])

    @torch.no_grad()
    def run(self, tokens: Tensor, ablated: Values, edges: Edges) -> float:
        """The metric of a circuit; `ablated` has heads' values before the output projection."""
        # What each sender adds to the stream: in this run, and ablated.
        here: dict[str, Tensor] = {"embed": self.embed(tokens)}
        there: dict[str, Tensor] = {"embed": ablated["embed"]}
        biases: dict[str, Tensor | float] = {}

        def stream(receiver: str) -> Tensor:
            made = torch.zeros_like(here["embed"])
            for sender in here:
                made = made + (here if (sender, receiver) in edges else there)[sender]
            return made + sum(biases.values())  # type: ignore[operator]

        for n in range(len(self.blocks)):
            name = f"layers[{n}]"
            keys = [self.project(n, "k", g, stream(f"{name}.groups[{g}].k")) for g in range(self.groups)]
            values = [self.project(n, "v", g, stream(f"{name}.groups[{g}].v")) for g in range(self.groups)]
            queries = [self.project(n, "q", h, stream(f"{name}.heads[{h}].q")) for h in range(self.heads)]
            for h, q in enumerate(queries):
                g = h * self.groups // self.heads
                here[f"{name}.heads[{h}]"] = self.out(n, h, self.attend(q, keys[g], values[g]))
                there[f"{name}.heads[{h}]"] = self.out(n, h, ablated[f"{name}.heads[{h}]"])
            biases[name] = self.bias(n)
            added = self.mlp(n, stream(f"{name}.mlp"))
            here[f"{name}.mlp"], there[f"{name}.mlp"] = added, ablated[f"{name}.mlp"]
        return self.metric(stream("unembed"))


__all__ = ["ByHand", "Graph", "by_hooks", "ids", "nodes_by_hooks", "recorded"]
