"""Sets of sites: cells that change several sites in one run.

Everything that the paths of a set name is changed together in one cell: every head of `heads[:]`, every token of `[:]`,
and all tokens where a path has no position.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain, combinations, product

from nnsplice import engine
from nnsplice.activations import derived, features
from nnsplice.activations.access import site_of
from nnsplice.activations.prompts import Prompts
from nnsplice.atlas import host
from nnsplice.errors import BadArgument, BadType, DuplicatePath, OverlappingWrite, ShortRow, circumstances, named
from nnsplice.packed.rows import columns_overlap
from nnsplice.paths import Path, Position, Slice, Span, parse_path, position_rank
from nnsplice.results import SETS, Cell
from nnsplice.sweeps.targets import At, Target, TargetPart, cell_of, has_tokens, own_tokens
from nnsplice.tokens import Rows, columns, concrete

#: One path or several; a list of paths among them is a set, whose sites are changed together.
Sites = str | Path | Iterable[str | Path | Iterable[str | Path]]
_WRITE = 'sites=["layers[3]", ["layers[3].heads[1]", "layers[5].heads[0]"]]'


def split_sites(sites: Sites) -> tuple[list[Path], list[tuple[Path, ...]]]:
    """The paths, and the sets of paths.

    Raises:
        BadArgument: there are none, or a set is empty.
        BadType: an entry is neither a path nor a set of paths.
    """
    given = [sites] if isinstance(sites, str | Path) or not isinstance(sites, Iterable) else list(sites)
    if not given:
        raise BadArgument("no sites, so there is nothing to sweep", expected="at least one path")
    single: list[Path] = []
    sets: list[tuple[Path, ...]] = []
    for one in given:
        if isinstance(one, str | Path) or not isinstance(one, Iterable):
            single += map(parse_path, engine.listed(one))
            continue
        members = tuple(one)
        if not members:
            raise BadArgument(
                "an empty set of sites, which changes nothing", expected="at least one path", write=_WRITE
            )
        for member in members:
            if not isinstance(member, str | Path):
                found = "a set of sites within a set" if isinstance(member, Iterable) else f"{named(member)} in a set"
                raise BadType(found, expected="paths, and lists of paths that are changed together", write=_WRITE)
        sets.append(tuple(map(parse_path, members)))
    return single, sets


def all_paths(sites: Sites) -> list[Path]:
    """All paths, those of sets too."""
    single, sets = split_sites(sites)
    return [*single, *(path for members in sets for path in members)]


def target_of_set(model: engine.Model, known: engine.ModelMap, members: Sequence[Path], edited: Prompts) -> Target:
    """The cell of a set.

    Args:
        known: the map of the model, computed once, as there may be thousands of sets.

    Raises:
        DuplicatePath: the same site twice.
        OverlappingWrite: two of its sites overlap, so that one write would undo the other.
        ShortRow: no prompt has these tokens.
    """
    parts: dict[Path, TargetPart] = {}
    for member in members:
        for place, _ in known.arrange((member.place,)):
            tower = site_of(place).tower
            for at in _positions_of(member, member.position, edited, tower):
                for key_position in [None] if member.key is None else _positions_of(member, member.key, edited, tower):
                    shown = Slice() if member.key is not None and key_position is None else key_position
                    key = replace(place.at(Slice() if at is None else at), key=shown)
                    if key in parts:
                        raise DuplicatePath("the same site twice in one set", path=member, expected="each site once")
                    parts[key] = TargetPart(cell_of(key), (place,), at, shown)
    ordered = [parts[key] for key in sorted(parts, key=lambda path: (known.rank(path), position_rank(path.key)))]
    if not any(part.key is not None for part in ordered):  # an edge that is cut twice is cut
        _check_overlaps(model, ordered, edited)
    name = " + ".join(part.cell.path.removesuffix("[:]") for part in ordered)
    return Target(Cell(name, SETS, set=name), tuple(ordered))


def _positions_of(member: Path, position: Position | None, edited: Prompts, tower: str) -> list[At]:
    """The positions of a path: each of a list, else the position itself; None for all tokens."""
    each: list[At] = list(position) if isinstance(position, tuple) else [None if position == Slice() else position]
    check_tokens(each, edited, member, tower)
    return each


def check_tokens(each: Iterable[At], edited: Prompts, path: Path, tower: str) -> None:
    """Raise for tokens that no prompt has, and for an unknown span."""
    lengths = edited.lengths(tower)
    for at in each:
        if isinstance(at, Span):
            _check_span(at, edited, path, tower)
        elif not any(has_tokens(at, length) for length in lengths):
            raise ShortRow(f"no prompt has a position [{at}]: the longest has {max(lengths)} tokens", path=path)


def _check_span(span: Span, edited: Prompts, path: Path, tower: str) -> None:
    """Raise for an unknown span, or a token past its end."""
    lengths = edited.lengths("encoder")
    rows = Rows(len(edited), max(lengths), (0,) * len(lengths), tuple(lengths))
    with circumstances(str(path)):
        edited.check_span(span, tower)
        # One cell may hold spans of different length.
        whole = [span] if span.token is not None else [Span(span.name, 0)]
        columns(concrete(whole[0], rows, max(lengths), edited.spans), rows, max(lengths), edited.spans)


def _check_overlaps(model: engine.Model, parts: Sequence[TargetPart], edited: Prompts) -> None:
    """Raise where two parts write the same number in any prompt."""
    written = [(part, _written_site(model, part.places[0])) for part in parts]
    # Writes to SAE features and to experts add a difference, so they overlap with other kinds of sites only.
    adding = {*features.KINDS, features.TRANSCODED}
    others = [pair for pair in written if site_of(pair[0].places[0]).kind not in adding]
    of_saes = [pair for pair in written if site_of(pair[0].places[0]).kind in adding]
    for (one, a), (other, b) in chain(combinations(others, 2), product(of_saes, others)):
        sa, sb = site_of(a), site_of(b)
        experts = {site_of(one.places[0]).kind, site_of(other.places[0]).kind} == {"expert"}
        if experts or (sa.location, sa.item) != (sb.location, sb.item) or not columns_overlap(sa.columns, sb.columns):
            continue
        for prompt, length in enumerate(edited.lengths(one.tower)):
            if not (has_tokens(one.position, length) and has_tokens(other.position, length)):
                continue
            tokens = [set(own_tokens(part.position, edited, prompt, length)) for part in (one, other)]
            if both := tokens[0] & tokens[1]:
                raise OverlappingWrite(
                    f"{one.cell.path} and {other.cell.path} are in one set, and both give token {min(both)} of prompt "
                    f"{prompt} a value there",
                    expected="sites that share no numbers, so that none undoes another",
                )


def _written_site(model: engine.Model, place: Path) -> Path:
    """The site that is really written for a site that is derived from other values."""
    kind = site_of(place).kind
    if kind == "pattern":
        return derived.pattern_places(model, place)[1]
    if kind == "ungated":
        return derived.slice_place(place)
    if kind == features.TRANSCODED:
        return features.written_at(model, place)
    return derived.expert_output(place) if kind == "expert" else host(place)
