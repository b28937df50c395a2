"""Norms and unembeddings as linear maps at one run, measured on the modules.

A norm is a gain times what it is given, less its mean in some, over a size, and a bias. With the size that it has in
the run kept constant it is linear, so a direction that a metric reads behind it is a direction in front of it.
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

#: By how much a norm may miss the form that is measured, relative to the largest number of its output.
_FORM = {torch.float64: 1e-5, torch.float32: 1e-4}  # (many norms compute in float32, whatever they are given)
_HALF = 5e-2


@dataclass(frozen=True)
class FrozenNorm:
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
    def of(module: nn.Module, name: str, given: Tensor, made: Tensor) -> FrozenNorm:
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
                raise _refused(name, f"it does not run by itself ({error})") from None
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
        return FrozenNorm(gain, bias, scale, centres, rounding)

    def back(self, direction: Tensor) -> Tensor:
        """What a direction behind the norm is in front of it: `[prompt, width]`."""
        before = self.scale * self.gain * direction
        return before - before.mean(-1, keepdim=True) if self.centres else before

    def constant(self, direction: Tensor) -> Tensor:
        """What the norm adds by itself along a direction behind it: `[prompt]`."""
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
    def through(module: Callable[[Tensor], Tensor], given: Tensor, behind: Tensor, name: str) -> LinearForm:
        """The direction in front of a linear module that a direction behind it stands for.

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
            (direction,) = torch.autograd.grad((made * behind.to(made)).sum(), states)
        with torch.no_grad():
            nothing = module(torch.zeros_like(given[:1])[:, None])[:, 0]
        constant = (nothing.double() * behind).sum(-1)
        value = (made.detach().double() * behind).sum(-1)
        direction, states = direction.double(), given.double()
        size = (made.detach().double() * behind).abs().sum(-1) + (direction * states).abs().sum(-1)
        off = ((direction * states).sum(-1) + constant - value).abs()
        if not bool((off <= rounding(given.dtype) * size.clamp_min(1e-300)).all()):
            raise RefusedPlace(f"{name} is not linear, so what it is given has no shares of what it makes")
        return LinearForm(direction, constant)


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

    def measured(logits: Tensor) -> Tensor:
        return metric(logits, range(prompts)).double()

    with torch.enable_grad():
        point = drawn().requires_grad_()
        value = measured(point)
        found = torch.autograd.grad(value.sum(), point, allow_unused=True)[0] if value.requires_grad else None
    weights = torch.zeros_like(point) if found is None else found
    with torch.no_grad():
        nothing = measured(torch.zeros_like(point))
        tried = (point.detach(), 30 * drawn(), drawn() - 5)
        bent = any(
            not torch.allclose((weights * logits).sum(-1) + nothing, measured(logits), rtol=1e-9, atol=1e-9)
            for logits in tried
        )
    if found is None or bent or not bool(weights.any(-1).all()):
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
    return weights, nothing


def _difference_of_means(metric: Bound) -> str:
    """The source of a metric of means over the sets; of the prompts' own tokens, if all have the same."""
    same = all(len(set(ids)) == 1 for ids in metric.ids.values())
    tokens = {name: np.atleast_1d(ids[0]).tolist() if same else f"[{name}, ...]" for name, ids in metric.ids.items()}
    return "lambda logits: " + " - ".join(f"logits[:, {one}].mean(-1)" for one in tokens.values())


# --- between two states of a run --------------------------------------------------------------------------------------


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two states are one, but for rounding."""
    allowed = 1e-5 if a.dtype == torch.float64 else 1e-4 if a.dtype == torch.float32 else 5e-2
    a, b = a.double(), b.double()
    return float((a - b).abs().max()) <= allowed * max(float(b.abs().max()), 1e-30)


def check_same(made: Tensor, given: Tensor, between: str) -> None:
    """Raise where a state is not handed on as it was made.

    Raises:
        RefusedPlace: so it is.
    """
    if made.shape != given.shape or not close(made, given):
        raise RefusedPlace(f"something stands between {between} that no part of the sum goes through")


def factor_between(made: Tensor, given: Tensor, between: str) -> float:
    """The number that a state is multiplied by on its way.

    Raises:
        RefusedPlace: more happens to it.
    """
    if made.shape != given.shape:
        raise RefusedPlace(f"more than a factor stands between {between}")
    if torch.equal(made, given):
        return 1.0
    a, b = made.double(), given.double()
    factor = float((a * b).sum() / (a * a).sum())
    if not close(a * factor, given):
        raise RefusedPlace(f"more than a factor stands between {between}")
    return factor


def logit_factor(model: engine.Model, made: Tensor, logits: Tensor) -> float:
    """The number that what the unembedding makes is multiplied by to be logits, before a softcap.

    Raises:
        RefusedPlace: more happens to it.
    """
    if made.shape != logits.shape:
        raise RefusedPlace("what the unembedding makes are not the logits one for one")
    a, b = made.double(), logits.double()
    tried: list[tuple[Tensor, float | None]] = [(b, None)]
    config = text_config(unwrap(model))
    caps = [value for name, value in vars(config).items() if "cap" in name and isinstance(value, float) and value > 0]
    tried += [(cap * torch.atanh((b / cap).clamp(-1, 1)), cap) for cap in caps]
    for before, cap in tried:
        near = torch.isfinite(before) & (before.abs() < (cap or float("inf")))  # a number at its cap has lost its size
        factor = 1.0 if torch.equal(a, before) else float((a * before)[near].sum() / (a * a)[near].sum())
        again = a * factor if cap is None else cap * torch.tanh(a * factor / cap)
        if close(again.to(logits.dtype), logits):
            return factor
    raise RefusedPlace(
        "more than a factor and a softcap stands between the unembedding and the logits",
        expected="a model whose logits are linear in its last normed state",
    )
