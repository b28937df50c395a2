"""Addresses that are malformed, have no meaning in a model, or name what it does not have."""

from __future__ import annotations

from nnsplice.errors.base import NnspliceError


class PathError(NnspliceError, ValueError):
    """A text is no path, or a path has no meaning here.

    >>> ns.parse_path("model.transformer.h.3.output")
    Traceback (most recent call last):
    nnsplice.errors.PathError: layers go in brackets: h[3], not h.3
        model.transformer.h.3.output
                            ^
      write: model.transformer.h[3].output
    """


class MissingPosition(PathError):
    """A path needs token positions here.

    >>> ns.capture(model, "w3 w4", "layers[1].output")
    Traceback (most recent call last):
    nnsplice.errors.MissingPosition: which tokens?
        layers[1].output
      expected: token positions in the last bracket
      write: layers[1].output[-1] for the last token, layers[1].output[:] for all
      in: ns.capture
    """


class OutOfRange(PathError, IndexError):
    """An index past the last layer, head, group, neuron or expert.

    >>> ns.capture(model, "w3 w4", "layers[3].output[-1]")
    Traceback (most recent call last):
    nnsplice.errors.OutOfRange: layers[3] is past the last layer; this model has 3, so layers are layers[0] to layers[2]
        layers[3].output[-1]
        ^
      in: ns.capture
    """


class RefusedPlace(PathError):
    """A site cannot be read or written exactly in this model.

    >>> ns.capture(model, "w3 w4", "layers[1].attn.o.heads[2].output[-1]")
    Traceback (most recent call last):
    nnsplice.errors.RefusedPlace: heads live before the output projection; slicing the projected output mixes them
        layers[1].attn.o.heads[2].output[-1]
                      ^
      write: layers[1].heads[2].output[-1]
      in: ns.capture
    """


class UnknownPath(NnspliceError, KeyError):
    """The model has no such site, or the capture no such key.

    >>> ns.expand(model, "model.transformer.h[0].atn.output")
    Traceback (most recent call last):
    nnsplice.errors.UnknownPath: model.transformer.h[0] has no part atn
        model.transformer.h[0].atn.output
                               ^
      expected: attn, ln_1, ln_2, mlp
    >>> saved = ns.capture(model, "w3 w4", "layers[1].output[-1]")
    >>> saved["layers[2].output[-1]"]
    Traceback (most recent call last):
    nnsplice.errors.UnknownPath: not in this capture
        layers[2].output[-1]
      expected: one of its keys: layers[1].output[-1]
    """


class UnknownParameter(NnspliceError, AttributeError):
    """The model has no such parameter.

    >>> ns.weights.preview_weight_restriction(model, {"transformer.wte.wight": None})
    Traceback (most recent call last):
    nnsplice.errors.UnknownParameter: this model has no parameter transformer.wte.wight
      expected: transformer.wte.weight, transformer.wpe.weight, transformer.ln_f.weight, ... (41 in all)
    """


class UnrecognisedModel(NnspliceError, ValueError):
    """The layers, heads and MLPs of the model are not recognised; native paths still work.

    >>> ns.Atlas.of(torch.nn.Sequential(torch.nn.Linear(2, 2))).resolve("layers[0]")
    Traceback (most recent call last):
    nnsplice.errors.UnrecognisedModel: the parts of this model cannot be told apart
        layers[0]
      expected: a list of layers, each with attention ...
      write: a native path, starting with `model.`
    """
