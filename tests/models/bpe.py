"""A small byte-level BPE tokenizer, made in memory, in which a leading space is part of the token."""

from __future__ import annotations

from typing import Any

import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

#: Words that become one token each, at the start of a text and after a space.
WHOLE = ("Paris", "Rome", "Tower", "The", "the", "is", "in")
#: A word in several tokens, also after a space.
PIECES = "Velmar"
END = "<|endoftext|>"


def tokenizer(*, trim_offsets: bool = True) -> Any:
    """Learned from a few words, the same on every call.

    Args:
        trim_offsets: whether a token's characters leave out the space that it begins with.
    """
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    inner.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    inner.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([*WHOLE, *(f"{word} {word}" for word in WHOLE)] * 2, trainer)
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=END, eos_token=END, pad_token=END)
