"""`atp*`: `atp` with exact softmax for queries and keys, and dropped gradients (Kramar et al., 2024).

* A softmax that is nearly certain has no gradient, though another query would turn it round. So for queries and keys
  the new probabilities are computed, and the straight line begins behind them (the QK fix).
* Effects on two ways through the model may cancel to nothing. So gradients are taken once for each layer with that
  layer's branches standing still, and the sizes of what each says are averaged (GradDrop). The sign is atp's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nnsplice.activations.access import site_of
from nnsplice.atlas import Atlas, Site, unwrap
from nnsplice.atlas.tree import is_norm
from nnsplice.attribution.attention import AttentionRecords, probabilities, worth_of_keys, worth_of_queries
from nnsplice.attribution.branches import Branches, branches_of
from nnsplice.attribution.gradients import GradientRun, gradient_run, pulled, value_key
from nnsplice.attribution.nodes import AttributionBatch, Gradients, lined_up, on_host
from nnsplice.errors import BadArgument, NnspliceError
from nnsplice.paths import Path


@dataclass(frozen=True)
class QueryKeySite:
    """A site that holds queries or keys: whose, and of which heads."""

    module: nn.Module
    role: str
    heads: tuple[int, ...]
    #: The reason why patching them changes more than these heads' probabilities; empty if it does not.
    mixes: str


def with_both_fixes(batch: AttributionBatch) -> tuple[GradientRun, Tensor]:
    """The corrupted run and scores `[row, cell]`: sizes with GradDrop, the sign without."""
    branches = branches_of(batch.model)
    qk_sites = query_key_sites(batch, branches)
    added = [branch.added for branch in branches.all]
    here, attention, there = _runs(batch, [*batch.paths, *added], bool(qk_sites))
    drop = _GradientDrop(here.tensors, branches)
    metric = batch.metric(here)
    value_keys = list(dict.fromkeys(value_key(site_of(path)) for path in batch.paths))
    modules = list(dict.fromkeys(one.module for one in qk_sites.values()))
    inputs = [here.tensors[name] for name in value_keys] + [attention[module].probabilities for module in modules]
    layers = range(branches.tower.n_layers)

    def scores(dropped: int | None) -> Tensor:
        drop.layer = dropped
        batch.spent.backward(batch.plan.corrupted, batch.rows)
        found = pulled(metric, inputs, again=dropped != layers[-1])
        gradients: Gradients = dict(zip(value_keys, found[: len(value_keys)], strict=True))
        straight = lined_up(batch, here, gradients, skip=qk_sites)
        of_modules = {m: g for m, g in zip(modules, found[len(value_keys) :], strict=True) if g is not None}
        return straight + _queries_and_keys(batch, qk_sites, attention, there, of_modules)

    plain = scores(None)
    owners = torch.tensor([_layer_inside(batch, branches, cell) for cell in range(len(batch.plan.targets))])
    sizes, counted = torch.zeros_like(plain), torch.zeros(len(owners))
    for layer in layers:
        others = owners != layer
        sizes += scores(layer).abs() * others
        counted += others
    # In a model of one layer nothing can be left out beside the site itself.
    sizes = torch.where(counted > 0, sizes / counted.clamp_min(1), plain.abs())
    return here, torch.where(plain < 0, -sizes, sizes)


class _GradientDrop:
    """Stops the gradient at the outputs of one layer's branches, as if they were constant."""

    def __init__(self, tensors: Mapping, branches: Branches) -> None:
        self.layer: int | None = None
        for branch in branches.all:
            tensors[value_key(site_of(branch.added))].register_hook(self._for(branch.block.index))

    def _for(self, layer: int):
        return lambda gradient: torch.zeros_like(gradient) if self.layer == layer else gradient


def _layer_inside(batch: AttributionBatch, branches: Branches, cell: int) -> int:
    """The layer whose standing still would silence the cell itself; -1 for sites of the stream."""
    inside = [branches.of(place) for place in batch.plan.targets[cell].places]
    layers = {branch.block.index for branch in inside if branch is not None}
    return layers.pop() if len(layers) == 1 and None not in inside else -1


# --- queries and keys -------------------------------------------------------------------------------------------------


def query_key_sites(batch: AttributionBatch, branches: Branches) -> dict[Path, QueryKeySite]:
    """The sites that hold queries or keys, in any spelling."""
    roles = dict(_roles(batch, branches))
    found = {path: roles[site_of(path)] for path in batch.paths if site_of(path) in roles}
    for reason in {ask.mixes for ask in found.values() if ask.mixes}:
        raise _refusal(reason)
    return found


def _roles(batch: AttributionBatch, branches: Branches) -> Iterator[tuple[Site, QueryKeySite]]:
    root, atlas = unwrap(batch.model), Atlas.of(batch.model)
    for block in branches.tower.blocks:
        home = block.attn or (block.pattern or (None,))[0]
        layout = block.layout
        if home is None or layout is None:
            continue
        # Norms of latent queries and keys come before the heads are split.
        before = tuple(name.removesuffix("_proj").removesuffix("_proj_with_mqa") for name in block.latents)
        inner = [name for name in atlas.tree.under(home) if name != block.attn_added and not name.startswith(before)]
        norms = any(_mixes(atlas, name, layout.size("q")) for name in inner)
        mixes = "a norm takes the queries or keys of all heads together" if norms else ""
        keys = "a part of each key, which is rotated, is that of all heads" if layout.kind == "latent" else mixes
        module, start = root.get_submodule(home), f"layers[{block.index}]"
        places = {f"{start}.heads[{h}].q": ("q", (h,)) for h in range(layout.n_heads)}
        places |= {f"{start}.groups[{g}].k": ("k", tuple(layout.heads_of(g))) for g in range(layout.n_kv)}
        places |= {f"{start}.attn.{role}": (role, tuple(range(layout.n_heads))) for role in ("q", "k")}
        for text, (role, heads) in places.items():
            try:
                (path,) = atlas.expand(text)
            except NnspliceError:  # heads that alternate on one axis have no site for all of them
                continue
            yield site_of(path), QueryKeySite(module, role, heads, keys if role == "k" else mixes)


def _mixes(atlas: Atlas, name: str, head_dim: int) -> bool:
    return is_norm(atlas.tree, name) and any(
        shape[0] > head_dim for _, shape in atlas.tree.nodes[name].params.values() if shape
    )


def _queries_and_keys(
    batch: AttributionBatch,
    qk_sites: Mapping[Path, QueryKeySite],
    here: AttentionRecords,
    there: AttentionRecords,
    gradients: Mapping[nn.Module, Tensor],
) -> Tensor:
    """`[row, cell]`, of sites with queries or keys, along the gradients at the probabilities of their modules."""
    scores = torch.zeros(len(batch.rows), len(batch.plan.targets), dtype=torch.float64)
    wanted = [(one, ask) for one in batch.wanted if (ask := qk_sites.get(one.place)) and ask.module in gradients]
    worth: dict[tuple[nn.Module, str], Tensor] = {}
    for module, role in dict.fromkeys((ask.module, ask.role) for _, ask in wanted):
        of = worth_of_queries if role == "q" else worth_of_keys
        worth[module, role] = of(here[module], there[module], gradients[module])
    worth = dict(zip(worth, on_host(list(worth.values())), strict=True))
    for one, ask in wanted:
        per_token = worth[ask.module, ask.role][:, list(ask.heads)].sum(1)
        scores.index_put_((one.rows, one.cells), per_token[one.rows, one.tokens], accumulate=True)
    return scores


def _runs(batch: AttributionBatch, paths: list[Path], with_attention: bool):
    """The corrupted run, and the attention of both runs where queries or keys are needed."""
    if not with_attention:
        return batch.run(paths), {}, {}
    root = unwrap(batch.model)
    if batch.plan.align != "position":
        raise BadArgument(
            'atp* computes attention of one run with queries and keys of the other, at the same positions; align="end" '
            "has others",
            expected='prompts of one length in a pair, or method="atp"',
        )
    try:
        with probabilities(root) as there:
            assert batch.plan.clean is not None
            batch.spent.forward(batch.plan.clean, batch.rows)
            with torch.no_grad():
                gradient_run(batch.model, batch.plan, batch.rows, batch.paths[:1], clean=True, tied=False)
        with probabilities(root) as here:
            one = batch.run(paths)
    except NotImplementedError as reason:
        raise _refusal(str(reason)) from None
    _check_same(batch, one.logits, here, there)
    return one, here, there


def _check_same(batch: AttributionBatch, logits: Tensor, here: AttentionRecords, there: AttentionRecords) -> None:
    layers = len(batch.wanted) and {one.module for one in query_key_sites(batch, branches_of(batch.model)).values()}
    if not layers <= set(here) or not layers <= set(there):  # type: ignore[operator]
        raise _refusal("its attention does not go through transformers' registry")
    own = batch.run([], tied=False).logits
    scale = float(own.abs().max()) or 1.0
    # Models that are told to use eager attention take its softmax in single precision, whatever their own.
    allowed = 1e-5 if own.dtype == torch.float64 else 1e-3 if own.dtype == torch.float32 else 5e-2
    if not float((own - logits.detach()).abs().max()) <= allowed * scale:
        raise _refusal("its attention is no plain softmax of scores")


def _refusal(reason: str) -> BadArgument:
    return BadArgument(
        f"atp* has to see the probabilities of this model's attention, and cannot: {reason}",
        expected='method="atp", or sites other than queries and keys',
    )
