"""Native paths -> sites: the model's own attributes, followed in its tree."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from nnsplice.atlas import families as rows
from nnsplice.atlas.block import TowerName
from nnsplice.atlas.indices import column, resolve_index
from nnsplice.atlas.model_parts import ModelParts
from nnsplice.atlas.site import Site
from nnsplice.errors import PathError, RefusedPlace, UnknownPath, closest
from nnsplice.paths.path import WEIGHT_VALUES, Path, Step


@dataclass(frozen=True, slots=True)
class Found:
    """Where a native path leads: a module, and the parameter of it where the last name is one."""

    steps: tuple[Step, ...]
    module: str
    parameter: str | None = None


def follow(atlas: ModelParts, path: Path) -> Iterator[Found]:
    """Every module or parameter that a native path names, in numeric order."""
    yield from _follow(atlas, path, 0, "", ())


def _follow(atlas: ModelParts, path: Path, number: int, module: str, done: tuple[Step, ...]) -> Iterator[Found]:
    nodes = atlas.tree.nodes
    if number == len(path.steps):
        yield Found(done, module)
        return
    step, node = path.steps[number], nodes[module]
    child = node.children.get(step.name)
    if child is None:
        if step.name in node.params and number == len(path.steps) - 1 and step.index is None:
            yield Found((*done, step), module, step.name)
            return
        owner = f"model.{'.'.join(map(str, done))}" if done else "model"
        raise UnknownPath(
            f"{owner} has no part {step.name}",
            path=path,
            column=column(path, number),
            expected=closest(step.name, [*node.children, *node.params]),
        )
    if step.index is None:
        yield from _follow(atlas, path, number + 1, child, (*done, step))
        return
    inner = nodes[child]
    shown = ".".join(["model", *map(str, done), step.name])
    if not inner.indexed or not inner.children:
        raise UnknownPath(
            f"{shown} is no list of modules",
            path=path,
            column=column(path, number) + len(step.name),
            expected=closest("", inner.children) if inner.children else "no index here",
        )
    entries = list(inner.children.values())
    noun = "layer" if any(tower.stack == child for tower in atlas.towers.values()) else "entry"
    for index in resolve_index(path, number, len(entries), noun, "this model" if noun == "layer" else "it", shown):
        yield from _follow(atlas, path, number + 1, entries[index], (*done, Step(step.name, index)))


def expand_native(atlas: ModelParts, path: Path) -> Iterator[Path]:
    """Every concrete path that a native path means."""
    if path.value in WEIGHT_VALUES:
        raise PathError(
            f"{path} names a parameter, not an activation", path=path, expected="an activation such as .output"
        )
    for found in follow(atlas, path):
        if found.parameter is not None:
            raise PathError(
                f"{found.parameter} is a parameter: it has no activation",
                path=path,
                column=column(path, len(path.steps) - 1),
                write=f"{replace(path, steps=path.steps[:-1], value='output')}",
            )
        node = atlas.tree.nodes[found.module]
        if node.container:
            place = replace(path, steps=found.steps, value=None, item=None, position=None)
            raise RefusedPlace(
                f"{place} is a list of modules, which is never called itself",
                path=path,
                column=column(path, len(path.steps) - 1),
                write=f"{place}[:].output" if node.indexed else f"{place}.{next(iter(node.children), 'name')}.output",
            )
        value = path.value or "output"
        end = "input" if value == "input" else "output"
        item = path.item
        if item == 0 and end == "output" and found.module in atlas.tuple_modules:
            item = None  # the first of a tuple, which is what no item means as well
        site = Site(found.module, end, item, tower=tower_of(atlas, found.module))
        yield replace(path, steps=found.steps, value=value, site=site)


def tower_of(atlas: ModelParts, module: str) -> TowerName:
    """Whose tokens a module's values run over."""
    encoder = atlas.towers.get("encoder")
    if encoder is None:
        return "decoder"
    if module == encoder.prefix or module.startswith(f"{encoder.prefix}."):
        return "encoder"
    parts = module.split(".")
    # Keys and values of cross attention are read off the encoder's tokens.
    if len(parts) > 1 and parts[-2] in rows.CROSS and parts[-1] in (*rows.K, *rows.V):
        return "encoder"
    return "decoder"
