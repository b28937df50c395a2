"""The scheme of a transformers model, from its atlas, and of its checkpoint files."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator

from nnsplice.atlas import Atlas, Block, Tower
from nnsplice.atlas.families import EXPERT_PARTS
from nnsplice.atlas.layouts import ROLES
from nnsplice.checkpoints.between.scheme import (
    Scheme,
    Stored,
    fused,
    fused_experts,
    scheme,
    single,
    tied,
)
from nnsplice.errors import NnspliceError

#: Norms of a block: name in transformers -> part. In blocks with a norm after the MLP, one is after attention too.
_NORMS = {
    "input_layernorm": "norm1", "ln_1": "norm1", "self_attn_layer_norm": "norm1", "ln_2": "norm2",
    "post_attention_layernorm": "norm2", "pre_feedforward_layernorm": "norm2", "final_layer_norm": "norm2",
}  # fmt: skip
_SANDWICH = {**_NORMS, "post_attention_layernorm": "norm1_after", "post_feedforward_layernorm": "norm2_after"}
#: Buffers in older files that models compute: causal masks, rotary frequencies, position ids.
_COMPUTED = re.compile(r"(^|\.)((cross)?(attn|attention)\.(masked_)?bias|rotary_emb\.inv_freq|position_ids)$")
#: Families whose norms multiply by one plus the weight, and whose embeddings are scaled in code.
GEMMA = re.compile(r"gemma")


def huggingface(atlas: Atlas) -> Scheme:
    """The scheme of a model's own parameters, and of the buffers that are saved with them."""
    found: dict[str, Stored] = {}
    tower = atlas.towers.get("decoder")
    if tower is not None and len(atlas.towers) == 1:
        found |= scheme(_ends(atlas, tower))
        for block in tower.blocks:
            if block.occurrence == 0:
                found |= scheme(_block(atlas, block))
    # A tensor without a part is its own part, which the other side has if it has the same name.
    every = (*atlas.tree.params, *atlas.tree.saved)
    others: dict[str, list[str]] = {}
    for name, kept in atlas.tree.aliases.items():
        others.setdefault(kept, []).append(f"as it is: {name}")
    rest = {name: tied(name, f"as it is: {name}", others.get(name, [])) for name in every if name not in found}
    return {name: (found | rest)[name] for name in every}


def _ends(atlas: Atlas, tower: Tower) -> Iterator[Stored]:
    scaled = "_unscaled" if GEMMA.match(str(atlas.tree.facts.get("model_type", ""))) else ""
    if tower.embed is not None:
        name = f"{tower.embed}.weight"
        part = f"embed{scaled}.weight"
        if atlas.tied:  # one tensor, two meanings
            yield tied(name, part, ["unembed.weight"])
        else:
            yield single(name, part)
    if tower.unembed is not None and not atlas.tied:
        yield from _layer(atlas, tower.unembed, "unembed")
    if tower.final_norm is not None:
        yield from _norm(atlas, tower.final_norm, "final_norm")
    positions = f"{tower.prefix}.wpe.weight".lstrip(".")
    if positions in atlas.tree.params:
        yield single(positions, "positions.weight")


def _block(atlas: Atlas, block: Block) -> Iterator[Stored]:
    here = f"L.{block.index}"
    for role in (*ROLES, "o"):
        module = getattr(block, role)
        # A layer that makes gates beside queries, or keys beside values, is left with its name.
        if module is not None and (role == "o" or not block.shares(role)):
            yield from _layer(atlas, module, f"{here}.attn.{role}")
    if block.fused is not None and block.layout is not None:
        ranges = [tuple(block.layout.range(role, i) for i in range(block.layout.count(role))) for role in ROLES]
        for kind, name, transposed in _parameters(atlas, block.fused):
            yield fused(name, [f"{here}.attn.{role}.{kind}" for role in ROLES], ranges, transposed=transposed)
    for role in ("gate", "up", "down", "router"):
        module = getattr(block, role)
        if module is not None:
            yield from _layer(atlas, module, f"{here}.mlp.{role}")
    if block.gate_up is not None:
        ranges = [((0, block.n_neurons),), ((block.n_neurons, 2 * block.n_neurons),)]
        for kind, name, transposed in _parameters(atlas, block.gate_up):
            yield fused(name, [f"{here}.mlp.{role}.{kind}" for role in ("gate", "up")], ranges, transposed=transposed)
    if block.experts is not None:
        yield from _experts(atlas, block, here)
    inside = {child.rpartition(".")[2]: child for child in atlas.tree.under(block.module, 1)}
    for word, meaning in (_SANDWICH if "post_feedforward_layernorm" in inside else _NORMS).items():
        if word in inside:
            yield from _norm(atlas, inside[word], f"{here}.{meaning}")
    for word in ("q_norm", "k_norm"):
        module = None if block.attn is None else atlas.tree.child(block.attn, word)
        if module is not None:
            yield from _norm(atlas, module, f"{here}.attn.{word}")


def _experts(atlas: Atlas, block: Block, here: str) -> Iterator[Stored]:
    """Experts as modules, or as two tensors with the axis of experts first."""
    assert block.experts is not None
    numbers = range(block.n_experts)
    if block.experts_are_modules:
        for number, expert in zip(numbers, atlas.tree.nodes[block.experts].children.values(), strict=True):
            for role, words in EXPERT_PARTS.items():
                module = next((child for word in words if (child := atlas.tree.child(expert, word))), None)
                if module is not None:
                    yield from _layer(atlas, module, f"{here}.experts.{number}.{role}")
        return
    shapes = {name.rpartition(".")[2]: shape for name, shape in atlas.tree.nodes[block.experts].params.values()}
    both, down = shapes.get("gate_up_proj"), shapes.get("down_proj")
    # Anything else (turned matrices, gate and up by turns, biases) is left with its name.
    if both is None or down is None or len(shapes) != 2 or both != (len(numbers), 2 * down[2], down[1]):
        return
    parts = [[f"{here}.experts.{number}.{role}.weight" for role in ("gate", "up")] for number in numbers]
    yield fused_experts(f"{block.experts}.gate_up_proj", parts, [down[2], down[2]])
    yield fused_experts(f"{block.experts}.down_proj", [[f"{here}.experts.{n}.down.weight"] for n in numbers], [down[1]])


def _parameters(atlas: Atlas, module: str) -> Iterator[tuple[str, str, bool]]:
    """Weight and bias of a layer: which, by what name, and whether it is stored the other way round."""
    params = atlas.tree.nodes[module].params
    for kind in ("weight", "bias"):
        if kind in params:
            yield kind, params[kind][0], kind == "weight" and atlas.tree.transposed(module)


def _layer(atlas: Atlas, module: str, part: str) -> Iterator[Stored]:
    for kind, name, transposed in _parameters(atlas, module):
        yield (turned if transposed else plain)(name, f"{part}.{kind}")


def _norm(atlas: Atlas, module: str, part: str) -> Iterator[Stored]:
    shifted = "_less_one" if GEMMA.match(str(atlas.tree.facts.get("model_type", ""))) else ""
    for kind, name, _ in _parameters(atlas, module):
        yield single(name, f"{part}.{kind}{shifted}")


def spelled(atlas: Atlas, own: Scheme, names: Iterable[str]) -> Scheme:
    """The scheme of a folder, whose files may spell parameters otherwise: a prefix more or less, experts one by one."""
    found: dict[str, Stored] = {}
    for name in names:
        known = _prefixed(atlas, own, name)
        if known is not None:
            found[name] = own[known].renamed(name)
        elif not _COMPUTED.search(name):
            found[name] = _located(atlas, name)
    # What the model ties, and a folder has twice, are two tensors: transformers reads them so.
    twice = {part for stored in found.values() if not stored.tied_parts for part in stored.parts}
    return {name: stored.without(twice) if stored.tied_parts & twice else stored for name, stored in found.items()}


def own_name(atlas: Atlas, name: str) -> str | None:
    """What the model calls a tensor of a file, where it has one tensor for it; None where it has not."""
    known = atlas.tree.aliases.get(name) or _prefixed(atlas, atlas.tree.params, name)
    if known is not None:
        return known
    try:
        place = atlas.locate(name)
    except NnspliceError:
        return None
    words, kind = [step.name for step in place.steps], name.rpartition(".")[2]
    if place.native or (words != ["unembed"] and words[1:] != ["mlp", "router"]):
        return None
    return next((own for own in atlas.resolve(place).names if own.rpartition(".")[2] == kind), None)


def _prefixed(atlas: Atlas, own: Container[str], name: str) -> str | None:
    """The model's name of a tensor, which files write with a prefix more or less."""
    words = name.split(".")
    spellings = [
        name,
        *(".".join(words[i:]) for i in range(1, 3)),
        *(f"{front}.{name}" for front in _fronts(atlas)),
    ]
    return next((spelling for spelling in spellings if spelling in own), None)


def _fronts(atlas: Atlas) -> list[str]:
    return [tower.prefix for tower in atlas.towers.values() if tower.prefix]


def _located(atlas: Atlas, name: str) -> Stored:
    """A name that the model itself does not have: an expert's matrix, a router or an unembedding by another name."""
    alias = _prefixed(atlas, atlas.tree.aliases, name)
    if alias is not None:
        tower = atlas.tower()
        last = len(atlas.towers) == 1 and atlas.tied and alias == f"{tower.unembed}.weight"
        return single(name, "unembed.weight" if last else f"as it is: {alias}")
    try:
        place = atlas.locate(name)
    except NnspliceError:
        return single(name, f"as it is: {name}")
    steps, (module, kind) = place.steps, name.split(".")[-2:]
    if [step.name for step in steps] == ["unembed"] and not atlas.tied:
        return single(name, f"unembed.{kind}")
    layer = f"L.{steps[0].index}"
    if len(steps) == 2 and steps[1].name == "experts":
        role = next((role for role, words in EXPERT_PARTS.items() if module in words), None)
        if role is not None:
            return single(name, f"{layer}.experts.{steps[1].index}.{role}.{kind}")
    if [step.name for step in steps[1:]] == ["mlp", "router"]:
        return single(name, f"{layer}.mlp.router.{kind}")
    return single(name, f"as it is: {name}")


def expert_of(atlas: Atlas, name: str) -> tuple[list[str], int] | None:
    """For an expert's tensor in a file: the model's tensors that hold all experts, and the expert's number."""
    try:
        steps = atlas.locate(name).steps
    except NnspliceError:
        return None
    if len(steps) != 2 or steps[1].name != "experts" or not isinstance(steps[1].index, int):
        return None
    block = next(tower.blocks[int(str(steps[0].index))] for tower in atlas.towers.values())
    params = atlas.tree.nodes[str(block.experts)].params
    return [full for full, _ in params.values()], steps[1].index
