"""Models made by hand, whose circuits are known because they are written down here as data.

Nothing is trained. A `Circuit` says what works in a model; `gpt2` and `llama` turn it into weights. Everything else is
inert: the other heads and neurons have random weights and large activity, written to a part of the stream that no
working component reads.

The residual stream is laid out in named parts, one number per word of the vocabulary in most of them. A norm would mix
these; it does not, because each stream also holds large constants, so that its length hardly changes, and because it
holds everything twice with opposite signs, so that its mean is zero. After a norm whose weight is that length, a
component reads the parts as they were written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from models.circuits import START, Circuit, Flag, Head, Match

WORDS, LENGTH, LAYERS, HEADS, GROUPS, NEURONS = 16, 8, 4, 4, 2, 32

# ----------------------------------------------------------------------------------------------------------- the stream

#: Part of the stream -> how many numbers. `first`, `second` are what components hand on; logits are read from `out`.
_SIZES = {
    "one": 1, "token": WORDS, "position": LENGTH, "first": WORDS, "second": WORDS, "out": WORDS,
    "junk": 16, "constants": 7,
}  # fmt: skip
HALF = sum(_SIZES.values())
WIDTH = 2 * HALF
HEAD_WIDTH = WIDTH // HEADS
_STARTS = dict(zip(_SIZES, torch.tensor([0, *_SIZES.values()]).cumsum(0).tolist(), strict=False))
#: So large that whatever else the stream holds hardly changes its length.
CONSTANT = 1e6
#: The length of every stream, by root mean square.
SCALE = CONSTANT * (_SIZES["constants"] / HALF) ** 0.5


def part(name: str, indices: Sequence[int] | None = None) -> list[int]:
    """Where a part of the stream stands, or these numbers of it."""
    return [_STARTS[name] + i for i in (range(_SIZES[name]) if indices is None else indices)]


# -------------------------------------------------------------------------------------------------------------- weights


def _reader(positions: Sequence[int], weight: float = 1.0) -> Tensor:
    """What reads the sum of these numbers of the stream, as a column."""
    column = torch.zeros(WIDTH)
    column[list(positions)] = weight
    return column


def _twice(half: Tensor) -> Tensor:
    """What is written to the stream, with its opposite."""
    return torch.cat([half, -half], -1)


def _embedding() -> Tensor:
    half = torch.zeros(WORDS, HALF)
    half[:, part("one")] = 1.0
    half[:, part("token")] = torch.eye(WORDS)
    half[:, part("junk")] = 5 * torch.randn(WORDS, _SIZES["junk"])
    half[:, part("constants")] = CONSTANT
    return _twice(half)


def _junk(rows: int) -> Tensor:
    """How inert components write: `[rows, width]`, to the part that nobody reads."""
    half = torch.zeros(rows, HALF)
    half[:, part("junk")] = torch.randn(rows, _SIZES["junk"])
    return _twice(half)


def _inert(columns: int) -> Tensor:
    """How inert components read: a little of everything but the constants, `[width, columns]`."""
    reads = torch.randn(WIDTH, columns) / 4
    reads[part("constants")] = 0.0
    reads[part("junk")] /= 10  # or what they write would grow from layer to layer
    reads[HALF:] = 0.0
    return reads


@dataclass(frozen=True)
class _Weights:
    """One working head: `[width, head width]` and `[head width, width]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor


def _head(head: Head, *, rotary: bool) -> _Weights:
    q, k, v = (torch.zeros(WIDTH, HEAD_WIDTH) for _ in range(3))
    # With rotary positions the first columns turn with the position; the later ones hardly do.
    half = HEAD_WIDTH // 2
    free = iter([*range(half // 2, half), *range(half + half // 2, HEAD_WIDTH)] if rotary else range(HEAD_WIDTH))
    one, own = part("one"), _reader(part("one")) - _reader(part("token", [START]))
    for look in head.looks:
        if isinstance(look, Flag):
            column = next(free)
            q[:, column], k[:, column] = _reader(one), _reader(part(look.part, look.indices), look.weight)
        elif isinstance(look, Match):
            for index in look.indices:
                column = next(free)
                q[:, column] = _reader(part(look.query, [index]))
                k[:, column] = _reader(part(look.key, [index]), look.weight)
        elif rotary:
            # A pair of columns that turns by one radian per position; the key is ahead by the distance.
            q[:, 0] = _reader(one)
            ahead = torch.tensor(float(look.distance))
            k[:, 0], k[:, half] = own * ahead.cos() * look.weight, own * ahead.sin() * look.weight
        else:
            for position in range(max(1, look.distance), LENGTH):
                if position - look.distance == 0:
                    continue
                column = next(free)
                q[:, column] = _reader(part("position", [position]))
                k[:, column] = _reader(part("position", [position - look.distance]), look.weight)
    for column, index in enumerate(head.indices):
        v[:, column] = _reader(part(head.reads, [index]))
    o = torch.zeros(HEAD_WIDTH, HALF)
    for column, index in enumerate(head.indices):
        o[column, part(head.writes, [index])] = 1.0
    return _Weights(q * HEAD_WIDTH**0.5, k, v, _twice(o))


def _attention(circuit: Circuit, layer: int, groups: int, *, rotary: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights of a layer's attention as `x @ weight`, inert but for the circuit's heads."""
    q, o = _inert(WIDTH), _junk(WIDTH)
    k, v = _inert(groups * HEAD_WIDTH), _inert(groups * HEAD_WIDTH)
    for head in circuit.heads:
        if head.layer == layer:
            weights = _head(head, rotary=rotary)
            own = slice(head.head * HEAD_WIDTH, (head.head + 1) * HEAD_WIDTH)
            group = head.head * groups // HEADS
            shared = slice(group * HEAD_WIDTH, (group + 1) * HEAD_WIDTH)
            q[:, own], o[own] = weights.q, weights.o
            # Columns that it has no use for stay as they are, for an inert head that shares keys and values with it.
            for inert, working in ((k, weights.k), (v, weights.v)):
                used = working.abs().sum(0) > 0
                inert[:, shared] = torch.where(used, working, inert[:, shared])
    return q, k, v, o


def _mlp(circuit: Circuit, layer: int, gain: float) -> tuple[Tensor, Tensor]:
    """Weights into and out of a layer's neurons, inert but for the lookups; a neuron that fires is `gain / 2`."""
    into, out = _inert(NEURONS), _junk(NEURONS)
    for lookup in circuit.lookups:
        if lookup.layer != layer:
            continue
        for n, ((a, b), answer) in enumerate(lookup.table.items()):
            neuron = 3 * n + 1
            both = _reader([*part(lookup.parts[0], [a]), *part(lookup.parts[1], [b])])
            into[:, neuron] = gain * (both - 1.5 * _reader(part("one")))
            half = torch.zeros(HALF)
            half[part(lookup.writes, [answer])] = 2 / gain
            out[neuron] = _twice(half)
    return into, out


def _unembedding() -> Tensor:
    return torch.stack([_reader(part("out", [word]), 10.0) for word in range(WORDS)])


_COMMON = {"vocab_size": WORDS, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "tie_word_embeddings": False}


def gpt2(circuit: Circuit) -> nn.Module:
    """The circuit as a GPT-2: learned positions, biases, LayerNorm."""
    config = hf.GPT2Config(
        **_COMMON, n_positions=LENGTH, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_inner=NEURONS,
    )  # fmt: skip
    model = _blank(hf.GPT2LMHeadModel(config))
    with torch.no_grad():
        model.transformer.wte.weight.copy_(_embedding())
        place = torch.zeros(LENGTH, HALF)
        place[:, part("position")] = torch.eye(LENGTH)
        model.transformer.wpe.weight.copy_(_twice(place))
        for layer, block in enumerate(model.transformer.h):
            q, k, v, o = _attention(circuit, layer, HEADS, rotary=False)
            block.attn.c_attn.weight.copy_(torch.cat([q, k, v], 1))
            block.attn.c_proj.weight.copy_(o)
            into, out = _mlp(circuit, layer, gain=20.0)
            block.mlp.c_fc.weight.copy_(into)
            block.mlp.c_proj.weight.copy_(out)
        model.lm_head.weight.copy_(_unembedding())
    return model


def llama(circuit: Circuit) -> nn.Module:
    """The circuit as a Llama with grouped keys and values: rotary positions, no biases, RMSNorm, gated MLP."""
    config = hf.LlamaConfig(
        **_COMMON, hidden_size=WIDTH, intermediate_size=NEURONS, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=GROUPS, head_dim=HEAD_WIDTH, max_position_embeddings=LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 1e12},
    )  # fmt: skip
    model = _blank(hf.LlamaForCausalLM(config))
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(_embedding())
        for layer, block in enumerate(model.model.layers):
            q, k, v, o = _attention(circuit, layer, GROUPS, rotary=True)
            for linear, weight in zip(("q_proj", "k_proj", "v_proj", "o_proj"), (q, k, v, o), strict=True):
                getattr(block.self_attn, linear).weight.copy_(weight.T)
            into, out = _mlp(circuit, layer, gain=80.0)
            block.mlp.gate_proj.weight.copy_(into.T)
            block.mlp.up_proj.weight.copy_(_reader(part("one")).expand(NEURONS, -1))
            block.mlp.down_proj.weight.copy_(out.T)
        model.lm_head.weight.copy_(_unembedding())
    return model


FORMS = {"gpt2": gpt2, "llama": llama}


def _blank(model: Any) -> Any:
    """In float64, without biases, every norm giving back what was written."""
    torch.manual_seed(0)
    model = model.double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = any(word in name for word in ("ln_", "norm")) and name.endswith("weight")
            parameter.fill_(SCALE if norm else 0.0)
    return model
