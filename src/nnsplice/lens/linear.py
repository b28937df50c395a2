"""Norms and unembeddings as linear maps in one run, measured on the modules.

A norm is `gain * (input - mean) / size + bias`, where the mean is 0 in RMS norms. With the size that it has in the run
kept constant it is linear in its input, so a direction of the metric at its output has a direction at its input (the
gradient, in the sense of autograd).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from nnsplice import engine
from nnsplice.atlas import text_config, unwrap
from nnsplice.errors import RefusedPlace
from nnsplice.metrics import Bound

#: The largest difference of two states that are equal but for rounding, relative to the largest number. Many norms
#: compute in float32, whatever the dtype of their input.
_CLOSE = {torch.float64: 1e-5, torch.float32: 1e-4}
_HALF = 5e-2


@dataclass(frozen=True)
class FrozenNorm:
    """One norm in one run: `scale * gain * (input - mean) + bias + rounding`, a row for each prompt."""

    #: `[width]`
    gain: Tensor
    bias: Tensor
    #: `[prompt, 1]`
    scale: Tensor
    #: Whether the mean is subtracted first, as in LayerNorm.
    centres: bool
    #: `[prompt, width]`: the output of the norm minus the rest of this form, which is small.
    rounding: Tensor

    @staticmethod
    def of(module: nn.Module, name: str, inputs: Tensor, outputs: Tensor) -> FrozenNorm:
        """The form of a norm, from its input and output in the run, `[prompt, width]` each.

        Raises:
            RefusedPlace: the norm does not have this form.
        """
        width = inputs.shape[-1]
        probe = torch.ones(width, dtype=inputs.dtype, device=inputs.device)
        probe[1::2] = -1
        if width % 2:
            probe[-3:] = probe.new_tensor([1.0, 1.0, -2.0])
        with torch.no_grad():
            try:
                up, down, moved = (
                    module(states[None, None])[0, 0].double() for states in (probe, -probe, probe + 3 * probe[0])
                )
                again = module(inputs[:, None])[:, 0].double()
            except (TypeError, RuntimeError, ValueError, IndexError) as error:
                raise _refused(name, f"it does not run by itself ({error})") from None
        bias, gain = (up + down) / 2, (up - down) / 2 / probe.double()
        centres = bool(torch.allclose(moved, up, rtol=1e-3, atol=1e-3 * float(up.abs().max())))
        states = inputs.double()
        line = gain * (states - states.mean(-1, keepdim=True) if centres else states)
        outputs = outputs.double()
        allowed = _CLOSE.get(inputs.dtype, _HALF) * float(outputs.abs().max())
        if not float((again - outputs).abs().max()) <= allowed:
            raise _refused(name, "by itself it makes other numbers than in the run")
        scale = ((outputs - bias) * line).sum(-1, keepdim=True) / (line * line).sum(-1, keepdim=True)
        scale = torch.where(torch.isfinite(scale), scale, 0.0)
        rounding = outputs - bias - scale * line
        off = float(rounding.abs().max())
        if not off <= allowed:
            raise _refused(name, f"what it makes is {off:.2g} off a gain times what it is given, over a size")
        return FrozenNorm(gain, bias, scale, centres, rounding)

    def pulled_back(self, direction: Tensor) -> Tensor:
        """The direction at the input of the norm, of one at its output: `[prompt, width]`."""
        before = self.scale * self.gain * direction
        return before - before.mean(-1, keepdim=True) if self.centres else before

    def constant(self, direction: Tensor) -> Tensor:
        """The part of the metric that is the norm's own, for a direction at its output: `[prompt]`."""
        return ((self.bias + self.rounding) * direction).sum(-1)


def _refused(name: str, why: str) -> RefusedPlace:
    return RefusedPlace(
        f"{name} is no norm that is linear once its size is constant: {why}",
        expected="a gain times what it is given, less its mean or not, over a size, and a bias",
    )


@dataclass(frozen=True)
class LinearForm:
    """A linear function of a module's input, a row for each prompt: `direction . input + constant`."""

    #: `[prompt, width]`
    direction: Tensor
    #: `[prompt]`
    constant: Tensor

    @staticmethod
    def through(module: Callable[[Tensor], Tensor], inputs: Tensor, behind: Tensor, name: str) -> LinearForm:
        """The linear form at the input of a module, of a direction at its output.

        Args:
            inputs: its input in the run, `[prompt, width]`; whether the module is linear is tried there.
            behind: the direction at its output, `[prompt, output width]`.

        Raises:
            RefusedPlace: the module is not linear.
        """
        with torch.enable_grad():
            states = inputs.detach().clone().requires_grad_()
            # Each row is a prompt of one token, so that rows do not mix.
            outputs = module(states[:, None])[:, 0]
            (direction,) = torch.autograd.grad((outputs * behind.to(outputs)).sum(), states)
        with torch.no_grad():
            at_zero = module(torch.zeros_like(inputs[:1])[:, None])[:, 0]
        constant = (at_zero.double() * behind).sum(-1)
        parts = outputs.detach().double() * behind
        direction, states = direction.double(), inputs.double()
        size = parts.abs().sum(-1) + (direction * states).abs().sum(-1)
        off = ((direction * states).sum(-1) + constant - parts.sum(-1)).abs()
        if not bool((off <= rounding(inputs.dtype) * size.clamp_min(1e-300)).all()):
            raise RefusedPlace(f"{name} is not linear, so what it is given has no shares of what it makes")
        return LinearForm(direction, constant)


def rounding(dtype: torch.dtype) -> float:
    """The largest rounding error of a sum, relative to the sum of the absolute values of its terms."""
    return 1e-10 if dtype == torch.float64 else 1e-4 if dtype == torch.float32 else _HALF


def weights_of(metric: Bound, prompts: int, vocabulary: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The metric as weights of the logits `[prompt, vocab]`, and its value where all logits are zero `[prompt]`.

    Raises:
        RefusedPlace: the metric is not linear in the logits.
    """
    generator = torch.Generator().manual_seed(0)

    def drawn() -> Tensor:
        return torch.randn(prompts, vocabulary, generator=generator, dtype=torch.float64).to(device)

    def measured(logits: Tensor) -> Tensor:
        return metric(logits, range(prompts)).double()

    with torch.enable_grad():
        point = drawn().requires_grad_()
        value = measured(point)
        found = torch.autograd.grad(value.sum(), point, allow_unused=True)[0] if value.requires_grad else None
    weights = torch.zeros_like(point) if found is None else found
    with torch.no_grad():
        at_zero = measured(torch.zeros_like(point))
        tried = (point.detach(), 30 * drawn(), drawn() - 5)
        nonlinear = any(
            not torch.allclose((weights * logits).sum(-1) + at_zero, measured(logits), rtol=1e-9, atol=1e-9)
            for logits in tried
        )
    if found is None or nonlinear or not bool(weights.any(-1).all()):
        if metric.metric.local and any(isinstance(one, tuple) for ids in metric.ids.values() for one in ids):
            raise RefusedPlace(
                f"{metric.metric.name} adds the probabilities of a set of tokens, which is no weighted sum of logits, "
                "so it has no parts",
                expected="a difference of logits of single tokens, or of means of logits",
                write=f"{_difference_of_means(metric)}   (a metric of token ids)",
            )
        raise RefusedPlace(
            f"{metric.metric.name} is not a weighted sum of logits, so it has no parts",
            expected="a logit, or a difference of logits of single tokens",
            write="ns.logit_diff(answer, wrong), or a token",
        )
    return weights, at_zero


def _difference_of_means(metric: Bound) -> str:
    """The source of a metric of means over the sets; of the prompts' own tokens, if all have the same."""
    same = all(len(set(ids)) == 1 for ids in metric.ids.values())
    tokens = {name: np.atleast_1d(ids[0]).tolist() if same else f"[{name}, ...]" for name, ids in metric.ids.items()}
    return "lambda logits: " + " - ".join(f"logits[:, {one}].mean(-1)" for one in tokens.values())


# --- between two states of a run --------------------------------------------------------------------------------------


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two states are equal up to rounding."""
    allowed = _CLOSE.get(a.dtype, _HALF)
    a, b = a.double(), b.double()
    return float((a - b).abs().max()) <= allowed * max(float(b.abs().max()), 1e-30)


def check_same(outputs: Tensor, inputs: Tensor, between: str) -> None:
    """Raise where something changes a state between the output of a module and the input of the next.

    Raises:
        RefusedPlace: the two differ.
    """
    if outputs.shape != inputs.shape or not close(outputs, inputs):
        raise RefusedPlace(f"something stands between {between} that no part of the sum goes through")


def factor_between(outputs: Tensor, inputs: Tensor, between: str) -> float:
    """The number that a state is multiplied by between the output of a module and the input of the next.

    Raises:
        RefusedPlace: the two differ by more than a factor.
    """
    if outputs.shape != inputs.shape:
        raise RefusedPlace(f"more than a factor stands between {between}")
    if torch.equal(outputs, inputs):
        return 1.0
    a, b = outputs.double(), inputs.double()
    factor = float((a * b).sum() / (a * a).sum())
    if not close(a * factor, inputs):
        raise RefusedPlace(f"more than a factor stands between {between}")
    return factor


def logit_factor(model: engine.Model, outputs: Tensor, logits: Tensor) -> float:
    """The number that the output of the unembedding is multiplied by to give the logits, before a softcap.

    Raises:
        RefusedPlace: the two differ by more than a factor and a softcap.
    """
    if outputs.shape != logits.shape:
        raise RefusedPlace("what the unembedding makes are not the logits one for one")
    a, b = outputs.double(), logits.double()
    tried: list[tuple[Tensor, float | None]] = [(b, None)]
    config = text_config(unwrap(model))
    caps = [value for name, value in vars(config).items() if "cap" in name and isinstance(value, float) and value > 0]
    tried += [(cap * torch.atanh((b / cap).clamp(-1, 1)), cap) for cap in caps]
    for before, cap in tried:
        near = torch.isfinite(before) & (
            before.abs() < (cap or float("inf"))
        )  # the inverse of tanh is infinite at the cap
        factor = 1.0 if torch.equal(a, before) else float((a * before)[near].sum() / (a * a)[near].sum())
        again = a * factor if cap is None else cap * torch.tanh(a * factor / cap)
        if close(again.to(logits.dtype), logits):
            return factor
    raise RefusedPlace(
        "more than a factor and a softcap stands between the unembedding and the logits",
        expected="a model whose logits are linear in its last normed state",
    )
