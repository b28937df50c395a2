"""A tokenizer of English words, as GPT-2's and Llama's are: bytes, and a word with the space before it as one token."""

from __future__ import annotations

import re
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import nnsplice as ns


def english(*, digits: bool) -> PreTrainedTokenizerFast:
    """Bytes, and all short words with their space as one token; years in pairs of digits, or digits alone."""
    vocab = {symbol: n for n, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []

    def learn(word: str) -> None:
        for n in range(1, len(word)):
            if word[: n + 1] not in vocab:
                vocab[word[: n + 1]] = len(vocab)
                merges.append((word[:n], word[n]))

    text = " ".join(path.read_text(encoding="utf-8") for path in _texts())
    for word in sorted(set(re.findall(r"[A-Za-z]+", text))):
        learn("\u0120" + word)
    if not digits:
        for n in range(100):
            learn(f"{n:02d}")
    inner = Tokenizer(models.BPE(vocab, merges))
    split = (
        pre_tokenizers.Digits(individual_digits=True) if digits else pre_tokenizers.Split(Regex(r"\d{2}"), "isolated")
    )
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def _texts() -> list[Path]:
    room = Path(ns.tasks.__file__).parent
    return [*room.glob("*.py"), room / "data" / "facts.tsv", room.parent / "models" / "toy_words.py"]
