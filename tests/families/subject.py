"""One family under judgement: the bare module, the same model inside nnsplice, prompts, and what rounding may do."""

from __future__ import annotations

import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

import nnsplice as ns
from families.build import build, prompt
from nnsplice.atlas import Block, Site, Tower
from nnsplice.errors import NnspliceError, UnknownPath
from zoo import tokenizer

#: `absent`: the model has no such part, which is said by name like a refusal.
State = Literal["exact", "refused", "absent", "wrong", "crash"]
#: Tokens of the prompts: longer than every window of the tiny models; one is shorter than the windows.
LONG, MIDDLE, SHORT = 12, 9, 3


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found of one family."""

    check: str
    state: State
    #: The largest difference, relative to what it was compared with; None where nothing was compared.
    number: float | None = None
    text: str = ""


class JudgeError(Exception):
    """The judge itself does not work on a family: no fault of nnsplice."""


@dataclass
class Subject:
    """A family, built twice with the same weights: once bare, for the truth, and once for nnsplice."""

    name: str
    dtype: torch.dtype = torch.float64
    findings: list[Finding] = field(default_factory=list)

    def _built(self) -> Any:
        return build(self.name) if self.dtype == torch.float64 else build(self.name).to(self.dtype)

    @cached_property
    def bare(self) -> Any:
        """The plain module that hooks and gradients ask."""
        return self._built()

    @cached_property
    def model(self) -> Any:
        """The same model, as a user loads it who has the module in memory."""
        return ns.load(self._built(), tokenizer=tokenizer(), task="text-generation")

    @cached_property
    def tower(self) -> Tower:
        """The decoder that nnsplice found."""
        return ns.Atlas.of(self.model).tower()

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Its layers."""
        return self.tower.blocks

    @cached_property
    def ids(self) -> Tensor:
        """The long prompt."""
        return prompt(LONG)

    @cached_property
    def other(self) -> Tensor:
        """A prompt of the same length that begins with the same two tokens, and differs at some others."""
        ids, changed = self.ids.clone(), prompt(LONG, 23)
        for position in (2, 4, 5, 8, 11):
            ids[:, position] = changed[:, position]
        return ids

    def logits(self, ids: Tensor) -> Tensor:
        """`[1, token, vocab]` of the bare module."""
        with torch.no_grad():
            return self.bare(ids).logits

    @cached_property
    def tolerance(self) -> float:
        """What rounding does to the logits, relative to the largest of them, with a margin.

        Many families compute norms, routers or masks in float32 whatever the model is. Where numbers are smooth, a
        small step of the embedding does half of what two do; what is missing to that is rounding.
        """
        base = self.logits(self.ids)
        eps = max(torch.finfo(dtype).eps for dtype in (base.dtype, next(self.bare.parameters()).dtype))

        def stepped(size: float, seed: int) -> Tensor:
            generator = torch.Generator().manual_seed(seed)

            def step(_: nn.Module, args: Any, out: Tensor) -> Tensor:
                return out * (1 + size * torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out))

            with hooks(self.bare.get_input_embeddings().register_forward_hook(step)):
                return self.logits(self.ids)

        bent = max(gap(2 * stepped(1e-8, seed) - stepped(2e-8, seed), base) for seed in range(2))
        return min(max(1e-9, 100 * eps, 50 * bent), 1e-4)

    def found(self, check: str, number: float, text: str = "", *, tolerance: float | None = None) -> None:
        """Note a number that has to be zero up to rounding."""
        allowed = self.tolerance if tolerance is None else tolerance
        state: State = "exact" if number <= allowed else "wrong"
        self.findings.append(Finding(check, state, number, text))

    def claim(self, check: str, holds: bool, text: str = "") -> None:
        """Note a fact that has to be true."""
        self.findings.append(Finding(check, "exact" if holds else "wrong", None, "" if holds else text))

    @contextmanager
    def check(self, name: str, what: str = "") -> Iterator[None]:
        """A look that may be refused. Whatever is no error of nnsplice's own, or says nothing, is a crash."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except Exception as error:
            self.failed(name, error, what)

    def failed(self, check: str, error: Exception, what: str = "") -> None:
        """Note an error."""
        text = f"{what}: {told(error)}" if what else told(error)
        ours = any("/nnsplice/" in frame.filename for frame in traceback.extract_tb(error.__traceback__))
        if not ours:
            raise JudgeError(f"{self.name}, {check}: {text}") from error
        state: State = "crash" if not is_refusal(error) else "absent" if isinstance(error, UnknownPath) else "refused"
        self.findings.append(Finding(check, state, None, text))


def own(value: Tensor, length: int = LONG) -> Tensor:
    """`[.., token, width]` of the prompt's own tokens: some families put tokens of their own before them."""
    return value[..., value.shape[-2] - length :, :]


def is_refusal(error: Exception) -> bool:
    """Whether an error is one of nnsplice's own, with a text."""
    return isinstance(error, NnspliceError) and bool(str(error).strip())


def told(error: Exception) -> str:
    """An error in one line."""
    first = re.sub(r"\s+", " ", str(error).strip().partition("\n")[0])[:200]
    return first if isinstance(error, NnspliceError) else f"{type(error).__name__}: {first}"


def gap(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest number that was expected."""
    if found.shape != expected.shape:
        return float("inf")
    found, expected = found.detach().double(), expected.detach().double()
    if not torch.equal(torch.isfinite(found), torch.isfinite(expected)):
        return float("inf")
    found, expected = (torch.nan_to_num(t, nan=0.0, posinf=0.0, neginf=0.0) for t in (found, expected))
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)) if found.numel() else 0.0


def first_tensor(value: Any) -> Any:
    """The value itself, or what stands first in a container."""
    while isinstance(value, tuple | list) and value:
        value = value[0]
    return getattr(value, "last_hidden_state", value)


@contextmanager
def hooks(*made: Any) -> Iterator[None]:
    """Handles that are removed afterwards."""
    try:
        yield
    finally:
        for handle in made:
            handle.remove()


def before(module: nn.Module, edit: Callable[[Tensor], Tensor | None]) -> Any:
    """Let `edit` see and change a module's first input."""

    def hook(_: nn.Module, args: tuple, kwargs: dict) -> Any:
        if args:
            made = edit(args[0])
            return None if made is None else ((made, *args[1:]), kwargs)
        name = next(iter(kwargs))
        made = edit(kwargs[name])
        return None if made is None else (args, {**kwargs, name: made})

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def after(module: nn.Module, edit: Callable[[Tensor], Tensor | None]) -> Any:
    """Let `edit` see and change a module's output, or what stands first in it."""

    def hook(_: nn.Module, args: tuple, out: Any) -> Any:
        whole = isinstance(out, Tensor)
        made = edit(out if whole else out[0])
        return None if made is None else made if whole else type(out)([made, *out[1:]])

    return module.register_forward_hook(hook)


def site_of(path: ns.Path) -> Site:
    """The site of an expanded path."""
    assert path.site is not None
    return path.site


def number(path: ns.Path, step: int) -> int:
    """The index of one step of an expanded path: its layer, its head."""
    index = path.steps[step].index
    assert isinstance(index, int)
    return index
