"""The weights of domains for parts of a model, as a table that a user may replace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from nnsplice.errors import BadArgument

#: The kind of a weight, and its depth in the model.
Kind = Literal["embed", "attn", "mlp", "other"]
Depth = Literal["early", "mid", "late"]
KINDS: tuple[Kind, ...] = ("embed", "attn", "mlp", "other")
DEPTHS: tuple[Depth, ...] = ("early", "mid", "late")


@dataclass(frozen=True)
class DomainTable:
    """The weight of each domain for the energy of a kind of parameter at a depth.

    >>> table = ns.adapters.DomainTable(
    ...     names=("facts", "rest"), weights={("mlp", "mid"): (1.0, 0.0)}, default=(0.0, 1.0), threshold=0.5
    ... )
    >>> table.of("attn", "late")
    (0.0, 1.0)

    Attributes:
        names: the domains.
        weights: (kind, depth) -> a weight for each domain; kinds are `embed`, `attn`, `mlp`, `other`, depths `early`,
            `mid`, `late`.
        default: the weights of kinds and depths that are not listed.
        threshold: the share from which on a domain becomes a tag.
        empty: the share of every domain for an adapter that changes nothing.
    """

    names: tuple[str, ...]
    weights: Mapping[tuple[str, str], tuple[float, ...]]
    default: tuple[float, ...] = ()
    threshold: float = 0.35
    empty: float = field(default=0.33)

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", MappingProxyType(dict(self.weights)))
        if not self.names or len(set(self.names)) != len(self.names):
            raise BadArgument(f"the names of the domains are {', '.join(self.names)}", expected="different ones")
        for key, row in [*self.weights.items(), *([("default", self.default)] if self.default else [])]:
            if isinstance(key, tuple) and (key[0] not in KINDS or key[1] not in DEPTHS):
                raise BadArgument(f"{key} is no kind and depth", expected=f"one of {KINDS} and one of {DEPTHS}")
            if len(row) != len(self.names) or any(not 0 <= weight < float("inf") for weight in row):
                raise BadArgument(
                    f"the row of {key} is {tuple(row)}",
                    expected=f"{len(self.names)} numbers from 0, for {', '.join(self.names)}",
                )

    def of(self, kind: str, depth: str) -> tuple[float, ...]:
        """The weights of one kind at one depth.

        Args:
            kind: `embed`, `attn`, `mlp` or `other`.
            depth: `early`, `mid` or `late`.

        Returns:
            A weight for each domain.
        """
        return tuple(self.weights.get((kind, depth), self.default or (0.0,) * len(self.names)))


_EARLY, _MID_ATTN, _MID = (1.5, 0.5, 0.0), (0.0, 1.5, 0.0), (0.0, 0.8, 1.2)
_LATE_MLP, _LATE = (0.0, 0.0, 1.8), (0.0, 1.2, 0.5)

#: A rule of thumb, made for adapters on German law: early layers recall, middle attention reasons, late MLPs style.
DOMAINS = DomainTable(
    names=("statute_recall", "logic_reasoning", "style_gutachtenstil"),
    weights={
        **{(kind, "early"): _EARLY for kind in KINDS},
        **{("embed", depth): _EARLY for depth in DEPTHS},
        ("attn", "mid"): _MID_ATTN,
        ("mlp", "mid"): _MID,
        ("other", "mid"): _MID,
        ("mlp", "late"): _LATE_MLP,
        ("attn", "late"): _LATE,
        ("other", "late"): _LATE,
    },
)
