"""Accuracies of a toy model over all prompts of `toy_prompts()`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nnsplice.models.toy_prompts import toy_prompts


def accuracies(module: nn.Module, tokenizer: Any) -> dict[str, float]:
    """Exam -> share of prompts answered rightly."""
    prompts = toy_prompts()
    ids = tokenizer.convert_tokens_to_ids

    def share_of_answers(texts: Sequence[str], answers: Sequence[str]) -> float:
        top = next_logits(module, tokenizer, texts).argmax(-1)
        return (top == torch.tensor(ids(list(answers)))).double().mean().item()

    def share_of_moods() -> float:
        chances = next_logits(module, tokenizer, [review.text for review in prompts.reviews]).softmax(-1)
        good, bad = (chances[:, ids(list(prompts.moods[mood]))].sum(-1) for mood in ("good", "bad"))
        return ((good > bad) == torch.tensor([r.mood == "good" for r in prompts.reviews])).double().mean().item()

    trained = [pair for pair in prompts.ioi if pair.trained]
    held_out = [pair for pair in prompts.ioi if not pair.trained]
    exams: dict[str, Callable[[], float]] = {
        "facts": lambda: share_of_answers([f.clean for f in prompts.facts], [f.answer for f in prompts.facts]),
        "ioi": lambda: share_of_answers([p.clean for p in trained], [p.answer for p in trained]),
        "ioi_held_out": lambda: share_of_answers([p.clean for p in held_out], [p.answer for p in held_out]),
        "induction": lambda: share_of_answers([r.text for r in prompts.repeats], [r.answer for r in prompts.repeats]),
        "mood": share_of_moods,
    }
    return {name: round(exam(), 4) for name, exam in exams.items()}


@torch.no_grad()
def next_logits(module: nn.Module, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """`[text, vocab]`, what comes next; texts of one length run together, so nothing is padded."""
    rows = tokenizer(list(texts))["input_ids"]
    by_length: dict[int, list[int]] = {}
    for n, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(n)
    found: list[Tensor] = []
    for group in by_length.values():
        ids = torch.tensor([rows[n] for n in group])
        found.append(module(ids, attention_mask=torch.ones_like(ids)).logits[:, -1])
    order = torch.tensor([n for group in by_length.values() for n in group]).argsort()
    return torch.cat(found)[order]
