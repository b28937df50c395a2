"""Which order of the parameters fits an optimizer's state: the known ones are replayed against its shapes.

An order says which tensors come in which parameter group; within a group, tensors are always in the model's order,
layer after layer. What an order cannot know from names alone (where an unfamiliar tensor stands, which tower comes
first, where parameters lie that were not saved) is tried both ways. Whoever asks gets every reading that fits, each
once, and goes on only if there is exactly one.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations, product

from nnsplice.adapters.header import Entry, stands
from nnsplice.adapters.states import Optimizer
from nnsplice.atlas.names import NamedLayer

#: Id -> the layer of its parameter. Parameters outside the layers are absent.
Layers = Mapping[int, NamedLayer]
#: A parameter's shape, None where it never had a gradient and so has no state.
Shape = tuple[int, ...] | None
Test = Callable[[Entry], bool]

#: The order in which a layer of PEFT registers its tensors.
ROLES = (
    "weight", "bias", "lora_A.weight", "lora_B.weight", "lora_B.bias",
    "lora_embedding_A.weight", "lora_embedding_B.weight", "lora_magnitude_vector.weight",
)  # fmt: skip
#: Unfamiliar modules outside the layers that are tried on both sides; more than these make too many readings.
MOST_UNKNOWN = 6


def _is_b(entry: Entry) -> bool:
    return entry.key.factor in ("lora_B",) or len(entry.shape) == 1


def _is_a(entry: Entry) -> bool:
    return entry.key.factor in ("lora_A", "lora_embedding_A")


def _is_embedding(entry: Entry) -> bool:
    return str(entry.key.factor).startswith("lora_embedding") or stands(entry, "") == "before"


def _is_vector(entry: Entry) -> bool:
    return len(entry.shape) == 1


def _is_undecayed(entry: Entry) -> bool:
    return entry.key.attribute == "bias" or (entry.key.factor is None and len(entry.shape) == 1)


def _is_whole(entry: Entry) -> bool:
    return entry.key.factor is None


def _any(entry: Entry) -> bool:
    return True


#: The order of the parameter groups: a tensor is in the first one whose test it passes.
ORDERS: Mapping[str, tuple[Test, ...]] = {
    "as registered": (_any,),
    "LoRA+": (
        lambda e: not _is_b(e) and not _is_embedding(e),
        lambda e: _is_embedding(e) and not _is_vector(e),  # DoRA's magnitude goes with B
        lambda e: not _is_undecayed(e),
        _any,
    ),
    "LoRA+ without an embedding group": (lambda e: not _is_b(e), lambda e: not _is_undecayed(e), _any),
    "all A, then all B": (_is_a, _any),
    "all B, then all A": (lambda e: not _is_a(e), _any),
    "matrices, then vectors": (lambda e: not _is_vector(e), _any),
    "vectors, then matrices": (_is_vector, _any),
    "decayed, then biases and norms": (lambda e: not _is_undecayed(e), _any),
    "biases and norms, then decayed": (_is_undecayed, _any),
    "embeddings, then the rest": (_is_embedding, _any),
    "the rest, then embeddings": (lambda e: not _is_embedding(e), _any),
    "factors, then whole parameters": (lambda e: not _is_whole(e), _any),
    "whole parameters, then factors": (_is_whole, _any),
}


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Tensors that stand together: those of a layer, or those before or after all layers."""

    layer: NamedLayer | None
    entries: tuple[Entry, ...]


def read_order(entries: Sequence[Entry], optimizer: Optimizer) -> list[Layers]:
    """Every way to give the ids to layers that fits the state, each once."""
    if any(number not in optimizer.shapes for number in optimizer.trained):
        return []  # moments that are factored or packed have no shape to go by
    found: dict[tuple, Layers] = {}
    for groups in _candidates(len(entries), optimizer):
        shapes = [[optimizer.shapes.get(number) for number in group] for group in groups]
        for layers in _fitting(entries, groups, shapes):
            found.setdefault(tuple(sorted((i, x.stack, x.number) for i, x in layers.items())), layers)
    return list(found.values())


def _candidates(count: int, optimizer: Optimizer) -> list[tuple[tuple[int, ...], ...]]:
    """The groups of ids that may be the adapter's: all of them, or those that were trained."""
    trained = tuple(group for ids in optimizer.groups if (group := tuple(i for i in ids if i in optimizer.states)))
    if sum(map(len, optimizer.groups)) == count:
        # A parameter that never had a gradient (an expert that was never chosen, say) has its id all the same.
        return [optimizer.groups]
    return [trained] if sum(map(len, trained)) >= count else []


def _fitting(
    entries: Sequence[Entry], groups: Sequence[tuple[int, ...]], shapes: Sequence[Sequence[Shape]]
) -> Iterator[Layers]:
    flat_ids = [number for group in groups for number in group]
    flat_shapes = [shape for group in shapes for shape in group]
    for name, tests in ORDERS.items():
        for classes in _arranged(entries, tests):
            if len(groups) == 1 or name == "as registered":
                chunks = [chunk for each in classes for chunk in each]
                surplus = len(flat_ids) - len(entries)
                for start in range(surplus + 1):
                    stop = start + len(entries)
                    yield from _matched([chunks], [flat_ids[start:stop]], [flat_shapes[start:stop]])
            elif len(groups) == len(classes):
                yield from _matched(classes, groups, shapes)
    if len(groups) > 1:
        # Groups by layer may run from the last layer to the first.
        turned_ids = [number for group in reversed(groups) for number in group]
        turned_shapes = [shape for group in reversed(shapes) for shape in group]
        for classes in _arranged(entries, (_any,)):
            yield from _matched([[c for each in classes for c in each]], [turned_ids], [turned_shapes])


def _arranged(entries: Sequence[Entry], tests: tuple[Test, ...]) -> Iterator[list[list[_Chunk]]]:
    """The tensors of each group in the model's order, in every way that names leave open."""
    stacks = sorted({entry.layer.stack for entry in entries if entry.layer})
    outside = {entry: stands(entry, stacks[0]) for entry in entries if entry.layer is None}
    modules = sorted({entry.key.module for entry, place in outside.items() if place == "unknown"})
    if len(modules) > MOST_UNKNOWN:
        return
    for sides in product(("before", "after"), repeat=len(modules)):
        side = dict(zip(modules, sides, strict=True))
        places = {entry: side.get(entry.key.module, place) for entry, place in outside.items()}
        for order in permutations(stacks):
            classes: list[list[_Chunk]] = []
            left = list(entries)
            for test in tests:
                chosen, rest = [], []
                for entry in left:
                    (chosen if test(entry) else rest).append(entry)
                left = rest
                if chosen:
                    classes.append(_chunks(chosen, places, order))
            yield classes


def _chunks(entries: Iterable[Entry], places: Mapping[Entry, str], stacks: Sequence[str]) -> list[_Chunk]:
    layers: defaultdict[NamedLayer, list[Entry]] = defaultdict(list)
    ends: dict[str, list[Entry]] = {"before": [], "after": []}
    for entry in entries:
        if entry.layer is None:
            ends[places[entry]].append(entry)
        else:
            layers[entry.layer].append(entry)
    ordered = sorted(layers, key=lambda layer: (stacks.index(layer.stack), layer.number))
    middle = [_Chunk(layer, tuple(layers[layer])) for layer in ordered]
    return [_Chunk(None, tuple(ends["before"])), *middle, _Chunk(None, tuple(ends["after"]))]


def _matched(
    classes: Sequence[Sequence[_Chunk]], groups: Sequence[Sequence[int]], shapes: Sequence[Sequence[Shape]]
) -> Iterator[Layers]:
    """The layers of the ids, if every group is as long as its tensors and has their shapes, chunk by chunk."""
    layers: dict[int, NamedLayer] = {}
    for chunks, ids, found in zip(classes, groups, shapes, strict=True):
        if sum(len(chunk.entries) for chunk in chunks) != len(ids):
            return
        start = 0
        alike: dict[tuple[str, ...], Sequence[Shape]] = {}
        for chunk in chunks:
            stop = start + len(chunk.entries)
            part = found[start:stop]
            if not _fits(part, chunk.entries):
                return
            if chunk.layer is not None:
                # Layers of one make register their parameters in one order.
                make = tuple(sorted(f"{entry.key.kind} {entry.shape}" for entry in chunk.entries))
                if not _same(alike.setdefault(make, part), part):
                    return
                layers.update(dict.fromkeys(ids[start:stop], chunk.layer))
            start = stop
    yield layers


def _fits(found: Sequence[Shape], entries: Sequence[Entry]) -> bool:
    """Whether shapes can be those of some modules one after the other, each with its tensors in PEFT's order."""
    modules: defaultdict[tuple[str, int, str], list[Entry]] = defaultdict(list)
    for entry in entries:
        role = _role(entry)
        # Tensors whose order in their module is not known may stand anywhere.
        modules[entry.key.module, entry.key.depth, entry.name if role is None else ""].append(entry)
    ordered = [sorted(group, key=lambda e: _role(e) or 0) for group in modules.values()]
    return _follow(tuple(found), Counter(tuple(e.shape for e in group) for group in ordered))


def _role(entry: Entry) -> int | None:
    name = f"{entry.key.factor}.{entry.key.attribute}" if entry.key.factor else entry.key.attribute
    return ROLES.index(name) if name in ROLES else None


def _follow(found: tuple[Shape, ...], modules: Counter[tuple[tuple[int, ...], ...]]) -> bool:
    if not found:
        return True
    for shapes in [one for one, left in modules.items() if left]:
        if _same(shapes, found[: len(shapes)]) and _follow(found[len(shapes) :], modules - Counter([shapes])):
            return True
    return False


def _same(one: Sequence[Shape], other: Sequence[Shape]) -> bool:
    return len(one) == len(other) and all(a is None or b is None or a == b for a, b in zip(one, other, strict=True))
