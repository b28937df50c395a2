"""Edits of features and errors of an attached SAE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from nnsplice.activations import features
from nnsplice.activations.access import site_of
from nnsplice.atlas import Site, host
from nnsplice.atlas.attached import Features
from nnsplice.paths import Path


@dataclass(frozen=True)
class PartChange:
    """A change of features or the error of one SAE. The changes of several of them at one token add up."""

    sae: Features
    #: As `rows.Change`, of the part's own values: `[row, 1]` for features, `[row, width]` for errors.
    change: Callable[[Tensor, Tensor | None], Tensor]

    def steps(self, values: Tensor, given: Tensor | None, sites: Sequence[Site]) -> Tensor:
        """The changes `[row, width]` of values `[row, width]`.

        Args:
            given: the given value for the part of each row.
            sites: the part of each row, all of one kind.
        """
        old = features.each(self.sae, sites, values)
        return features.moved_each(self.sae, sites, self.change(old, given).to(old) - old, values)


def is_part(place: Path) -> bool:
    """Whether a site is a feature or the error of an SAE."""
    return site_of(place).kind in features.KINDS


def host_site(place: Path) -> Site:
    """The site of a path; for a part of an SAE, the site that the SAE is attached to."""
    return site_of(host(place) if is_part(place) else place)
