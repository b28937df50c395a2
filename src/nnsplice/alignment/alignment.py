"""`Alignment`: the held-out accuracy of every site, its controls, and the trained subspaces."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import TYPE_CHECKING

from nnsplice import plots
from nnsplice.errors import BadArgument, FileError, UnknownPath, closest
from nnsplice.files import from_json, local_path, text_of, whole
from nnsplice.paths import Path, parse_path
from nnsplice.results import SweepResult
from nnsplice.shown import printable
from nnsplice.subspaces import Subspace

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

#: What is measured on the held-out pairs, each by interchange: of the trained subspace; of a random one of as many
#: dimensions; of one that was trained in the same way on the model with random weights; of the whole site.
IIA, RANDOM, UNTRAINED, WHOLE = MEASURED = ("iia", "random_subspace", "random_model", "whole_place")
CONTENTS = "alignment.json"


@dataclass(frozen=True, eq=False, repr=False)
class Alignment:
    """The result of `ns.align`.

    >>> base, source = ["w3 w4", "w5 w4", "w6 w4", "w7 w4"], ["w5 w4", "w6 w4", "w7 w4", "w3 w4"]
    >>> found = ns.align(model, base, source, ["w5", "w6", "w7", "w3"], "layers[:].output[0]", k=2, epochs=1,
    ...                  progress=False)
    >>> found.frame().columns.tolist()
    ['path', 'layer', 'position', 'k', 'iia', 'random_subspace', 'random_model', 'whole_place']
    >>> isinstance(found, ns.Alignment), list(found.subspaces)
    (True, ['layers[0].output[0]', 'layers[1].output[0]'])

    Attributes:
        result: 1 or 0 for every held-out pair and site: whether the counterfactual answer came first; its metrics are
            `"iia"`, `"random_subspace"`, `"random_model"` and `"whole_place"`.
        subspaces: the trained subspaces by the site's address; none for a site where both runs of every pair are equal.
    """

    result: SweepResult
    subspaces: Mapping[str, Subspace]

    def grid(self, metric: str = IIA, component: str | Path | None = None) -> xr.DataArray:
        """The accuracy on held-out pairs, with an axis for layers, and for positions or the names of spans.

        Args:
            metric: `"iia"` of the subspaces that were found; `"random_subspace"` of random ones with as many
                dimensions; `"random_model"` of the same training on random weights; `"whole_place"` of all dimensions.
            component: the kind of site, if there are several.

        Returns:
            An `xarray.DataArray`, the mean over held-out pairs.

        Raises:
            BadArgument: no such metric, or several kinds of site and none is named.
            UnknownPath: a kind that was not trained.
        """
        if metric not in MEASURED:
            raise BadArgument(f"no metric {metric!r} was measured", expected=f"one of {', '.join(MEASURED)}")
        return self.result.only(metric).grid(component).mean("prompt").rename(metric)

    def subspace(self, path: str | Path) -> Subspace:
        """The subspace that was found at a site.

        Args:
            path: the site; its position may be left out where it was trained at one position only.

        Raises:
            UnknownPath: no subspace was trained there; the message names the closest sites.
        """
        address = parse_path(path)
        wanted = str(address.at(address.position))
        if wanted in self.subspaces:
            return self.subspaces[wanted]
        if address.position is None:
            found = [s for key, s in self.subspaces.items() if str(parse_path(key).place) == str(address.at(-1).place)]
            if len(found) == 1:
                return found[0]
        raise UnknownPath(
            "no subspace was trained there",
            path=path,
            expected=f"one of {closest(wanted, self.subspaces)}" if self.subspaces else None,
        )

    def frame(self) -> pd.DataFrame:
        """A row for each site: its dimensions, and the accuracies on held-out pairs."""
        import numpy as np
        import pandas as pd

        table = self.result.table
        rows = []
        for number, cell in enumerate(table.cells):
            found = self.subspaces.get(cell.path)
            # A pair that is too short for a site counts for nothing there.
            means = {name: float(np.nanmean(table.values[:, number, n])) for n, name in enumerate(table.metrics)}
            rows.append({"path": cell.path, "layer": cell.layer, "position": cell.position,
                         "k": found.k if found else 0, **means})  # fmt: skip
        return pd.DataFrame(rows)

    def best(self, n: int = 10) -> pd.DataFrame:
        """The sites where the trained subspace is furthest above both a random subspace and random weights.

        Args:
            n: the number of sites.

        Returns:
            A `pandas.DataFrame` like `frame()`, the largest difference first, in the column `above`.
        """
        frame = self.frame()
        frame["above"] = frame[IIA] - frame[[RANDOM, UNTRAINED]].max(axis=1)
        return frame.sort_values("above", ascending=False, kind="stable").head(n).reset_index(drop=True)

    def plot(
        self, metric: str = IIA, component: str | Path | None = None, *, ax: plots.Axes | None = None
    ) -> plots.Axes:
        """Draw the grid as a heatmap.

        Args:
            metric: as for `grid`.
            component: the kind of site, if there are several.
            ax: axes to draw on; a new figure if left out.

        Raises:
            BadArgument: no such metric, several kinds of site and none is named, or prompts of different lengths.
            UnknownPath: a kind that was not trained.
        """
        return self.result.only(metric).plot(component, of="value", ax=ax)

    def to_folder(self, folder: str | os.PathLike[str]) -> None:
        """Write the result and every subspace as files of their own.

        Args:
            folder: the folder, which is made if it does not exist.
        """
        path = local_path(folder)
        path.mkdir(exist_ok=True)
        self.result.to_file(path / "result.safetensors")
        names = {key: f"subspace-{number}.safetensors" for number, key in enumerate(self.subspaces)}
        for key, name in names.items():
            self.subspaces[key].to_file(path / name)
        with whole(path / CONTENTS) as temporary:
            temporary.write_text(json.dumps({"kind": "Alignment", "subspaces": names}), encoding="utf-8")

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Alignment:
        """Read an alignment.

        Args:
            folder: a folder that `to_folder` wrote.

        Raises:
            FileError: the folder holds no alignment, or is damaged.
        """
        path = local_path(folder)
        if not (path / CONTENTS).is_file():
            raise FileError(f"{path} holds no alignment", expected="a folder that Alignment.to_folder wrote")
        contents = from_json(text_of(path / CONTENTS), path / CONTENTS)
        names = contents.get("subspaces") if isinstance(contents, dict) else None
        if not isinstance(names, dict) or not all(
            isinstance(n, str) and FilePath(n).name == n and (path / n).is_file() for n in names.values()
        ):
            raise FileError(f"{path} is damaged", expected="a folder that Alignment.to_folder wrote")
        found = {key: Subspace.from_file(path / name) for key, name in names.items()}
        return cls(SweepResult.from_file(path / "result.safetensors"), found)

    def __repr__(self) -> str:
        setting = self.result.asked["alignment"]
        pairs = len(setting["held_out"])
        sites = f"{len(self.subspaces)} sites, {pairs} held-out pairs"
        lines = [f"Alignment: {setting['method']}, k={setting['k']}, {sites}"]
        for row in self.best(3).to_dict("records"):
            lines.append(
                f"  {row['path']}  accuracy {row[IIA]:.2f}; random subspace {row[RANDOM]:.2f}, "
                f"random model {row[UNTRAINED]:.2f}, whole site {row[WHOLE]:.2f}"
            )
        return printable("\n".join(lines))
