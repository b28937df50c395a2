"""Arguments with a value or a type that is not allowed, and packages that are not installed."""

from __future__ import annotations

from nnsplice.errors.base import NnspliceError


class BadArgument(NnspliceError, ValueError):
    """An argument has a value that is not allowed.

    >>> saved = ns.capture(model, "w3 w4", "layers[1].output[-1]")
    >>> saved.mean("layer")
    Traceback (most recent call last):
    nnsplice.errors.BadArgument: there is no mean over 'layer'
      expected: "prompt" or "position"
    """


class BadType(NnspliceError, TypeError):
    """An argument has a type that is not allowed.

    >>> ns.steering.SteeringVector.of(torch.zeros(1, 16))
    Traceback (most recent call last):
    nnsplice.errors.BadType: a Tensor is no capture
      expected: a SavedActivation of one row
      write: SteeringVector.of(ns.SavedActivation.from_pairs(("layers[3].output[-1]", tensor)))
    """


class MissingPackage(NnspliceError, ImportError):
    """A package of one of the extras is not installed, or nnsight is a version with other private names."""
