"""Attaching an SAE to a site of a model, so that its features have addresses."""

from __future__ import annotations

from typing import Any

from nnsplice import engine
from nnsplice.activations import capture
from nnsplice.activations.access import site_of
from nnsplice.atlas import AttachedSae, attach, attached, detach, unwrap
from nnsplice.errors import BadArgument, BadType, PathError, RefusedPlace, ShapeError, UnknownPath, circumstances, named
from nnsplice.paths import Path, Span, parse_path
from nnsplice.subspaces.sae import SAE


def attach_sae(model: Any, place: str | Path, sae: SAE, name: str, *, reads: str | Path | None = None) -> str:
    """Give features of a site addresses: `layers[2].output.sae["name"].features[7]`, and `.error` for the rest.

    They are sites of captures, sweeps and gradients, and features of steering. Writing a feature adds what changes,
    `h + dec(f') - dec(f)`; the rest of the site stays. The model runs as before: nothing is put into it.

    >>> toy = ns.load("toy")
    >>> address = ns.attach_sae(toy, "layers[2].output", ns.load_sae(ns.models.embedded("toy") / "sae"), "third")
    >>> address
    'layers[2].output.sae["third"]'
    >>> saved = ns.capture(toy, "The hotel was lovely", [f"{address}.features[0:3][-1]", f"{address}.error[-1]"])
    >>> saved[f"{address}.error[-1]"].shape
    torch.Size([1, 64])
    >>> ns.detach_sae(toy, "third")

    A transcoder reads what enters an MLP and is written to what that adds: `place` is where its features are written,
    and `reads` what they are read from. They are sites of captures, writes and sweeps, each cell a run of its own; its
    error, gradients, paths, circuits and steering are refused.

    Args:
        model: a model from `ns.load`.
        place: one site of the model, a whole value: the stream, or what a branch adds.
        sae: an SAE of this site, from `ns.load_sae`.
        name: its name in addresses; each name once in a model.
        reads: the site that a transcoder reads: portable, or native such as
            `"model.model.layers[5].mlp.input"`.

    Returns:
        The address that features are parts of.

    Raises:
        BadArgument: a name that is taken or empty, a path of several sites (as a cross-layer transcoder has), a
            transcoder without `reads`, `reads` with an SAE that is none, or a site there that runs after `place`.
        BadType: something other than an SAE.
        PathError: a native path, or a text that is no path.
        RefusedPlace: a head, neurons, or another part of a value.
        ShapeError: the site has another width.
        UnknownPath: a site that this model does not have.
    """
    model = engine.as_model(model)
    with circumstances("ns.attach_sae"):
        if not isinstance(sae, SAE):
            raise BadType(f"{named(sae)} is no SAE", expected="an SAE", write="ns.load_sae(folder)")
        if not isinstance(name, str) or not name:
            raise BadArgument(f"name={name!r}", expected="a text")
        if parse_path(place).native:
            raise PathError("features have addresses at portable sites", path=place, write='"layers[2].output"')
        found = engine.expand(model, parse_path(place).place)
        if len(found) != 1:
            raise BadArgument(
                f"{len(found)} sites",
                path=place,
                expected="one site; an SAE of several layers (a cross-layer transcoder) is not known here",
            )
        site = site_of(found[0])
        if site.kind != "plain" or site.columns is not None or found[0].sae is not None:
            raise RefusedPlace(
                "an SAE is attached to a value that stands whole in one tensor",
                path=place,
                expected="the stream before or after a layer, or what attention or the MLP adds",
            )
        if name in attached(unwrap(model)):
            raise BadArgument(
                f"an SAE {name!r} is attached already", expected="another name", write=f"ns.detach_sae(model, {name!r})"
            )
        width = _width(model, found[0])
        if width != sae.width:
            raise ShapeError(f"the SAE is of a site {sae.width} wide, and this one is {width} wide", path=place)
        source = _read_by(model, sae, found[0], reads)
    attach(unwrap(model), name, AttachedSae(found[0], sae, source))
    return f"{found[0].place}.sae[{Span(name)}]"


def _width(model: engine.Model, place: Path) -> int:
    return capture(model, [[0]], place.at(0)).get(place.at(0)).shape[-1]


def _read_by(model: engine.Model, sae: SAE, place: Path, reads: str | Path | None) -> Path | None:
    """The site that a transcoder reads; None for an SAE."""
    if reads is None:
        if sae.transcoder:
            raise BadArgument(
                "a transcoder reads another site than it is written to",
                path=place,
                expected="reads=, what enters the MLP",
                write=f'ns.attach_sae(model, {str(place)!r}, sae, name, reads="layers[i].mid")',
            )
        return None
    if sae.centred or sae.norm != "none":
        raise BadArgument(
            "an SAE that takes its bias from its inputs, or scales them, reads the site that it is of",
            path=place,
            expected="a transcoder, or no reads=",
        )
    found = engine.expand(model, parse_path(reads).place)
    if len(found) != 1:
        raise BadArgument(f"{len(found)} sites", path=reads, expected="one site that a transcoder reads")
    site = site_of(found[0])
    if site.kind not in ("plain", "stream") or site.columns is not None or found[0].sae is not None:
        raise RefusedPlace("a transcoder reads a value that stands whole in one tensor", path=reads)
    known = engine.map_of(model)
    if site.tower != site_of(place).tower or not known.rank(found[0])[0] < known.rank(place)[0]:
        raise BadArgument(f"{reads} does not run before {place}", expected="what enters the MLP that it stands for")
    width = _width(model, found[0])
    if width != sae.reads:
        raise ShapeError(f"the transcoder reads {sae.reads} numbers, and this site is {width} wide", path=reads)
    return found[0]


def detach_sae(model: Any, name: str) -> None:
    """Remove an attached SAE from a model; its addresses are unknown afterwards.

    >>> sae = ns.load_sae(ns.models.embedded("toy") / "sae")
    >>> toy = ns.load("toy")
    >>> _ = ns.attach_sae(toy, "layers[2].output", sae, "third")
    >>> ns.detach_sae(toy, "third")

    Args:
        model: the model that it is attached to.
        name: its name in addresses.

    Raises:
        UnknownPath: no SAE of this name is attached.
    """
    model = engine.as_model(model)
    held = attached(unwrap(model))
    if name not in held:
        raise UnknownPath(f"no SAE {name!r} is attached to this model", expected=f"one of {', '.join(held) or 'none'}")
    detach(unwrap(model), name)
