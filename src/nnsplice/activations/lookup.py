"""The entries of a capture that match a path.

A key is found by its text, and by its site where the capture has an atlas: `layers[-1]`, `layers[2]` and
`model.transformer.h[2]` are then one site. Positions are compared as written: `[-1]` and `[4]` are two keys.

A slice selects the captured entries in its range; of a list every number must be captured.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import product

from torch import Tensor

from nnsplice.activations.packs import Pack
from nnsplice.atlas import Atlas, Site
from nnsplice.errors import BadArgument, PathError, UnknownPath, closest
from nnsplice.paths import Path, Position, Slice, Span, Step, parse_path

#: (number of the pack, number of the position in it)
EntryIndex = tuple[int, int]


class KeyIndex:
    """Finds the entry of a key by its text, or by its site if the keys are located in a model."""

    def __init__(self, packs: Sequence[Pack]) -> None:
        entries = [(key, (p, n)) for p, pack in enumerate(packs) for n, key in enumerate(pack.keys)]
        self.packs = packs
        self.by_text: dict[str, EntryIndex] = {str(key): entry for key, entry in entries}
        self.by_site: dict[Path, EntryIndex] = {key: entry for key, entry in entries if key.site is not None}

    @cached_property
    def places(self) -> dict[str, int]:
        """The text of every site, in each spelling -> the number of its pack."""
        return {str(key.place): number for number, pack in enumerate(self.packs) for key in pack.keys}

    def same(self, key: Path) -> EntryIndex | None:
        """The entry of the same site and position, in any spelling."""
        return self.by_text.get(str(key)) or (None if key.site is None else self.by_site.get(key))


def tensor(index: KeyIndex, path: str | Path, atlas: Atlas | None, length: int | None) -> Tensor:
    """The tensor at a path of one site: `[prompt, width]`, or `[prompt, position, width]` for several positions.

    Raises:
        UnknownPath: the path was not captured.
        BadArgument: a path of several sites.
    """
    exact = index.by_text.get(path) if isinstance(path, str) else None
    if exact is not None:
        return index.packs[exact[0]].tensor[:, exact[1]]
    wanted = parse_path(path)
    entries = find(index, wanted, atlas, length)
    sites = {number for number, _ in entries}
    if len(sites) > 1:
        raise BadArgument(
            f"this path stands for {len(sites)} sites, and get() returns the tensor of one",
            path=path,
            write=f"saved.subset({str(path)!r}), or saved.stack('layer') for one tensor over the layers",
        )
    pack = index.packs[entries[0][0]].take([n for _, n in entries])
    single = isinstance(wanted.position, int) or (isinstance(wanted.position, Span) and len(entries) == 1)
    return pack.tensor[:, 0] if single else pack.tensor


def find(index: KeyIndex, path: str | Path, atlas: Atlas | None, length: int | None = None) -> list[EntryIndex]:
    """The entries of a path with any slices and lists.

    Args:
        length: the number of tokens of every prompt, if it is known and the same.

    Raises:
        UnknownPath: there is none, or a number of a list was not captured.
    """
    pattern = parse_path(path)
    entries, missing = match(index, pattern, atlas, length)
    if missing is None:
        return entries
    keys = [str(key) for pack in index.packs for key in pack.keys]
    from_end = atlas is None and any(map(_counts_from_end, pattern.steps))
    raise UnknownPath(
        "not in this capture" if missing == pattern else f"{missing} is not in this capture",
        path=path,
        expected=f"one of its keys: {closest(str(missing), keys)}" if keys else "nothing: this capture is empty",
        write=f"ns.expand(model, {str(path)!r}), as this capture has no model to count from" if from_end else None,
    )


def match(
    index: KeyIndex, pattern: Path, atlas: Atlas | None, length: int | None
) -> tuple[list[EntryIndex], Path | None]:
    """The entries of a path, and the first part of it that was not captured."""
    exact = index.same(pattern)
    if exact is not None:
        return [exact], None
    entries: list[EntryIndex] = []
    found_places: set[int] = set()
    for single in _singles(pattern):
        places = _places(index, single, atlas)
        if places and found_places.issuperset(places):  # a number twice in a list
            continue
        found_places.update(places)
        positions_at = {place: {key.position: n for n, key in enumerate(index.packs[place].keys)} for place in places}
        wanted = single.position
        for position in wanted if isinstance(wanted, tuple) else ():
            if not any(position in positions for positions in positions_at.values()):
                return [], single.at(position)
        found = [(place, n) for place in places for n in _positions(positions_at[place], wanted, single, length)]
        if not found:
            return [], single
        entries += found
    return entries, None


def chosen(packs: Sequence[Pack], entries: Container[EntryIndex]) -> list[Pack]:
    """Only these entries, in the packs' own order."""
    kept: list[Pack] = []
    for number, pack in enumerate(packs):
        indices = [index for index in range(len(pack.keys)) if (number, index) in entries]
        if indices:
            kept.append(pack.take(indices))
    return kept


def located(packs: Sequence[Pack], atlas: Atlas) -> list[Pack]:
    """The packs with sites for the keys that have none, as far as the atlas finds them."""
    found: list[Pack] = []
    for pack in packs:
        sites: set[Site] = set() if pack.keys[0].site is not None else _sites(atlas, pack.keys[0].place)
        keys = tuple(replace(key, site=site) for site in sites for key in pack.keys)
        found.append(Pack(keys, pack.tensor) if len(sites) == 1 else pack)
    return found


def _sites(atlas: Atlas, place: Path) -> set[Site]:
    try:
        return {path.site for path in atlas.expand(place)}
    except (PathError, UnknownPath):
        return set()


def _singles(pattern: Path) -> Iterator[Path]:
    """A path with lists of layers, heads and so on as paths with one number each."""
    choices = [step.index if isinstance(step.index, tuple) else (step.index,) for step in pattern.steps]
    for chosen in product(*choices):
        steps = tuple(replace(step, index=index) for step, index in zip(pattern.steps, chosen, strict=True))
        yield pattern if steps == pattern.steps else replace(pattern, steps=steps, site=None)


def _places(index: KeyIndex, pattern: Path, atlas: Atlas | None) -> list[int]:
    wanted = pattern.place
    number = index.places.get(str(wanted))
    if number is not None:
        return [number]
    if atlas is not None:
        sites = _sites(atlas, wanted)
        found = [number for number, pack in enumerate(index.packs) if pack.keys[0].site in sites]
        if found:
            return found
    # Without an atlas, the texts are compared.
    return list(dict.fromkeys(number for text, number in index.places.items() if _fits(wanted, parse_path(text))))


def _fits(pattern: Path, key: Path) -> bool:
    """Whether the site of a key fits a pattern, by its text."""
    if (pattern.native, pattern.tower, len(pattern.steps)) != (key.native, key.tower, len(key.steps)):
        return False
    if (pattern.value or "output", pattern.item) != (key.value or "output", key.item):
        return False
    if pattern.sae != key.sae:
        return False
    for wanted, step in zip(pattern.steps, key.steps, strict=True):
        if wanted == step:
            continue
        if wanted.name != step.name or not isinstance(wanted.index, Slice) or not isinstance(step.index, int):
            return False
        if step.index < 0 or _counts_from_end(wanted) or step.index not in wanted.index.range(step.index + 1):
            return False
    return True


def _counts_from_end(step: Step) -> bool:
    """Whether an index depends on the number of layers (heads, ...) of the model."""
    index = step.index
    if isinstance(index, Slice):
        return any(bound is not None and bound < 0 for bound in (index.start, index.stop, index.step))
    return any(number < 0 for number in ((index,) if isinstance(index, int) else index or ()))


def _positions(
    captured: Mapping[Position | None, int], position: Position | None, path: Path, length: int | None
) -> list[int]:
    """The numbers of the wanted positions of one site.

    Args:
        captured: position -> its number in the pack.
    """
    if position is None or position == Slice():
        return list(captured.values())
    if isinstance(position, tuple):
        return [captured[p] for p in position if p in captured]
    if isinstance(position, Slice):
        return _sliced(captured, position, path, length)
    if isinstance(position, Span) and position.token is None and position not in captured:
        return [n for p, n in captured.items() if isinstance(p, Span) and p.name == position.name]
    return [captured[position]] if position in captured else []


def _sliced(captured: Mapping[Position | None, int], wanted: Slice, path: Path, length: int | None) -> list[int]:
    numbers = [p for p in captured if isinstance(p, int)]
    if not numbers:
        return []
    if length is None or not all(-length <= p < length for p in numbers):
        # Keys and bounds that count from the same end can be compared without the length.
        given = [*numbers, *(bound for bound in (wanted.start, wanted.stop) if bound is not None)]
        if min(given) >= 0 and (wanted.step or 1) > 0:
            length = 1 + max(numbers)
        elif max(given) < 0 and wanted.step in (None, 1):
            length = -min(numbers)
        else:
            raise UnknownPath(
                f"[{wanted}] depends on the number of tokens of the prompts, which is not known",
                path=path,
                expected=f"some of its positions: {', '.join(map(str, numbers[:8]))}{', ...' * (len(numbers) > 8)}",
            )
    order = {token: rank for rank, token in enumerate(wanted.range(length))}
    ranked = [(order[token], captured[p]) for p in numbers if (token := p % length) in order]
    return [n for _, n in sorted(ranked)]
