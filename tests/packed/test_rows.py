"""Rows of the packed engine: several edits at any layers, reads on the way, ends; against plain hooks."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import nnsplice as ns
from nnsplice import engine, wire
from nnsplice.activations.access import site_of
from nnsplice.activations.encoding import encode
from nnsplice.errors import OverlappingWrite
from nnsplice.packed import BaseRuns, Edit, Read, Row, run
from nnsplice.packed.sae_edits import PartChange
from nnsplice.paths import Path
from zoo import FAMILIES, double, having

PROMPTS = ["w3 w9 w5 w6 w7 w11", "w13 w24 w15", "w3 w4 w5 w26 w17"]
SITES = (
    "layers[:].input", "layers[:].output", "layers[:].mid", "layers[:].attn.output", "layers[:].mlp.output",
    "layers[:].heads[:].output", "layers[:].heads[:].q", "layers[:].groups[:].k", "layers[:].groups[:].v",
    "layers[:].neurons[3]", "layers[:].mlp.up",
)  # fmt: skip
COVERED = [family for family in (*FAMILIES, "gpt_oss") if family not in ("t5", "bart", "bert")]


def _place(tensor: Tensor, site: Any) -> Tensor:
    start, stop = site.columns or (0, tensor.shape[-1])
    return tensor[..., start:stop]


def by_hooks(model: Any, prompt: Sequence[int], row: Row) -> tuple[Tensor, list[Tensor]]:
    """The same row by torch's hooks on the bare module: the last block's output at its end, and what was read."""
    root, hooks, seen = model._module, [], {}
    last = ns.Atlas.of(model).tower().blocks[-1].module

    def at(site: Any, act: Callable[[Tensor], Tensor | None]) -> None:
        module = root.get_submodule(site.module)

        def before(_m: Any, args: tuple, kwargs: dict) -> Any:
            held = args[0] if args else next(iter(kwargs.values()))
            new = act(held)
            if new is None:
                return None
            if site.kind == "stream":
                held.copy_(new)
                return None
            return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): new})

        def after(_m: Any, _args: Any, out: Any) -> Any:
            new = act(wire.unpack(out, site.item))
            return None if new is None else wire.repack(out, site.item, new)

        if site.end == "input":
            hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        else:
            hooks.append(module.register_forward_hook(after))

    def writing(edit: Edit) -> Callable[[Tensor], Tensor]:
        def write(held: Tensor) -> Tensor:
            new = held.clone()
            flat = new.reshape(-1, new.shape[-1])
            part = _place(flat, site_of(edit.place))
            at_ = list(edit.positions)
            given = edit.values(part.shape[-1])
            assert (given is None or isinstance(given, Tensor)) and not isinstance(edit.change, PartChange)
            part[at_] = edit.change(part[at_], given)
            return flat.reshape(held.shape)

        return write

    def keeping(read: Read) -> Callable[[Tensor], None]:
        def keep(held: Tensor) -> None:
            flat = held.reshape(-1, held.shape[-1])
            seen[read] = _place(flat, site_of(read.place))[list(read.positions)].clone()

        return keep

    for edit in row.edits:
        at(site_of(edit.place), writing(edit))
    for read in row.reads:
        at(site_of(read.place), keeping(read))
    ends: list[Tensor] = []
    hooks.append(
        root.get_submodule(last).register_forward_hook(
            lambda _m, _a, out: ends.append((out[0] if isinstance(out, tuple) else out)[0])
        )
    )
    try:
        with torch.no_grad():
            root(input_ids=torch.tensor([list(prompt)]))
    finally:
        for hook in hooks:
            hook.remove()
    return (ends[0][row.end] if row.end is not None else ends[0][-1]), [seen[read] for read in row.reads]


def _doubled(current: Tensor, value: Tensor | None) -> Tensor:
    return 2 * current - 1


def _random_row(
    model: Any, places: Sequence[Path], ids: Sequence[Sequence[int]], chosen: random.Random, generator: Any
) -> Row:
    known, prompt = engine.map_of(model), chosen.randrange(len(ids))
    length = len(ids[prompt])
    edits: list[Edit] = []
    for place in sorted(chosen.sample(places, chosen.choice([1, 2, 3])), key=known.rank):
        positions = sorted(chosen.sample(range(length), chosen.choice([1, 2])))
        if chosen.random() < 0.3:
            edits.append(Edit(place, tuple(positions), _doubled, lambda width: None))
        else:
            drawn = torch.randn(len(positions), 256, generator=generator, dtype=torch.float64)
            edits.append(Edit.of(place, positions, drawn[:, : _width(model, place)]))
    return Row(prompt, tuple(edits), chosen.randrange(length))


def _width(model: Any, place: Path) -> int:
    return ns.capture(model, "w3 w4", place.at(-1))[str(place.at(-1))].shape[-1]


@pytest.mark.parametrize("family", COVERED)
def test_rows_with_several_edits_at_any_layers_equal_hooks(family: str) -> None:
    model = double(family)
    places = engine.expand(model, having(model, SITES))
    given = encode(model, PROMPTS)
    chosen, generator = random.Random(family), torch.Generator().manual_seed(0)
    rows: list[Row] = []
    while len(rows) < 12:
        row = _random_row(model, places, given.ids, chosen, generator)
        try:
            run(BaseRuns(model, given), [row])
        except OverlappingWrite:
            continue
        rows.append(row)
    ran = run(BaseRuns(model, given), rows)
    for number, row in enumerate(rows):
        expected, _ = by_hooks(model, given.ids[row.prompt], row)
        torch.testing.assert_close(ran.ends[number], expected, rtol=0, atol=2e-12)


@pytest.mark.parametrize("family", COVERED)
def test_values_read_behind_edits_equal_those_of_hooks(family: str) -> None:
    model = double(family)
    known = engine.map_of(model)
    places = engine.expand(model, having(model, SITES))
    given = encode(model, PROMPTS)
    chosen, generator = random.Random(family), torch.Generator().manual_seed(1)
    rows: list[Row] = []
    for number in range(12):
        prompt = chosen.randrange(len(given))
        length = len(given.ids[prompt])
        place = chosen.choice(places)
        at = chosen.randrange(length)
        behind = [other for other in places if known.rank(other) > known.rank(place)]
        reads = [
            Read(other, tuple(sorted(chosen.sample(range(at, length), chosen.choice([1, length - at])))))
            for other in chosen.sample(behind, min(2, len(behind)))
        ]
        edit = Edit.of(
            place, (at,), torch.randn(1, 256, generator=generator, dtype=torch.float64)[:, : _width(model, place)]
        )
        rows.append(Row(prompt, (edit,), chosen.randrange(length) if number % 2 else None, tuple(reads)))
    rows = [row for row in rows if row.reads]
    ran = run(BaseRuns(model, given), rows)
    for number, row in enumerate(rows):
        end, values = by_hooks(model, given.ids[row.prompt], row)
        if row.end is not None:
            torch.testing.assert_close(ran.ends[number], end, rtol=0, atol=2e-12)
        for read, value in zip(row.reads, values, strict=True):
            torch.testing.assert_close(ran.readings[number, read], value, rtol=0, atol=2e-12)
    assert set(ran.ends) == {number for number, row in enumerate(rows) if row.end is not None}


def test_a_token_before_all_edits_is_read_as_the_run_has_it() -> None:
    model = double("llama")
    given = encode(model, PROMPTS)
    edited, read_at = engine.expand(model, ["layers[0].mlp.output", "layers[1].attn.output"])
    read = Read(read_at, (1, 4))
    row = Row(0, (Edit.of(edited, (3,), torch.ones(1, 16, dtype=torch.float64)),), None, (read,))
    _, (expected,) = by_hooks(model, given.ids[0], row)
    found = run(BaseRuns(model, given), [row]).readings[0, read]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-12)


def test_a_head_and_the_whole_query_overlap_and_other_columns_of_one_matrix_do_not() -> None:
    """In GPT-2 queries, keys and values are columns of one output, and head 1 begins where no other site does."""
    model = double("gpt2")
    base = BaseRuns(model, encode(model, PROMPTS))
    whole, head, keys = engine.expand(model, ["layers[0].attn.q", "layers[0].heads[1].q", "layers[0].groups[1].k"])

    def row(one: Path, other: Path, width: int, other_width: int) -> Row:
        edits = (Edit.of(one, (1,), torch.ones(1, width)), Edit.of(other, (1,), torch.ones(1, other_width)))
        return Row(0, edits, end=2)

    for rows in ([row(whole, head, 16, 4)], [row(head, whole, 4, 16)]):
        with pytest.raises(OverlappingWrite, match="overlap at the same token"):
            run(base, rows)
    run(base, [row(whole, keys, 16, 4)])
