"""Rounding: how far two ways of computing one number may lie apart in a model."""

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

#: How far two ways of computing one number may lie apart, in the model's dtype, where both are right.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
#: ... and as a multiple of what rounding does to it, in a model of float64 that rounds to less on its way.
NOISE_FACTOR, MOST_ALLOWED = 32, TOLERANCE[torch.float32]
#: How far embeddings are moved to see that, relative to themselves.
MOVED = 1e-10
#: Dtypes in which a small effect may be rounding.
HALF_PRECISION = (torch.float16, torch.bfloat16)


def rounding_note(work: Work, off: float, size: float) -> str:
    """The note of a result in half precision about small effects; empty in others.

    Args:
        off: the difference of cells from one run per cell.
        size: the size of the logits; a few cells may agree exactly while others are rounded to steps of it.
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
    """The direction of logits as a number near 1, independent of the scale of the metric."""
    wide = torch.where(logits.abs() < 1e4, logits, 0).double()  # tokens that are ruled out have logits of any size
    wide = wide - wide.mean(-1, keepdim=True)
    along = torch.randn(wide.shape[-1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return wide @ along.to(wide.device) / wide.norm(dim=-1).clamp_min(1e-300)


def rounding_noise(work: Work, jobs: Sequence[Job]) -> tuple[float, Cost]:
    """The change of a prompt's logits, at every token, in a batch and with slightly changed embeddings.

    By so little that arithmetic in float64 hardly shows it, and enough to turn some roundings to float32.
    """
    lengths = work.plan.corrupted.lengths("decoder")
    prompt = max((prompt for prompt, _ in jobs), key=lambda prompt: lengths[prompt])
    draws = torch.Generator().manual_seed(0)

    def shaken(_module: nn.Module, _args: Any, out: Any) -> Any:
        if not isinstance(out, Tensor) or len(out) == 1:
            return out
        noise = torch.randn(out.shape, generator=draws, dtype=torch.float64).to(out)
        return out * (1 + MOVED * noise)

    found: list[Tensor] = []
    embedding: Any = unwrap(work.model).get_input_embeddings()  # pyright: ignore[reportCallIssue]
    hook = embedding.register_forward_hook(shaken)
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
