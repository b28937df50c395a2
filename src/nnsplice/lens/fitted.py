"""`FittedLens`: affine maps from the states of layers to states of the last layer, of one model; and its file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from nnsplice import engine
from nnsplice.activations.access import site_of
from nnsplice.atlas import Site
from nnsplice.digests import digest_of
from nnsplice.errors import BadArgument, FileError
from nnsplice.files import from_json, is_pickle, whole
from nnsplice.headers import read_header
from nnsplice.lens.runs import decoder_of
from nnsplice.paths import Path
from nnsplice.shown import counted, printable

if TYPE_CHECKING:
    import pandas as pd

LensKind = Literal["tuned", "jacobian"]
HEADER = "nnsplice"
KIND = "FittedLens"
FORMAT = 1
WRITTEN = "a file that FittedLens.to_file wrote"


@dataclass(frozen=True, eq=False, repr=False)
class FittedLens:
    """One affine map for each layer: `matrix @ state + bias` is decoded in place of the state.

    >>> lens = ns.lens.fit(model, ["w3 w4 w5", "w6 w7 w8", "w9 w3 w5"], kind="jacobian", progress=False)
    >>> lens
    FittedLens: jacobian, layers 0..2, width 16, 3 prompts
    >>> ns.lens.logit(model, "w3 w4 w5", lens=lens).grid().sizes
    Frozen({'prompt': 1, 'layer': 3, 'position': 3})

    Attributes:
        kind: `"tuned"` or `"jacobian"`.
        layers: the layers whose outputs are mapped.
        matrices: `[layer, width, width]`.
        biases: `[layer, width]`.
        about: the model it was fitted to (name, revision, digest of the weights), prompts, seed, and the held-out KL.
    """

    kind: LensKind
    layers: tuple[int, ...]
    matrices: Tensor
    biases: Tensor
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> dict[str, Any]:
        """The kind and the digest, as plain data."""
        return {"kind": self.kind, "digest": self.digest}

    @property
    def digest(self) -> str:
        """A digest of the kind, the layers and all numbers."""
        return digest_of({f"{self.kind} {self.layers}": self.matrices, "biases": self.biases})

    def held_out(self) -> pd.DataFrame:
        """The mean KL from the model's own distribution on held-out prompts: a row for each layer.

        The column `kl` is of this lens, `logit_lens` of the states without a map.

        Raises:
            BadArgument: a Jacobian lens, for which nothing is held out.
        """
        import pandas as pd

        if "kl" not in self.about:
            raise BadArgument(
                f"a {self.kind} lens is fitted to no distribution, so nothing was held out",
                write='ns.lens.fit(model, prompts, kind="tuned")',
            )
        return pd.DataFrame(
            {"layer": self.layers, "kl": self.about["kl"], "logit_lens": self.about["logit_lens"]}
        )  # fmt: skip

    def check(self, model: engine.Model, places: Sequence[Path]) -> None:
        """Raise for a model that the lens was not fitted to, or a site that it has no map for.

        Args:
            model: the model to read.
            places: the sites to read.

        Raises:
            BadArgument: the model has other weights, or a site is not the output of a fitted layer.
        """
        if engine.weights_digest(model) != self.about.get("weights"):
            raise BadArgument(
                f"this lens was fitted to {self.about.get('model')} with other weights than this model has",
                expected="the model that it was fitted to",
                write="ns.lens.fit(model, prompts)",
            )
        layers = self._layers_of(model)
        for place in places:
            if layers.get(site_of(place)) not in self.layers:
                raise BadArgument(
                    "this lens was not fitted at this site",
                    path=place,
                    expected=f"layers[{','.join(map(str, self.layers))}].output",
                )

    def translate(self, model: engine.Model, place: Path, states: Tensor) -> Tensor:
        """Apply the map of a layer to its states, so that they can be read as states of the last layer.

        Args:
            model: the model that the lens was fitted to.
            place: the output of a fitted layer.
            states: `[row, width]`.

        Returns:
            `[row, width]`.
        """
        at = self.layers.index(self._layers_of(model)[site_of(place)])
        return states @ self.matrices[at].to(states).T + self.biases[at].to(states)

    def _layers_of(self, model: engine.Model) -> dict[Site, int]:
        places = engine.expand(model, "layers[:].output")
        return {site_of(place): block.index for place, block in zip(places, decoder_of(model).blocks, strict=True)}

    # --- files

    def to_file(self, path: str | os.PathLike[str]) -> None:
        """Write the lens to a safetensors file, completely or not at all.

        Args:
            path: the file to write.
        """
        from safetensors.torch import save_file

        record = {
            "kind": KIND, "format": FORMAT, "version": version("nnsplice"), "digest": self.digest, "lens": self.kind,
            "layers": list(self.layers), "about": dict(self.about),
        }  # fmt: skip
        tensors = {"matrices": self.matrices.contiguous(), "biases": self.biases.contiguous()}
        with whole(path) as temporary:
            save_file(tensors, temporary, metadata={HEADER: json.dumps(record)})

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> FittedLens:
        """Read a lens.

        Args:
            path: the file.

        Returns:
            The lens.

        Raises:
            FileError: the file holds no fitted lens, is of a newer format, or is damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if is_pickle(path):
            raise FileError(f"{path} looks like a pickle, which can run any code; it is left closed", expected=WRITTEN)
        record = from_json(read_header(path).metadata.get(HEADER, "null"), f"the header of {path}")
        if not isinstance(record, dict) or record.get("kind") != KIND:
            raise FileError(f"{path} holds no fitted lens", expected=WRITTEN)
        if record["format"] > FORMAT:
            raise FileError(f"{path} has format {record['format']}; this nnsplice reads up to {FORMAT}")
        try:
            tensors = load_file(path)
            made = cls(record["lens"], tuple(record["layers"]), tensors["matrices"], tensors["biases"], record["about"])
            same = made.digest == record["digest"]
        except (SafetensorError, KeyError, TypeError) as error:
            raise FileError(f"{path} is damaged: {error}", expected=WRITTEN) from None
        if not same:
            raise FileError(f"{path} is damaged: what it holds is not what was written", expected=WRITTEN)
        return made

    def __repr__(self) -> str:
        first, last = min(self.layers), max(self.layers)
        layers = f"layers {first}..{last}" if len(self.layers) > 1 else f"layer {first}"
        text = f"FittedLens: {self.kind}, {layers}, width {self.matrices.shape[-1]}"
        text += f", {self.about.get('prompts', '?')} prompts"
        if "kl" in self.about:
            pairs = zip(self.about["kl"], self.about["logit_lens"], strict=True)
            worse = sum(kl > plain for kl, plain in pairs)
            mean = sum(self.about["kl"]) / len(self.layers)
            text += f", held-out KL {mean:.3g}" + (
                f", worse than the logit lens in {counted(worse, 'layer')}" if worse else ""
            )
        return printable(text)


def detached_copy(tensor: Tensor) -> Tensor:
    """A copy on the CPU, without gradients."""
    return torch.clone(tensor.detach()).cpu()
