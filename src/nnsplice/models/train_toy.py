"""Train a toy model: `python -m nnsplice.models.train_toy --model toy --out DIR`.

The same seed gives the same bytes on one machine: one thread, and every random number from the seed.

A network of this size does everything wherever it is cheapest: it carries both words of a subject to the last token
and looks the fact up there. Large models gather a subject's words at its last token, look up what is known about it,
and carry that on later. To get that picture here, for the first part of the training some words are `hidden` from later
ones in some layers, as by a narrower attention mask. The shipped model has no such mask, and keeps what it has learned.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from tqdm.auto import tqdm

from nnsplice.models import toy_corpus, toy_words
from nnsplice.models.toy_accuracy import accuracies
from nnsplice.models.toy_corpus import Role
from nnsplice.models.toy_sentences import WORDS

#: The layers in which a word of this role can be seen from later words of its row; any other word always can.
SEEN_IN: Mapping[Role, frozenset[int]] = {
    Role.WITHIN: frozenset({0}),
    Role.SUBJECT: frozenset({3, 4, 5}),
    Role.MOOD: frozenset({1}),
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one model is built and trained."""

    #: Class of the config in transformers, and its arguments.
    config: str
    arguments: dict[str, Any]
    #: Where the layers stand, and the attention in one of them.
    layers: str
    attention: str
    learning_rate: float = 3e-3
    steps: int = 2500
    batch: int = 128
    weight_decay: float = 0.05
    warm_up: int = 100
    #: For this share of the steps, words are hidden outside of these layers.
    hiding: float = 0.7
    seen_in: Mapping[Role, frozenset[int]] = field(default_factory=lambda: SEEN_IN)


LENGTH = 40
RECIPES = {
    "toy": Recipe(
        "GPT2Config",
        {
            "n_positions": LENGTH,
            "n_embd": 64,
            "n_layer": 6,
            "n_head": 4,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "initializer_range": 0.06,
        },
        "transformer.h",
        "attn",
    ),
    "toy-llama": Recipe(
        "LlamaConfig",
        {
            "max_position_embeddings": LENGTH,
            "hidden_size": 64,
            "intermediate_size": 176,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "initializer_range": 0.06,
        },
        "model.layers",
        "self_attn",
        # Rotary positions make it easy to look back at the giver in the first layer, before anything is known of it.
        seen_in={**SEEN_IN, Role.AGAIN: frozenset({2, 3, 4, 5})},
    ),
}


def tokenizer() -> Any:
    """One token per word or mark of the language, with the start token before every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: n for n, word in enumerate((*toy_words.SPECIAL, *WORDS))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=toy_words.UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    inner.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"{toy_words.START} $A", special_tokens=[(toy_words.START, vocabulary[toy_words.START])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=toy_words.START,
        eos_token=toy_words.START,
        pad_token=toy_words.PADDING,
        unk_token=toy_words.UNKNOWN,
        padding_side="left",
        model_max_length=LENGTH,
    )


def build(recipe: Recipe, words: Any) -> Any:
    """The untrained model, for this tokenizer."""
    import transformers

    config = getattr(transformers, recipe.config)(
        **recipe.arguments,
        vocab_size=math.ceil(len(words) / 8) * 8,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def train(recipe: Recipe, words: Any, *, seed: int = 0, steps: int | None = None, progress: bool = True) -> Any:
    """A trained model, in eval mode."""
    torch.set_num_threads(1)  # sums in another order are other numbers
    torch.manual_seed(seed)
    rng = random.Random(seed)
    steps = recipe.steps if steps is None else steps
    model = build(recipe, words).train()
    optimizer = _optimizer(model, recipe)
    vocabulary = words.get_vocab()
    with _Hiding(model, recipe) as hiding:
        for step in (bar := tqdm(range(steps), desc="training", unit="step", disable=not progress)):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * _schedule(step, steps, recipe.warm_up)
            batch = toy_corpus.batch(toy_corpus.draw(rng, recipe.batch), vocabulary)
            hiding.roles = batch.roles if step < recipe.hiding * steps else None
            loss = _loss(_logits(model, batch), batch)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step % 50 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def _logits(model: Any, batch: toy_corpus.ToyBatch) -> Tensor:
    # Padding stands on the right, where causal attention never looks back at it, so the mask may be all ones.
    return model(batch.ids, attention_mask=torch.ones_like(batch.ids), use_cache=False).logits


def _loss(logits: Tensor, batch: toy_corpus.ToyBatch) -> Tensor:
    each = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none")
    weights = batch.weights[:, 1:].flatten()
    return (each * weights).sum() / weights.sum()


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98))


def _schedule(step: int, steps: int, warm_up: int) -> float:
    """Up in a line, down in half a cosine to three percent."""
    return min(1.0, (step + 1) / warm_up) * (0.5 * (1 + math.cos(math.pi * step / steps)) * 0.97 + 0.03)


def hidden(roles: Tensor, layer: int, seen_in: Mapping[Role, frozenset[int]] = SEEN_IN) -> Tensor:
    """`[row, query, key]`: which words are hidden from which in this layer.

    The words of a subject are seen from its last word, in the first layer; that one is seen from the rest of the row,
    in the later layers. A word of mood is seen in one layer only, so that before it nothing else knows of the mood.
    """
    length = roles.shape[1]
    unseen = [role for role, layers in seen_in.items() if layer not in layers]
    keys = torch.isin(roles, torch.tensor(unseen, dtype=roles.dtype))[:, None, :].expand(-1, length, -1)
    outside = ~torch.isin(roles, torch.tensor([Role.WITHIN, Role.SUBJECT]))
    stray = outside[:, :, None] & (roles == Role.WITHIN)[:, None, :]
    return (keys | stray) & ~torch.eye(length, dtype=torch.bool)


class _Hiding:
    """While it is open, each layer's attention leaves out what is hidden in the rows whose `roles` are set."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.roles: Tensor | None = None
        self._seen_in = recipe.seen_in
        layers = model.get_submodule(recipe.layers)
        assert isinstance(layers, nn.ModuleList)
        self._attentions = [layer.get_submodule(recipe.attention) for layer in layers]

    def __enter__(self) -> _Hiding:
        self._hooks = [
            attention.register_forward_pre_hook(partial(self._hide, layer), with_kwargs=True)
            for layer, attention in enumerate(self._attentions)
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hide(self, layer: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self.roles is None:
            return None
        length = self.roles.shape[1]
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        left_out = later | hidden(self.roles, layer, self._seen_in)
        mask = torch.zeros(left_out.shape).masked_fill(left_out, float("-inf"))[:, None]
        return args, {**kwargs, "attention_mask": mask}


def write(model: Any, words: Any, out: Path, card: dict[str, Any]) -> None:
    """The model as a folder that transformers loads, with a card of what it reached."""
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # it comes readable by its owner only
    words.save_pretrained(out)
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n")


def main(
    model: Annotated[str, typer.Option(help=f"Which model: {' or '.join(RECIPES)}.")] = "toy",
    out: Annotated[Path | None, typer.Option(help="Folder to write to; by default one with the model's name.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the rows.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Steps to train; by default what the recipe says.", min=1)] = None,
) -> None:
    """Train a toy model, examine it and write it as a Hugging Face folder. Takes some five minutes on one core."""
    if model not in RECIPES:
        raise typer.BadParameter(f"{model!r} is none of {', '.join(RECIPES)}", param_hint="--model")
    recipe, words = RECIPES[model], tokenizer()
    trained = train(recipe, words, seed=seed, steps=steps)
    reached = accuracies(trained, words)
    parameters = sum(p.numel() for p in trained.parameters())
    card = {"model": model, "seed": seed, "steps": steps or recipe.steps, "parameters": parameters, "accuracy": reached}
    out = out or Path(model)
    write(trained, words, out, card)
    typer.echo(json.dumps(card, indent=2))
    typer.echo(f"written to {out}")


if __name__ == "__main__":
    typer.run(main)
