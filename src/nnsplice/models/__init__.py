"""Models to work on: the loader, and the embedded toy models with the language they speak.

    load                              a model by name ("toy", "toy-llama"), folder, hub name or module
    toy_prompts                       prompts that the toy models answer, as a `ToyPrompts`
    Fact, IOIPair, Review, Repeat     its records

`python -m nnsplice.models.train_toy` makes a toy model anew.
"""

from nnsplice.models.language import Fact, IOIPair, Repeat, Review, ToyPrompts, toy_prompts
from nnsplice.models.loader import load

__all__ = ["Fact", "IOIPair", "Repeat", "Review", "ToyPrompts", "load", "toy_prompts"]
