"""Features of attached SAEs, and their error: read from the value of a site, and written into it.

A feature is written as a difference, `h + dec(f') - dec(f)`, so the error of the SAE stays, and an equal feature
changes no bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nnsplice.activations.access import site_of
from nnsplice.activations.packs import Pack
from nnsplice.atlas import Site, attached, unwrap
from nnsplice.atlas.attached import AttachedSae, Features
from nnsplice.errors import BadArgument, UnknownPath
from nnsplice.paths import Path

#: The kinds of site that are a part of an SAE.
KINDS = ("feature", "error")
#: A feature of a transcoder, which reads one site and is written at another.
TRANSCODED = "transcoded"
#: The number of feature values that are encoded at once.
AT_ONCE = 1 << 24


def sae_of(model: Any, path: Path) -> Features:
    """The SAE of a path.

    Raises:
        UnknownPath: it is no longer attached.
    """
    return _attached_to(model, path, site_of(path).sae).sae


def _attached_to(model: Any, path: Path, name: str | None) -> AttachedSae:
    """The attachment of the SAE of this name; the path is for the error.

    Raises:
        UnknownPath: it is no longer attached.
    """
    saes = attached(unwrap(model))
    if name is None or name not in saes:
        raise UnknownPath(f"no SAE {name!r} is attached to this model any more", path=path)
    return saes[name]


def identities(model: Any, paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """The identity of each SAE of these paths as plain data, by its name in the model.

    Raises:
        UnknownPath: one is no longer attached.
    """
    by_name = {path.sae.name: path for path in paths if path.sae is not None}
    return {name: _identity(_attached_to(model, path, name)) for name, path in sorted(by_name.items())}


def _identity(attachment: AttachedSae) -> dict[str, Any]:
    reads = attachment.reads
    return {**attachment.sae.identity, **({} if reads is None else {"reads": str(reads.place)})}


def check_identities(model: Any, expected: Mapping[str, Any], what: str) -> None:
    """Raise if the model has another SAE, or none, under one of these names.

    Args:
        expected: what `identities` returned when `what` was made.
        what: what was made with the SAEs, for the error.

    Raises:
        BadArgument: another SAE.
        UnknownPath: none.
    """
    saes = attached(unwrap(model))
    for name, identity in expected.items():
        if name not in saes:
            raise UnknownPath(
                f"{what} was made with the SAE {name!r}, and none of this name is attached to this model",
                expected="the SAE that it was made with",
                write=f"ns.attach_sae(model, place, sae, {name!r})",
            )
        if _identity(saes[name]) != identity:
            raise BadArgument(
                f"{what} was made with another SAE of this name, {name!r}, than the one that is attached",
                expected="the SAE that it was made with",
            )


def check_packs(model: Any, packs: Iterable[Pack], saes: Mapping[str, Any]) -> None:
    """`check_identities` of the SAEs whose features these packs hold."""
    names = {key.sae.name for pack in packs for key in pack.keys if key.sae is not None}
    check_identities(model, {name: sae for name, sae in saes.items() if name in names}, "the capture")


def written_at(model: Any, path: Path) -> Path:
    """Where a feature of a transcoder is written."""
    return replace(path, sae=None, site=_attached_to(model, path, site_of(path).sae).place.site)


def part(sae: Features, site: Site, values: Tensor) -> Tensor:
    """The feature `[..., 1]` or the error `[..., width]` of `[..., width]` values.

    All values are encoded at once, as the last digit of a product depends on how many are.
    """
    if site.kind == "error":
        return sae.error(values).to(values)
    assert site.index is not None
    return sae.encode(values)[..., site.index : site.index + 1].to(values)


def parts(sae: Features, sites: list[Site], values: Tensor) -> dict[int | None, Tensor]:
    """Several parts of one SAE, by the index of the feature; None for the error."""
    features = sae.encode(values) if any(site.kind != "error" for site in sites) else values[..., :0]
    return {
        site.index: part(sae, site, values) if site.index is None else features[..., [site.index]].to(values)
        for site in sites
    }


def moved(sae: Features, site: Site, difference: Tensor, values: Tensor) -> Tensor:
    """The change of a site's value if a part of its SAE changes.

    Args:
        difference: `[..., 1]` or `[..., width]`.
        values: the values of the site, `[..., width]`, for SAEs that scale their inputs.
    """
    if site.kind == "error":
        return difference.to(values)
    assert site.index is not None
    return sae.added(difference, values, [site.index]).to(values)


def changed(sae: Features, site: Site, values: Tensor, new: Tensor) -> Tensor:
    """The values of a site with one part of them replaced."""
    return values + moved(sae, site, new.to(values) - part(sae, site, values), values)


def each(sae: Features, sites: Sequence[Site], values: Tensor) -> Tensor:
    """One part for each row, all of one kind: `[row, 1]` of features, `[row, width]` of errors.

    Args:
        sites: the part for each row.
        values: `[row, width]`; equal rows are encoded once.
    """
    if sites[0].kind == "error":
        return sae.error(values).to(values)
    if values.requires_grad:
        unique, which = values, torch.arange(len(values), device=values.device)
    else:
        unique, which = torch.unique(values, dim=0, return_inverse=True)
    numbers = torch.tensor(_numbers(sites), device=values.device)
    found = values.new_zeros(len(values), 1)
    step = max(AT_ONCE // sae.features, 1)
    for start in range(0, len(unique), step):
        rows = ((which >= start) & (which < start + step)).nonzero()[:, 0]
        encoded = sae.encode(unique[start : start + step])
        found = found.index_put((rows,), encoded[which[rows] - start, numbers[rows]][:, None].to(values))
    return found


def moved_each(sae: Features, sites: Sequence[Site], difference: Tensor, values: Tensor) -> Tensor:
    """`moved` for each row with its own part, `[row, ...]`."""
    if sites[0].kind == "error":
        return difference.to(values)
    return sae.added_each(difference, values, _numbers(sites)).to(values)


def _numbers(sites: Sequence[Site]) -> list[int]:
    return [site.index for site in sites if site.index is not None]
