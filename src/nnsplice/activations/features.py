"""Features of attached SAEs and their error: read from the value of a site, and written into it.

A feature is written as a difference, `h + dec(f') - dec(f)`, so what the SAE leaves out stays; where nothing differs
the value keeps every bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nnsplice.activations.access import site_of
from nnsplice.atlas import Site, attached, unwrap
from nnsplice.atlas.attached import Attached, Features
from nnsplice.errors import BadArgument, UnknownPath
from nnsplice.paths import Path

#: The kinds that are read and written here.
KINDS = ("feature", "error")
#: A feature of a transcoder, which reads one site and is written at another.
TRANSCODED = "transcoded"
#: So many values of features are encoded at once.
AT_ONCE = 1 << 24


def sae_of(model: Any, path: Path) -> Features:
    """The SAE that a path is a part of.

    Raises:
        UnknownPath: it was taken away since the path was made.
    """
    name = site_of(path).sae
    held = attached(unwrap(model))
    if name is None or name not in held:
        raise UnknownPath(f"no SAE {name!r} is attached to this model any more", path=path)
    return held[name].sae


def identities(model: Any, paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """What tells the SAEs of these paths from others, by their names in the model, as plain data.

    Raises:
        UnknownPath: one was taken away since the path was made.
    """
    held = attached(unwrap(model))
    places = {path.sae.name: path for path in paths if path.sae is not None}
    found: dict[str, dict[str, Any]] = {}
    for name, path in sorted(places.items()):
        if name not in held:
            raise UnknownPath(f"no SAE {name!r} is attached to this model any more", path=path)
        found[name] = _identity(held[name])
    return found


def _identity(one: Attached) -> dict[str, Any]:
    return {**one.sae.identity, **({} if one.reads is None else {"reads": str(one.reads.place)})}


def check_identities(model: Any, asked: Mapping[str, Any], what: str) -> None:
    """Raise where one of these SAEs is not the one that is attached to a model by its name.

    Args:
        asked: what `identities` said when `what` was made.
        what: what was made with them, for the error.

    Raises:
        BadArgument: another SAE.
        UnknownPath: none.
    """
    held = attached(unwrap(model))
    for name, told in asked.items():
        if name not in held:
            raise UnknownPath(
                f"{what} was made with the SAE {name!r}, and none of this name is attached to this model",
                expected="the SAE that it was made with",
                write=f"ns.attach_sae(model, place, sae, {name!r})",
            )
        if _identity(held[name]) != told:
            raise BadArgument(
                f"{what} was made with another SAE of this name, {name!r}, than the one that is attached",
                expected="the SAE that it was made with",
            )


def written_at(model: Any, path: Path) -> Path:
    """Where a feature of a transcoder is written."""
    name = site_of(path).sae
    held = attached(unwrap(model))
    if name is None or name not in held:
        raise UnknownPath(f"no SAE {name!r} is attached to this model any more", path=path)
    return replace(path, sae=None, site=held[name].place.site)


def part(sae: Features, site: Site, values: Tensor) -> Tensor:
    """`[..., 1]` of a feature, `[..., width]` of the error, of `[..., width]` values.

    All of the values are encoded, whichever are wanted: the last digit of a product depends on how many are.
    """
    if site.kind == "error":
        return sae.error(values).to(values)
    assert site.index is not None
    return sae.encode(values)[..., site.index : site.index + 1].to(values)


def parts(sae: Features, sites: list[Site], values: Tensor) -> dict[int | None, Tensor]:
    """The same for several parts of one SAE, by the number of the feature; None is the error."""
    features = sae.encode(values) if any(site.kind != "error" for site in sites) else values[..., :0]
    return {
        site.index: part(sae, site, values) if site.index is None else features[..., [site.index]].to(values)
        for site in sites
    }


def moved(sae: Features, site: Site, difference: Tensor, values: Tensor) -> Tensor:
    """What the site changes by when a part of it does.

    Args:
        difference: `[..., 1]` or `[..., width]`.
        values: what stands there, `[..., width]`, which SAEs that scale their inputs need.
    """
    if site.kind == "error":
        return difference.to(values)
    assert site.index is not None
    return sae.added(difference, values, [site.index]).to(values)


def changed(sae: Features, site: Site, values: Tensor, new: Tensor) -> Tensor:
    """The values of a site with one part of them replaced."""
    return values + moved(sae, site, new.to(values) - part(sae, site, values), values)


def each(sae: Features, sites: Sequence[Site], values: Tensor) -> Tensor:
    """A part of each row's own, all of one kind: `[row, 1]` of a feature, `[row, width]` of the error.

    Args:
        sites: the part that each row is about.
        values: `[row, width]`; many rows may be the same, and such are encoded once.
    """
    if sites[0].kind == "error":
        return sae.error(values).to(values)
    if values.requires_grad:
        alike, which = values, torch.arange(len(values), device=values.device)
    else:
        alike, which = torch.unique(values, dim=0, return_inverse=True)
    numbers = torch.tensor(_numbers(sites), device=values.device)
    found = values.new_zeros(len(values), 1)
    step = max(AT_ONCE // sae.features, 1)
    for start in range(0, len(alike), step):
        rows = ((which >= start) & (which < start + step)).nonzero()[:, 0]
        encoded = sae.encode(alike[start : start + step])
        found = found.index_put((rows,), encoded[which[rows] - start, numbers[rows]][:, None].to(values))
    return found


def moved_each(sae: Features, sites: Sequence[Site], difference: Tensor, values: Tensor) -> Tensor:
    """What each row changes by when a part of its own does: `moved`, of `[row, ...]`."""
    if sites[0].kind == "error":
        return difference.to(values)
    return sae.added_each(difference, values, _numbers(sites)).to(values)


def _numbers(sites: Sequence[Site]) -> list[int]:
    return [site.index for site in sites if site.index is not None]
