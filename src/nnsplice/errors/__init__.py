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
    ├── StoreError (OSError)                an object store refuses or does not answer
    └── TeamError (RuntimeError)            another process of a distributed call failed

Each file has one subject: `addresses`, `arguments`, `values` (prompts, captures, tensors), `runs`, `files`.

A message says what was found, what was expected and what to write instead. Inner code raises the reason; the public
function adds the circumstances with `circumstances`.
"""

from nnsplice.errors.addresses import (
    MissingPosition,
    OutOfRange,
    PathError,
    RefusedPlace,
    UnknownParameter,
    UnknownPath,
    UnrecognisedModel,
)
from nnsplice.errors.arguments import BadArgument, BadType, MissingPackage
from nnsplice.errors.base import NnspliceError
from nnsplice.errors.base import circumstances as circumstances
from nnsplice.errors.files import FileError, MapperError, MissingCheckpoint, StoreError, WriteFailed
from nnsplice.errors.runs import LateUpdate, NeedsProbe, NeverFired, OutsideTrace, RefusedExecutor, TeamError
from nnsplice.errors.values import (
    DuplicatePath,
    KeyMismatch,
    OverlappingWrite,
    ParamMappingError,
    ShapeError,
    ShortRow,
    SpanError,
)
from nnsplice.errors.words import closest as closest
from nnsplice.errors.words import named as named

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
    "StoreError",
    "TeamError",
    "UnknownParameter",
    "UnknownPath",
    "UnrecognisedModel",
    "WriteFailed",
]

# Tracebacks and pickles name the public import path, whichever file of this room an error is defined in.
for _name in __all__:
    globals()[_name].__module__ = __name__


def __dir__() -> list[str]:  # what <TAB> shows
    return __all__
