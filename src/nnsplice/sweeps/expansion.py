"""Sites as paths -> targets: the cells of a sweep in execution order."""

from __future__ import annotations

from dataclasses import replace

from nnsplice import closures, engine
from nnsplice.activations import derived
from nnsplice.activations.access import site_of
from nnsplice.activations.prompts import Prompts
from nnsplice.errors import BadArgument, ShortRow, circumstances
from nnsplice.paths import Path, Position, Slice, Span
from nnsplice.sweeps.sets import Sites, check_tokens, split_sites, target_of_set
from nnsplice.sweeps.targets import Target, TargetPart, cell_of, number_of
from nnsplice.tokens import columns, concrete


def targets_of(model: engine.Model, sites: Sites, edited: Prompts, window: int, together: bool) -> tuple[Target, ...]:
    """A target for each site and position, and for each set, in the order of the forward pass."""
    wanted, sets = split_sites(sites)
    if window < 1:
        raise BadArgument(f"window={window}", expected="at least 1")
    if window > 1 and sets:
        raise BadArgument(
            f"window={window} beside sets of sites, which say themselves what is changed together",
            expected="one of them",
            write='sites=[["layers[3:8].mlp.output[-1]"], ...] for a window of layers 3 to 7',
        )
    targets: dict[Path, Target] = {}
    for pattern in wanted:
        open_ = pattern.position is None
        places = engine.expand(model, pattern.place)
        for place in places:
            tower = site_of(place).tower
            written = _window(model, place, window)
            for position in [None] if open_ and together else _positions(pattern, edited, tower):
                for key_position in [None] if pattern.key is None else _positions(pattern, edited, tower, pattern.key):
                    key = replace(place.at(Slice() if position is None else position), key=key_position)
                    cell = cell_of(key)
                    targets.setdefault(key, Target(cell, (TargetPart(cell, written, position, key_position),)))
    known = engine.map_of(model)
    found = [targets[path] for path in sorted(targets, key=lambda path: known.rank(path))]
    joint = [target_of_set(model, known, members, edited) for members in sets]
    found += {target.cell.path: target for target in joint}.values()
    places = [place for target in found for place in target.places]
    derived.refuse_routers(model, places)
    closures.require(model, places, written=True)
    closures.warn_of_joint_norms(model, places)
    return tuple(found)


def _positions(pattern: Path, edited: Prompts, tower: str, position: Position | None = None) -> list[int | Span]:
    """The positions of a path, each a cell of its own; a position that no prompt has is an error."""
    lengths = edited.lengths(tower)
    position = pattern.position if position is None else position
    if position is None or isinstance(position, Slice):
        found = list((position or Slice()).range(max(lengths)))
        if not found:
            raise ShortRow(f"[{position}] selects none of at most {max(lengths)} tokens", path=pattern)
        return list(found)
    each: list[int | Span] = list(dict.fromkeys(position)) if isinstance(position, tuple) else [position]
    check_tokens(each, edited, pattern, tower)
    return each


def _window(model: engine.Model, place: Path, window: int) -> tuple[Path, ...]:
    """The sites of a window of layers around a site, itself included; fewer at the first and last layers."""
    if window == 1:
        return (place,)
    layer = number_of(place, "layer")
    if layer is None:
        raise BadArgument("a window is of neighbouring layers, and this site has no layer", path=place)
    low, high = layer - window // 2, layer + (window + 1) // 2
    at = next(number for number, step in enumerate(place.steps) if step.index is not None)  # where layers are counted
    steps = list(place.steps)
    steps[at] = replace(steps[at], index=Slice(max(low, 0), high))
    with circumstances(f"window={window} around {place}"):
        return tuple(engine.expand(model, replace(place, site=None, steps=tuple(steps))))


def tokens_of(path: Path, prompts: Prompts) -> list[list[int]]:
    """The tokens of each prompt at a path's position; all tokens without a position.

    Raises:
        ShortRow: a prompt has no such token.
    """
    tower = site_of(path).tower
    found: list[list[int]] = []
    for row, length in enumerate(prompts.lengths(tower)):
        if path.position is None:
            found.append(list(range(length)))
            continue
        one = prompts.take([row])
        with circumstances(str(path)):
            rows = one.rows(tower)
            at = columns(concrete(path.position, rows, length, one.spans), rows, length, one.spans)
        found.append([int(token) % length for token in (at if isinstance(at, list) else at[0])])
    return found
