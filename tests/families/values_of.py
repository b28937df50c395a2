"""Are values what their names say: the same as plain hooks see, adding up, and one head at a time?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import nnsplice as ns
from activations.oracle import Edit, run, values
from families.subject import Subject, after, before, gap, hooks, number, own, site_of
from families.weights_of import through
from nnsplice.atlas import Block, Site

#: Every kind of site, as it is asked for.
KINDS = (
    "embed.output",
    "layers[:].input",
    "layers[:].output",
    "layers[:].mid",
    "layers[:].attn.output",
    "layers[:].mixer.output",
    "layers[:].mlp.output",
    "layers[:].heads[:].output",
    "layers[:].heads[:].q",
    "layers[:].heads[:].gate",
    "layers[:].groups[:].k",
    "layers[:].groups[:].v",
    "layers[:].neurons[0,-1].output",
    "layers[:].attn.q.output",
    "layers[:].attn.k.output",
    "layers[:].attn.v.output",
    "layers[:].attn.o.output",
    "layers[:].mlp.gate.output",
    "layers[:].mlp.up.output",
    "layers[:].mlp.down.output",
    "layers[:].experts[:].output",
    "layers[:].heads[:].pattern",
    "final_norm.output",
    "unembed.output",
)


@dataclass
class Served:
    """What nnsplice gives of one kind of site."""

    kind: str
    #: Single sites with their values `[token, width]` on the long prompt.
    values: dict[ns.Path, Tensor] = field(default_factory=dict)
    saved: ns.SavedActivation | None = None
    refused: list[str] = field(default_factory=list)

    @property
    def derived(self) -> bool:
        """Whether the value stands in no tensor of its own."""
        return self.kind.endswith((".pattern", "experts[:].output"))


def serve(subject: Subject) -> dict[str, Served]:
    """Ask for every kind of site, all layers at once, or layer by layer where that is refused."""
    return {kind: _serve(subject, kind) for kind in KINDS}


def _serve(subject: Subject, kind: str) -> Served:
    served, parts = Served(kind), []
    asked = [kind] if "[:]" not in kind else [kind.replace("[:]", f"[{b.index}]", 1) for b in subject.blocks]
    try:
        parts.append(_captured(subject, [kind], served))
    except Exception:
        for path in asked:
            with subject.check(f"served {kind}"):
                parts.append(_captured(subject, [path], served))
    for saved in parts:
        served.saved = saved if served.saved is None else served.saved | saved
    return served


def _captured(subject: Subject, paths: list[str], served: Served) -> ns.SavedActivation:
    places = ns.expand(subject.model, paths)
    saved = ns.capture(subject.model, subject.ids, [f"{path}[:]" for path in paths])
    for place in places:
        found = saved.get(f"{place}[:]")[0]
        served.values[place] = found
    return saved


def judge_values(subject: Subject, served: dict[str, Served]) -> None:
    """Captures against hooks, sums, heads, replays."""
    for one in served.values():
        if one.values and not one.derived:
            with subject.check(f"capture {one.kind}"):
                seen = values(subject.bare, {"input_ids": subject.ids}, [site_of(path) for path in one.values])
                off = max(gap(found, own(seen[site_of(path)])[0]) for path, found in one.values.items())
                subject.found(f"capture {one.kind}", off)
    for path, found in served["layers[:].heads[:].pattern"].values.items():
        length = subject.ids.shape[1]
        probable = found.shape[0] == length and bool((found >= 0).all()) and bool((found.sum(-1) < 1 + 1e-5).all())
        subject.claim(
            "capture layers[:].heads[:].pattern", probable, f"{path} holds no probabilities: {list(found.shape)}"
        )
    with subject.check("sums"):
        _sums(subject, served)
    with subject.check("heads"):
        _heads(subject, served)
    _replays(subject, served)


# --- sums -------------------------------------------------------------------------------------------------------------


def _of_layer(served: Served, layer: int) -> Tensor | None:
    return next((v for path, v in served.values.items() if number(path, 0) == layer), None)


def _sums(subject: Subject, served: dict[str, Served]) -> None:
    """Input, attention and MLP make the output, and what stands between them, in every layer that gives them."""
    for block in subject.blocks:
        get = {name: _of_layer(served[f"layers[:].{name}"], block.index)
               for name in ("input", "output", "mid", "attn.output", "mlp.output")}  # fmt: skip
        start, end, mid, attn, mlp = get.values()
        norms = _norms(subject, block)
        layer = f"layer {block.index}"
        widths = {value.shape for value in get.values() if value is not None}
        if len(widths) > 1:
            subject.claim("sums", False, f"{layer}: parts of {sorted(map(list, widths))} cannot be added")
            continue
        if start is not None and attn is not None and mid is not None:
            subject.found("mid = input + attn", min(gap(v, mid) for v in norms(start + attn)), layer)
        if mid is not None and mlp is not None and end is not None:
            subject.found("output = mid + mlp", min(gap(v, end) for v in norms(mid + mlp)), layer)
        if mid is None and start is not None and attn is not None and mlp is not None and end is not None:
            stream = [value for made in norms(start + attn) for value in norms(made + mlp)]
            subject.found("output = input + attn + mlp", min(gap(v, end) for v in stream), layer)
        # Where a part of a sum is not to be had, a step of one summand has to be seen in the sum.
        if start is None and attn is not None and mid is not None:
            _adds(subject, served, block, "attn", mid)
        if mlp is not None and (end is None or (mid is None and (attn is None or start is None))):
            _adds(subject, served, block, "mlp", None)


def _norms(subject: Subject, block: Block):
    """A value, and what the layer's own norms make of it: some families norm the stream itself after each branch."""
    homes = [subject.bare.get_submodule(name) for name in (*block.modules, *([block.end] if block.end else []))]
    # Every class of RoBERTa-PreLayerNorm is called a norm; a norm has no parts.
    found = [m for home in homes for m in home.modules() if "Norm" in type(m).__name__ and not list(m.children())]

    def made(value: Tensor) -> Iterator[Tensor]:
        yield value
        for norm in found:
            try:
                with torch.no_grad():
                    yield norm(value[None].to(next(norm.parameters())))[0]
            except (RuntimeError, TypeError, StopIteration, ValueError):
                continue

    return made


def _adds(subject: Subject, served: dict[str, Served], block: Block, part: str, mid: Tensor | None) -> None:
    """What is added to a branch's output is added to the stream behind it: to `mid`, else to the layer's output."""
    path = next(p for p in served[f"layers[:].{part}.output"].values if number(p, 0) == block.index)
    inputs = {"input_ids": subject.ids}
    end = (
        site_of(next(p for p in served["layers[:].mid"].values if number(p, 0) == block.index))
        if mid is not None
        else None
    )
    seen: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        seen.append(own(value).clone())
        return value

    def passed(edits: dict[Site, Edit]) -> Tensor:
        seen.clear()
        if end is not None:
            run(subject.bare, inputs, {**edits, end: keep})
        else:
            with hooks(
                after(subject.bare.get_submodule(block.end or block.module), lambda out: seen.append(own(out).clone()))
            ):
                run(subject.bare, inputs, edits)
        return seen[0]

    step = torch.randn(
        served[f"layers[:].{part}.output"].values[path].shape,
        generator=torch.Generator().manual_seed(0),
        dtype=torch.float64,
    )
    moved = passed({site_of(path): lambda value: _exchanged(own(value) + step.to(value))(value)}) - passed({})
    off = gap(moved[0] if moved.shape[0] == 1 else moved, step)
    subject.found(f"{part} is added to the stream", off, f"layer {block.index}", tolerance=max(subject.tolerance, 1e-7))


# --- heads ------------------------------------------------------------------------------------------------------------


def _heads(subject: Subject, served: dict[str, Served]) -> None:
    heads, queries = served["layers[:].heads[:].output"], served["layers[:].heads[:].q"]
    gates = served["layers[:].heads[:].gate"]
    keys, vs = served["layers[:].groups[:].k"], served["layers[:].groups[:].v"]
    patterns = served["layers[:].heads[:].pattern"]
    for block in subject.blocks:
        mine = {p: v for p, v in heads.values.items() if number(p, 0) == block.index}
        if not mine or block.o is None:
            continue
        layer = f"layer {block.index}"
        if _of_layer(served["layers[:].attn.output"], block.index) is not None:
            _all_of_attention(subject, served, block, list(mine))
        for path in [p for p in gates.values if number(p, 0) == block.index]:
            _scales(subject, block, path)
        for kind, per_head in ((queries, True), (gates, True), (keys, False), (vs, False)):
            for path in [p for p in kind.values if number(p, 0) == block.index]:
                at = number(path, 1)
                size = block.n_heads // block.n_kv
                moves = {at} if per_head else set(range(at * size, (at + 1) * size))
                _moves(subject, block, path, moves, kind.kind)
        mixes = {number(p, 1): v for p, v in patterns.values.items() if number(p, 0) == block.index}
        values_ = {number(p, 1): v for p, v in vs.values.items() if number(p, 0) == block.index}
        first = next((p for p in patterns.values if number(p, 0) == block.index), None)
        if first is not None and not _is_writable(subject, first, patterns.values[first]):
            _shares(subject, block, mixes)
            continue
        for path, slice_ in mine.items():
            head = number(path, 1)
            group = head // max(block.n_heads // block.n_kv, 1)
            if head in mixes and group in values_ and mixes[head].shape[-1] == values_[group].shape[0]:
                made = mixes[head].to(values_[group]) @ values_[group]
                subject.found("slice = pattern @ v", gap(made, slice_), layer)


def _is_writable(subject: Subject, path: ns.Path, pattern: Tensor) -> bool:
    """Whether a pattern may be written, and so promises that it makes the slice of these values."""
    saved = ns.SavedActivation.from_pairs(*((f"{path}[{t}]", pattern[None, t]) for t in range(len(pattern))))
    try:
        ns.patched_logits(subject.model, subject.ids, saved)
    except ns.errors.RefusedPlace:
        return False
    return True


def _shares(subject: Subject, block: Block, mixes: dict[int, Tensor]) -> None:
    """What may only be read is what the softmax made, all of it or what a sink leaves."""
    softmax, made = torch.nn.functional.softmax, []

    def keep(*args: Any, **kwargs: Any) -> Tensor:
        made.append(softmax(*args, **kwargs))
        return made[-1]

    home = subject.bare.get_submodule(block.pattern[0])  # pyright: ignore[reportOptionalSubscript]
    enter = home.register_forward_pre_hook(lambda *_: setattr(torch.nn.functional, "softmax", keep))
    leave = home.register_forward_hook(lambda *_: setattr(torch.nn.functional, "softmax", softmax), always_call=True)
    with hooks(enter, leave):
        subject.logits(subject.ids)
    for head, pattern in mixes.items():
        size = pattern.shape[-1]
        same = [one for one in made if one.dim() == 4 and one.shape[-2] == size and one.shape[1] == block.n_heads]
        if same:
            truth = same[0][0, head, :, :size].to(pattern)
            subject.found("pattern = softmax", gap(pattern, truth), f"layer {block.index}")


def _all_of_attention(subject: Subject, served: dict[str, Served], block: Block, mine: list[ns.Path]) -> None:
    """Without its heads, attention adds what does not depend on the tokens; and heads add up."""
    place = next(p for p in served["layers[:].attn.output"].values if number(p, 0) == block.index)
    zero = {site_of(path): torch.zeros_like for path in mine}
    left = []
    for ids in (subject.ids, subject.other.flip(-1)):
        seen: dict[str, Tensor] = {}
        keep = {site_of(place): lambda value, seen=seen: seen.setdefault("left", value.clone())}
        run(subject.bare, {"input_ids": ids}, {**zero, **keep})
        left.append(own(seen["left"])[0])
    size = served["layers[:].attn.output"].values[place].abs().max().clamp_min(1e-30)
    off = float((left[0] - left[1]).abs().max() / size)
    subject.found("heads make all of attention", off, f"layer {block.index}")
    projection = subject.bare.get_submodule(block.o)
    width = block.n_heads * block.head_dim
    a, b = torch.randn(2, 1, 3, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(
        next(projection.parameters())
    )
    with torch.no_grad():
        off = gap(projection(a) + projection(b) - projection(a * 0), projection(a + b))
    subject.found("heads add up in the output projection", off, f"layer {block.index}")


def _moves(subject: Subject, block: Block, path: ns.Path, expected: set[int], kind: str) -> None:
    """A change of one head's query (or one group's key or value) changes that head's slice alone."""

    def change(passing: bool) -> Tensor:
        seen: list[Tensor] = []
        noise = torch.Generator().manual_seed(0)
        made = [before(subject.bare.get_submodule(block.o), lambda x: seen.append(x.clone()))]
        edit = lambda v: v + 0.5 * torch.randn(v.shape, generator=noise, dtype=torch.float64).to(v)  # noqa: E731
        with hooks(*made, *(through(subject.bare, block) if passing else ())):
            subject.logits(subject.ids)
            run(subject.bare, {"input_ids": subject.ids}, {site_of(path): edit})
        each = (seen[block.occurrence] - seen[len(seen) // 2 + block.occurrence]).abs()
        return each.reshape(-1, block.n_heads, block.head_dim).amax((0, 2))

    for passing in (False, True):  # a norm over all heads couples them, as the family means it
        moved = change(passing)
        found = {
            head for head in range(block.n_heads) if float(moved[head]) > 1e-9 * float(moved.max().clamp_min(1e-30))
        }
        if found == expected:
            break
    subject.claim(f"one at a time {kind}", found == expected, f"{path} moves the slices of heads {sorted(found)}")


def _scales(subject: Subject, block: Block, path: ns.Path) -> None:
    """A change of the first number of a gate at one token changes one column at that token, or all if it is one."""
    seen: list[Tensor] = []

    def edit(value: Tensor) -> Tensor:
        value[:, -2, 0] += 0.5
        return value

    with hooks(before(subject.bare.get_submodule(block.o), lambda x: seen.append(x.clone()))):
        subject.logits(subject.ids)
        run(subject.bare, {"input_ids": subject.ids}, {site_of(path): edit})
    moved = (seen[block.occurrence] - seen[len(seen) // 2 + block.occurrence]).reshape(subject.ids.shape[1], -1) != 0
    expected = torch.zeros_like(moved)
    columns = site_of(path).columns
    assert columns is not None
    start = number(path, 1) * block.head_dim
    expected[-2, start : start + (1 if columns[1] - columns[0] > 1 else block.head_dim)] = True
    subject.claim("a gate scales its own column", torch.equal(moved, expected), f"{path} scales something else")


# --- replays ----------------------------------------------------------------------------------------------------------


def _exchanged(tokens: Tensor) -> Edit:
    """The prompt's own tokens exchanged for others."""
    return lambda value: torch.cat([value[:, : value.shape[1] - tokens.shape[1]], tokens], 1)


def _replays(subject: Subject, served: dict[str, Served]) -> None:
    base = subject.logits(subject.ids)
    for one in served.values():
        if one.saved is None:
            continue
        with subject.check(f"replay {one.kind}"):
            again = ns.patched_logits(subject.model, subject.ids, one.saved)
            subject.found(f"replay {one.kind}", gap(again, base), "own values")
            if one.derived:
                continue
            sites = [site_of(path) for path in one.values]
            other = values(subject.bare, {"input_ids": subject.other}, sites)
            truth = run(subject.bare, {"input_ids": subject.ids}, {s: _exchanged(own(other[s])) for s in sites})
            pairs = [
                (f"{p}[{t}]", own(other[site_of(p)])[:, t]) for p in one.values for t in range(subject.ids.shape[1])
            ]
            found = ns.patched_logits(subject.model, subject.ids, ns.SavedActivation.from_pairs(*pairs))
            subject.found(f"replay {one.kind}", gap(found, truth), "another prompt's values")
            if one.kind not in ("layers[:].mlp.gate.output",):
                subject.claim(f"replay {one.kind}", gap(truth, base) > 1e-6, "another prompt's values change nothing")
