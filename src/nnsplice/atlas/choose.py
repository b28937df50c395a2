"""Choose the lists of blocks that are the decoder and the encoder.

A model may have several lists of blocks: towers for images and sound, resamplers between them, parts that alternate.
The decoder is the nearest list under the model's `get_decoder()`, or under a module that is named for text. If several
lists fit, none is chosen, as the first one would be right by chance only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from nnsplice.atlas import families as rows
from nnsplice.atlas.block import Tower, TowerName
from nnsplice.atlas.tree import ModuleTree, Node


@dataclass(frozen=True, slots=True)
class Doubt:
    """Why a model with lists of layers has no towers."""

    reason: str
    #: The lists that it is about.
    stacks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Towers:
    """What was recognised of a model."""

    towers: Mapping[str, Tower]
    #: Every list of blocks that was recognised -> its modules, whether it is a tower or not.
    stacks: Mapping[str, tuple[str, ...]]
    doubt: Doubt | None


@dataclass(frozen=True, slots=True)
class ChosenStacks:
    """The list of each tower."""

    towers: Mapping[TowerName, str]
    doubt: Doubt | None = None


def choose(tree: ModuleTree, stacks: Mapping[str, int], width: Callable[[str], int | None]) -> ChosenStacks:
    """The towers among recognised lists of blocks.

    Args:
        stacks: name of the list -> how many layers it has.
        width: how wide the stream of a list is, None where that is unknown.
    """
    groups: dict[TowerName, list[str]] = {"encoder": [], "decoder": []}
    for stack in stacks:
        groups[_tower_name(tree, stack, stacks)].append(stack)
    if stacks and not groups["decoder"]:
        encoders = tuple(groups["encoder"])
        return ChosenStacks(
            {}, Doubt(f"of its two towers the encoder alone is recognised: {_listed(encoders)}", encoders)
        )
    towers: dict[TowerName, str] = {}
    for name, group in groups.items():
        if not group:
            continue
        nearest = _nearest(tree, name, group)
        if name == "decoder":
            hidden = _hidden(tree, nearest[0], stacks)
            if hidden:
                return ChosenStacks(
                    {}, Doubt(f"the layers of its decoder, {_listed(hidden)}, are not recognised", hidden)
                )
            nearest = _fitting(tree, nearest, stacks, width)
        if len(nearest) > 1:
            which = "the layers" if name == "decoder" else "the layers of its encoder"
            return ChosenStacks({}, Doubt(f"several lists could be {which}: {_listed(nearest)}", tuple(nearest)))
        towers[name] = nearest[0]
    # In the order of the model, as it was read.
    return ChosenStacks({name: stack for stack in stacks for name, taken in towers.items() if taken == stack})


def is_numbered(node: Node) -> bool:
    """Whether a module is a list of modules."""
    return node.indexed and bool(node.children) and all(key.isdigit() for key in node.children)


def _tower_name(tree: ModuleTree, stack: str, stacks: Mapping[str, int]) -> TowerName:
    """BERT's only list is called `encoder` too, but a model with one tower has no need for the word."""
    two = tree.facts.get("is_encoder_decoder")
    if two is False:
        return "decoder"
    if any("decoder" in other.split(".") for other in stacks):
        words = stack.split(".")
        return "encoder" if "decoder" not in words and "encoder" in words else "decoder"
    return "encoder" if two and _under(stack, tree.ends.get("encoder")) else "decoder"


def _nearest(tree: ModuleTree, tower: TowerName, stacks: list[str]) -> list[str]:
    """The lists that stand nearest to where a tower is looked for."""
    keys = {stack: _distance(tree, tower, stack) for stack in stacks}
    best = min(keys.values())
    return [stack for stack, key in keys.items() if key == best]


def _distance(tree: ModuleTree, tower: TowerName, stack: str) -> tuple[bool, bool, int]:
    """How far a list stands from where the tower is looked for: by what names it, and by steps."""
    home = tree.ends.get(tower)
    beneath = _under(stack, home)
    return (
        not reads_text(stack),
        not beneath,
        len(stack.split(".")) - (len(home.split(".")) if home and beneath else 0),
    )


def reads_text(stack: str) -> bool:
    """Whether a list stands in a part that is named for text."""
    return bool(rows.TEXT & set(stack.split(".")))


def _under(name: str, home: str | None) -> bool:
    return home is not None and name.startswith(f"{home}.")


def _hidden(tree: ModuleTree, chosen: str, stacks: Mapping[str, int]) -> tuple[str, ...]:
    """Lists of modules that stand nearer than the chosen one and were not recognised: they may be the decoder."""
    found = []
    for node in tree.nodes.values():
        words = set(node.name.split("."))
        if not is_numbered(node) or node.name in stacks or words & (rows.NOT_TEXT | {"encoder"}):
            continue
        if any(node.name.startswith(f"{other}.") for other in (*stacks, *found)):
            continue
        blocks = [tree.nodes[child] for child in node.children.values()]
        if all(len(block.children) > 1 for block in blocks):
            found.append(node.name)
    return tuple(n for n in found if _distance(tree, "decoder", n) < _distance(tree, "decoder", chosen))


def _fitting(
    tree: ModuleTree, nearest: list[str], stacks: Mapping[str, int], width: Callable[[str], int | None]
) -> list[str]:
    """Of lists that stand equally near, those that are as wide as the embedding and as long as the config says."""
    embed = tree.ends.get("embed")
    shape = tree.weight(embed) if embed is not None else None
    layers = next((tree.facts[key] for key in rows.N_LAYERS if isinstance(tree.facts.get(key), int)), None)
    for fits in (lambda stack: shape and width(stack) == shape[1], lambda stack: stacks[stack] == layers):
        nearest = [stack for stack in nearest if fits(stack)] or nearest
    return nearest


def _listed(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names)
