"""A hand-made GPT-2 that holds one variable in a known subspace of the stream, and moves it in its second block.

A token of class c has the embedding `U code(c) + N noise + marks`: U holds the variable, N numbers that mean nothing.
Block 0 does nothing. Block 1 reads U at every token it sees, all of them alike, and writes it into V of the token that
reads. Block 2 does nothing. The unembedding reads V. So the variable stands in U at the first token before block 1, and
in V at the last token behind it; nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import transformers as hf
from torch import Tensor

import nnsplice as ns

WIDTH = 24


@dataclass(frozen=True)
class Planted:
    """The model, and what is known of it."""

    model: Any
    #: `[width, rank]` each.
    read: Tensor
    written: Tensor
    base: list[list[int]]
    source: list[list[int]]
    answers: list[int]

    @property
    def mirrored(self) -> list[int]:
        """Some pairs to hold out, so that the others still balance: with a pair, the one of mirrored noise is there."""
        copies = [(b[0] % 4, s[0] % 4) for b, s in zip(self.base, self.source, strict=True)]
        return [number for number, (a, b) in enumerate(copies) if a == b and a in (0, 3)]


def planted(rank: int = 2, seed: int = 0, scale: float = 0.3, *, aligned: bool = False) -> Planted:
    """Classes are the corners of a cube of `rank` dimensions, each with four tokens whose noise is mirrored.

    Args:
        scale: of the logits; small, so that the loss still falls where every answer is right already.
        aligned: every direction is the difference of two of the site's own numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    codes = torch.tensor(list(product((-1.0, 1.0), repeat=rank)), dtype=torch.float64)
    noises = torch.tensor([(1.0, 1.0), (-1.0, 1.0), (1.0, -1.0), (-1.0, -1.0)], dtype=torch.float64)
    classes, copies = len(codes), len(noises)
    # Everything lies across the constant vector, so that a layer norm only scales, and by one number for all.
    free = torch.randn(WIDTH, WIDTH - 1, generator=generator, dtype=torch.float64)
    free = torch.linalg.qr(torch.cat([torch.ones(WIDTH, 1, dtype=torch.float64), free], 1))[0][:, 1:]
    if aligned:
        eye = torch.eye(WIDTH, dtype=torch.float64)
        free = (eye[:, ::2] - eye[:, 1::2]) / 2**0.5
    read, written, noise, mark = free[:, :rank], free[:, rank : 2 * rank], free[:, -3:-1], free[:, -1:]
    asking = classes * copies  # the token that is read; it belongs to no class
    config = hf.GPT2Config(
        vocab_size=asking + 1, n_embd=WIDTH, n_layer=3, n_head=1, n_positions=8, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    module: Any = hf.GPT2LMHeadModel(config).double().eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.fill_(1.0 if ".ln_" in name and name.endswith("weight") else 0.0)
        words = torch.stack([read @ code + noise @ n for code in codes for n in noises])
        module.transformer.wte.weight[:asking] = words
        module.transformer.wte.weight[asking] = mark[:, 0] * (rank + 2) ** 0.5
        attention = module.transformer.h[1].attn
        # Queries and keys are zero: every token sees all before it and itself alike.
        attention.c_attn.weight[:, 2 * WIDTH :] = read @ read.T
        attention.c_proj.weight.copy_(read @ written.T)
        module.lm_head.weight.zero_()
        for number, code in enumerate(codes):
            module.lm_head.weight[number * copies] = scale * (written @ code)
    base, source, answers = [], [], []
    for a, b in product(range(asking), repeat=2):
        if a // copies != b // copies:
            base.append([a, asking])
            source.append([b, asking])
            answers.append(b // copies * copies)
    return Planted(ns.load(module, False), read, written, base, source, answers)
