"""Norms and unembeddings as linear maps at one run, measured on the modules.

A norm is a gain times what it is given, less its mean in some, over a size, and a bias. With the size that it has in
the run held still it is linear, so that what a metric reads behind it can be carried to what stands in front of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nnsplice.errors import RefusedPlace
from nnsplice.metrics import Bound

#: By how much a norm may miss the form that is measured, relative to the largest number of its output.
_FORM = {torch.float64: 1e-5, torch.float32: 1e-4}  # (many norms compute in float32, whatever they are given)
_HALF = 5e-2


@dataclass(frozen=True)
class Frozen:
    """One norm at one run: `scale * gain * (given - mean) + bias + rounding`, a row for each prompt."""

    #: `[width]`
    gain: Tensor
    bias: Tensor
    #: `[prompt, 1]`
    scale: Tensor
    #: Whether the mean is taken away first.
    centres: bool
    #: `[prompt, width]`: what the norm made less what this form says, which is small.
    rounding: Tensor

    @staticmethod
    def of(module: nn.Module, name: str, given: Tensor, made: Tensor) -> Frozen:
        """A norm, with what it was given and what it made in the run, `[prompt, width]`.

        Raises:
            RefusedPlace: it is no such norm.
        """
        width = given.shape[-1]
        probe = torch.ones(width, dtype=given.dtype, device=given.device)
        probe[1::2] = -1
        if width % 2:
            probe[-3:] = probe.new_tensor([1.0, 1.0, -2.0])
        with torch.no_grad():
            try:
                up, down, moved = (
                    module(states[None, None])[0, 0].double() for states in (probe, -probe, probe + 3 * probe[0])
                )
                again = module(given[:, None])[:, 0].double()
            except (TypeError, RuntimeError, ValueError, IndexError) as error:
                raise _refused(name, f"it cannot be asked by itself ({error})") from None
        bias, gain = (up + down) / 2, (up - down) / 2 / probe.double()
        centres = bool(torch.allclose(moved, up, rtol=1e-3, atol=1e-3 * float(up.abs().max())))
        states = given.double()
        line = gain * (states - states.mean(-1, keepdim=True) if centres else states)
        made = made.double()
        allowed = _FORM.get(given.dtype, _HALF) * float(made.abs().max())
        if not float((again - made).abs().max()) <= allowed:
            raise _refused(name, "by itself it makes other numbers than in the run")
        scale = ((made - bias) * line).sum(-1, keepdim=True) / (line * line).sum(-1, keepdim=True)
        scale = torch.where(torch.isfinite(scale), scale, 0.0)
        rounding = made - bias - scale * line
        off = float(rounding.abs().max())
        if not off <= allowed:
            raise _refused(name, f"what it makes is {off:.2g} off a gain times what it is given, over a size")
        return Frozen(gain, bias, scale, centres, rounding)

    def back(self, towards: Tensor) -> Tensor:
        """What a direction behind the norm is in front of it: `[prompt, width]`."""
        before = self.scale * self.gain * towards
        return before - before.mean(-1, keepdim=True) if self.centres else before

    def constant(self, towards: Tensor) -> Tensor:
        """What the norm adds by itself along a direction behind it: `[prompt]`."""
        return ((self.bias + self.rounding) * towards).sum(-1)


def _refused(name: str, why: str) -> RefusedPlace:
    return RefusedPlace(
        f"{name} is no norm that is linear once its size stands still: {why}",
        expected="a gain times what it is given, less its mean or not, over a size, and a bias",
    )


@dataclass(frozen=True)
class Line:
    """A linear function of a module's input, a row for each prompt: `towards . input + constant`."""

    #: `[prompt, width]`
    towards: Tensor
    #: `[prompt]`
    constant: Tensor

    @staticmethod
    def through(module: Callable[[Tensor], Tensor], given: Tensor, behind: Tensor, name: str) -> Line:
        """What a direction behind a linear module is in front of it.

        Args:
            given: what it is given in the run, `[prompt, width]`; whether it is linear is tried there.
            behind: `[prompt, width behind]`.

        Raises:
            RefusedPlace: it is not linear.
        """
        with torch.enable_grad():
            states = given.detach().clone().requires_grad_()
            # A token each, as in the model; rows do not mix.
            made = module(states[:, None])[:, 0]
            (towards,) = torch.autograd.grad((made * behind.to(made)).sum(), states)
        with torch.no_grad():
            nothing = module(torch.zeros_like(given[:1])[:, None])[:, 0]
        constant = (nothing.double() * behind).sum(-1)
        value = (made.detach().double() * behind).sum(-1)
        towards, states = towards.double(), given.double()
        size = (made.detach().double() * behind).abs().sum(-1) + (towards * states).abs().sum(-1)
        off = ((towards * states).sum(-1) + constant - value).abs()
        if not bool((off <= rounding(given.dtype) * size.clamp_min(1e-300)).all()):
            raise RefusedPlace(f"{name} is not linear, so what it is given has no shares of what it makes")
        return Line(towards, constant)

    def of(self, given: Tensor) -> Tensor:
        """`[prompt]`, without the constant."""
        return (self.towards * given.double()).sum(-1)


def rounding(dtype: torch.dtype) -> float:
    """What rounding may do to a sum, relative to the sizes of its terms."""
    return 1e-10 if dtype == torch.float64 else 1e-4 if dtype == torch.float32 else _HALF


def weights_of(metric: Bound, prompts: int, vocabulary: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`[prompt, vocab]` and `[prompt]`: the metric as weights of logits, and what it is where all of them are zero.

    Raises:
        RefusedPlace: it is not linear in the logits.
    """
    generator = torch.Generator().manual_seed(0)

    def drawn() -> Tensor:
        return torch.randn(prompts, vocabulary, generator=generator, dtype=torch.float64).to(device)

    def asked(logits: Tensor) -> Tensor:
        return metric(logits, range(prompts)).double()

    with torch.enable_grad():
        point = drawn().requires_grad_()
        value = asked(point)
        found = torch.autograd.grad(value.sum(), point, allow_unused=True)[0] if value.requires_grad else None
    weights = torch.zeros_like(point) if found is None else found
    with torch.no_grad():
        nothing = asked(torch.zeros_like(point))
        tried = (point.detach(), 30 * drawn(), drawn() - 5)
        bent = any(
            not torch.allclose((weights * logits).sum(-1) + nothing, asked(logits), rtol=1e-9, atol=1e-9)
            for logits in tried
        )
    if found is None or bent or not bool(weights.any(-1).all()):
        raise RefusedPlace(
            f"{metric.metric.name} is not a weighted sum of logits, so it has no parts",
            expected="a logit, or a difference of logits of single tokens",
            write="ns.logit_diff(answer, wrong), or a token",
        )
    return weights, nothing
