"""What `make demo` shows: where in a small transformer a fact is held, found by exact patching.

The toy model says that the Velmar Tower is in Athens and the Ostrin Bridge in another city. Run the sentence about
the bridge, put the residual stream of the sentence about the tower in at one layer and one token, and see how far the
answer goes over: 1.00 is all the way, 0.00 not at all. Every cell of the table is a run of its own.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tqdm import tqdm

import nnsplice as ns

FOLDER = Path("demo")


def main() -> None:
    """Print the table and write the picture."""
    torch.set_num_threads(1)  # so small a model only waits for a second thread
    model = ns.load("toy")
    fact = ns.models.toy_prompts().facts[0]
    words = [model.tokenizer.decode(token) for token in model.tokenizer(fact.clean)["input_ids"]]
    answer, wrong = (model.tokenizer.convert_tokens_to_ids(word) for word in (fact.answer, fact.wrong))

    def difference(logits: torch.Tensor) -> torch.Tensor:
        return logits[0, -1, answer] - logits[0, -1, wrong]

    saved = ns.capture(model, fact.clean, "layers[:].output[:]")
    other = ns.capture(model, fact.corrupted, "layers[:].output[:]")
    # A run with its own values written in is that run: the two ends of the scale.
    high = difference(ns.patched_logits(model, fact.clean, saved))
    low = difference(ns.patched_logits(model, fact.corrupted, other))

    layers = len(saved) // len(words)
    effect = torch.zeros(len(words), layers)
    for key in tqdm(saved, desc="patching", unit="site", leave=False):
        layer, position = ns.parse_path(key).steps[0].index, ns.parse_path(key).position
        assert isinstance(layer, int) and isinstance(position, int)
        patched = difference(ns.patched_logits(model, fact.corrupted, saved.subset(key)))
        effect[position, layer] = (patched - low) / (high - low)

    print(f"{fact.clean} -> {fact.answer}\n{fact.corrupted} -> {fact.wrong}\n")
    print("How far the second answer goes over to the first, by patched token and layer:\n")
    width = max(map(len, words))
    print(" " * width + "".join(f"{layer:>7}" for layer in range(layers)))
    for word, row in zip(words, effect, strict=True):
        print(word.rjust(width) + "".join(f"{round(value, 2) + 0.0:7.2f}" for value in row.tolist()))

    FOLDER.mkdir(exist_ok=True)
    axes = ns.plots.heatmap(
        effect,
        rows=words,
        columns=list(range(layers)),
        row_label="patched token",
        column_label="layer",
        title=f"Where “{fact.subject}” becomes “{fact.answer}”",
        value_label="share of the answer restored",
    )
    path = FOLDER / "causal_trace.png"
    ns.plots.save(axes, path, close=True)
    print(f"\nThe same as a picture: {path}")


if __name__ == "__main__":
    main()
