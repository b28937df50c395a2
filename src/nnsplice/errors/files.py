"""Files and checkpoints."""

from __future__ import annotations

from nnsplice.errors.base import NnspliceError


class FileError(NnspliceError, ValueError):
    """A file is of another kind than expected, or damaged.

    >>> ns.SavedActivation.from_file(ns.models.embedded("toy") / "config.json")
    Traceback (most recent call last):
    nnsplice.errors.FileError: ... is cut off, damaged or no safetensors file: it has 814 bytes, its header ...
      expected: 8 bytes of length, then a header
    """


class StoreError(NnspliceError, OSError):
    """An object store refuses or does not answer: a wrong bucket, wrong credentials, or the network.

    >>> issubclass(ns.errors.StoreError, OSError)
    True
    """


class MapperError(NnspliceError, ValueError):
    """The mappers of a checkpoint do not fit together, or do not fit its tensors.

    >>> from nnsplice.checkpoints import Parallel, Rename
    >>> Parallel([Rename("wte", "embed"), Rename("wte", "unembed")])
    Traceback (most recent call last):
    nnsplice.errors.MapperError: colliding input key wte
        Rename(...) and Rename(...)
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
