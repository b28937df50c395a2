"""Findings of checks, the model under check, and summaries."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nnsplice import engine
from nnsplice.atlas import Atlas, Tower, text_config, unwrap
from nnsplice.checks.outline import Outline, OutlineValue, outline, place_of
from nnsplice.errors import BadArgument, NnspliceError, RefusedPlace
from nnsplice.paths import Index, Path, Slice

State = Literal["ok", "FAILED", "skipped"]

#: The length of the prompts, and of the decoder's prompts in models with two towers; a short prompt is half as long.
TOKENS, DECODER_TOKENS = 6, 5
PROMPTS = 2
#: Parts of which only a sample is checked.
SAMPLED = ("neurons", "experts")


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check on one part of a model.

    >>> from nnsplice.checks import run_checks
    >>> finding = next(finding for finding in run_checks(model, layers=0) if finding.check == "heads")
    >>> finding.what, finding.state
    ('layers[0].heads[:].output', 'ok')

    Attributes:
        check: the name of the check.
        what: the part that was checked, as a path if it has one.
        state: `"ok"`, `"FAILED"` or `"skipped"`.
        number: the number that was measured; None where nothing was.
        detail: what was found, or the reason for skipping.
    """

    check: str
    what: str
    state: State
    number: float | None = None
    detail: str = ""


@dataclass(frozen=True)
class Subject:
    """A model under check, with its inputs."""

    model: engine.Model
    #: The layers to check, by tower.
    layers: Mapping[str, tuple[int, ...]]
    #: Token ids of two prompts of one length, as the model's forward takes them.
    inputs: Mapping[str, Tensor]

    @property
    def root(self) -> nn.Module:
        """The plain module."""
        return unwrap(self.model)

    @property
    def atlas(self) -> Atlas:
        """The atlas of the model."""
        return Atlas.of(self.model)

    @cached_property
    def tolerance(self) -> float:
        """The allowed relative difference of two computations in another order: half of the digits.

        Of float32 at best, as many families compute norms and masks in float32 whatever the dtype of the model.
        """
        dtypes = {parameter.dtype for parameter in self.root.parameters() if parameter.is_floating_point()}
        return max(torch.finfo(dtype).eps for dtype in (*dtypes, torch.float32)) ** 0.5

    @cached_property
    def logits(self) -> Tensor:
        """The logits `[prompt, token, vocab]` of the plain module, without nnsight and nnsplice.

        Raises:
            RefusedPlace: the model does not return logits of this shape.
        """
        with torch.no_grad():
            found = getattr(self.root(**self.inputs), "logits", None)
        if not isinstance(found, Tensor) or found.dim() != 3:
            raise RefusedPlace(f"{type(self.root).__name__} has no logits for each token")
        return found

    def towers(self) -> Iterator[tuple[Tower, tuple[int, ...]]]:
        """Each tower with the layers to check."""
        for tower in self.atlas.towers.values():
            yield tower, self.layers[tower.name]

    @cached_property
    def causal(self) -> bool:
        """Whether decoder tokens depend only on earlier ones."""
        if engine.is_encoder_decoder(self.model):
            return True
        names = [block.attn for block in self.atlas.tower().blocks if block.attn]
        flags = [getattr(self.root.get_submodule(name), "is_causal", True) for name in names]
        return "MaskedLM" not in type(self.root).__name__ and all(flags)


def subject_of(model: Any, layers: Slice | tuple[int, ...] | int | None = None, seed: int = 0) -> Subject:
    """A model under check, with random prompts.

    Args:
        layers: the layers to check; None for all.
        seed: the seed of the random prompts.
    """
    model = engine.as_model(model)
    root = unwrap(model)
    if any(module.training for module in root.modules()):
        raise BadArgument("this model is in training mode, where no two runs are equal", write="model.eval()")
    atlas = Atlas.of(model)
    chosen = {
        name: tuple(range(tower.n_layers)) if layers is None else _numbers(atlas, name, layers)
        for name, tower in atlas.towers.items()
    }
    return Subject(model, chosen, _inputs(model, atlas, seed))


def _numbers(atlas: Atlas, tower: str, layers: Index) -> tuple[int, ...]:
    paths = atlas.expand(place_of(tower, (), "output", layers))
    return tuple(path.steps[0].index for path in paths)  # pyright: ignore[reportReturnType]  # expanded: numbers


def _inputs(model: engine.Model, atlas: Atlas, seed: int) -> dict[str, Tensor]:
    tokenizer = engine.tokenizer_of(model)
    special = set(getattr(tokenizer, "all_special_ids", ()))
    size = min(filter(None, (_vocabulary(model, atlas), len(tokenizer) if tokenizer is not None else None)))
    pool = torch.tensor([token for token in range(size) if token not in special] or [0])
    generator = torch.Generator().manual_seed(seed)
    needed = PROMPTS * (TOKENS + DECODER_TOKENS)
    # All tokens differ if the vocabulary is large enough, so that a value of another token is noticed.
    drawn = torch.cat([torch.randperm(len(pool), generator=generator) for _ in range(1 + needed // len(pool))])
    ids = pool[drawn[:needed]].to(model.device)
    first = ids[: PROMPTS * TOKENS].reshape(PROMPTS, TOKENS)
    inputs = {"input_ids": first, "attention_mask": torch.ones_like(first)}
    if engine.is_encoder_decoder(model):
        inputs["decoder_input_ids"] = ids[PROMPTS * TOKENS :].reshape(PROMPTS, DECODER_TOKENS)
    return inputs


def _vocabulary(model: engine.Model, atlas: Atlas) -> int:
    tower = atlas.towers.get("decoder")
    if tower is not None and tower.embed is not None:
        return atlas.tree.owner(tower.embed).params["weight"][1][0]
    return getattr(text_config(unwrap(model)), "vocab_size", 2)


@dataclass(frozen=True, slots=True)
class CheckedValue:
    """A value of a site in all layers that have it."""

    tower: str
    names: tuple[str, ...]
    value: OutlineValue
    path: Path

    @property
    def role(self) -> str:
        """The role: the last name of the site."""
        return self.names[-1] if self.names else "layers"

    @property
    def everything(self) -> bool:
        """Whether the path covers all of the value, and not a sample of neurons or experts."""
        return self.role not in SAMPLED


def kinds(subject: Subject) -> Iterator[CheckedValue]:
    """All portable sites that are not refused; of neurons and experts only the first and the last."""
    for tower in outline(subject.atlas):
        for group, parts in _groups(tower, subject.layers[tower.name]):
            for part in parts:
                inner: Index = (0, -1) if set(part.names) & set(SAMPLED) else Slice()
                for value in part.values:
                    if not value.refused:
                        path = place_of(tower.name, part.names, value.name, group, inner)
                        yield CheckedValue(tower.name, part.names, value, path)


def _groups(tower: Outline, wanted: tuple[int, ...]) -> Iterator[tuple[Index | None, tuple[Any, ...]]]:
    yield None, tower.before
    total = sum(len(layers.numbers) for layers in tower.layers)
    for layers in tower.layers:
        numbers = tuple(number for number in layers.numbers if number in wanted)
        if numbers:
            yield _as_index(numbers, total), layers.parts
    yield None, tower.after


def _as_index(numbers: tuple[int, ...], total: int) -> Index:
    """The shortest index with these numbers."""
    first, last = numbers[0], numbers[-1]
    if len(numbers) == total:
        return Slice()
    if len(numbers) == 1:
        return first
    return Slice(first, last + 1) if last - first == len(numbers) - 1 else numbers


def gap(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected number; 0 if bit-identical."""
    if found.shape != expected.shape:
        return float("inf")
    if torch.equal(found, expected):
        return 0.0
    expected = expected.double()
    difference = (found.to(expected) - expected).abs().max()
    return float(difference / expected.abs().max().clamp_min(1e-30))


def attempt(check: str, what: str, check_part: Callable[[], Finding]) -> Finding:
    """Run a check of one part. If the site is refused the check is skipped; any other error is a failure."""
    try:
        return check_part()
    except RefusedPlace as error:
        return Finding(check, what, "skipped", detail=re.sub(r"\blayer \d+\b", "the layer", reason_of(error)))
    except Exception as error:
        return Finding(check, what, "FAILED", detail=reason_of(error))


def reason_of(error: BaseException) -> str:
    """The first line of an error."""
    text = str(error).strip().partition("\n")[0]
    return text if isinstance(error, NnspliceError) else f"{type(error).__name__}: {text}"


def summary(findings: Iterable[Finding]) -> list[Finding]:
    """Group findings of one check with the same state, keeping the largest number; each failure stays by itself.

    >>> from nnsplice.checks import Finding, summary
    >>> summary([Finding("heads", "layers[0]", "ok", 0.0), Finding("heads", "layers[1]", "ok", 1e-7)])
    [Finding(check='heads', what='layers[0] and 1 more', state='ok', number=1e-07, detail='')]

    Args:
        findings: findings of `run_checks`.

    Returns:
        One finding for each group.
    """
    groups: dict[tuple[str, ...], list[Finding]] = {}
    for number, finding in enumerate(findings):
        separate = str(number) if finding.state == "FAILED" else ""
        groups.setdefault((finding.check, finding.state, finding.detail, separate), []).append(finding)
    return [_merged(group) for group in groups.values()]


def _merged(group: list[Finding]) -> Finding:
    if len(group) == 1:
        return group[0]
    numbers = [finding.number for finding in group if finding.number is not None]
    what = f"{group[0].what} and {len(group) - 1} more"
    return replace(group[0], what=what, number=max(numbers) if numbers else None)
