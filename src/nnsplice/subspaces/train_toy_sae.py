"""Train the SAE that is shipped with the toy model: `python -m nnsplice.subspaces.train_toy_sae DIR`.

A top-k SAE on the stream behind the third layer, by reconstruction alone. The same seed gives the same numbers on one
machine.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from nnsplice.activations import capture
from nnsplice.models import load, toy_prompts
from nnsplice.subspaces.sae import SAE
from nnsplice.subspaces.sae_files import write_sae

PLACE = "layers[2].output"
FEATURES, K, STEPS, BATCH = 256, 8, 4000, 256


def states(seed: int = 0) -> Tensor:
    """`[token, width]`, what the toy model has at the site on its own prompts; first tokens left out."""
    prompts = toy_prompts()
    texts: Sequence[str] = [
        *(fact.clean for fact in prompts.facts), *(review.text for review in prompts.reviews),
        *(pair.clean for pair in prompts.ioi),
    ]  # fmt: skip
    toy = load("toy")
    by_length: dict[int, list[str]] = {}
    for text in dict.fromkeys(texts):
        by_length.setdefault(len(toy.tokenizer(text)["input_ids"]), []).append(text)
    found = [capture(toy, some, f"{PLACE}[1:]", batch_size=128).get(f"{PLACE}[1:]") for some in by_length.values()]
    rows = torch.cat([tensor.flatten(0, 1) for tensor in found])
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]


def train(rows: Tensor, seed: int = 0) -> SAE:
    """A top-k SAE of these states."""
    torch.manual_seed(seed)
    width = rows.shape[1]
    decoder = torch.nn.functional.normalize(torch.randn(FEATURES, width), dim=1)
    held = {
        "W_dec": decoder.clone(), "W_enc": decoder.T.clone(), "b_enc": torch.zeros(FEATURES), "b_dec": rows.mean(0)
    }  # fmt: skip
    held = {name: tensor.requires_grad_() for name, tensor in held.items()}
    optimizer = torch.optim.Adam(held.values(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    for _ in range(STEPS):
        batch = rows[torch.randint(len(rows), (BATCH,))]
        before = (batch - held["b_dec"]) @ held["W_enc"] + held["b_enc"]
        kept = before.topk(K, dim=-1)
        features = torch.zeros_like(before).scatter(-1, kept.indices, kept.values.relu())
        loss = (features @ held["W_dec"] + held["b_dec"] - batch).square().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            held["W_dec"] /= held["W_dec"].norm(dim=1, keepdim=True)
    about = {"model_name": "toy", "hook_name": "blocks.2.hook_resid_post"}
    return SAE("topk", {name: t.detach() for name, t in held.items()}, k=K, centred=True, about=about)


def explained(sae: SAE, rows: Tensor) -> float:
    """The share of the variance that the features make up for."""
    return 1 - float(sae.error(rows).square().sum() / (rows - rows.mean(0)).square().sum())


def main(folder: str) -> None:
    """Train it, write it into a folder, and say how good it is."""
    torch.set_num_threads(1)
    every = states()
    held_out = len(every) // 10
    made = train(every[held_out:])
    write_sae(made, folder)
    used = int((made.encode(every[:held_out]) > 0).any(0).sum())
    summary = f"{explained(made, every[:held_out]):.3f} of the variance of held-out states, {used} features used"
    sys.stdout.write(f"{len(every)} states; {summary}\n")


if __name__ == "__main__":
    main(sys.argv[1])
