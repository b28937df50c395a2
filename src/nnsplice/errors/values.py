"""Prompts, captures and tensors that do not fit each other."""

from __future__ import annotations

from nnsplice.errors.base import NnspliceError


class ShortRow(NnspliceError, IndexError):
    """A prompt has no token at this position.

    >>> ns.capture(model, ["w3 w4 w5", "w6"], "layers[1].output[2]")
    Traceback (most recent call last):
    nnsplice.errors.ShortRow: row 1 has 1 token, so there is no position [2]
      expected: [0] to [0], or [-1] to [-1]
      in: layers[1].output[2]
      in: ns.capture
    """


class SpanError(NnspliceError, ValueError):
    """A named span cannot be found in a prompt.

    >>> ns.capture(model, "w3 w4 w5", 'layers[1].output["subject"]', spans={"subject": ["w9"]})
    Traceback (most recent call last):
    nnsplice.errors.SpanError: span "subject": 'w9' does not occur in row 0: 'w3 w4 w5'
      expected: a text that occurs once
      in: ns.capture
    """


class ShapeError(NnspliceError, ValueError):
    """A tensor has another shape than is needed, such as `[prompt, token, width]`.

    >>> ns.SavedActivation.from_pairs(("layers[1].output[-1]", torch.zeros(1, 2, 3, 16)))
    Traceback (most recent call last):
    nnsplice.errors.ShapeError: an entry of shape [1, 2, 3, 16] is not [prompt, width]
        layers[1].output[-1]
    """


class KeyMismatch(NnspliceError, ValueError):
    """Two values that should have the same keys do not: captures, circuits or results.

    >>> one, other = (ns.capture(model, "w3 w4", f"layers[{i}].output[-1]") for i in (0, 1))
    >>> one - other
    Traceback (most recent call last):
    nnsplice.errors.KeyMismatch: two captures of different sites
      only in the left: layers[0].output[-1]
      only in the right: layers[1].output[-1]
      expected: the same keys in both
      write: shared = [key for key in a if key in b];  a.subset(shared) - b.subset(shared)
    """


class DuplicatePath(NnspliceError, ValueError):
    """The same site and position is given twice.

    >>> one, other = (ns.capture(model, "w3 w4", f"layers[{i}:2].output[-1]") for i in (0, 1))
    >>> one | other
    Traceback (most recent call last):
    nnsplice.errors.DuplicatePath: 1 path in both captures: layers[1].output[-1]
      expected: captures of different sites or positions
      write: a | b.subset([...])
    """


class OverlappingWrite(NnspliceError, ValueError):
    """Two writes change the same value.

    >>> saved = ns.capture(model, "w3 w4", ["layers[1].output[-1]", "layers[1].output[1]"])
    >>> ns.patched_logits(model, "w5 w6", saved)
    Traceback (most recent call last):
    nnsplice.errors.OverlappingWrite: two of the positions [1], [-1] are the same token of a prompt
        layers[1].output
      expected: each token once
    """


class ParamMappingError(NnspliceError, ValueError):
    """The parameters of an optimizer cannot be mapped to layers with certainty.

    >>> optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters())
    >>> ns.adapters.map_optimizer_to_layers(optimizer, model)
    Traceback (most recent call last):
    nnsplice.errors.ParamMappingError: parameter 0 of the optimizer, of shape [2, 2], is none of this model
      expected: the model that the optimizer was made for, not a copy or one that was wrapped later
    """
