"""The trained parameters of a site: a rotation, a rotation with a boundary, or a mask.

Each part is a module with three uses: `begin` before every step, `change` as the edit of a packed row, `penalty` beside
the loss; and `basis` when it is done. A rotation is torch's own orthogonal parametrisation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

#: Where the hard concrete distribution is stretched to, and its temperature (Louizos et al., 2018).
LOW, HIGH, BETA = -0.1, 1.1, 2 / 3
#: The penalty for all directions open, in nats of loss.
COST = 1.0


class TrainableSubspace(nn.Module):
    """The trained parameters of one site."""

    def begin(self, progress: float) -> None:
        """Prepare a step.

        Args:
            progress: the finished share of the training.
        """
        raise NotImplementedError

    def change(self, current: Tensor, given: Tensor | None) -> Tensor:
        """The interchange: `[row, width]` with its part of the source's value."""
        raise NotImplementedError

    def penalty(self) -> Tensor:
        """A penalty that is added to the loss."""
        return next(self.parameters()).new_zeros(())

    def basis(self) -> Tensor:
        """`[k, width]`, the directions that are kept when training is done."""
        raise NotImplementedError


class Rotation(TrainableSubspace):
    """DAS: k directions."""

    def __init__(self, width: int, k: int, generator: torch.Generator) -> None:
        super().__init__()
        linear = nn.Linear(width, k, bias=False)
        start = torch.linalg.qr(torch.randn(width, k, generator=generator, dtype=torch.float64))[0].T
        with torch.no_grad():
            linear.weight.copy_(start)
        self.linear: Any = orthogonal(linear, orthogonal_map="householder" if k < width else "matrix_exp")
        self.directions: Any = None
        #: How far each direction is open; None for all of it.
        self.gates: Tensor | None = None

    def begin(self, progress: float) -> None:
        """Compute the directions once for the whole step."""
        self.directions = self.linear.weight

    def change(self, current: Tensor, given: Tensor | None) -> Tensor:
        """`h + Rᵀ g R (h' - h)`, where the rows of R are directions and g is how far each is open."""
        assert given is not None
        along = (given - current).to(self.directions) @ self.directions.T
        along = along if self.gates is None else along * self.gates
        return current + (along @ self.directions).to(current)

    def basis(self) -> Tensor:
        """All directions."""
        return self.linear.weight.detach()


class Boundless(Rotation):
    """Boundless DAS: at most k directions, the first of them open up to a boundary that is trained too."""

    def __init__(self, width: int, k: int, generator: torch.Generator) -> None:
        super().__init__(width, k, generator)
        self.boundary: nn.Parameter = nn.Parameter(torch.tensor(0.5))
        self.k: int = k

    def begin(self, progress: float) -> None:
        """The gates are soft at first, and nearly hard at the end."""
        super().begin(progress)
        temperature = max(self.k / 10, 0.05) * (0.05 / max(self.k / 10, 0.05)) ** progress
        order = torch.arange(self.k, device=self.directions.device) + 0.5
        self.gates: Tensor | None = torch.sigmoid((self.boundary.clamp(0, 1) * self.k - order) / temperature).to(
            self.directions
        )

    def penalty(self) -> Tensor:
        """The share of the directions that is open."""
        return COST * self.boundary.clamp(0, 1)

    def basis(self) -> Tensor:
        """The directions before the boundary, one at least."""
        kept = max(round(float(self.boundary.detach().clamp(0, 1)) * self.k), 1)
        return self.linear.weight.detach()[:kept]


class NumberMask(TrainableSubspace):
    """A mask over the site's own numbers: hard concrete gates, and a budget of k that stay open."""

    def __init__(self, width: int, k: int, generator: torch.Generator) -> None:
        super().__init__()
        self.scores: nn.Parameter = nn.Parameter(torch.full((width,), 2.0))
        self.k: int = k
        self.generator: torch.Generator = generator
        self.gates: Tensor | None = None
        #: The current weight of the penalty for open gates.
        self.pressure: float = 0.0

    def begin(self, progress: float) -> None:
        """Draw the gates; what is open beyond the budget costs more and more."""
        scores = self.scores
        drawn = torch.rand(scores.shape, generator=self.generator).clamp(1e-6, 1 - 1e-6).to(scores)
        soft = torch.sigmoid((torch.log(drawn) - torch.log1p(-drawn) + scores) / BETA)
        self.gates = (soft * (HIGH - LOW) + LOW).clamp(0, 1)
        self.pressure = min(2 * progress, 1.0)

    def penalty(self) -> Tensor:
        """The expected number of open directions beyond the budget, in budgets."""
        open_ = torch.sigmoid(self.scores - BETA * math.log(-LOW / HIGH)).sum()
        return self.pressure * torch.relu(open_ - self.k) / self.k

    def change(self, current: Tensor, given: Tensor | None) -> Tensor:
        """The interchange of single numbers."""
        assert given is not None and self.gates is not None
        return current + (self.gates * (given - current).to(self.gates)).to(current)

    def basis(self) -> Tensor:
        """The k numbers with the highest scores."""
        kept = self.scores.detach().topk(self.k).indices.sort().values
        return torch.eye(len(self.scores), device=self.scores.device, dtype=self.scores.dtype)[kept]


@dataclass(frozen=True)
class SubspaceMethod:
    """A way to find a subspace."""

    #: `(width, k, generator) -> Part`
    make: Callable[[int, int, torch.Generator], TrainableSubspace]
    learning_rate: float


METHODS = {
    "das": SubspaceMethod(Rotation, 1e-2),
    "boundless": SubspaceMethod(Boundless, 1e-2),
    "mask": SubspaceMethod(NumberMask, 1e-1),
}
