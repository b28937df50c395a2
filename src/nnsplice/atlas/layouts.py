"""How query, key and value heads lie along the axis of a projection.

Every layout is an order of slots, one slot per head and role, each `head_dim` long. So one rule, `slot -> [start,
stop)`, serves the columns of an activation and the rows of a weight alike, and a new layout is one new line of numbers.

    separate      q, k and v have an axis each
    concat        q of all heads | k of all groups | v of all groups
    interleaved   (q k v) of head 0 | (q k v) of head 1 | ...
    grouped       (q ... q k v) of group 0 | (q ... q k v) of group 1 | ...
    quartered     four parts, each: q of its heads | v of its heads | k of its heads (CodeGen)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Role = Literal["q", "k", "v"]
Kind = Literal["separate", "concat", "interleaved", "grouped", "quartered"]
ROLES: tuple[Role, ...] = ("q", "k", "v")

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

    kind: Kind
    n_heads: int
    n_kv: int
    head_dim: int

    @property
    def per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.n_heads // self.n_kv

    @property
    def fused(self) -> bool:
        """Whether q, k and v lie on one axis."""
        return self.kind != "separate"

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
        return (self.n_heads + 2 * self.n_kv if self.fused else self.count(role)) * self.head_dim

    def slot(self, role: Role, index: int) -> int:
        """The number of the slot that holds one head of a role."""
        if not 0 <= index < self.count(role):
            raise IndexError(f"{role} has heads 0 to {self.count(role) - 1}, not {index}")
        match self.kind:
            case "separate":
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
        start = self.slot(role, index) * self.head_dim
        return start, start + self.head_dim

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


def fits(kind: Kind, n_heads: int, n_kv: int, head_dim: int) -> bool:
    """Whether a layout can exist with these numbers."""
    if min(n_heads, n_kv, head_dim) < 1 or n_heads % n_kv:
        return False
    return not (kind == "interleaved" and n_heads != n_kv) and not (
        kind == "quartered" and (n_heads != n_kv or n_heads % _PARTS)
    )
