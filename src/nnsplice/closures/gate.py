"""The gate: measures the promises of a kind of site before its first use, and refuses sites that break theirs.

The cost is one forward pass of a few tokens for most kinds, one more for the stream, one more for `mid`, and three
calls of each module of experts. Results are remembered until modules or weights change.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from nnsplice import engine
from nnsplice.atlas import Atlas, Block, Site, Tower, unwrap
from nnsplice.closures import heads, logit_head, mlp_parts, streams
from nnsplice.closures.pass_values import Arguments, record_pass
from nnsplice.closures.promises import CROSS, PROMISES, UNMEASURED, Closure, PromiseKind, kind_of
from nnsplice.errors import NnspliceError, RefusedPlace
from nnsplice.paths import Path

#: The number of tokens of the prompt: enough for a token with several before it.
TOKENS = 4


@dataclass
class _Measured:
    """The measurements of a model with its current modules and weights."""

    #: See `state_of`.
    state: tuple[object, ...]
    #: The closures by the name of the pass that measured them; see `_PASSES`.
    closures: dict[str, tuple[Closure, ...]] = field(default_factory=dict)
    #: Whether attention was eager in the first pass, so that it returned probabilities.
    eager: bool = False
    #: The end of the first pass of each tower, until the stream is measured.
    ends: dict[str, logit_head.PassEnd] = field(default_factory=dict)
    #: The arguments of modules of experts in the first pass, by module and call.
    calls: dict[tuple[str, int], Arguments] = field(default_factory=dict)
    #: For a model without loaded weights: a small random twin that runs instead, and its arguments.
    twin: tuple[object, tuple[Any, ...], dict[str, Any]] | None = None
    #: The number of forward passes of measurements that no result has reported yet.
    unreported: float = 0.0
    #: Kinds that hold in every layer.
    sound: set[PromiseKind] = field(default_factory=set)


_measured: weakref.WeakKeyDictionary[nn.Module, _Measured] = weakref.WeakKeyDictionary()
_lock = threading.RLock()


def require(model: Any, paths: Iterable[Path], *, written: bool = False) -> None:
    """Raise for expanded paths that break their promise in their layer; native paths promise nothing.

    Args:
        written: the sites will be written, which promises more of patterns.

    Raises:
        RefusedPlace: the message has the measurement, and the kinds of sites that hold in this model.
    """
    wanted: dict[PromiseKind, list[Path]] = {}
    paths = list(paths)
    engine.refuse_replaced(model, (path.site.module for path in paths if isinstance(path.site, Site)))
    for path in paths:
        kind = kind_of(path)
        if kind is not None:
            wanted.setdefault(kind, []).append(path)
        if kind == "pattern" and written:
            wanted.setdefault("written pattern", []).append(path)
    known = _measured.get(unwrap(model)) if wanted else None
    if not wanted or (known is not None and wanted.keys() <= known.sound and known.state == state_of(model)):
        return
    # Inside a run of a `fully_shard` model its parameters are other tensors, and its blocks must not be called.
    if (
        known is not None
        and wanted.keys() <= known.sound
        and engine.meshes_of(unwrap(model))
        and engine.is_inside(model)
    ):
        return
    # The model's lock first: a thread that holds it may come here for the second.
    with engine.locked(model), _lock:
        known = _measurements(model)
        for kind, places in wanted.items():
            if kind not in known.sound:
                _check(model, known, kind, places)


def measure(model: Any, kinds: Iterable[PromiseKind] | None = None) -> list[Closure]:
    """The closures of these kinds in all layers; of all kinds if left out.

    >>> from nnsplice.closures import measure
    >>> sorted({closure.kind for closure in measure(model, ["heads", "mid"]) if closure.holds})
    ['heads', 'mid']

    Raises:
        RefusedPlace: the model cannot be run.
    """
    wanted = tuple(PROMISES if kinds is None else kinds)
    with engine.locked(model), _lock:
        known = _measurements(model)
        return [closure for kind in wanted for closure in _closures(model, known, kind)]


def passes_spent(model: Any) -> float:
    """The number of forward passes of `TOKENS` tokens spent on measurements since the last call."""
    with _lock:
        known = _measured.get(unwrap(model))
        if known is None:
            return 0.0
        passes, known.unreported = known.unreported, 0.0
        return passes


def state_of(model: Any) -> tuple[object, ...]:
    """A value that differs after a change of modules or weights; the weights are not read."""
    root = unwrap(model)
    # There is another atlas after modules change. Of sharded weights the memory changes in every run, so ids are used.
    state = id if engine.meshes_of(root) else _parameter_state
    return (Atlas.of(root), hash(tuple(map(state, _parameters(root)))))


def _parameters(root: nn.Module) -> Iterator[nn.Parameter]:
    """All parameters, for every trace: `root.parameters()` also makes their names, which takes five times as long."""
    queue: list[nn.Module | None] = [root]
    while queue:
        module = queue.pop()
        if module is not None:
            yield from (parameter for parameter in module._parameters.values() if parameter is not None)
            queue.extend(module._modules.values())


def _parameter_state(parameter: torch.Tensor) -> tuple[int, int]:
    try:
        return (parameter.data_ptr(), parameter._version)
    except RuntimeError:  # sharded, wrapped and inference tensors have neither
        return (id(parameter), -1)


def _measurements(model: Any) -> _Measured:
    root, state = unwrap(model), state_of(model)
    known = _measured.get(root)
    if known is None or known.state != state:
        known = _measured[root] = _Measured(state, unreported=0.0 if known is None else known.unreported)
    return known


# --- measuring --------------------------------------------------------------------------------------------------------


def _closures(model: Any, known: _Measured, kind: PromiseKind) -> list[Closure]:
    if kind in ("pattern", "written pattern") and _is_eager(model) and not known.eager:
        known.closures.pop("pass", None)  # it was run with an attention that returns no probabilities
        known.sound.clear()
    found = list(_run(model, known, "pass"))
    if kind == "mid" and all(closure.holds for closure in found if closure.kind == "mid"):
        found += _run(model, known, "mid")
    if kind in ("experts", "stream"):
        found += _run(model, known, kind)
    return [closure for closure in found if closure.kind == kind]


def _run(model: Any, known: _Measured, what: str) -> tuple[Closure, ...]:
    if what not in known.closures:
        measuring = _PASSES[what]
        try:
            # The checks need gradients, also inside a caller's no_grad or inference_mode.
            with torch.inference_mode(False), torch.enable_grad():
                runner, args, kwargs = known.twin or engine.example_of(model, TOKENS)
                known.twin = None if runner is model else (runner, args, kwargs)
                known.closures[what] = tuple(measuring(runner, (args, kwargs), known))
            known.unreported += mlp_parts.share_of_experts(model) if what == "experts" else 1.0
            known.eager = _is_eager(model) if what == "pass" else known.eager
        except NnspliceError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            raise RefusedPlace(
                f"what portable sites of {type(unwrap(model)).__name__} promise could not be measured: a short run "
                f"failed with {reason}",
                expected="a model that runs with a few tokens, or an input to run it with",
                write="ns.expand(model, paths, probe=example_input) once, or native paths",
            ) from error
    return known.closures[what]


def _is_eager(model: Any) -> bool:
    return engine.attention_of(model) in (None, "eager")


def _first_pass(model: Any, example: Any, known: _Measured) -> Iterator[Closure]:
    atlas, recorded = Atlas.of(model), record_pass(model, example)
    known.calls = recorded.calls
    for tower in atlas.towers.values():
        end = logit_head.pass_end(tower, recorded)
        if end is not None:
            known.ends[tower.name] = end
        for block in tower.blocks:
            sums = streams.Sums(atlas, block, recorded)
            yield from streams.stream(tower, block, recorded)
            yield from streams.branches(tower, block, sums)
            yield from streams.crossing(tower, block, sums)
            yield from streams.middle(tower, block, sums)
            yield from mlp_parts.neurons(tower, block, recorded)
        own = list(tower.blocks)
        crossing = [block.cross for block in tower.blocks if block.cross is not None]
        for label, blocks in ((tower.name, own), (CROSS, crossing)):
            named = replace(tower, name=label)  # pyright: ignore[reportArgumentType] - for the closures' names alone
            for block in blocks:
                yield from heads.rebuilt(atlas, named, block, recorded)
            layers = [slices for block in blocks if (slices := heads.head_slices(block, recorded)) is not None]
            if layers:
                yield from heads.influence(named, layers)
            for slices in layers:
                yield from heads.before_gates(named, slices)
                if label != CROSS:
                    yield from heads.keys(named, slices.block, len(slices.slots), _given(tower, example))
                if _is_eager(model) and slices.block.pattern is not None:
                    yield from heads.patterns(named, slices, recorded)


def _given(tower: Tower, example: tuple[tuple[Any, ...], dict[str, Any]]) -> int | None:
    """The number of tokens of a tower's input; None if the arguments do not have it."""
    _, kwargs = example
    own = kwargs.get("decoder_input_ids") if tower.name == "decoder" else None
    ids = kwargs.get("input_ids") if own is None else own
    return ids.numel() if isinstance(ids, torch.Tensor) and ids.dim() == 2 else None


def _head_pass(model: Any, example: Any, known: _Measured) -> Iterator[Closure]:
    for tower in Atlas.of(model).towers.values():
        end = known.ends.pop(tower.name, None)
        if end is not None:
            yield from logit_head.head(model, tower, example, end)


def _written_pass(model: Any, example: Any, _: _Measured) -> Iterator[Closure]:
    generator = torch.Generator().manual_seed(0)

    def written(tensor: torch.Tensor) -> torch.Tensor:
        other = torch.randn(tensor.shape, generator=generator).to(tensor)
        return other * tensor.abs().mean()

    atlas, recorded = Atlas.of(model), record_pass(model, example, written)
    for tower in atlas.towers.values():
        for block in tower.blocks:
            yield from streams.middle_written(tower, block, streams.Sums(atlas, block, recorded))


def _experts_pass(model: Any, _: Any, known: _Measured) -> Iterator[Closure]:
    calls, known.calls = known.calls, {}
    with engine.undisturbed(model):
        for tower in Atlas.of(model).towers.values():
            for block in tower.blocks:
                yield from mlp_parts.experts(tower, block, calls, model)


_PASSES: dict[str, Callable[[Any, Any, _Measured], Iterator[Closure]]] = {
    "pass": _first_pass,
    "stream": _head_pass,
    "mid": _written_pass,
    "experts": _experts_pass,
}


# --- refusing ---------------------------------------------------------------------------------------------------------


#: Kinds that every layer with heads has: a layer without a measurement is refused.
_MEASURED: tuple[PromiseKind, ...] = ("heads", "q", "k", "v", "gate", "ungated", "written pattern")


def _check(model: Any, known: _Measured, kind: PromiseKind, places: list[Path]) -> None:
    found = _closures(model, known, kind)
    broken = [closure for closure in found if not closure.holds]
    there = {(closure.tower, closure.layer) for closure in found}
    if kind == "written pattern" and not _is_eager(model):
        return  # a write of a pattern says itself that it needs eager attention
    towers = Atlas.of(model).towers
    if not broken and there >= _needed(towers, kind):
        if found:
            known.sound.add(kind)
        return
    for path in places:
        tower, layer = _where(path)
        closure = next((c for c in broken if c.tower == tower and c.layer == layer), None)
        if closure is None and kind in _MEASURED and (tower, layer) not in there:
            if _block(towers, tower, layer).layout is None:
                continue  # a whole projection, whose address promises nothing but the module
            text = "nothing could be measured of its attention: it makes no probabilities, or passes no gradients back"
            closure = Closure(kind, tower, layer, UNMEASURED, 0.0, text)
            broken = [*broken, closure]
        if closure is not None:
            raise _refusal(model, known, kind, path, closure, broken)


def _needed(towers: Mapping[str, Tower], kind: PromiseKind) -> set[tuple[str, int]]:
    """The (tower, layer) pairs that must have been measured."""
    every = [(name, block) for name, tower in towers.items() for block in tower.blocks]
    # Cross-attention runs only with an encoder.
    every += [(CROSS, block.cross) for name, block in every if block.cross is not None and "encoder" in towers]
    found = ((name, block) for name, block in every if kind in _MEASURED and block.layout is not None)
    return {(name, block.index) for name, block in found if kind not in ("gate", "ungated") or block.gate_of(0)}


def _where(path: Path) -> tuple[str, int]:
    index = path.steps[0].index if path.steps[0].name == "layers" else 0
    assert isinstance(path.site, Site) and isinstance(index, int)
    crosses = len(path.steps) > 1 and path.steps[1].name.partition(".")[0] == CROSS
    return CROSS if crosses else path.site.tower, index


def _block(towers: Mapping[str, Tower], tower: str, layer: int) -> Block:
    """The block of a closure's layer."""
    if tower != CROSS:
        return towers[tower].blocks[layer]
    block = towers["decoder"].blocks[layer].cross
    assert block is not None
    return block


def _refusal(
    model: Any, known: _Measured, kind: PromiseKind, path: Path, closure: Closure, broken: list[Closure]
) -> RefusedPlace:
    name, promise = PROMISES[kind]
    if closure.gap == UNMEASURED and (lost := _not_finite(unwrap(model))):
        more = f" (and {len(lost) - 1} more parameters)" * (len(lost) > 1)
        return RefusedPlace(
            f"{lost[0]}{more} holds NaN or infinity, so what stands at a site of this model cannot be measured",
            path=path,
            expected="a model whose weights are all numbers",
        )
    layers = sorted({one.layer for one in broken if one.tower == closure.tower})
    number = "" if closure.gap == UNMEASURED else f" (by {closure.gap:.1e}, where rounding makes {closure.allowed:.0e})"
    shown = ", ".join(map(str, layers[:8])) + (", ..." if len(layers) > 8 else "")
    sound = [PROMISES[other][0] for other in PROMISES if other != kind and _sound(known, other)]
    return RefusedPlace(
        f"{name} would not be what its name says in layer{'s' * (len(layers) > 1)} {shown} of this model: "
        f"{closure.found}{number}",
        path=path,
        expected=f"a model in which {promise}; measured to hold in every layer of this one: "
        f"{', '.join(sound) or 'nothing else'}",
        write="a native path, which promises nothing: model....output",
    )


def _not_finite(root: nn.Module) -> list[str]:
    """The names of the parameters that contain NaN or infinity."""
    return [name for name, one in root.named_parameters() if not one.is_meta and not bool(one.isfinite().all())]


def _sound(known: _Measured, kind: PromiseKind) -> bool:
    """Whether a kind was measured and holds in all layers."""
    found = [closure for of in known.closures.values() for closure in of if closure.kind == kind]
    return bool(found) and all(closure.holds for closure in found)
