"""The final norm and unembedding, checked against the model's logits on the job's own run.

The head is the code of the model's own forward, with its norms, scales, caps and tied weights; nothing of it is
implemented again here. Applied to the output of the last layer it has to reproduce the model's logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nnsplice import engine
from nnsplice.atlas import Tower, unwrap
from nnsplice.errors import RefusedPlace
from nnsplice.lens.runs import LensRun, decoder_of, last_of
from nnsplice.packed import LOGITS, Head

#: How many tokens of a run the check covers.
TRIED = 64


@dataclass(frozen=True)
class Tail:
    """The part of a model after its last layer."""

    model: engine.Model
    tower: Tower
    head: Head

    @staticmethod
    def of(model: engine.Model, run: LensRun) -> Tail:
        """The tail of a model, from a run with the value of `last_of(tower)`.

        Raises:
            RefusedPlace: there is more than a norm and a head after the last layer.
        """
        tower = decoder_of(model)
        states = run.values[last_of(tower)].flatten(0, 1)
        try:
            if not hasattr(run.returned, "last_hidden_state"):
                raise NotImplementedError("it does not say which state it gives to its head")
            with engine.locked(model):
                head = Head.of(unwrap(model), tower, states, _own(run), type(run.returned))
        except NotImplementedError as error:
            raise RefusedPlace(f"states of this model are not read as the last layer's are: {error}") from None
        except Exception as error:
            ends = [name for name in (tower.final_norm, tower.unembed) if name]
            if not engine.has_own_code(map(unwrap(model).get_submodule, ends)):
                raise
            raise RefusedPlace(
                f"a hook or a module of your own at {' or '.join(ends)} does not take states one by one, "
                f"[state, width], as a lens reads them: {type(error).__name__}: {error}",
                expected="code there that treats every token alike, whatever its position",
            ) from error
        tail = Tail(model, tower, head)
        tail.check(run)
        return tail

    def check(self, run: LensRun) -> None:
        """Compare the logits of a run with those computed from the output of its last layer.

        Raises:
            RefusedPlace: they differ.
        """
        states, logits = run.values[last_of(self.tower)].flatten(0, 1), run.logits.flatten(0, 1)
        tried = torch.linspace(0, len(states) - 1, min(TRIED, len(states)), device=states.device).round().long()
        off, size = 0.0, float(logits.abs().max())
        for rows, made in self.each(states[tried]):
            off = max(off, float((made - logits[tried][rows]).abs().max()))
        if not off <= allowed(self.model, logits) * max(size, torch.finfo(torch.float32).tiny):
            raise RefusedPlace(
                f"the model's norm and head make other logits of what leaves its last layer than the model does: they "
                f"are {off:.2g} apart, of {size:.2g}",
                expected="a model whose logits are its norm and head of that",
            )

    def logits(self, states: Tensor) -> Tensor:
        """The logits `[row, vocab]` of states `[row, width]`, taken as outputs of the last layer."""
        with engine.locked(self.model):
            return self.head.logits(states)

    def each(
        self, states: Tensor, translate: Callable[[Tensor], Tensor] | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """The logits of slices of states, as many at once as fit into memory."""
        step = max(LOGITS // max(self.head.vocabulary, 1), 1)
        for start in range(0, len(states), step):
            rows = slice(start, start + step)
            yield rows, self.logits(states[rows] if translate is None else translate(states[rows]))


def allowed(model: engine.Model, logits: Tensor) -> float:
    """The largest rounding difference between logits of batches of another size, relative to the largest logit."""
    numbers = [p.dtype for p in unwrap(model).parameters() if p.is_floating_point()]
    eps = max(torch.finfo(dtype).eps for dtype in (logits.dtype, *numbers))
    return max(1e-12, 1e3 * eps if eps < 1e-3 else 8 * eps)


def _own(run: LensRun) -> Tensor:
    """The last hidden state that the model returned, of the prompts' own tokens: `[token, width]`."""
    state: Tensor = run.returned.last_hidden_state
    length = run.logits.shape[1]
    return (state[:, state.shape[1] - length :] if state.dim() == 3 else state).flatten(0, -2)
