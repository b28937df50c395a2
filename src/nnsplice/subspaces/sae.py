"""`SAE`: a sparse autoencoder as a value, with the arithmetic of each kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from nnsplice.digests import digest_of
from nnsplice.errors import BadArgument, BadType, ShapeError, named
from nnsplice.paths import Path
from nnsplice.subspaces.subspace import Subspace

#: The tensors of each kind beside the decoder's, with what each is as long as: `f` features, `w` the site's width.
KINDS: Mapping[str, Mapping[str, str]] = {
    "standard": {"W_enc": "wf", "b_enc": "f"},
    "topk": {"W_enc": "wf", "b_enc": "f"},
    "batchtopk": {"W_enc": "wf", "b_enc": "f", "threshold": "f"},
    "jumprelu": {"W_enc": "wf", "b_enc": "f", "threshold": "f"},
    "gated": {"W_enc": "wf", "b_gate": "f", "b_mag": "f", "r_mag": "f"},
}
DECODER = {"W_dec": "fw", "b_dec": "w"}
#: How inputs are scaled before they are encoded: none, or by numbers of each token's own.
NORMS = ("none", "layer_norm", "constant_norm_rescale")


@dataclass(frozen=True, eq=False)
class SAE:
    """A sparse autoencoder: features of a site, and the direction of each.

    >>> sae = ns.load_sae(ns.models.embedded("toy") / "sae")
    >>> sae
    SAE: topk, 256 features of a site 64 wide
    >>> saved = ns.capture(ns.load("toy"), "The hotel was lovely", "layers[2].output[-1]")
    >>> features = sae.encode(saved["layers[2].output[-1]"])
    >>> features.shape, int((features > 0).sum())
    (torch.Size([1, 256]), 8)

    Attributes:
        kind: `"standard"`, `"topk"`, `"batchtopk"`, `"jumprelu"` or `"gated"`.
        tensors: by their names in files: `W_enc` `[width, feature]`, `W_dec` `[feature, width]`, biases, thresholds.
        k: the number of active features of `"topk"`.
        centred: whether `b_dec` is taken from what is encoded.
        norm: the scaling of the inputs.
        by_decoder_norm: whether features are chosen by what they add, their value times the norm of their direction.
        about: its origin, as plain data.
        transcoder: whether it reads another site than it writes; then `W_enc` is `[width read, feature]`, and there
            may be `W_skip` `[width, width read]`, by which inputs are added to the reconstruction.
    """

    kind: str
    tensors: Mapping[str, Tensor] = field(repr=False)
    k: int | None = None
    centred: bool = False
    norm: str = "none"
    by_decoder_norm: bool = False
    about: Mapping[str, Any] = field(default_factory=dict, repr=False)
    transcoder: bool = False
    #: The versions of the tensors, and their digest then.
    _known: tuple[tuple[int, ...], str] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise BadArgument(f"an SAE of the kind {self.kind!r}", expected=f"one of {', '.join(KINDS)}")
        if self.norm not in NORMS:
            raise BadArgument(f"inputs scaled by {self.norm!r}", expected=f"one of {', '.join(NORMS)}")
        held = {name: tensor.detach() for name, tensor in self.tensors.items()}
        wanted = {**KINDS[self.kind], **DECODER}
        if self.transcoder:
            if self.centred or self.norm != "none":
                raise BadArgument("a transcoder takes no bias from what it reads, and does not scale it")
            wanted |= {"W_enc": "rf", **({"W_skip": "wr"} if "W_skip" in held else {})}
        _check(held, wanted)
        if self.kind == "topk" and not (type(self.k) is int and 1 <= self.k <= held["W_dec"].shape[0]):
            raise BadArgument(f"a topk SAE with k={self.k!r}", expected=f"1 to {held['W_dec'].shape[0]}")
        if self.by_decoder_norm and self.kind not in ("topk", "batchtopk"):
            raise BadArgument(f"a {self.kind} SAE chooses no features by their decoder's norm")
        object.__setattr__(self, "tensors", MappingProxyType({name: held[name] for name in wanted}))
        object.__setattr__(self, "about", MappingProxyType(dict(self.about)))

    # --------------------------------------------------------------------------------------------------- properties

    @property
    def features(self) -> int:
        """The number of features."""
        return self.tensors["W_dec"].shape[0]

    @property
    def width(self) -> int:
        """The width of its site."""
        return self.tensors["W_dec"].shape[1]

    @property
    def reads(self) -> int:
        """The width of the site that it reads: its own site, except for a transcoder."""
        return self.tensors["W_enc"].shape[0]

    @property
    def identity(self) -> Mapping[str, Any]:
        """The identity of an SAE, as plain data."""
        how = {"kind": self.kind, "k": self.k, "centred": self.centred, "norm": self.norm}
        more = {"transcoder": True} if self.transcoder else {}
        return {**how, "by_decoder_norm": self.by_decoder_norm, "tensors": self._digest, **more}

    @property
    def _digest(self) -> str:
        # The tensors are not copied: further training of them changes this SAE.
        versions = tuple(0 if one.is_inference() else one._version for one in self.tensors.values())
        if self._known is None or self._known[0] != versions:
            object.__setattr__(self, "_known", (versions, digest_of(dict(self.tensors))))
        assert self._known is not None
        return self._known[1]

    # ---------------------------------------------------------------------------------------------------- arithmetic

    def encode(self, values: Tensor) -> Tensor:
        """The features of values, computed in float32 at least.

        Args:
            values: `[..., width]`, of what a transcoder reads.

        Returns:
            `[..., feature]`.

        Raises:
            BadType: something other than a tensor.
            ShapeError: values of another width.
        """
        self._check_width(values)
        t = self._tensors(values)
        inputs = values.to(t["W_dec"])
        mean, scale = self._scaling(inputs)
        inputs = (inputs - mean) / scale[0]
        if self.centred:
            inputs = inputs - t["b_dec"]
        return _ENCODERS[self.kind](self, inputs, t)

    def decode(self, features: Tensor, like: Tensor | None = None) -> Tensor:
        """The reconstruction from features.

        Args:
            features: `[..., feature]`.
            like: the values that were encoded, which an SAE that scales its inputs needs to scale back.

        Returns:
            `[..., width]`.

        Raises:
            BadArgument: the SAE scales its inputs, or a transcoder skips by them, and `like` is left out.
        """
        t = self._tensors(features)
        out = self.added(features.to(t["W_dec"]), None) + t["b_dec"]
        if self.norm == "none" and "W_skip" not in t:
            return out
        if like is None:
            raise BadArgument(
                "this transcoder adds its inputs to what it decodes"
                if "W_skip" in t
                else f"this SAE scales its inputs ({self.norm}), and what it decodes has to be scaled back",
                expected="the values that were encoded",
                write="sae.decode(features, like=values)",
            )
        if "W_skip" in t:
            return out + like.to(out) @ t["W_skip"].T
        mean, scale = self._scaling(like.to(out))
        return out * scale[1] + mean

    def added(self, features: Tensor, like: Tensor | None, chosen: Sequence[int] | None = None) -> Tensor:
        """The sum of the features' directions, without `b_dec`; 0 where all features are 0.

        Args:
            features: `[..., feature]`, of all features or of those chosen.
            like: the values that were encoded; None leaves them scaled as the SAE scales its inputs.
            chosen: the numbers of the features that are given, where not all are.

        Returns:
            `[..., width]`.
        """
        directions = self._directions(features, chosen)
        return self._scaled_back(features.to(directions) @ directions, like)

    def added_each(self, values: Tensor, like: Tensor | None, numbers: Sequence[int]) -> Tensor:
        """The output of one feature of each row: `added`, where every row is about a feature of its own.

        Args:
            values: `[row, 1]`.
            like: the values that were encoded, `[row, width]`; None leaves them scaled as the SAE scales its inputs.
            numbers: the number of each row's feature.

        Returns:
            `[row, width]`.
        """
        directions = self._directions(values, numbers)
        return self._scaled_back(values.to(directions) * directions, like)

    def _directions(self, like: Tensor, chosen: Sequence[int] | None) -> Tensor:
        """The direction of each feature, for its value as it is encoded: `[feature, width]`."""
        t = self._tensors(like)
        directions = t["W_dec"] if chosen is None else t["W_dec"][list(chosen)]
        # A direction of zeros adds nothing, whatever its feature is.
        return torch.nn.functional.normalize(directions, dim=-1) if self.by_decoder_norm else directions

    def _scaled_back(self, out: Tensor, like: Tensor | None) -> Tensor:
        return out if like is None or self.norm == "none" else out * self._scaling(like.to(out))[1][1]

    def error(self, values: Tensor) -> Tensor:
        """The reconstruction error: values minus their reconstruction.

        Args:
            values: `[..., width]`.

        Returns:
            `[..., width]`.

        Raises:
            BadArgument: a transcoder, whose values are of another site than what is decoded.
            ShapeError: values of another width.
        """
        if self.transcoder:
            raise BadArgument(
                "a transcoder decodes another site than it reads, so its error takes both",
                write="written - sae.decode(sae.encode(read), read)",
            )
        wide = values.to(self._tensors(values)["W_dec"])
        return wide - self.decode(self.encode(values), values)

    def subspace(self, place: str | Path, features: Sequence[int]) -> Subspace:
        """The subspace that the decoder directions of some features span.

        >>> ns.load_sae(ns.models.embedded("toy") / "sae").subspace("layers[2].output", [3, 8])
        Subspace: 2 of 64 dimensions at layers[2].output, SAE features

        Args:
            place: the address that the SAE is of.
            features: the numbers of the features.

        Returns:
            The subspace, with as many dimensions as features.

        Raises:
            BadArgument: no such feature, none at all, or directions that depend on each other.
            PathError: an address of several sites.
            ShapeError: more features than the site is wide.
        """
        numbers = list(features)
        wrong = next((n for n in numbers if not isinstance(n, int) or not -self.features <= n < self.features), None)
        if wrong is not None:
            raise BadArgument(f"there is no feature {wrong!r}", expected=f"numbers from 0 to {self.features - 1}")
        made = Subspace.of(place, self.tensors["W_dec"][numbers])
        return Subspace(made.place, made.basis, {"method": "SAE features", "features": numbers, **self.about})

    def _tensors(self, like: Tensor) -> Mapping[str, Tensor]:
        dtype = torch.promote_types(like.dtype, torch.float32)
        return {name: tensor.to(like.device, dtype) for name, tensor in self.tensors.items()}

    def _scaling(self, values: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The shift of the inputs; the factor that inputs are divided by and outputs multiplied by."""
        one = values.new_ones(())
        if self.norm == "layer_norm":
            mean = values.mean(-1, keepdim=True)
            spread = (values - mean).std(-1, keepdim=True)
            return mean, (spread + 1e-5, spread)
        if self.norm == "constant_norm_rescale":
            size = values.norm(dim=-1, keepdim=True) / self.width**0.5
            return values.new_zeros(()), (size, size)
        return values.new_zeros(()), (one, one)

    def _check_width(self, values: Tensor) -> None:
        if not isinstance(values, Tensor):
            raise BadType(f"{named(values)} is no tensor", expected=f"[..., {self.width}]")
        if values.shape[-1] != self.reads:
            kind = "transcoder reads" if self.transcoder else "SAE is of"
            raise ShapeError(f"values {values.shape[-1]} wide, and the {kind} a site {self.reads} wide")

    def __repr__(self) -> str:
        kind = f"{self.kind} transcoder" if self.transcoder else self.kind
        return f"SAE: {kind}, {self.features} features of a site {self.width} wide"


def _check(held: Mapping[str, Tensor], wanted: Mapping[str, str]) -> None:
    missing = [name for name in wanted if name not in held]
    if missing:
        raise BadArgument(f"an SAE without {', '.join(missing)}", expected=", ".join(wanted))
    if held["W_dec"].dim() != 2:
        raise ShapeError(f"W_dec of shape {list(held['W_dec'].shape)}", expected="[feature, width]")
    if held["W_enc"].dim() != 2:
        raise ShapeError(f"W_enc of shape {list(held['W_enc'].shape)}", expected="[width, feature]")
    length = {**dict(zip("fw", held["W_dec"].shape, strict=True)), "r": held["W_enc"].shape[0]}
    for name, axes in wanted.items():
        shape = [length[axis] for axis in axes]
        if list(held[name].shape) != shape:
            raise ShapeError(f"{name} of shape {list(held[name].shape)}", expected=f"{shape}")
        if not held[name].is_floating_point():
            raise BadArgument(f"{name} is {held[name].dtype}", expected="floating point numbers")
        if not bool(torch.isfinite(held[name]).all()):
            raise BadArgument(f"{name} holds NaN or infinity", expected="finite numbers")


# --- each kind --------------------------------------------------------------------------------------------------------


def _before(inputs: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    return inputs @ t["W_enc"] + t["b_enc"]


def _standard(_sae: SAE, inputs: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    return _before(inputs, t).relu()


def _topk(sae: SAE, inputs: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    before = _before(inputs, t)
    if sae.by_decoder_norm:
        before = before * t["W_dec"].norm(dim=-1)
    assert sae.k is not None
    kept = before.topk(sae.k, dim=-1)
    return torch.zeros_like(before).scatter(-1, kept.indices, kept.values.relu())


def _jumprelu(sae: SAE, inputs: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    before = _before(inputs, t)
    if sae.by_decoder_norm:
        before = before * t["W_dec"].norm(dim=-1)
    return before.relu() * (before > t["threshold"])


def _gated(_sae: SAE, inputs: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    projected = inputs @ t["W_enc"]
    size = (projected * t["r_mag"].exp() + t["b_mag"]).relu()
    return size * (projected + t["b_gate"] > 0)


_ENCODERS: Mapping[str, Callable[[SAE, Tensor, Mapping[str, Tensor]], Tensor]] = {
    "standard": _standard,
    "topk": _topk,
    "batchtopk": _jumprelu,  # trained with the top k of a batch; used with the threshold that came out of it
    "jumprelu": _jumprelu,
    "gated": _gated,
}
