"""The check that the subspace of a sweep has the width of every site."""

from __future__ import annotations

from collections.abc import Sequence

from nnsplice import engine
from nnsplice.activations.access import site_of
from nnsplice.activations.capture import capture
from nnsplice.activations.prompts import Prompts
from nnsplice.errors import BadArgument
from nnsplice.sweeps.operations import Operation, check_width
from nnsplice.sweeps.targets import Target


def check(model: engine.Model, operation: Operation, targets: Sequence[Target], edited: Prompts) -> None:
    """Check that every site is as wide as the subspace, in one run of the shortest prompt.

    Raises:
        ShapeError: a site has another width.
        BadArgument: a pattern, whose width is a number of tokens.
    """
    if operation.subspace is None:
        return
    places = list(dict.fromkeys(place.place for target in targets for place in target.places))
    pattern = next((place for place in places if site_of(place).kind == "pattern"), None)
    if pattern is not None:
        raise BadArgument("a pattern's width is a number of tokens, so no subspace fits it", path=pattern)
    lengths = edited.lengths("decoder")
    shortest = edited.take([lengths.index(min(lengths))])
    for key, tensor in capture(model, shortest, [place.at(0) for place in places]).items():
        check_width(operation.subspace, tensor.shape[-1], key)
