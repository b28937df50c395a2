"""The order in which a forward pass reaches a model's modules, and the index of a site in it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from nnsplice.atlas.families import NOT_TEXT
from nnsplice.atlas.site import Site
from nnsplice.errors import NeverFired

#: ModelParts of a module's name that mark a tower for something else than text, or what leads from there to the text's.
_OF_IMAGES = NOT_TEXT | {"multi_modal_projector", "connector"}


@dataclass(frozen=True)
class Order:
    """One forward pass as the sequence of module ends it went through.

    >>> from nnsplice.atlas import Site
    >>> order = Order.of([("h.0", "input"), ("h.0", "output"), ("h.1", "input"), ("h.1", "output")])
    >>> order.rank(Site("h.1")) > order.rank(Site("h.0"))
    True
    """

    #: (module, end, occurrence) -> index in the sequence.
    ranks: dict[tuple[str, str, int], int]

    @staticmethod
    def of(sequence: Iterable[tuple[str, str]]) -> Order:
        """Number the visits; a module that runs several times is visited as occurrence 0, 1, ..."""
        ranks: dict[tuple[str, str, int], int] = {}
        visits: dict[tuple[str, str], int] = {}
        for module, end in sequence:
            visit = visits.get((module, end), 0)
            visits[module, end] = visit + 1
            ranks[module, end, visit] = len(ranks)
        return Order(ranks)

    def first(self, module: str | None, end: str) -> int | None:
        """Where a pass meets an end of a module first; None where it does not."""
        return None if module is None else self.ranks.get((module, end, 0))

    def calls(self, module: str) -> int:
        """How often a pass goes into a module."""
        return self._calls.get(module, 0)

    @cached_property
    def _calls(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for module, end, _ in self.ranks:
            if end == "input":
                counts[module] = counts.get(module, 0) + 1
        return counts

    def rank(self, site: Site) -> int:
        """Where in the pass the site's value is met.

        Raises:
            NeverFired: the pass does not go through it.
        """
        rank = self.ranks.get(site.location)
        if rank is None:
            raise self._never_fired(site)
        return rank

    def _never_fired(self, site: Site) -> NeverFired:
        name = f"model.{site.module}" if site.module else "model"
        visits = sum((site.module, site.end, visit) in self.ranks for visit in range(site.occurrence))
        if visits:
            return NeverFired(f"{name} runs {visits} times in one forward pass, so there is no call {site.occurrence}")
        if _OF_IMAGES & set(name.split(".")):
            return NeverFired(
                f"{name} does not run on tokens: its values belong to pieces of an image or a sound",
                expected="a site that tokens go through, where those of an image are a span",
                write='layers[i].output["image"]',
            )
        inside = sorted({module for module, _, _ in self.ranks if module.startswith(f"{site.module}.")})
        return NeverFired(
            f"{name} is never called as a whole in a forward pass, so it has no {site.end}",
            expected="a module that runs" + (f", such as model.{inside[0]}" if inside else ""),
        )
