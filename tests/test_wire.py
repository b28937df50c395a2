"""Taking tokens out of a value and putting them into it, and the containers around a value."""

from __future__ import annotations

import ast
import inspect
from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast

from nnsplice import wire

BATCH, LENGTH, WIDTH = 3, 12, 8


def numbered(*shape: int) -> Tensor:
    """Every number another one."""
    return torch.arange(1.0, torch.Size(shape).numel() + 1, dtype=torch.float64).reshape(shape)


one_list = st.lists(st.integers(0, LENGTH - 1), min_size=1, max_size=LENGTH, unique=True)
by_row = st.lists(st.permutations(range(LENGTH)), min_size=BATCH, max_size=BATCH)
wheres = st.none() | one_list | st.builds(lambda rows, n: torch.tensor(rows)[:, :n], by_row, st.integers(1, LENGTH))
parts = st.none() | st.integers(0, WIDTH - 1).flatmap(lambda a: st.tuples(st.just(a), st.integers(a + 1, WIDTH)))


def chosen(where: Any, part: tuple[int, int] | None) -> Tensor:
    """Which numbers of a value are meant, written down one by one."""
    meant = torch.zeros(BATCH, LENGTH, WIDTH, dtype=torch.bool)
    start, stop = part or (0, WIDTH)
    for row in range(BATCH):
        tokens = range(LENGTH) if where is None else where[row].tolist() if isinstance(where, Tensor) else where
        for token in tokens:
            meant[row, token, start:stop] = True
    return meant


# -------------------------------------------------------------------------------------------------------- pick and put


@given(wheres, parts)
def test_pick_takes_the_tokens_in_the_order_they_are_named(where: Any, part: tuple[int, int] | None) -> None:
    values = numbered(BATCH, LENGTH, WIDTH)
    start, stop = part or (0, WIDTH)
    found = wire.pick(values, where, part)
    for row in range(BATCH):
        tokens = range(LENGTH) if where is None else where[row].tolist() if isinstance(where, Tensor) else where
        assert torch.equal(found[row], torch.stack([values[row, token, start:stop] for token in tokens]))


@given(wheres, parts)
def test_putting_back_what_was_picked_changes_nothing(where: Any, part: tuple[int, int] | None) -> None:
    values = numbered(BATCH, LENGTH, WIDTH)
    assert torch.equal(wire.put(values, where, part, wire.pick(values, where, part)), values)


@given(wheres, parts, st.booleans())
def test_put_writes_what_is_meant_and_nothing_else(where: Any, part: tuple[int, int] | None, one_row: bool) -> None:
    values = numbered(BATCH, LENGTH, WIDTH)
    before, meant = values.clone(), chosen(where, part)
    new = -1e3 * wire.pick(values, where, part)[: 1 if one_row else BATCH]
    out = wire.put(values, where, part, new)
    assert torch.equal(out[~meant], values[~meant])
    assert torch.equal(wire.pick(out, where, part), new.expand(BATCH, -1, -1))
    assert torch.equal(values, before)


@given(wheres, parts)
def test_nothing_that_comes_out_shares_memory_with_what_went_in(where: Any, part: tuple[int, int] | None) -> None:
    values = numbered(BATCH, LENGTH, WIDTH)
    new = wire.pick(values, where, part)
    out = wire.put(values, where, part, new)
    kept = [values.clone(), new.clone()]
    out.fill_(-1)
    assert torch.equal(values, kept[0]) and torch.equal(new, kept[1])
    new.fill_(-2)
    assert torch.equal(values, kept[0])


@pytest.mark.parametrize("where", [None, [5], list(range(LENGTH)), torch.tensor([[0], [1], [2]])])
def test_a_view_is_picked_into_memory_of_its_own_size(where: Any) -> None:
    values = numbered(2 * BATCH, LENGTH, WIDTH)[::2].expand(BATCH, LENGTH, WIDTH)
    found = wire.pick(values, where, (2, 4))
    assert found.untyped_storage().nbytes() == found.numel() * found.element_size()


def test_an_expanded_value_is_written_row_by_row() -> None:
    values = numbered(1, LENGTH, WIDTH).expand(BATCH, -1, -1)  # what all prompts share
    out = wire.put(values, torch.tensor([[0], [1], [2]]), None, torch.zeros(BATCH, 1, WIDTH))
    assert [row.nonzero().numel() for row in (out == 0)] == [2 * WIDTH] * BATCH


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_values_are_cast_to_those_they_replace(dtype: torch.dtype) -> None:
    out = wire.put(numbered(BATCH, LENGTH, WIDTH).to(dtype), [0], None, torch.full((1, 1, WIDTH), 1 / 3).double())
    assert out.dtype == dtype and torch.equal(out[:, 0], torch.full((BATCH, WIDTH), 1 / 3, dtype=dtype))


@given(wheres, parts)
def test_gradients_reach_what_was_kept_and_what_was_put(where: Any, part: tuple[int, int] | None) -> None:
    values = numbered(BATCH, LENGTH, WIDTH).requires_grad_()
    new = torch.ones_like(wire.pick(values, where, part)).detach().requires_grad_()
    wire.put(values, where, part, new).sum().backward()
    assert torch.equal(values.grad, (~chosen(where, part)).double())  # type: ignore[arg-type]
    assert torch.equal(new.grad, torch.ones_like(new))  # type: ignore[arg-type]
    picked = wire.pick(values, where, part)
    (gradient,) = torch.autograd.grad(picked.sum(), values)
    assert torch.equal(gradient, chosen(where, part).double())


def test_one_row_that_serves_all_gets_the_gradients_of_all() -> None:
    new = torch.zeros(1, 1, WIDTH, dtype=torch.float64, requires_grad=True)
    wire.put(numbered(BATCH, LENGTH, WIDTH), [3], None, new).sum().backward()
    assert torch.equal(new.grad, torch.full_like(new, BATCH))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------- containers

Pair = namedtuple("Pair", ["hidden", "weights"])
FIRST, SECOND, NEW = numbered(1, 2, 3), numbered(1, 2, 3) + 100, -numbered(1, 2, 3)

CONTAINERS = [
    (FIRST, SECOND),
    [FIRST, SECOND],
    Pair(FIRST, SECOND),
    {"a": FIRST, "b": SECOND},
    OrderedDict(a=FIRST, b=SECOND),
    BaseModelOutput(last_hidden_state=FIRST, attentions=SECOND),  # type: ignore[arg-type]
    CausalLMOutputWithPast(logits=FIRST, hidden_states=SECOND),  # type: ignore[arg-type]
]


def members(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else list(value)


@pytest.mark.parametrize("value", CONTAINERS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("item", [None, 0, 1])
def test_one_member_is_read_and_replaced_and_the_rest_stays(value: Any, item: int | None) -> None:
    before = members(value)
    assert wire.unpack(value, item) is before[item or 0]
    packed = wire.repack(value, item, NEW)
    assert type(packed) is type(value) and packed is not value
    assert wire.unpack(packed, item) is NEW
    assert all(a is b for n, (a, b) in enumerate(zip(members(packed), before, strict=True)) if n != (item or 0))
    assert all(a is b for a, b in zip(members(value), before, strict=True))
    if hasattr(value, "keys"):
        assert list(packed.keys()) == list(value.keys())


def test_the_attributes_of_a_model_output_follow() -> None:
    packed = wire.repack(CONTAINERS[-1], None, NEW)
    assert packed.logits is packed["logits"] is packed[0] is NEW and packed.hidden_states is SECOND
    assert wire.repack(Pair(FIRST, SECOND), 1, NEW).weights is NEW


def test_members_that_are_no_tensors_stay_too() -> None:
    cache = object()
    assert wire.repack((FIRST, None, cache), None, NEW) == (NEW, None, cache)


def test_a_bare_tensor_is_its_own_value() -> None:
    assert wire.unpack(FIRST) is FIRST and wire.repack(FIRST, None, NEW) is NEW


@pytest.mark.parametrize(
    ("value", "item", "kind", "message"),
    [
        (FIRST, 0, ValueError, r"element \[0\] was asked for, but the value is no container: Tensor"),
        ((FIRST, None), 1, ValueError, "a NoneType stands there"),
        (None, None, ValueError, "a NoneType stands there"),
        ("text", None, ValueError, "a str stands there"),
        ({"a": {"b": FIRST}}, None, ValueError, "a dict stands there"),
        ((FIRST,), 3, IndexError, "out of range"),
        ((), None, IndexError, "out of range"),
    ],
)
def test_where_no_tensor_stands_it_says_what_does(value: Any, item: int | None, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        wire.unpack(value, item)


# ---------------------------------------------------------------------------------------------------------------- rows


def test_flat_tokens_are_cut_into_rows_and_shared_ones_serve_all() -> None:
    values = numbered(BATCH, LENGTH, WIDTH)
    assert wire.as_rows(values, BATCH) is values and wire.as_rows(values, None) is values
    assert torch.equal(wire.as_rows(values.flatten(0, 1), BATCH), values)
    assert torch.equal(wire.as_rows(values[:1], BATCH), values[:1].expand(BATCH, -1, -1))


@pytest.mark.parametrize(
    ("shape", "batch"),
    [((4,), 2), ((2, 3, 4, 5), 2), ((5, 4), 2), ((6, 4), None), ((6, 4), 0), ((3, 5, 4), 2), ((), 1)],
)
def test_a_value_without_a_row_for_each_prompt_says_its_shape(shape: tuple[int, ...], batch: int | None) -> None:
    with pytest.raises(ValueError) as raised:
        wire.as_rows(torch.zeros(shape), batch)
    assert str(list(shape)) in str(raised.value)


# --------------------------------------------------------------------------------------------------------------- travel


def test_what_travels_to_a_server_needs_torch_and_the_standard_library_only() -> None:
    tree = ast.parse(inspect.getsource(wire))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert imported == {"__future__", "collections.abc", "typing", "torch"}
