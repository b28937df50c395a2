"""The orders of an optimizer's parameters that fit the shapes of its state.

An order says which tensors come in which parameter group; within a group, tensors are always in the model's order,
layer after layer. What names alone do not tell is tried both ways: the side of an unknown tensor, the order of two
towers, the position of parameters that were not saved. All maps that fit are returned, each once; the caller needs
exactly one.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations, product

from nnsplice.adapters.header import AdapterTensor, side_of_layers
from nnsplice.adapters.states import Optimizer
from nnsplice.atlas.names import NamedLayer

#: Id -> the layer of its parameter. Parameters outside the layers are absent.
Layers = Mapping[int, NamedLayer]
#: A parameter's shape, None where it never had a gradient and so has no state.
Shape = tuple[int, ...] | None
Test = Callable[[AdapterTensor], bool]

#: The order in which a layer of PEFT registers its tensors.
ROLES = (
    "weight", "bias", "lora_A.weight", "lora_B.weight", "lora_B.bias",
    "lora_embedding_A.weight", "lora_embedding_B.weight", "lora_magnitude_vector.weight",
)  # fmt: skip
#: The most unknown modules outside the layers; each is tried before and after them.
MOST_UNKNOWN = 6


def _is_b(entry: AdapterTensor) -> bool:
    return entry.key.factor in ("lora_B",) or len(entry.shape) == 1


def _is_a(entry: AdapterTensor) -> bool:
    return entry.key.factor in ("lora_A", "lora_embedding_A")


def _is_embedding(entry: AdapterTensor) -> bool:
    return str(entry.key.factor).startswith("lora_embedding") or side_of_layers(entry, "") == "before"


def _is_vector(entry: AdapterTensor) -> bool:
    return len(entry.shape) == 1


def _is_undecayed(entry: AdapterTensor) -> bool:
    return entry.key.attribute == "bias" or (entry.key.factor is None and len(entry.shape) == 1)


def _is_whole(entry: AdapterTensor) -> bool:
    return entry.key.factor is None


def _every(entry: AdapterTensor) -> bool:
    return True


#: The order of the parameter groups: a tensor is in the first one whose test it passes.
ORDERS: Mapping[str, tuple[Test, ...]] = {
    "as registered": (_every,),
    "LoRA+": (
        lambda e: not _is_b(e) and not _is_embedding(e),
        lambda e: _is_embedding(e) and not _is_vector(e),  # DoRA's magnitude goes with B
        lambda e: not _is_undecayed(e),
        _every,
    ),
    "LoRA+ without an embedding group": (lambda e: not _is_b(e), lambda e: not _is_undecayed(e), _every),
    "all A, then all B": (_is_a, _every),
    "all B, then all A": (lambda e: not _is_a(e), _every),
    "matrices, then vectors": (lambda e: not _is_vector(e), _every),
    "vectors, then matrices": (_is_vector, _every),
    "decayed, then biases and norms": (lambda e: not _is_undecayed(e), _every),
    "biases and norms, then decayed": (_is_undecayed, _every),
    "embeddings, then the rest": (_is_embedding, _every),
    "the rest, then embeddings": (lambda e: not _is_embedding(e), _every),
    "factors, then whole parameters": (lambda e: not _is_whole(e), _every),
    "whole parameters, then factors": (_is_whole, _every),
}


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Tensors that are registered together: those of a layer, or those before or after all layers."""

    layer: NamedLayer | None
    entries: tuple[AdapterTensor, ...]


def fitting_orders(entries: Sequence[AdapterTensor], optimizer: Optimizer) -> list[Layers]:
    """Every map from ids to layers that fits the state, each once."""
    if any(number not in optimizer.shapes for number in optimizer.trained):
        return []  # factored or packed moments do not have the parameter's shape
    found: dict[tuple, Layers] = {}
    for groups in _candidates(len(entries), optimizer):
        shapes = [[optimizer.shapes.get(number) for number in group] for group in groups]
        for layers in _fitting(entries, groups, shapes):
            found.setdefault(tuple(sorted((i, x.stack, x.number) for i, x in layers.items())), layers)
    return list(found.values())


def _candidates(count: int, optimizer: Optimizer) -> list[tuple[tuple[int, ...], ...]]:
    """The groups of ids that may belong to the adapter: all, or those that were trained."""
    trained = tuple(group for ids in optimizer.groups if (group := tuple(i for i in ids if i in optimizer.states)))
    if sum(map(len, optimizer.groups)) == count:
        # A parameter without a gradient, such as an expert that was never routed to, has an id too.
        return [optimizer.groups]
    return [trained] if sum(map(len, trained)) >= count else []


def _fitting(
    entries: Sequence[AdapterTensor], groups: Sequence[tuple[int, ...]], shapes: Sequence[Sequence[Shape]]
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
        reversed_ids = [number for group in reversed(groups) for number in group]
        reversed_shapes = [shape for group in reversed(shapes) for shape in group]
        for classes in _arranged(entries, (_every,)):
            yield from _matched([[c for each in classes for c in each]], [reversed_ids], [reversed_shapes])


def _arranged(entries: Sequence[AdapterTensor], tests: tuple[Test, ...]) -> Iterator[list[list[_Chunk]]]:
    """The tensors of each group in the model's order, in every way that names leave open."""
    stacks = sorted({entry.layer.stack for entry in entries if entry.layer})
    known = {entry: side_of_layers(entry, stacks[0]) for entry in entries if entry.layer is None}
    modules = sorted({entry.key.module for entry, side in known.items() if side == "unknown"})
    if len(modules) > MOST_UNKNOWN:
        return
    for tried in product(("before", "after"), repeat=len(modules)):
        side_of = dict(zip(modules, tried, strict=True))
        sides = {entry: side_of.get(entry.key.module, side) for entry, side in known.items()}
        for order in permutations(stacks):
            classes: list[list[_Chunk]] = []
            left = list(entries)
            for test in tests:
                chosen, rest = [], []
                for entry in left:
                    (chosen if test(entry) else rest).append(entry)
                left = rest
                if chosen:
                    classes.append(_chunks(chosen, sides, order))
            yield classes


def _chunks(
    entries: Iterable[AdapterTensor], sides: Mapping[AdapterTensor, str], stacks: Sequence[str]
) -> list[_Chunk]:
    layers: defaultdict[NamedLayer, list[AdapterTensor]] = defaultdict(list)
    ends: dict[str, list[AdapterTensor]] = {"before": [], "after": []}
    for entry in entries:
        if entry.layer is None:
            ends[sides[entry]].append(entry)
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
                # Layers with equal modules register their parameters in one order.
                signature = tuple(sorted(f"{entry.key.kind} {entry.shape}" for entry in chunk.entries))
                if not _same(alike.setdefault(signature, part), part):
                    return
                layers.update(dict.fromkeys(ids[start:stop], chunk.layer))
            start = stop
    yield layers


def _fits(found: Sequence[Shape], entries: Sequence[AdapterTensor]) -> bool:
    """Whether shapes fit some modules in any order, each with its tensors in PEFT's order."""
    modules: defaultdict[tuple[str, int, str], list[AdapterTensor]] = defaultdict(list)
    for entry in entries:
        role = _role(entry)
        # A tensor whose order in its module is not known may come anywhere.
        modules[entry.key.module, entry.key.depth, entry.name if role is None else ""].append(entry)
    ordered = [sorted(group, key=lambda e: _role(e) or 0) for group in modules.values()]
    return _can_follow(tuple(found), Counter(tuple(e.shape for e in group) for group in ordered))


def _role(entry: AdapterTensor) -> int | None:
    name = f"{entry.key.factor}.{entry.key.attribute}" if entry.key.factor else entry.key.attribute
    return ROLES.index(name) if name in ROLES else None


def _can_follow(found: tuple[Shape, ...], modules: Counter[tuple[tuple[int, ...], ...]]) -> bool:
    if not found:
        return True
    for shapes in [one for one, left in modules.items() if left]:
        if _same(shapes, found[: len(shapes)]) and _can_follow(found[len(shapes) :], modules - Counter([shapes])):
            return True
    return False


def _same(one: Sequence[Shape], other: Sequence[Shape]) -> bool:
    return len(one) == len(other) and all(a is None or b is None or a == b for a, b in zip(one, other, strict=True))
