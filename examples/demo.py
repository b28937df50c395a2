"""What `make demo` shows: where in a small transformer a fact is held, found by exact patching.

The toy model says that the Velmar Tower is in Athens and the Ostrin Bridge in another city. Run the sentence about
the bridge, put the residual stream of the sentence about the tower in at one layer and one token, and see how far the
answer goes over: 1.00 is all the way, 0.00 not at all. Every cell of the table is a run of its own. The picture needs
matplotlib; the table does not.
"""

from __future__ import annotations

from pathlib import Path

import torch

import nnsplice as ns

FOLDER = Path("demo")


def main() -> None:
    """Print the table and write the picture."""
    torch.set_num_threads(1)  # so small a model only waits for a second thread
    model = ns.load("toy")
    fact = ns.models.toy_prompts().facts[0]
    metric = ns.logit_diff(fact.answer, fact.wrong)
    result = ns.sweep(model, fact.clean, fact.corrupted, "layers[:].output[:]", metric)

    print(f"{fact.clean} -> {fact.answer}\n{fact.corrupted} -> {fact.wrong}\n")
    print("How far the second answer goes over to the first, by patched token and layer:\n")
    effect = result.effect().sel(prompt=0)
    words = effect.token.values.tolist()
    width = max(map(len, words))
    print(" " * width + "".join(f"{layer:>7}" for layer in effect.layer.values))
    for word, row in zip(words, effect.transpose("position", "layer").values, strict=True):
        print(word.rjust(width) + "".join(f"{round(value, 2) + 0.0:7.2f}" for value in row.tolist()))

    try:
        axes = result.plot()
    except ns.errors.MissingPackage as error:
        print(f"\nNo picture: {error}")
        return
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / "causal_trace.png"
    ns.plots.save(axes, path, close=True)
    print(f"\nThe same as a picture: {path}")


if __name__ == "__main__":
    main()
