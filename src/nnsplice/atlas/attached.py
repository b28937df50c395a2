"""SAEs attached to sites of a model: their names, and the meaning of addresses of their features."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor, nn

from nnsplice.atlas.site import Site
from nnsplice.errors import OutOfRange, PathError, RefusedPlace, UnknownPath, closest
from nnsplice.paths.path import Index, Path, Slice


class Features(Protocol):
    """What is asked of an SAE."""

    @property
    def features(self) -> int:
        """How many it has."""
        ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """What makes two the same."""
        ...

    def encode(self, values: Tensor) -> Tensor:
        """`[..., width]` -> `[..., feature]`."""
        ...

    def error(self, values: Tensor) -> Tensor:
        """What the features leave out."""
        ...

    def added(self, features: Tensor, like: Tensor | None, chosen: Sequence[int] | None = None) -> Tensor:
        """What features add to the site, without a bias."""
        ...

    def added_each(self, values: Tensor, like: Tensor | None, numbers: Sequence[int]) -> Tensor:
        """The same where each row is about one feature: `[row, 1]` -> `[row, width]`."""
        ...


@dataclass(frozen=True)
class AttachedSae:
    """An SAE and its site."""

    #: Where it is written, as `expand` returns it.
    place: Path
    sae: Features
    #: What a transcoder reads, which is another site; None for an SAE, which reads its own.
    reads: Path | None = None


_ATTACHED: weakref.WeakKeyDictionary[nn.Module, dict[str, AttachedSae]] = weakref.WeakKeyDictionary()


def attach(root: nn.Module, name: str, one: AttachedSae) -> None:
    """Give a site of a model an SAE, by a name that is free."""
    _ATTACHED.setdefault(root, {})[name] = one


def detach(root: nn.Module, name: str) -> None:
    """Take it away again."""
    del _ATTACHED[root][name]


def attached(root: nn.Module | None) -> Mapping[str, AttachedSae]:
    """The SAEs of a model, by their names."""
    return {} if root is None else _ATTACHED.get(root, {})


def expand_part(root: nn.Module | None, path: Path, places: Sequence[Path]) -> Iterator[Path]:
    """Every single feature, or the error, that a path means.

    Args:
        places: what the path means without its SAE.

    Raises:
        UnknownPath: no SAE of this name is attached there.
    """
    assert path.sae is not None
    held = attached(root)
    for place in places:
        one = held.get(path.sae.name)
        if one is None or one.place.site != place.site:
            told = [f"{name} at {other.place}" for name, other in held.items()]
            raise UnknownPath(
                f"no SAE {path.sae.name!r} is attached to {place.place}",
                path=path,
                expected=closest(path.sae.name, told) if told else "an SAE that was attached",
                write=None if told else f"ns.attach_sae(model, {str(place.place)!r}, sae, {path.sae.name!r})",
            )
        for number in _numbers(path, one.sae.features):
            if one.reads is not None and number is None:
                raise RefusedPlace(
                    "what a transcoder leaves out is of two sites, the one that it reads and the one that it writes",
                    path=path,
                    expected="its features; a write of them leaves the rest as it is",
                )
            kind = "transcoded" if one.reads is not None else "error" if number is None else "feature"
            read = place if one.reads is None else one.reads
            site = replace(read.site, kind=kind, index=number, sae=path.sae.name)  # type: ignore[type-var]
            yield replace(place, sae=replace(path.sae, features=number), site=site)


def _numbers(path: Path, count: int) -> Iterator[int | None]:
    assert path.sae is not None
    index: Index | None = path.sae.features
    if index is None:
        yield None
        return
    if isinstance(index, Slice):
        yield from index.range(count)
        return
    for number in (index,) if isinstance(index, int) else index:
        if not -count <= number < count:
            raise OutOfRange(f"features[{number}] is past the last feature; this SAE has {count}", path=path)
        yield number % count


def host(path: Path) -> Path:
    """The site that a feature or an error of an SAE is of; a path of neither as it is."""
    if path.sae is None:
        return path
    site = path.site
    assert isinstance(site, Site), f"{path} was not expanded"
    assert site.kind != "transcoded", f"{path} is written at another site"
    return replace(path, sae=None, site=replace(site, kind="plain", index=None, sae=None))


def refuse_part(path: Path) -> None:
    """Raise where parameters are asked for: features have none in the model."""
    if path.sae is not None:
        raise PathError(
            "no parameters of the model belong to a feature of an SAE",
            path=path,
            write=str(replace(path, sae=None, position=None, value=None)),
        )
