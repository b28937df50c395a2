"""Models to work on: the loader, and the embedded toy models with the language they speak.

    load                              a model by name ("toy", "toy-llama"), folder, hub name or module
    unwrap                              the Hugging Face module inside a loaded model
    embedded                          the folder of "toy" or "toy-llama": a checkpoint like any other
    toy_prompts                       prompts that the toy models answer, as a `ToyPrompts`
    Fact, IOIPair, Review, Repeat     its records

`python -m nnsplice.models.train_toy` makes a toy model anew.
"""

from nnsplice.atlas import unwrap
from nnsplice.deprecated import renamed_to
from nnsplice.models.language import Fact, IOIPair, Repeat, Review, ToyPrompts, toy_prompts
from nnsplice.models.loader import load
from nnsplice.models.sources import embedded

__all__ = ["Fact", "IOIPair", "Repeat", "Review", "ToyPrompts", "embedded", "load", "toy_prompts", "unwrap"]


def __dir__() -> list[str]:  # what <TAB> shows
    return __all__


def __getattr__(name: str) -> object:
    if name == "peel":
        renamed_to("ns.models.peel", "ns.models.unwrap")
        return unwrap
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
