"""Rounding: the tolerance when two ways of computing the same logits are compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nnsplice import engine
from nnsplice.atlas import unwrap
from nnsplice.packed.cost import Cost
from nnsplice.sweeps.executors import Work
from nnsplice.sweeps.jobs import Job

#: The allowed relative difference of two correct computations, by the dtype of the weights.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
#: A float64 model may compute parts in float32: then this multiple of the measured noise is allowed, up to a bound.
NOISE_FACTOR, MOST_ALLOWED = 32, TOLERANCE[torch.float32]
#: The relative change of the embeddings with which that noise is measured.
MOVED = 1e-10
#: Dtypes in which a small effect may be a rounding error.
HALF_PRECISION = (torch.float16, torch.bfloat16)


def rounding_note(work: Work, off: float, size: float) -> str:
    """The note of a result in half precision about small effects; empty in others.

    Args:
        off: the largest difference between cells and one run per cell.
        size: the largest logit: rounding steps are relative to it, also where the compared cells agree exactly.
    """
    dtype = dtype_of(work)
    if dtype not in HALF_PRECISION:
        return ""
    least = max(off, torch.finfo(dtype).eps * size)
    return (
        f"in {str(dtype).removeprefix('torch.')}, {work.plan.metric.metric.name} is known to about {least:.2g}: "
        "an effect that is no larger may be rounding, its sign too"
    )


def dtype_of(work: Work) -> torch.dtype:
    """The dtype of the model's weights."""
    return next((p.dtype for p in unwrap(work.model).parameters() if p.is_floating_point()), torch.float32)


def tolerance(work: Work) -> float:
    """The largest difference between two correct computations of one number in this model."""
    return TOLERANCE.get(dtype_of(work), 2e-1)


def direction(logits: Tensor) -> Tensor:
    """Logits `[..., vocab]`, centred and normalised, projected on a fixed random direction: `[...]`, of size 1."""
    # Some models give tokens that cannot occur very large negative logits.
    wide = torch.where(logits.abs() < 1e4, logits, 0).double()
    wide = wide - wide.mean(-1, keepdim=True)
    along = torch.randn(wide.shape[-1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return wide @ along.to(wide.device) / wide.norm(dim=-1).clamp_min(1e-300)


def rounding_noise(work: Work, jobs: Sequence[Job]) -> tuple[float, Cost]:
    """The change of a prompt's logits, over all tokens, in a batch and with slightly changed embeddings; and the cost.

    The change is far below the tolerance of float64, but large enough to round some float32 numbers differently.
    """
    lengths = work.plan.corrupted.lengths("decoder")
    prompt = max((prompt for prompt, _ in jobs), key=lambda prompt: lengths[prompt])
    draws = torch.Generator().manual_seed(0)

    def perturbed(_module: nn.Module, _args: Any, out: Any) -> Any:
        if not isinstance(out, Tensor) or len(out) == 1:
            return out
        noise = torch.randn(out.shape, generator=draws, dtype=torch.float64).to(out)
        return out * (1 + MOVED * noise)

    found: list[Tensor] = []
    embedding: Any = unwrap(work.model).get_input_embeddings()  # pyright: ignore[reportCallIssue]
    hook = embedding.register_forward_hook(perturbed)
    cost = Cost()
    try:
        for rows in ([prompt], [prompt] * 4):
            with torch.no_grad():
                engine.run(
                    work.model,
                    work.plan.corrupted.inputs(rows, work.model.device),
                    lambda: found.append(direction(engine.read_logits(work.model))),
                )
            cost += work.cost_model.whole(work.plan.corrupted, rows, lengths[prompt])
    finally:
        hook.remove()
    return float((found[1] - found[0]).abs().max()), cost
