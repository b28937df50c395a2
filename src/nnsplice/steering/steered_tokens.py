"""`Steering.show`: prompts run once, with every token marked that a rule changes."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nnsplice import engine
from nnsplice.activations.encoding import encode
from nnsplice.activations.prompts import PromptsLike
from nnsplice.atlas import unwrap
from nnsplice.shown import printable
from nnsplice.steering.padding import padded
from nnsplice.steering.rules import Rule
from nnsplice.steering.session import ActiveRule, Session


@dataclass(frozen=True, eq=False)
class SteeredTokens:
    """The tokens of some prompts that one rule changes.

    Attributes:
        rule: the rule.
        tokens: the texts of the tokens of each prompt.
        shares: the norm of the change of each token, as a share of the norm of its state; 0 if it is not steered.
    """

    rule: Rule
    tokens: tuple[tuple[str, ...], ...]
    shares: tuple[tuple[float, ...], ...]

    def lines(self, mark: str = "[{}]") -> list[str]:
        """A line for the rule, and one for each prompt, with its changed tokens marked."""
        found = [str(self.rule)]
        for texts, shares in zip(self.tokens, self.shares, strict=True):
            pairs = zip((text.strip() for text in texts), shares, strict=True)
            words = [mark.format(text) if share else text for text, share in pairs]
            moved = [share for share in shares if share]
            ends = dict.fromkeys(f"{share:.2f}" for share in (min(moved), max(moved))) if moved else ()
            change = f"by {' to '.join(ends)} of the norm" if moved else "none of the prompt"
            found.append(f"  {' '.join(words)}   ({len(moved)} of {len(texts)} tokens, {change})")
        return found


@dataclass(frozen=True, eq=False, repr=False)
class Shown:
    """The result of `Steering.show`: text, or a table in a notebook."""

    rules: tuple[SteeredTokens, ...]

    def __repr__(self) -> str:
        return printable("\n".join(line for rule in self.rules for line in rule.lines()))

    def _repr_html_(self) -> str:
        parts = []
        for touched in self.rules:
            first, *rest = (html.escape(line) for line in touched.lines("\x01{}\x02"))
            marked = (line.replace("\x01", "<mark>").replace("\x02", "</mark>") for line in rest)
            parts.append(f"<b>{first}</b>" + "".join(f"<br>&emsp;{line}" for line in marked))
        return f"<div>{'<br>'.join(parts)}</div>"


def shown(model: engine.Model, rules: Sequence[Rule], prompts: PromptsLike) -> Shown:
    """Run prompts once, and compare the states before and after each rule."""
    engine.refuse_edits(model)
    given = encode(model, prompts)
    texts = engine.token_texts(model, given.ids)
    ids, mask = padded(given.ids, 0, left=not engine.is_encoder_decoder(model))
    inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
    if given.decoder_ids is not None:
        inputs["decoder_input_ids"] = torch.tensor(given.decoder_ids, device=model.device)
        texts = texts if rules[0].site.tower == "encoder" else engine.token_texts(model, given.decoder_ids)
    session = Session(model, rules)
    for active in session.active_rules:
        active.recorded = []
    with session, torch.no_grad():
        unwrap(model)(**inputs)
    return Shown(tuple(_steered_tokens(active, texts) for active in session.active_rules))


def _steered_tokens(active: ActiveRule, texts: tuple[tuple[str, ...], ...]) -> SteeredTokens:
    shares = tuple(_shares(active, row, len(tokens)) for row, tokens in enumerate(texts))
    return SteeredTokens(active.rule, texts, shares)


def _shares(active: ActiveRule, row: int, count: int) -> tuple[float, ...]:
    """The relative change of each token of a row."""
    shares = [0.0] * count
    for before, after, call in active.recorded or ():
        moved = (after[row] - before[row]).norm(dim=-1) / before[row].norm(dim=-1).clamp(min=1e-30)
        for position, share in zip(call.positions.expand(call.rows, -1)[row].tolist(), moved.tolist(), strict=True):
            if position >= 0:
                shares[position] = share
    return tuple(shares)
