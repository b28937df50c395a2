"""Knockout of attention edges before the softmax.

The edges are removed from the mask, in the attention function of transformers' registry (see `attention`). An attention
module with code of its own does not use that function, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from nnsplice import closures, engine
from nnsplice.activations.access import site_of
from nnsplice.atlas import Site, edges_between_towers, unwrap
from nnsplice.errors import BadArgument, MissingPosition, RefusedPlace, ShortRow
from nnsplice.packed.attention import AttentionCall, attention, is_exchanged
from nnsplice.packed.masks import Edge, causal, without
from nnsplice.packed.rows import Cut
from nnsplice.paths import Paths, Slice, Span, parse_path

#: An attention module, and the index of its call in a pass.
Called = tuple[nn.Module, int]
#: A head, its queries and keys as the path has them, and the path.
_Wanted = tuple[int, Any, Any, str]
OWN_CODE = "its attention runs code of its own, in which single edges cannot be cut"


@dataclass
class AttentionWithCuts:
    """An attention function: the model's own, without the cut edges."""

    #: The edges to cut in each call of an attention module; layers may share a module, hence the index of the call.
    cut_edges: Mapping[Called, Callable[[AttentionCall], Sequence[Edge]]]
    ran: set[Called] = field(default_factory=set)
    calls: dict[nn.Module, int] = field(default_factory=dict)

    def __call__(self, call: AttentionCall) -> Tensor:
        """The attention of a batch without the edges of this call."""
        mask = _own_mask(call)
        called = call.module, self.calls.get(call.module, 0)
        self.calls[call.module] = called[1] + 1
        if called in self.cut_edges:
            self.ran.add(called)
            edges = self.cut_edges[called](call)
            shape = (call.query.shape[0], call.query.shape[1], call.query.shape[2], call.key.shape[2])
            mask = without(mask, shape, edges, call.query.device) if edges else mask
        return call.attended(call.query, call.key, call.value, mask)


def _own_mask(call: AttentionCall) -> Tensor | None:
    """The mask of the model's own function, as a tensor also where it is given by arguments."""
    queries, keys = call.query.shape[2], call.key.shape[2]
    if call.masks_by_arguments and call.is_causal:
        if call.mask is not None or queries != keys:
            raise RefusedPlace(f"attention {call.own!r} of padded prompts", expected="prompts of one length, or sdpa")
        return causal(keys, call.more.get("sliding_window"), call.query.device)
    if call.mask is None and call.is_causal and call.own != "eager" and queries > 1:
        return causal(keys, None, call.query.device)
    return call.mask


@contextmanager
def cut(model: Any, rows: Sequence[Sequence[Cut]]) -> Iterator[None]:
    """In this block, each row of a batch without padding runs without the edges of its cuts.

    Raises:
        RefusedPlace: an attention that should be cut does not go through transformers' registry.
    """
    found: dict[Called, list[Edge]] = {}
    root = unwrap(model)
    for row, cuts in enumerate(rows):
        for one in cuts:
            found.setdefault(_called(root, site_of(one.place)), []).extend(
                (row, one.head, query, key) for query, key in one.edges
            )
    if not found:
        yield
        return
    _refuse_nested()
    cutting = AttentionWithCuts({called: lambda _, edges=edges: edges for called, edges in found.items()})
    with attention(root, cutting):
        yield
    _check_ran(cutting)


def _called(root: nn.Module, site: Site) -> Called:
    return root.get_submodule(site.module), site.occurrence


def _refuse_nested() -> None:
    if is_exchanged():
        raise BadArgument(
            "a knockout within a knockout, of which one would be lost", expected="all edges in one of them"
        )


def _check_ran(cutting: AttentionWithCuts) -> None:
    if set(cutting.cut_edges) - cutting.ran:
        raise RefusedPlace(OWN_CODE, expected="a model whose attention goes through transformers' registry")


# --- in a with block --------------------------------------------------------------------------------------------------


@contextmanager
def knockout(model: Any, edges: Paths) -> Iterator[None]:
    """Attention knockout: in this block, given queries do not attend to given keys.

    An edge is a pattern with a query and a key: `"layers[3].heads[1].pattern[-1][2]"`. Slices and lists name several,
    `"layers[2:5].heads[:].pattern[-1][1:4]"`. The query's other keys share the whole softmax.

    >>> with ns.knockout(model, "layers[0].heads[:].pattern[2][0]"):
    ...     cut = ns.capture(model, "w3 w4 w5", "layers[0].output[:]")
    >>> whole = ns.capture(model, "w3 w4 w5", "layers[0].output[:]")
    >>> [bool((cut[key] == value).all()) for key, value in whole.items()]   # it is the third token's attention alone
    [True, True, False]

    It applies to runs of whole prompts in this thread; a decoding step with a key/value cache is refused. Attention
    patterns cannot be read in the block; `heads[j].output` can.

    Args:
        model: a model from `ns.load`.
        edges: a path or several, with the numbers of the query's and the key's tokens.

    Raises:
        MissingPosition: a path without a key.
        BadArgument: a path that is no pattern, a named span, or a block inside another one.
        ShortRow: a row of the run has no such token.
        RefusedPlace: attention that does not go through transformers' registry, or a run with a cache.
    """
    _refuse_nested()
    model = engine.as_model(model)
    root = unwrap(model)
    wanted: dict[Called, list[_Wanted]] = {}
    for path in map(parse_path, engine.listed(edges)):
        if path.key is None:
            raise MissingPosition(
                "which key? An edge of attention goes from a query to a key",
                path=path,
                expected="a pattern with two brackets",
                write="layers[3].heads[1].pattern[-1][2]",
            )
        if isinstance(path.position, Span) or isinstance(path.key, Span):
            raise BadArgument("spans are not given here", path=path, expected="numbers of tokens")
        places = engine.expand(model, path.place)
        closures.require(model, places, written=True)
        for place in places:
            site = site_of(place)
            if site.kind != "pattern" or site.index is None:
                raise BadArgument("a knockout is of attention, and this is none", path=path)
            if place.steps[-1].name == "cross.heads":
                raise edges_between_towers(path)
            wanted.setdefault(_called(root, site), []).append((site.index, path.position, path.key, str(path)))
    if not wanted:
        raise BadArgument("no edges, so nothing is cut", expected="at least one path")
    # Measured now, as promises are measured with the model's own attention.
    closures.measure(model, ["stream", "mid", "experts"])
    edges_of_run = _EdgesOfRun({})
    cutting = AttentionWithCuts(
        {called: lambda call, some=some: edges_of_run.of(call, some) for called, some in wanted.items()}
    )
    edges_of_run.calls = cutting.calls
    hook = root.register_forward_pre_hook(edges_of_run.begin, with_kwargs=True)
    try:
        with attention(root, cutting):
            yield
    finally:
        hook.remove()
    if edges_of_run.runs:
        _check_ran(cutting)


@dataclass
class _EdgesOfRun:
    """The edges of a run, from positions that count the prompts' own tokens; found for each batch."""

    #: The number of calls of each attention module in this pass.
    calls: dict[nn.Module, int]
    mask: Tensor | None = None
    runs: int = 0

    def begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Store the attention mask of a run."""
        self.runs += 1
        self.calls.clear()
        given = kwargs.get("attention_mask")
        self.mask = given if isinstance(given, Tensor) and given.dim() == 2 else None

    def of(self, call: AttentionCall, wanted: Sequence[_Wanted]) -> list[Edge]:
        """The edges to cut in one call."""
        batch, _, queries, _ = call.query.shape
        if queries != call.key.shape[2] or (self.mask is not None and self.mask.shape != (batch, queries)):
            raise RefusedPlace(
                "a knockout is of runs of whole prompts, and this step reads keys of an earlier one",
                expected="runs without a cache: a trace, a capture, model(...)",
                write="use_cache=False",
            )
        found: list[Edge] = []
        for row in range(batch):
            own = list(range(queries)) if self.mask is None else self.mask[row].nonzero()[:, 0].tolist()
            for head, position, key, path in wanted:
                for query in _tokens(position, own, row, path):
                    found += [(row, head, query, token) for token in _tokens(key, own, row, path)]
        return found


def _tokens(position: Any, own: Sequence[int], row: int, path: str) -> list[int]:
    if isinstance(position, Slice):
        return [own[number] for number in position.range(len(own))]
    each = [position] if isinstance(position, int) else list(position)
    for number in each:
        if not -len(own) <= number < len(own):
            raise ShortRow(f"row {row} has {len(own)} tokens, and no [{number}]", path=path)
    return [own[number] for number in each]
