"""`over_revisions`: one job over training checkpoints, one model in memory at a time."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path as Folder
from typing import TYPE_CHECKING, Any

from nnsplice.digests import function_digest
from nnsplice.errors import BadArgument, BadType, KeyMismatch, circumstances, named
from nnsplice.files import from_json, local_path, text_of
from nnsplice.progress import bar
from nnsplice.results import SweepResult
from nnsplice.work import write_json

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

#: The file of a journal that identifies its job.
ABOUT = "revisions.json"


@dataclass(frozen=True, eq=False, repr=False)
class Revisions:
    """A result for each revision, in the order of the training.

    >>> result = ns.ablate(model, "w3 w4 w5", "layers[:].mlp", ns.logit_diff("w7", "w8"), progress=False)
    >>> ns.Revisions({"step1": result, "step2": result}).grid().revision.values.tolist()
    ['step1', 'step2']

    Attributes:
        results: the result of the job for each revision.
    """

    results: dict[str, SweepResult]

    def grid(self, component: str | None = None) -> xr.DataArray:
        """The raw metric, with an axis `revision` before those of the results.

        Args:
            component: the kind of site, if there are several.

        Raises:
            BadArgument: several kinds of site, and none is named.
            UnknownPath: a kind that was not swept.
        """
        return self._along(lambda result: result.grid(component))

    def effect(self, component: str | None = None) -> xr.DataArray:
        """The normalized effect in each revision; see `SweepResult.effect`.

        Args:
            component: the kind of site, if there are several.

        Raises:
            BadArgument: several kinds of site, and none is named.
            UnknownPath: a kind that was not swept.
        """
        return self._along(lambda result: result.effect(component))

    def frame(self) -> pd.DataFrame:
        """A row for each cell of each revision."""
        import pandas as pd

        return pd.concat(
            [result.frame().assign(revision=name) for name, result in self.results.items()], ignore_index=True
        )

    def _along(self, of: Callable[[SweepResult], xr.DataArray]) -> xr.DataArray:
        import xarray as xr

        arrays = [of(result) for result in self.results.values()]
        return xr.concat(arrays, "revision", join="outer").assign_coords(revision=list(self.results))

    def __repr__(self) -> str:
        return f"Revisions: {', '.join(self.results)}\n{next(iter(self.results.values()))!r}"


def over_revisions(
    load: Callable[[str], Any],
    revisions: Sequence[str],
    job: Callable[[Any], SweepResult],
    *,
    journal: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Revisions:
    """Load each revision, do one job with it, and drop it: a result with an axis `revision`.

    >>> models = {"step1": model, "step2": model}
    >>> metric = ns.logit_diff("w7", "w8")
    >>> job = lambda one: ns.ablate(one, "w3 w4 w5", "layers[:].mlp", metric, progress=False)
    >>> ns.over_revisions(models.get, ["step1", "step2"], job, progress=False).grid().sizes
    Frozen({'revision': 2, 'prompt': 1, 'layer': 3})

    Args:
        load: a revision's name -> the model: `lambda name: ns.load("EleutherAI/pythia-70m", revision=name)`.
        revisions: their names, in order.
        job: the model -> a result, the same question of every revision.
        journal: a folder that every finished result is written to; the same call after a stop goes on from there.
        progress: show a bar.

    Returns:
        The result of every revision, in their order.

    Raises:
        BadArgument: no revision, one twice, or a journal folder that holds other files.
        BadType: the job returned something other than a `SweepResult`.
        FileError: the journal is damaged.
        KeyMismatch: the journal is of another job, or the results have different cells or metrics.
    """
    names = [str(name) for name in revisions]
    with circumstances("ns.over_revisions"):
        if not names or len(set(names)) < len(names):
            raise BadArgument(f"revisions={names}", expected="different names, at least one")
        folder = None if journal is None else _journal(local_path(journal), job)
    results: dict[str, SweepResult] = {}
    with bar("revisions", len(names), "revision", progress) as shown:
        for name in names:
            kept = None if folder is None else folder / f"{_file_name(name)}.safetensors"
            if kept is not None and kept.is_file():
                results[name] = SweepResult.from_file(kept)
            else:
                results[name] = _result_of(load, name, job)
                if kept is not None:
                    results[name].to_file(kept)
            with circumstances("ns.over_revisions"):
                _check_same(names[0], results[names[0]], name, results[name])
            shown.update(1)
    return Revisions(results)


def _result_of(load: Callable[[str], Any], name: str, job: Callable[[Any], SweepResult]) -> SweepResult:
    """The result of one revision; the model is freed."""
    model = load(name)
    result = job(model)
    del model
    gc.collect()
    if not isinstance(result, SweepResult):
        raise BadType(f"the job returned {named(result)}", expected="a SweepResult, such as ns.sweep returns")
    return result


def _check_same(first: str, one: SweepResult, name: str, other: SweepResult) -> None:
    if [cell.path for cell in one.cells] != [cell.path for cell in other.cells] or one.metrics != other.metrics:
        raise KeyMismatch(
            f"the results of {first} and {name} have different cells or metrics", expected="one job for all revisions"
        )


def _file_name(name: str) -> str:
    """A file name for a revision, different for different revisions."""
    return "".join(c if c.isalnum() or c in "-_." else f"%{ord(c):x}" for c in name)


def _journal(folder: Folder, job: Callable[[Any], SweepResult]) -> Folder:
    folder.mkdir(parents=True, exist_ok=True)
    contents, about = {"kind": "revisions", "job": function_digest(job)}, folder / ABOUT
    if about.is_file():
        if from_json(text_of(about), about) != contents:
            raise KeyMismatch(f"the journal {folder} is of another job", expected="the same job, or another folder")
    elif any(folder.iterdir()):
        raise BadArgument(f"{folder} is no journal and not empty", expected="a folder of its own")
    else:
        write_json(about, contents)
    return folder
