"""`direct`: direct logit attribution, the metric as a sum over heads, MLPs and embeddings.

With the size of the final norm held still, what the metric reads is linear in the last state of the stream, and that
state is a sum. So the metric is a sum too, and here it has to come out: the parts are computed one by one, what was not
asked about as well, and where all of them together are not the metric of the run, nothing is returned.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnsplice import engine
from nnsplice.activations.access import site_of
from nnsplice.activations.capture import capture
from nnsplice.activations.prompts import Prompts, PromptsLike, SpanTexts, encode
from nnsplice.atlas import Atlas, Block, Site, text_config, unwrap
from nnsplice.attribution.branches import Branch, Branches, branches_of
from nnsplice.attribution.edges import norm_behind
from nnsplice.attribution.gradients import batches
from nnsplice.closures.seen import norms_of
from nnsplice.errors import BadArgument, RefusedPlace, circumstances
from nnsplice.lens.linear import Frozen, Line, rounding, weights_of
from nnsplice.lens.passes import Pass, decoder_of, last_of, look
from nnsplice.lens.senders import Asked, Senders, check_positions, experts_of, senders_of
from nnsplice.metrics import Answer, Bound, Metric, bound_of
from nnsplice.paths import Path, Paths
from nnsplice.progress import bar
from nnsplice.results import Run, SweepResult, Table
from nnsplice.sweeps.identity import prompts_record
from nnsplice.sweeps.running import check_mode
from nnsplice.sweeps.targets import cell_of

#: What is asked about where nothing is said.
ALL = ("embed", "layers[:].heads[:]", "layers[:].mlp")


def direct(
    model: Any,
    prompts: PromptsLike,
    metric: Metric | Callable[[Tensor], Tensor] | Answer,
    sites: Paths = ALL,
    *,
    spans: SpanTexts | None = None,
    max_tokens: int | None = None,
    progress: bool = True,
) -> SweepResult:
    """What every site adds to the metric directly: direct logit attribution, with the final norm's size held still.

    The cells of a prompt and `result.rest` (biases, and what was not asked about, each computed by itself) are the
    metric, before a final softcap. That is measured on every job; a model of which it does not hold is refused.

    >>> metric = ns.logit_diff("w7", "w8")
    >>> parts = ns.lens.direct(model, "w3 w4 w5", metric, ["embed", "layers[:].heads[:]", "layers[:].mlp"])
    >>> whole = parts.table.values.sum() + parts.rest.sum()
    >>> bool(abs(whole - parts.clean[0]) < 1e-5)
    True
    >>> parts.grid("layers[:].heads[:].output").sizes
    Frozen({'prompt': 1, 'layer': 3, 'head': 4})

    Args:
        model: a model from `ns.load`, in eval mode.
        prompts: a text, a list of texts, token ids or chat messages.
        metric: a weighted sum of logits, such as `ns.logit_diff(answer, wrong)`; or a token for all prompts or for
            each, whose logit is meant.
        sites: `embed`, `layers[i].heads[j]` or `layers[i].attn`, `layers[i].mlp` or its neurons or experts, without
            positions: they are read where the metric reads.
        spans: as for `ns.capture`.
        max_tokens: how many tokens run at once.
        progress: show a bar.

    Returns:
        A cell for each site, in units of the metric; `result.rest` has the remainder of each prompt.

    Raises:
        BadArgument: a model in train mode or with edits of nnsight, several metrics or one that compares runs, an
            answer of several tokens, no sites, a branch together with its parts, or a position other than the metric's.
        RefusedPlace: a metric that is not linear in the logits, a site that adds nothing by itself, or a model whose
            metric is not the sum of the parts.
        ShortRow: a prompt has no token at the metric's position.
    """
    start = time.perf_counter()
    model = engine.as_model(model)
    with circumstances("ns.lens.direct"):
        engine.refuse_edits(model)
        engine.refuse_changed_logits(model)
        check_mode(model)
        decoder_of(model)
        given = encode(model, prompts, spans)
        if given.values is not None:
            raise BadArgument("a metric reads tokens, and these prompts are values", expected="texts or token ids")
        bound = _bound(metric, engine.tokenizer_of(model), given)
        bound.metric.check_lengths(given.lengths("decoder"))
        check_positions(sites, bound.metric.position)
        branches = branches_of(model)
        senders = senders_of(model, branches, sites)
        values, rest = np.zeros((len(given), len(senders.places))), np.zeros(len(given))
        whole = np.zeros(len(given))
        with bar("direct", len(given), "prompt", progress) as shown:
            for rows in batches(given, range(len(given)), engine.room(model, max_tokens)):
                sums = _Sums.of(model, given, rows, bound, branches, senders)
                values[rows], rest[rows], whole[rows] = sums.parts()
                shown.update(len(rows))
    name, revision = engine.name_of(model)
    asked = {
        "model": name, "revision": revision, "weights": engine.weights_digest(model), "prompts": prompts_record(given),
        "sites": [str(place) for place in senders.places], "metric": bound.identity, "operation": "direct",
    }  # fmt: skip
    reads = bound.metric.position
    cells = tuple(replace(cell_of(place.at(reads)), position=None) for place in senders.places)
    there = np.ones(values.shape, dtype=bool)
    about = Run("direct", time.perf_counter() - start, forwards=len(given))
    texts = engine.token_texts(model, given.ids)
    return SweepResult(Table(cells, values, there, there, whole, np.zeros_like(whole), texts, asked, about, rest=rest))


def _bound(metric: Any, tokenizer: Any, given: Prompts) -> Bound:
    answer: Any = metric
    is_metric = isinstance(metric, Metric) or callable(metric)
    asked: Any = metric if is_metric else Metric("logit", _logit, {"answer": answer}, local=True)
    bound = bound_of(asked, tokenizer, len(given), given.texts)
    if not isinstance(bound, Bound) or bound.metric.compares:
        raise BadArgument("one metric of one run is split into parts", expected="one metric, such as ns.logit_diff")
    return bound


def _logit(logits: Tensor, answer: Tensor) -> Tensor:
    if answer.dim() > 1:
        raise BadArgument("a set of tokens has no one logit", expected="a single token for each prompt")
    return logits.gather(-1, answer[:, None])[:, 0]


# --- the sum ----------------------------------------------------------------------------------------------------------


@dataclass
class _Sums:
    """The sum of one batch, walked from the metric back to the embeddings."""

    model: engine.Model
    bound: Bound
    branches: Branches
    senders: Senders
    run: Pass
    experts: Mapping[Path, Tensor]
    #: Which token of each prompt is read.
    reads: Tensor
    values: Tensor
    rest: Tensor
    #: The sizes of all that was added up, which rounding is measured by.
    size: Tensor

    @staticmethod
    def of(
        model: engine.Model, given: Prompts, rows: Sequence[int], bound: Bound, branches: Branches, senders: Senders
    ) -> _Sums:
        tower = branches.tower
        sites = [last_of(tower), site_of(branches.all[0].reads), *(site_of(branch.added) for branch in branches.all)]
        ends = [tower.unembed, *([tower.final_norm] if tower.final_norm else [])]
        for block in tower.blocks:
            norms = _stream_norms(model, block)
            ends += norms
            sites += [_end_of(block)] if norms else []
        for asked in senders.asked.values():
            norm = norm_behind(asked.branch)
            ends += [norm] if norm is not None else []
            if asked.whole is None and not asked.experts:
                sites.append(Site(asked.projection, "input", occurrence=asked.branch.block.occurrence))
        sites += [Site(str(name), end) for name in dict.fromkeys(ends) for end in ("input", "output")]
        run = look(model, given, rows, sites)
        position, length = bound.metric.position, run.logits.shape[1]
        wanted = experts_of(list(senders.asked.values()))
        saved = capture(model, given.take(rows), [path.at(position) for path in wanted]) if wanted else None
        held = {} if saved is None else {path: saved.get(path.at(position)) for path in wanted}
        device = run.logits.device
        zero = torch.zeros(len(rows), dtype=torch.float64, device=device)
        reads = torch.full((len(rows),), position % length, device=device)
        values = torch.zeros(len(rows), len(senders.places), dtype=torch.float64, device=device)
        bound_rows = Bound(bound.metric, {name: tuple(ids[row] for row in rows) for name, ids in bound.ids.items()})
        return _Sums(model, bound_rows, branches, senders, run, held, reads, values, zero, zero.clone())

    def at(self, site: Site) -> Tensor:
        """A value of the run where the metric reads: `[prompt, width]`, in the model's own numbers."""
        if site not in self.run.values:
            raise RefusedPlace(f"{site.module} did not run, so what it adds is not known")
        value = self.run.values[site]
        return value[torch.arange(len(value), device=value.device), self.reads.to(value.device)]

    def ends_of(self, module: str) -> tuple[Tensor, Tensor]:
        """What a module was given, and what it made."""
        return self.at(Site(module, "input")), self.at(Site(module, "output"))

    def parts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`[prompt, cell]`, `[prompt]` of all else, and `[prompt]` of the metric itself.

        Raises:
            RefusedPlace: the parts are not the metric.
        """
        towards, whole = self._behind()
        pairs = list(zip(self.branches.all[::2], self.branches.all[1::2], strict=True))
        for number in reversed(range(len(pairs))):
            attn, mlp = pairs[number]
            behind_mlp, behind_attn = self._norms_of_stream(attn.block, attn, mlp)
            for norm in behind_mlp:
                towards = self._through(norm, towards)
            self._branch(mlp, 2 * number + 1, towards * mlp.block.scale)
            for norm in behind_attn:
                towards = self._through(norm, towards)
            self._branch(attn, 2 * number, towards * attn.block.scale)
        entering = (self.at(site_of(self.branches.all[0].reads)).double() * towards).sum(-1)
        self._note(self.senders.embed, entering)
        together = self.values.sum(-1) + self.rest
        off = (together - whole).abs()
        allowed = rounding(self.at(last_of(self.branches.tower)).dtype) * (self.size + whole.abs())
        if not bool((off <= allowed).all()):
            raise RefusedPlace(
                f"all parts together are not {self.bound.metric.name}: they are {float(off.max()):.2g} apart, of "
                f"{float(whole.abs().max()):.2g}",
                expected="a model whose last state is the sum of its embeddings and what its layers add",
            )
        return self.values.cpu().numpy(), self.rest.cpu().numpy(), whole.cpu().numpy()

    def _note(self, cell: int | None, value: Tensor) -> None:
        """Count a part: as a cell's, or as none's."""
        self.size = self.size + value.abs()
        if cell is None:
            self.rest = self.rest + value
        else:
            self.values[:, cell] += value

    def _behind(self) -> tuple[Tensor, Tensor]:
        """What the metric is along the last stream, `[prompt, width]`, and the metric, `[prompt]`."""
        tower, root = self.branches.tower, unwrap(self.model)
        assert tower.unembed is not None
        given, made = self.ends_of(tower.unembed)
        logits = self.run.logits[torch.arange(len(given), device=given.device), self.reads.to(given.device)]
        weights, nothing = weights_of(self.bound, len(given), logits.shape[-1], logits.device)
        factor = _factor_behind(self.model, made, logits)
        whole = (weights * made.double()).sum(-1) * factor + nothing
        line = Line.through(root.get_submodule(tower.unembed), given, weights * factor, tower.unembed)
        self._note(None, line.constant + nothing)
        state = self.at(last_of(tower))
        if tower.final_norm is None:
            return line.towards * _factor(state, given, "the last layer and the head"), whole
        before, normed = self.ends_of(tower.final_norm)
        _same(before, state, "the last layer and the final norm")
        towards = line.towards * _factor(normed, given, "the final norm and the head")
        return self._through(tower.final_norm, towards), whole

    def _through(self, norm: str, towards: Tensor) -> Tensor:
        """A direction behind a norm, in front of it."""
        given, made = self.ends_of(norm)
        frozen = Frozen.of(unwrap(self.model).get_submodule(norm), norm, given, made)
        self._note(None, frozen.constant(towards))
        return frozen.back(towards)

    def _norms_of_stream(self, block: Block, attn: Branch, mlp: Branch) -> tuple[list[str], list[str]]:
        """Where the stream itself is normalised: the norms at the layer's end, and those between its branches."""
        norms = _stream_norms(self.model, block)
        if not norms:
            return [], []
        stream, last = self.at(_end_of(block)), []
        if (found := self._made(norms, stream)) is not None:
            last, stream = [found], self.ends_of(found)[0]
        middle = stream.double() - self.at(site_of(mlp.added)).double() * block.scale
        between = [] if block.parallel else [one for one in [self._made(norms, middle)] if one is not None]
        return last, between

    def _made(self, norms: Sequence[str], stream: Tensor) -> str | None:
        """The norm that made a state of the stream."""
        for norm in norms:
            if Site(norm, "output") not in self.run.values:
                continue  # of a second attention, which this model does not run
            made = self.ends_of(norm)[1]
            if made.shape == stream.shape and _close(made, stream):
                return norm
        return None

    def _branch(self, branch: Branch, number: int, towards: Tensor) -> None:
        """Count what a branch adds, in the parts that are asked about."""
        added, asked = self.at(site_of(branch.added)), self.senders.asked.get(number)
        if asked is None or asked.whole is not None:
            self._note(None if asked is None else asked.whole, (added.double() * towards).sum(-1))
            return
        norm = norm_behind(branch)
        if norm is not None:
            towards, added = self._through(norm, towards), self.ends_of(norm)[0]
        if asked.experts:
            self._experts(asked, added, towards)
            return
        module: nn.Module = unwrap(self.model).get_submodule(asked.projection)
        parts = self.at(Site(asked.projection, "input", occurrence=branch.block.occurrence))
        line = Line.through(module, parts, towards, asked.projection)
        self._note(None, line.constant)
        each = line.towards * parts.double()
        left = torch.ones(each.shape[-1], dtype=torch.bool, device=each.device)
        for place, cell in asked.cells.items():
            columns = slice(*(site_of(place).columns or (0, None)))
            left[columns] = False
            self._note(cell, each[:, columns].sum(-1))
        self._note(None, each[:, left].sum(-1))

    def _experts(self, asked: Asked, added: Tensor, towards: Tensor) -> None:
        """Count what each expert adds, and what stands beside them."""
        beside = added.double()
        for path in asked.experts:
            value = self.experts[path].to(beside)
            beside = beside - value
            self._note(asked.cells.get(path), (value * towards).sum(-1))
        self._note(None, (beside * towards).sum(-1))


def _end_of(block: Block) -> Site:
    return Site(block.end or block.module, "output", occurrence=block.occurrence)


def _stream_norms(model: engine.Model, block: Block) -> list[str]:
    """The norms of a layer whose stream is normalised in it; none in others."""
    if not block.post_norm:
        return []
    return list(norms_of(Atlas.of(model), block))


# --- what stands between ----------------------------------------------------------------------------------------------


def _close(a: Tensor, b: Tensor) -> bool:
    allowed = 1e-5 if a.dtype == torch.float64 else 1e-4 if a.dtype == torch.float32 else 5e-2
    a, b = a.double(), b.double()
    return float((a - b).abs().max()) <= allowed * max(float(b.abs().max()), 1e-30)


def _same(made: Tensor, given: Tensor, between: str) -> None:
    if made.shape != given.shape or not _close(made, given):
        raise RefusedPlace(f"something stands between {between} that no part of the sum goes through")


def _factor(made: Tensor, given: Tensor, between: str) -> float:
    """The number that a state is multiplied by on its way."""
    if made.shape != given.shape:
        raise RefusedPlace(f"more than a factor stands between {between}")
    if torch.equal(made, given):
        return 1.0
    a, b = made.double(), given.double()
    factor = float((a * b).sum() / (a * a).sum())
    if not _close(a * factor, given):
        raise RefusedPlace(f"more than a factor stands between {between}")
    return factor


def _factor_behind(model: engine.Model, made: Tensor, logits: Tensor) -> float:
    """The number that what the unembedding makes is multiplied by to be logits, before a softcap."""
    if made.shape != logits.shape:
        raise RefusedPlace("what the unembedding makes are not the logits one for one")
    a, b = made.double(), logits.double()
    tried: list[tuple[Tensor, float | None]] = [(b, None)]
    config = text_config(unwrap(model))
    caps = [value for name, value in vars(config).items() if "cap" in name and isinstance(value, float) and value > 0]
    tried += [(cap * torch.atanh((b / cap).clamp(-1, 1)), cap) for cap in caps]
    for before, cap in tried:
        near = torch.isfinite(before) & (before.abs() < (cap or float("inf")))  # a cap's end tells nothing
        factor = 1.0 if torch.equal(a, before) else float((a * before)[near].sum() / (a * a)[near].sum())
        again = a * factor if cap is None else cap * torch.tanh(a * factor / cap)
        if _close(again.to(logits.dtype), logits):
            return factor
    raise RefusedPlace(
        "more than a factor and a softcap stands between the unembedding and the logits",
        expected="a model whose logits are linear in its last normed state",
    )
