"""Compare the numbers of `ns.load_sae` with those of SAELens, in an environment that has both.

    python bench/compare_saelens.py

SAELens writes an SAE of each kind with random weights; both read it, and encode and decode the same values.
"""

from __future__ import annotations

import sys
import tempfile
from importlib.metadata import version
from typing import Any

import sae_lens
import torch

import nnsplice as ns

WIDTH, FEATURES = 32, 128
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("Standard", {}),
    ("TopK", {"k": 9}),
    ("TopK", {"k": 9, "rescale_acts_by_decoder_norm": True}),
    ("JumpReLU", {}),
    ("Gated", {}),
]


def compared(name: str, options: dict[str, Any]) -> tuple[float, float]:
    """How far features and reconstructions are apart at most."""
    config = getattr(sae_lens, f"{name}SAEConfig")(d_in=WIDTH, d_sae=FEATURES, **options)
    theirs = getattr(sae_lens, f"{name}SAE")(config)
    with torch.no_grad():
        for parameter_name, parameter in theirs.named_parameters():
            parameter.copy_(
                torch.rand_like(parameter) if parameter_name == "threshold" else torch.randn_like(parameter)
            )
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_model(folder)
        ours = ns.load_sae(folder)
    values = 2 * torch.randn(50, 4, WIDTH)
    with torch.no_grad():
        features = theirs.encode(values)
        out = theirs.decode(features)
    mine = ours.encode(values)
    return float((mine - features).abs().max()), float((ours.decode(mine, values) - out).abs().max())


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.stdout.write(f"sae-lens {version('sae-lens')}\n")
    for name, options in KINDS:
        for norm in ("none", "layer_norm", "constant_norm_rescale"):
            for centred in (False, True):
                more = {**options, "normalize_activations": norm, "apply_b_dec_to_input": centred}
                apart = compared(name, more)
                sys.stdout.write(f"{name:9} {more}: features {apart[0]:.1e}, reconstruction {apart[1]:.1e} apart\n")
