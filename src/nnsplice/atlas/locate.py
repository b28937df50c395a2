"""Names of parameters and modules -> the smallest portable site that holds them.

Names come from this model, from a wrapped or an unwrapped one, from adapter files and from checkpoints, so the same
tensor is spelled in many ways. A name is first brought to a spelling of this model's tree; then the site is the
deepest module around it that the language has a word for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from nnsplice.atlas import families as rows
from nnsplice.atlas.model_parts import ModelParts
from nnsplice.atlas.modules import layer_place
from nnsplice.atlas.resolve import resolve
from nnsplice.errors import OutOfRange, UnknownPath, closest
from nnsplice.paths.path import Path, Step

#: Names that wrappers put in the middle of others.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
#: What an adapter hangs below the layer it changes: `.lora_A.default.weight`, `.base_layer.weight`, ...
_ADAPTED = re.compile(
    r"\.(?:base_layer|original_module|modules_to_save(?:\.\w+)?"
    r"|(?:lora|vera|hada|lokr|oft|ia3|randlora)_\w+?(?:\.\w+?)??)(?=\.(?:weight|bias)$|$)"
)


def locate(atlas: ModelParts, name: str) -> Path:
    """The smallest site that holds a name. See `Atlas.locate`."""
    for spelling in _spellings(atlas, name):
        found = _known(atlas, spelling) or _foreign_expert(atlas, spelling)
        if found is not None:
            return found
    found = _foreign_unembed(atlas, name)
    if found is not None:
        return found
    tree = atlas.tree
    raise UnknownPath(
        f"{name} is no name of this model, however it may be wrapped",
        expected=closest(name, [*tree.params, *filter(None, tree.nodes), *tree.buffers]),
    )


def _spellings(atlas: ModelParts, name: str) -> Iterator[str]:
    """The name as it may be called in this tree, most literal first."""
    seen: set[str] = set()
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    roots = atlas.tree.nodes[""].children
    stacks = tuple(f"{tower.stack}." for tower in atlas.towers.values())
    homes = [home for tower in atlas.towers.values() for home in _ancestors(tower.prefix)]
    for literal in dict.fromkeys((name, ".".join(parts), _ADAPTED.sub("", ".".join(parts)))):
        words = literal.split(".")
        # `base_model.model.` and `module.` in front, or the backbone's own name where this model is the bare backbone.
        tails = [".".join(words[i:]) for i, word in enumerate(words) if i == 0 or word in roots]
        # ... or the other way round: this model puts its backbone's name in front.
        tails += [f"{home}.{'.'.join(words[i:])}" for i in range(len(words)) for home in homes]
        for tail in tails:
            if tail not in seen and (tail == name or _exists(atlas, tail) or tail.startswith(stacks)):
                seen.add(tail)
                yield tail


def _ancestors(prefix: str) -> list[str]:
    words = prefix.split(".")
    return [".".join(words[:i]) for i in range(1, len(words) + 1) if prefix]


def _exists(atlas: ModelParts, name: str) -> bool:
    tree = atlas.tree
    return name in tree.params or name in tree.aliases or name in tree.nodes or name in tree.buffers


def _known(atlas: ModelParts, name: str) -> Path | None:
    """A name of the tree itself."""
    tree = atlas.tree
    if not name or (not _exists(atlas, name) and not _layer_weight(atlas, name)):
        return None
    parameter = tree.aliases.get(name, name) if name not in tree.nodes else None
    words = name.split(".")
    for stop in range(len(words), 0, -1):
        place = atlas.places.get(".".join(words[:stop]))
        if place is None:
            continue
        # A norm inside the attention lies below its module, but is no parameter of `attn`.
        if parameter in tree.params and parameter not in resolve(atlas, place):
            continue
        return place
    # T5's `shared` is never called; its tensor is the embedding of both towers.
    for role in ("embed", "unembed"):
        for tower in sorted(atlas.towers.values(), key=lambda tower: tower.name):
            place = atlas.places.get(getattr(tower, role) or "")
            if place is not None and parameter in tree.params and parameter in resolve(atlas, place):
                return place
    return _native(atlas, name)


def _layer_weight(atlas: ModelParts, name: str) -> bool:
    """Whether it is the weight of a layer whose own parameters an adapter moved one module down."""
    module, _, attribute = name.rpartition(".")
    return module in atlas.tree.nodes and attribute in atlas.tree.owner(module).params


def _native(atlas: ModelParts, name: str) -> Path:
    module, _, attribute = name.rpartition(".")
    steps: list[Step] = []
    for word in (name if name in atlas.tree.nodes else module).split("."):
        if word.isdigit() and steps and steps[-1].index is None:
            steps[-1] = replace(steps[-1], index=int(word))
        elif word:
            steps.append(Step(word))
    value = None
    if name not in atlas.tree.nodes:
        value = attribute if attribute in ("weight", "bias") else None
        steps += [] if value else [Step(attribute)]
    return Path(tuple(steps), native=True, value=value)


def _foreign_expert(atlas: ModelParts, name: str) -> Path | None:
    """Mixture-of-experts names of the other spelling: one module per expert, or fused tensors."""
    for tower in atlas.towers.values():
        match = re.match(rf"{re.escape(tower.stack)}\.(\d+)\.(.+)$", name)
        if match is None or int(match[1]) >= tower.n_layers:
            continue
        block = tower.blocks[int(match[1])]
        if not block.is_sparse:
            continue
        expert = re.search(r"(?:^|\.)experts\.(\d+)(?:\.|$)", match[2])
        if expert is not None:
            if int(expert[1]) >= block.n_experts:
                raise OutOfRange(
                    f"{name} names expert {expert[1]}, but layer {block.index} has {block.n_experts}, "
                    f"so experts are experts[0] to experts[{block.n_experts - 1}]"
                )
            return layer_place(tower, block, Step("experts", int(expert[1])))
        if re.search(r"(?:^|\.)experts\.\w+$", match[2]):
            return layer_place(tower, block, Step("mlp"))
        if re.fullmatch(rf"\w+\.(?:{'|'.join(rows.ROUTER)})(?:\.\w+)?", match[2]):
            return layer_place(tower, block, Step("mlp"), Step("router"))
    return None


def _foreign_unembed(atlas: ModelParts, name: str) -> Path | None:
    """The unembedding by the name that other versions of the family give it (`embed_out.weight`)."""
    tower = atlas.towers.get("decoder")
    module = name.rpartition(".")[0]
    named = any(module == row or module.endswith(f".{row}") for row in rows.UNEMBED if "." in row or "_" in row)
    return Path((Step("unembed"),)) if named and tower is not None and tower.unembed else None
