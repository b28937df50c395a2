"""The terms of direct attribution, from the requested sites."""

from __future__ import annotations

from dataclasses import dataclass

from nnsplice import closures, engine
from nnsplice.activations.access import site_of
from nnsplice.attribution.branches import Branch, Branches
from nnsplice.errors import BadArgument, RefusedPlace
from nnsplice.paths import Path, Paths, parse_path


@dataclass(frozen=True)
class BranchTerms:
    """The requested terms of one branch: itself, or its heads, neurons or experts."""

    branch: Branch
    #: Site -> the number of its cell in the result.
    cells: dict[Path, int]
    #: All experts of the layer, if some are requested: the others are part of the rest.
    experts: tuple[Path, ...] = ()

    @property
    def whole(self) -> int | None:
        """The cell of the branch itself; None if its parts are requested instead."""
        return next((n for path, n in self.cells.items() if site_of(path) == site_of(self.branch.added)), None)

    @property
    def projection(self) -> str:
        """The projection at the branch's end that heads or neurons are the input of."""
        name = self.branch.block.o if self.branch.name == "attn" else self.branch.block.down
        assert name is not None
        return name


@dataclass(frozen=True)
class Terms:
    """All requested terms, in the order of the forward pass."""

    places: tuple[Path, ...]
    #: The cell of the embeddings; None if they are not requested.
    embed: int | None
    #: By the index of the branch in `Branches.all`.
    by_branch: dict[int, BranchTerms]


def terms_of(model: engine.Model, branches: Branches, sites: Paths) -> Terms:
    """The terms of the requested sites.

    Raises:
        RefusedPlace: a site that is no term of the sum.
        BadArgument: no sites, or a branch together with its parts, which would count twice.
    """
    wanted = engine.listed(sites)
    if not wanted:
        raise BadArgument("no sites", expected="at least one site, such as layers[:].heads[:]")
    known = engine.map_of(model)
    places: dict[Path, None] = {}
    for pattern in map(parse_path, wanted):
        places |= dict.fromkeys(engine.expand(model, pattern.place))
    ordered = tuple(sorted(places, key=known.rank))
    closures.require(model, ordered)
    (entry,) = engine.expand(model, "embed")
    first = branches.all[0].reads
    embed: int | None = None
    by_branch: dict[int, BranchTerms] = {}
    for number, place in enumerate(ordered):
        branch = branches.of(place)
        if branch is None:
            if site_of(place).location not in (site_of(entry).location, site_of(first).location):
                raise RefusedPlace(
                    "a state of the stream is the sum of all that was added before it, so it is no part of that sum",
                    path=place,
                    expected="embed, heads, attn.output, mlp.output, neurons, experts",
                    write="ns.lens.logit(model, prompts, sites)   (what a state of the stream says)",
                )
            if embed is not None:
                raise BadArgument("the embeddings are requested twice", path=place)
            embed = number
            continue
        at = branches.all.index(branch)
        one = by_branch.setdefault(at, BranchTerms(branch, {}))
        one.cells[place] = number
        by_branch[at] = _checked(model, one, place)
    return Terms(ordered, embed, by_branch)


def _checked(model: engine.Model, one: BranchTerms, place: Path) -> BranchTerms:
    site, branch = site_of(place), one.branch
    if len({_kind_of(path) for path in one.cells}) > 1:
        raise BadArgument(
            "a branch and parts of it, or its neurons and its experts, would count twice",
            path=place,
            expected="layers[i].attn or layers[i].heads[:], layers[i].mlp or its neurons or experts",
        )
    if site == site_of(branch.added):
        return one
    if site.kind == "expert":
        if one.experts:
            return one
        whole = engine.expand(model, f"layers[{branch.block.index}].experts[:]")
        return BranchTerms(branch, one.cells, tuple(whole))
    last = branch.block.o if branch.name == "attn" else branch.block.down
    if (site.module, site.end, site.kind) == (last, "input", "plain") and site.columns is not None:
        return one
    raise RefusedPlace(
        "this site adds nothing to the stream by itself",
        path=place,
        expected="embed, heads, attn.output, mlp.output, neurons, experts",
    )


def _kind_of(path: Path) -> tuple[object, ...]:
    site = site_of(path)
    return (site.location, site.kind)


def check_positions(sites: Paths, reads: int) -> None:
    """Raise for a position other than the metric's: the direct effect of other tokens is 0."""
    for pattern in map(parse_path, engine.listed(sites)):
        if pattern.position is not None and pattern.position != reads:
            raise BadArgument(
                f"what is added at other tokens than [{reads}], which the metric reads, is no direct part of it: 0",
                path=pattern,
                expected="sites without positions",
                write=str(pattern.place),
            )
