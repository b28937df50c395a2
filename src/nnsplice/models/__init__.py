"""Models to work on: the loader, and the toy models with the language they were trained on.

    load                              a model by name ("toy", "toy-llama"), folder, hub name or module
    unwrap                            the Hugging Face module inside a loaded model
    embedded                          the folder of "toy" or "toy-llama": a checkpoint like any other
    toy_prompts                       prompts that the toy models answer, as a `ToyPrompts`
    Fact, IOIPair, Review, Repeat     its records

loader                              `load`: which of the files below loads a name
folders, modules                    checkpoints by folder or hub name; modules that are already loaded
dequantise, conversion_cache        GGUF files as checkpoints, and the cache of them
published, sources                  models in Python packages; which checkpoint a name means
hub                                 whether the hub can be reached
toy_words, toy_sentences            the toy language: words, and sentences made of them
toy_prompts, toy_corpus             its prompts; its training data
train_toy, toy_accuracy             `python -m nnsplice.models.train_toy` trains a toy model; its accuracies
"""

from nnsplice.atlas import unwrap
from nnsplice.deprecated import renamed_to
from nnsplice.models.loader import load
from nnsplice.models.sources import embedded
from nnsplice.models.toy_prompts import Fact, IOIPair, Repeat, Review, ToyPrompts, toy_prompts

__all__ = ["Fact", "IOIPair", "Repeat", "Review", "ToyPrompts", "embedded", "load", "toy_prompts", "unwrap"]


def __dir__() -> list[str]:  # what <TAB> shows
    return __all__


def __getattr__(name: str) -> object:
    if name == "peel":
        renamed_to("ns.models.peel", "ns.models.unwrap")
        return unwrap
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
