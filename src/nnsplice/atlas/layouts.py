"""How query, key and value heads lie along the axis of a projection.

Every layout is an order of slots, one slot per head and role. Where roles share an axis, each slot is `head_dim` long.
So one rule, `slot -> [start, stop)`, serves the columns of an activation and the rows of a weight alike, and a new
layout is one new line of numbers.

    separate      q, k and v have an axis each
    latent        q has an axis; k and v come from one vector for all heads: (k v) of head 0 | (k v) of head 1 | ...
    concat        q of all heads | k of all groups | v of all groups
    interleaved   (q k v) of head 0 | (q k v) of head 1 | ...
    grouped       (q ... q k v) of group 0 | (q ... q k v) of group 1 | ...
    quartered     four parts, each: q of its heads | v of its heads | k of its heads (CodeGen)

Where q has an axis of its own, a gate may stand beside each query: (q gate) of head 0 | (q gate) of head 1 | ...
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Role = Literal["q", "k", "v"]
LayoutKind = Literal["separate", "latent", "concat", "interleaved", "grouped", "quartered"]
ROLES: tuple[Role, ...] = ("q", "k", "v")

#: Kinds in which the query has an axis of its own.
_APART = ("separate", "latent")
#: CodeGen was trained on four devices and kept their order.
_PARTS = 4


@dataclass(frozen=True, slots=True)
class Layout:
    """The order of heads along a projection's output axis.

    >>> gpt2 = Layout("concat", n_heads=4, n_kv=4, head_dim=8)
    >>> gpt2.range("k", 1)
    (40, 48)
    >>> Layout("grouped", n_heads=4, n_kv=2, head_dim=8).range("q", 2)
    (32, 40)
    """

    kind: LayoutKind
    n_heads: int
    n_kv: int
    #: Width of a head's slice in front of the output projection, and of its value.
    head_dim: int
    #: Width of a query and of a key; 0 where it is `head_dim`. With latent attention a head's own part of the key is
    #: shorter than its query: the rest, which is rotated, is one for all heads.
    query_dim: int = 0
    key_dim: int = 0
    #: Width of the gate that stands behind each query; 0 where there is none.
    gate_dim: int = 0

    @property
    def per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.n_heads // self.n_kv

    @property
    def fused(self) -> bool:
        """Whether q, k and v lie on one axis."""
        return self.kind not in _APART

    def size(self, role: Role) -> int:
        """How wide one head of a role is."""
        return {"q": self.query_dim, "k": self.key_dim or self.query_dim, "v": 0}[role] or self.head_dim

    def shares(self, role: Role) -> bool:
        """Whether the axis of a role carries something else beside it."""
        return self.fused or (role == "q" and self.gate_dim > 0) or (self.kind == "latent" and role != "q")

    def group_of(self, head: int) -> int:
        """The key/value head that a query head reads."""
        return head * self.n_kv // self.n_heads

    def heads_of(self, group: int) -> range:
        """The query heads that read one key/value head."""
        return range(group * self.per_group, (group + 1) * self.per_group)

    def count(self, role: Role) -> int:
        """How many heads a role has: key/value heads are counted as groups."""
        return self.n_heads if role == "q" else self.n_kv

    def width(self, role: Role) -> int:
        """Length of the axis that carries the role: the common one where q, k and v are fused."""
        if self.fused:
            return (self.n_heads + 2 * self.n_kv) * self.head_dim
        return self.count(role) * self._step(role)

    def _step(self, role: Role) -> int:
        """From one head of a role to the next, where the role shares its axis with one other at most."""
        if self.kind == "latent" and role != "q":
            return self.size("k") + self.size("v")
        return self.size(role) + (self.gate_dim if role == "q" else 0)

    def slot(self, role: Role, index: int) -> int:
        """The number of the slot that holds one head of a role."""
        if not 0 <= index < self.count(role):
            raise IndexError(f"{role} has heads 0 to {self.count(role) - 1}, not {index}")
        match self.kind:
            case "separate" | "latent":
                return index
            case "concat":
                return index + {"q": 0, "k": self.n_heads, "v": self.n_heads + self.n_kv}[role]
            case "interleaved":
                return 3 * index + ROLES.index(role)
            case "grouped":
                group = self.group_of(index) if role == "q" else index
                inside = index % self.per_group if role == "q" else self.per_group + (role == "v")
                return group * (self.per_group + 2) + inside
            case "quartered":
                each = self.n_heads // _PARTS
                part, inside = divmod(index, each)
                return part * 3 * each + {"q": 0, "v": 1, "k": 2}[role] * each + inside

    def range(self, role: Role, index: int) -> tuple[int, int]:
        """Where head (or group) `index` of a role lies, as `(start, stop)`."""
        if self.fused:
            start = self.slot(role, index) * self.head_dim
        else:
            start = self.slot(role, index) * self._step(role)
            start += self.size("k") if self.kind == "latent" and role == "v" else 0
        return start, start + self.size(role)

    def gate(self, head: int) -> tuple[int, int] | None:
        """Where the gate of a head lies, on the axis of q; None where there is none.

        >>> Layout("separate", n_heads=4, n_kv=2, head_dim=8, gate_dim=8).gate(1)
        (24, 32)
        """
        stop = self.range("q", head)[1]
        return (stop, stop + self.gate_dim) if self.gate_dim else None

    def whole(self, role: Role) -> tuple[tuple[int, int], ...]:
        """All of a role, as few ranges as there are.

        >>> Layout("interleaved", n_heads=2, n_kv=2, head_dim=3).whole("q")
        ((0, 3), (9, 12))
        """
        return merge(self.range(role, index) for index in range(self.count(role)))


def merge(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Sorted ranges with those that touch or overlap joined.

    >>> merge([(4, 6), (0, 2), (2, 3)])
    ((0, 3), (4, 6))
    """
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        elif start < stop:
            joined.append((start, stop))
    return tuple(joined)


def fits(kind: LayoutKind, n_heads: int, n_kv: int, head_dim: int) -> bool:
    """Whether a layout can exist with these numbers."""
    if min(n_heads, n_kv, head_dim) < 1 or n_heads % n_kv:
        return False
    return not (kind in ("interleaved", "latent") and n_heads != n_kv) and not (
        kind == "quartered" and (n_heads != n_kv or n_heads % _PARTS)
    )
