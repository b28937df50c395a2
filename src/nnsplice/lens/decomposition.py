"""The metric of a run as a sum over heads, MLPs and embeddings, computed from the logits back to the embeddings.

A direction is a gradient of the metric with the norms kept constant: a vector whose product with a state of the stream
is what that state adds to the metric. It is taken back through the layers, from the last to the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from nnsplice import engine
from nnsplice.activations.access import site_of
from nnsplice.activations.capture import capture
from nnsplice.activations.prompts import Prompts
from nnsplice.atlas import Atlas, Block, Site, unwrap
from nnsplice.attribution.branches import Branch, Branches
from nnsplice.attribution.edges import norm_behind
from nnsplice.closures.pass_values import norms_of
from nnsplice.errors import RefusedPlace
from nnsplice.lens.linear import (
    FrozenNorm,
    LinearForm,
    check_same,
    close,
    factor_between,
    logit_factor,
    rounding,
    weights_of,
)
from nnsplice.lens.runs import LensRun, last_of, lens_run
from nnsplice.lens.terms import BranchTerms, Terms
from nnsplice.metrics import Bound
from nnsplice.paths import Path


@dataclass
class Decomposition:
    """The metric of one batch of prompts as a sum of terms."""

    model: engine.Model
    bound: Bound
    branches: Branches
    terms: Terms
    run: LensRun
    #: The outputs of requested experts where the metric reads: `[prompt, width]`.
    experts: Mapping[Path, Tensor]
    #: `[prompt]`: the token that the metric reads.
    reads: Tensor
    #: `[prompt, cell]`: the terms of the requested sites so far.
    values: Tensor
    #: `[prompt]`: the sum of all other terms so far.
    rest: Tensor
    #: `[prompt]`: the sum of the absolute values of all terms, which bounds the rounding error.
    size: Tensor

    @staticmethod
    def of(
        model: engine.Model, given: Prompts, rows: Sequence[int], bound: Bound, branches: Branches, terms: Terms
    ) -> Decomposition:
        tower = branches.tower
        sites = [last_of(tower), site_of(branches.all[0].reads), *(site_of(branch.added) for branch in branches.all)]
        ends = [tower.unembed, *([tower.final_norm] if tower.final_norm else [])]
        for block in tower.blocks:
            norms = _stream_norms(model, block)
            ends += norms
            sites += [_end_of(block)] if norms else []
        for requested in terms.by_branch.values():
            norm = norm_behind(requested.branch)
            ends += [norm] if norm is not None else []
            if requested.whole is None and not requested.experts:
                sites.append(Site(requested.projection, "input", occurrence=requested.branch.block.occurrence))
        sites += [Site(str(name), end) for name in dict.fromkeys(ends) for end in ("input", "output")]
        run = lens_run(model, given, rows, sites)
        position, length = bound.metric.position, run.logits.shape[1]
        wanted = [path for one in terms.by_branch.values() for path in one.experts]
        saved = capture(model, given.take(rows), [path.at(position) for path in wanted]) if wanted else None
        experts = {} if saved is None else {path: saved.get(path.at(position)) for path in wanted}
        device = run.logits.device
        zero = torch.zeros(len(rows), dtype=torch.float64, device=device)
        reads = torch.full((len(rows),), position % length, device=device)
        values = torch.zeros(len(rows), len(terms.places), dtype=torch.float64, device=device)
        bound_rows = Bound(bound.metric, {name: tuple(ids[row] for row in rows) for name, ids in bound.ids.items()})
        return Decomposition(model, bound_rows, branches, terms, run, experts, reads, values, zero, zero.clone())

    def at(self, site: Site) -> Tensor:
        """The value of a site at the token that the metric reads: `[prompt, width]`, in the model's dtype."""
        if site not in self.run.values:
            raise RefusedPlace(f"{site.module} did not run, so what it adds is not known")
        value = self.run.values[site]
        return value[torch.arange(len(value), device=value.device), self.reads.to(value.device)]

    def ends_of(self, module: str) -> tuple[Tensor, Tensor]:
        """The input and the output of a module where the metric reads: `[prompt, width]` each."""
        return self.at(Site(module, "input")), self.at(Site(module, "output"))

    def parts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The terms of the requested sites `[prompt, cell]`, the sum of all others and the metric, `[prompt]` each.

        Raises:
            RefusedPlace: the terms do not add up to the metric.
        """
        direction, whole = self._from_logits()
        pairs = list(zip(self.branches.all[::2], self.branches.all[1::2], strict=True))
        for number in reversed(range(len(pairs))):
            attn, mlp = pairs[number]
            behind_mlp, behind_attn = self._norms_of_stream(attn.block, attn, mlp)
            for norm in behind_mlp:
                direction = self._through_norm(norm, direction)
            self._branch(mlp, 2 * number + 1, direction * mlp.block.scale)
            for norm in behind_attn:
                direction = self._through_norm(norm, direction)
            self._branch(attn, 2 * number, direction * attn.block.scale)
        entering = (self.at(site_of(self.branches.all[0].reads)).double() * direction).sum(-1)
        self._count(self.terms.embed, entering)
        off = (self.values.sum(-1) + self.rest - whole).abs()
        allowed = rounding(self.at(last_of(self.branches.tower)).dtype) * (self.size + whole.abs())
        if not bool((off <= allowed).all()):
            raise RefusedPlace(
                f"all parts together are not {self.bound.metric.name}: they are {float(off.max()):.2g} apart, of "
                f"{float(whole.abs().max()):.2g}",
                expected="a model whose last state is the sum of its embeddings and what its layers add",
            )
        return self.values.cpu().numpy(), self.rest.cpu().numpy(), whole.cpu().numpy()

    def _count(self, cell: int | None, value: Tensor) -> None:
        """Add a term `[prompt]` to a cell, or to the rest."""
        self.size = self.size + value.abs()
        if cell is None:
            self.rest = self.rest + value
        else:
            self.values[:, cell] += value

    def _from_logits(self) -> tuple[Tensor, Tensor]:
        """The direction of the metric in the output of the last layer `[prompt, width]`, and the metric `[prompt]`."""
        tower, root = self.branches.tower, unwrap(self.model)
        assert tower.unembed is not None
        head_input, head_output = self.ends_of(tower.unembed)
        device = head_input.device
        logits = self.run.logits[torch.arange(len(head_input), device=device), self.reads.to(device)]
        weights, at_zero = weights_of(self.bound, len(head_input), logits.shape[-1], logits.device)
        factor = logit_factor(self.model, head_output, logits)
        whole = (weights * head_output.double()).sum(-1) * factor + at_zero
        linear = LinearForm.through(root.get_submodule(tower.unembed), head_input, weights * factor, tower.unembed)
        self._count(None, linear.constant + at_zero)
        state = self.at(last_of(tower))
        if tower.final_norm is None:
            return linear.direction * factor_between(state, head_input, "the last layer and the head"), whole
        before, normed = self.ends_of(tower.final_norm)
        check_same(before, state, "the last layer and the final norm")
        direction = linear.direction * factor_between(normed, head_input, "the final norm and the head")
        return self._through_norm(tower.final_norm, direction), whole

    def _through_norm(self, norm: str, direction: Tensor) -> Tensor:
        """Take a direction back through a norm, and count the norm's own term."""
        frozen = FrozenNorm.of(unwrap(self.model).get_submodule(norm), norm, *self.ends_of(norm))
        self._count(None, frozen.constant(direction))
        return frozen.pulled_back(direction)

    def _norms_of_stream(self, block: Block, attn: Branch, mlp: Branch) -> tuple[list[str], list[str]]:
        """The norms of the stream itself: those at the layer's end, and those between its branches."""
        norms = _stream_norms(self.model, block)
        if not norms:
            return [], []
        stream, last = self.at(_end_of(block)), []
        if (found := self._norm_of(norms, stream)) is not None:
            last, stream = [found], self.ends_of(found)[0]
        middle = stream.double() - self.at(site_of(mlp.added)).double() * block.scale
        between = [] if block.parallel else [one for one in [self._norm_of(norms, middle)] if one is not None]
        return last, between

    def _norm_of(self, norms: Sequence[str], stream: Tensor) -> str | None:
        """The norm whose output this state of the stream is; None where it is no norm's."""
        for norm in norms:
            if Site(norm, "output") not in self.run.values:
                continue  # the norm of a cross-attention, which this model does not run
            _, output = self.ends_of(norm)
            if output.shape == stream.shape and close(output, stream):
                return norm
        return None

    def _branch(self, branch: Branch, number: int, direction: Tensor) -> None:
        """Count the terms of a branch: the branch as a whole, or its heads, neurons or experts."""
        added, requested = self.at(site_of(branch.added)), self.terms.by_branch.get(number)
        if requested is None or requested.whole is not None:
            self._count(None if requested is None else requested.whole, (added.double() * direction).sum(-1))
            return
        norm = norm_behind(branch)
        if norm is not None:
            direction, added = self._through_norm(norm, direction), self.ends_of(norm)[0]
        if requested.experts:
            self._experts(requested, added, direction)
            return
        module: nn.Module = unwrap(self.model).get_submodule(requested.projection)
        inputs = self.at(Site(requested.projection, "input", occurrence=branch.block.occurrence))
        linear = LinearForm.through(module, inputs, direction, requested.projection)
        self._count(None, linear.constant)
        terms = linear.direction * inputs.double()
        left = torch.ones(terms.shape[-1], dtype=torch.bool, device=terms.device)
        for place, cell in requested.cells.items():
            columns = slice(*(site_of(place).columns or (0, None)))
            left[columns] = False
            self._count(cell, terms[:, columns].sum(-1))
        self._count(None, terms[:, left].sum(-1))

    def _experts(self, requested: BranchTerms, added: Tensor, direction: Tensor) -> None:
        """Count the term of each expert, and that of the rest of the MLP."""
        others = added.double()
        for path in requested.experts:
            value = self.experts[path].to(others)
            others = others - value
            self._count(requested.cells.get(path), (value * direction).sum(-1))
        self._count(None, (others * direction).sum(-1))


def _end_of(block: Block) -> Site:
    return Site(block.end or block.module, "output", occurrence=block.occurrence)


def _stream_norms(model: engine.Model, block: Block) -> list[str]:
    """The norms of a layer that normalises the stream itself (post-norm); empty for others."""
    if not block.post_norm:
        return []
    return list(norms_of(Atlas.of(model), block))
