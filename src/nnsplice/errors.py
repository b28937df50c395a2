"""Every exception of nnsplice.

Each one is also a builtin exception:

    NnspliceError
    ├── PathError (ValueError)              a text is no path, or a path has no meaning here
    │   ├── MissingPosition                 a path needs token positions here
    │   ├── OutOfRange (+ IndexError)       layer 12 of 12
    │   └── RefusedPlace                    a site cannot be read or written exactly in this model
    ├── UnknownPath (KeyError)              the model has no such site, or the capture no such key
    ├── UnknownParameter (AttributeError)   the model has no such parameter
    ├── UnrecognisedModel (ValueError)      the layers, heads and MLPs of the model are not recognised
    ├── ShortRow (IndexError)               a prompt has no token at this position
    ├── SpanError (ValueError)              a named span cannot be found in a prompt
    ├── ShapeError (ValueError)             a tensor has another shape than is needed
    ├── KeyMismatch (ValueError)            captures, circuits or results with different keys
    ├── DuplicatePath (ValueError)          the same site and position twice
    ├── OverlappingWrite (ValueError)       two writes change the same value
    ├── LateUpdate (RuntimeError)           the running trace is already past the site
    ├── NeverFired (RuntimeError)           the forward pass does not reach the site
    ├── OutsideTrace (RuntimeError)         works only inside a running trace, or only outside one
    ├── NeedsProbe (RuntimeError)           the model has to be run once, and needs an input for that
    ├── RefusedExecutor (NotImplementedError)   the executor given by name is not exact for this sweep
    ├── BadArgument (ValueError)            an argument has a value that is not allowed
    ├── BadType (TypeError)                 an argument has a type that is not allowed
    ├── MissingPackage (ImportError)        a package of one of the extras is not installed
    ├── ParamMappingError (ValueError)      parameters of an optimizer cannot be mapped to layers with certainty
    ├── FileError (ValueError)              a file is of another kind than expected, or damaged
    ├── MapperError (ValueError)            mappers that do not fit together, or do not fit a checkpoint
    ├── MissingCheckpoint (FileNotFoundError)   a folder has no weights, or lacks a file of them
    ├── WriteFailed (OSError)               a file could not be written
    └── TeamError (RuntimeError)            another process of a distributed call failed

A message says what was found, what was expected and what to write instead. Inner code raises the reason; the public
function adds the circumstances with `circumstances`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

from nnsplice.shown import printable, shown

__all__ = [
    "BadArgument",
    "BadType",
    "DuplicatePath",
    "FileError",
    "KeyMismatch",
    "LateUpdate",
    "MapperError",
    "MissingCheckpoint",
    "MissingPackage",
    "MissingPosition",
    "NeedsProbe",
    "NeverFired",
    "NnspliceError",
    "OutOfRange",
    "OutsideTrace",
    "OverlappingWrite",
    "ParamMappingError",
    "PathError",
    "RefusedExecutor",
    "RefusedPlace",
    "ShapeError",
    "ShortRow",
    "SpanError",
    "TeamError",
    "UnknownParameter",
    "UnknownPath",
    "UnrecognisedModel",
    "WriteFailed",
]


def __dir__() -> list[str]:  # what <TAB> shows
    return __all__


class NnspliceError(Exception):
    """The base class of all errors of nnsplice; `str()` is the whole message, also of those that are a KeyError.

    >>> try:
    ...     ns.capture(model, "w3 w4", "layers[7].output[-1]")
    ... except IndexError as error:   # or ns.errors.NnspliceError, which every one of them is
    ...     print(error)
    layers[7] is past the last layer; this model has 3, so layers are layers[0] to layers[2]
        layers[7].output[-1]
        ^
      in: ns.capture
    """

    def __init__(
        self,
        reason: str,
        *,
        path: object = None,
        column: int | None = None,
        expected: str | None = None,
        write: str | None = None,
    ) -> None:
        """Compose the message.

        Args:
            reason: what was found, in one sentence.
            path: the text or path it was found in, shown on a line of its own.
            column: where in `path`, shown as a caret below it.
            expected: what would have been right.
            write: the line to write instead.
        """
        lines = [reason]
        if path is not None:
            lines.append(f"    {path}")
            if column is not None:
                lines.append("    " + " " * column + "^")
        if expected is not None:
            lines.append(f"  expected: {expected}")
        if write is not None:
            lines.append(f"  write: {write}")
        super().__init__(printable("\n".join(lines)))  # it may quote a name out of a file

    def __str__(self) -> str:
        # KeyError would show the repr of its message, with every line break escaped.
        return str(self.args[0])

    def __reduce__(self) -> tuple[object, ...]:
        # The message is already composed; a copy in another process must not compose it again.
        return (_restore, (type(self), self.args[0]))


def _restore(kind: type[NnspliceError], message: str) -> NnspliceError:
    return kind(message)


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
      expected: attn
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
      expected: transformer.wte.weight, transformer.wpe.weight, transformer.ln_f.weight
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
    nnsplice.errors.KeyMismatch: two captures of different places
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
      expected: captures of different places or positions
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


class LateUpdate(NnspliceError, RuntimeError):
    """The running trace is already past the site.

    >>> saved = ns.capture(model, "w3 w4", "layers[0].output[-1]")
    >>> with model.trace("w5 w6"):
    ...     _ = model.transformer.h[2].output.save()
    ...     saved.apply(model)
    Traceback (most recent call last):
    nnsplice.errors.LateUpdate: ...
    """


class NeverFired(NnspliceError, RuntimeError):
    """The forward pass does not reach the site, or a steering rule met no token.

    >>> vector = ns.steering.SteeringVector.of(ns.capture(model, "w3 w4", "layers[1].output[-1]"))
    >>> with ns.steering.steer(model, vector, where=ns.steering.from_token(9)):
    ...     _ = ns.models.peel(model)(torch.tensor([[3, 4]]))
    Traceback (most recent call last):
    nnsplice.errors.NeverFired: no token of 1 pass was steered by this rule
        layers[1].output  add 1, where from_token(9)
      expected: a run that is so long, or from_token with a smaller number
      in: ns.steering.steer
    """


class OutsideTrace(NnspliceError, RuntimeError):
    """The call works only inside a running trace, or only outside one.

    >>> ns.save_activations(model, "layers[1].output[-1]")
    Traceback (most recent call last):
    nnsplice.errors.OutsideTrace: ns.save_activations works inside a trace of this model
      write: with model.trace(prompt): ...   (with several invokes: inside `with tracer.invoke(prompt):`)
    """


class NeedsProbe(NnspliceError, RuntimeError):
    """The model has to be run once to learn the order of its modules, and needs an input for that.

    >>> import nnsight
    >>> ns.expand(nnsight.NNsight(torch.nn.Sequential(torch.nn.Linear(2, 2))), "model[0].output")
    Traceback (most recent call last):
    nnsplice.errors.NeedsProbe: the order of Sequential is learned from one short run, and its inputs are not known
      expected: an input to run it with, once: of a call that has prompts, or as probe=
      write: ns.expand(model, paths, probe=example_input)
    """


class RefusedExecutor(NnspliceError, NotImplementedError):
    """The executor given by name does not reproduce the exact numbers of this sweep.

    >>> toy, metric = ns.load("toy"), ns.logit_diff("Mary", "John")
    >>> hook = ns.models.peel(toy).transformer.ln_f.register_forward_hook(lambda _m, _a, out: out + out.flip(1))
    >>> ns.sweep(toy, "Mary gave", "John gave", "layers[:].output[:]", metric, executor="packed", progress=False)
    Traceback (most recent call last):
    nnsplice.errors.RefusedExecutor: packed rows do not give this job's numbers: it is no causal decoder
      expected: executor="auto", which takes the fastest that does, and says in result.run.note why
    >>> hook.remove()
    """


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


class ParamMappingError(NnspliceError, ValueError):
    """The parameters of an optimizer cannot be mapped to layers with certainty.

    >>> optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters())
    >>> ns.adapters.map_optimizer_to_layers(optimizer, model)
    Traceback (most recent call last):
    nnsplice.errors.ParamMappingError: parameter 0 of the optimizer, of shape [2, 2], is none of this model
      expected: the model that the optimizer was made for, not a copy or one that was wrapped later
    """


class FileError(NnspliceError, ValueError):
    """A file is of another kind than expected, or damaged.

    >>> ns.SavedActivation.from_file(ns.models.embedded("toy") / "config.json")
    Traceback (most recent call last):
    nnsplice.errors.FileError: ... is cut off, damaged or no safetensors file: it has 814 bytes, its header ...
      expected: 8 bytes of length, then a header
    """


class StoreError(NnspliceError, OSError):
    """An object store does not answer, or refuses: a wrong bucket, credentials, or the network."""


class MapperError(NnspliceError, ValueError):
    """The mappers of a checkpoint do not fit together, or do not fit its tensors.

    >>> from nnsplice.checkpoints import Parallel, Rename
    >>> Parallel([Rename("wte", "embed"), Rename("wte", "unembed")])
    Traceback (most recent call last):
    nnsplice.errors.MapperError: colliding input key wte
        ModelStateMapperRename(...) and ModelStateMapperRename(...)
      expected: mappers that share no key
      write: Sequential([Copy("wte", ["wte", "wte.2"]), ...])
    """


class MissingCheckpoint(NnspliceError, FileNotFoundError):
    """A folder has no weights, or lacks a file of them.

    >>> ns.checkpoints.Checkpoint.open("no-such-folder")
    Traceback (most recent call last):
    nnsplice.errors.MissingCheckpoint: no-such-folder is not there
      expected: a folder with model.safetensors or model.safetensors.index.json
    """


class WriteFailed(NnspliceError, OSError):
    """A file could not be written."""


class TeamError(NnspliceError, RuntimeError):
    """Another process of a distributed call failed."""


def named(value: object) -> str:
    """What a value is, with its article: `"an int"`, `"a Tensor"`."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOaeio' else 'a'} {name}"


@contextmanager
def circumstances(text: str) -> Iterator[None]:
    """Add where it happened to an error raised inside, and hide the inner frames' chain from the reader."""
    try:
        yield
    except NnspliceError as error:
        error.args = (f"{error.args[0]}\n  in: {printable(text)}",)
        raise error from None


def closest(name: str, names: Iterable[str], n: int = 3) -> str:
    """The names most like `name`, as text for a message; all of them when there are few and none is close."""
    names = list(dict.fromkeys(names))
    near = get_close_matches(name, names, n=n, cutoff=0.5)
    chosen = near or names[: 2 * n]
    more = "" if near or len(names) <= 2 * n else f", ... ({len(names)} in all)"
    return ", ".join(map(shown, chosen)) + more if chosen else "nothing"
