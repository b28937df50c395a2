"""Reading a run: `save_activations` inside a trace, `capture` around one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nnsplice import closures, engine, wire
from nnsplice.activations import derived, features
from nnsplice.activations import remote as remote_runs
from nnsplice.activations.access import Access, accesses, keys_of, live_value, require_positions, site_of
from nnsplice.activations.encoding import encode
from nnsplice.activations.packs import Pack, Provenance
from nnsplice.activations.prompts import Prompts, PromptsLike, SpanTexts
from nnsplice.activations.saved_activation import SavedActivation
from nnsplice.deprecated import renamed
from nnsplice.errors import BadArgument, circumstances
from nnsplice.paths import Path, Paths
from nnsplice.progress import bar
from nnsplice.tokens import Rows, Spans, columns, concrete


@renamed(paths="sites")
@engine.only_local
def save_activations(model: Any, sites: Paths, *, keep_graph: bool = False) -> SavedActivation:
    """Save activations of the running trace, inside `with model.trace(...)`.

    Paths may be native or portable, with slices and lists, in any order. The result stays valid after the trace.

    >>> with model.trace("w3 w4 w5"):
    ...     saved = ns.save_activations(model, ["layers[:].mlp.output[-1]", "layers[0].heads[1].output[0:2]"])
    >>> len(saved)
    5

    Args:
        model: the model that is traced.
        sites: a path or several, with token positions.
        keep_graph: keep the values in the autograd graph instead of copying them out of it.

    Returns:
        The activations by path, a row for each prompt of the trace.

    Raises:
        OutsideTrace: no trace is running.
        PathError: no path, a path without a position, out of range, or a site without an exact value.
        UnknownPath: a site that this model does not have.
    """
    model = engine.as_model(model)
    mediator = engine.worker(model, "ns.save_activations")
    wanted = _wanted(model, sites)
    batch = engine.batch_of(model, mediator)
    packs = gather(model, mediator, wanted, batch, keep_graph=keep_graph)
    name, revision = engine.name_of(model)
    saes = features.identities(model, wanted) or None
    origin = Provenance(name, revision, tokens=_tokens(batch), saes=saes)
    return SavedActivation._new(packs, origin, engine.map_of(model))


@renamed(paths="sites")
def capture(
    model: Any,
    prompts: PromptsLike,
    sites: Paths,
    *,
    spans: SpanTexts | None = None,
    batch_size: int | None = None,
    keep_graph: bool = False,
    progress: bool = True,
    remote: bool | str = False,
) -> SavedActivation:
    """Run prompts through the model and save activations.

    Prompts of one length run together without padding. The pass stops after the last site that is needed.

    >>> ns.capture(model, ["w3 w4 w5", "w6 w7"], "layers[:].output[-1]")
    SavedActivation: 3 sites, 1 position each, 2 rows, float32, 384 B
      layers[0..2].output  [-1]  width 16

    Args:
        model: a model from `ns.load`.
        prompts: a text, a list of texts, token ids (list, list of lists, tensor), chat messages, an encoding, or
            `{"text": ..., "images": ...}`; for a module of your own its input: token ids, values
            `[prompt, token, width]` or `[prompt, width]`, or a dictionary by the names of its forward's arguments.
        sites: a path or several, with token positions: `"layers[:].output[-1]"`, `'layers[2].output["subject"][-1]'`.
        spans: token spans by name: `{"subject": ["Eiffel Tower", ...]}`, a text or (start, stop) for each prompt.
        batch_size: how many prompts run in one pass; if left out all prompts of one length, or one by one where hooks
            or classes of your own run in the model, which may tell rows apart.
        keep_graph: keep the values in the autograd graph.
        progress: show a progress bar once a second has passed.
        remote: run on nnsight's remote service.

    Returns:
        The activations by path, a row for each prompt.

    Raises:
        PathError: no path, a path without a position (`MissingPosition`), a layer or head out of range (`OutOfRange`),
            or a site without an exact value (`RefusedPlace`).
        UnknownPath: a site that this model does not have.
        ShortRow: a prompt has no token at a position.
        SpanError: a span that is not found in a prompt.
    """
    with engine.accepting_sharded(model):
        return _captured(engine.as_model(model), prompts, sites, spans, batch_size, keep_graph, progress, remote)


def _captured(
    model: engine.Model,
    prompts: PromptsLike,
    sites: Paths,
    spans: SpanTexts | None,
    batch_size: int | None,
    keep_graph: bool,
    progress: bool,
    remote: bool | str,
) -> SavedActivation:
    if batch_size is not None and batch_size < 1:
        raise BadArgument(f"batch_size={batch_size}", expected="at least 1")
    with circumstances("ns.capture"):
        given = encode(model, prompts, spans, images=True, sounds=True)
        wanted = checked(model, given, sites)
    batches = given.batches(model, size=batch_size)
    parts: list[list[Pack]] = []
    with bar("capture", len(given), "prompt", progress) as shown:
        for rows in batches:
            inputs, batch, found = given.inputs(rows, model.device), given.batch(rows), given.spans_of(rows)
            if remote:
                parts.append(remote_runs.read(model, wanted, inputs, batch, found, remote))
            else:
                parts.append(_local(model, wanted, inputs, batch, found, keep_graph))
            shown.update(len(rows))
    origin = origin_of(model, given, wanted)
    return SavedActivation._new(joined(parts, batches), origin, engine.map_of(model))


def checked(model: engine.Model, given: Prompts, sites: Paths) -> list[Path]:
    """The expanded sites of a capture, checked against all prompts.

    Raises:
        ShortRow: a prompt has no token at a position.
    """
    wanted = _wanted(model, sites)
    _check_positions(wanted, given)
    closures.require(model, wanted)
    return wanted


def captured_within(model: engine.Model, given: Prompts, sites: Paths, max_tokens: int) -> SavedActivation:
    """The capture of these prompts where there is memory for so many tokens at once."""
    at_most = max(max_tokens // max(*given.lengths("encoder"), *given.lengths("decoder")), 1)
    size = max(map(len, given.batches(model, at_most=at_most)))
    return capture(model, given, sites, batch_size=size, progress=False)


def origin_of(model: engine.Model, given: Prompts, wanted: Sequence[Path]) -> Provenance:
    """The provenance of a capture of these prompts."""
    name, revision = engine.name_of(model)
    saes = features.identities(model, wanted) or None
    return Provenance(name, revision, given.texts, _ids(given, wanted), given.spans, saes, given.digests)


def _wanted(model: engine.Model, paths: Paths) -> list[Path]:
    wanted = engine.expand(model, paths)
    if not wanted:
        raise BadArgument("no paths, so there is nothing to capture", expected="at least one path")
    require_positions(wanted)
    return wanted


def gather(
    model: engine.Model,
    mediator: Any,
    paths: Sequence[Path],
    batch: engine.Batch,
    *,
    keep_graph: bool = False,
    spans: Spans | None = None,
) -> list[Pack]:
    """Read the sites, given in execution order, out of the run that this block belongs to."""
    plan, gates = accesses(model, paths), _Gates(model, paths)
    for access in (*gates.plan, *plan):
        access.check_not_past(mediator)
        if access.kind == "pattern":
            derived.require_eager(model, access.paths[0])
    packs: list[Pack] = []
    for access in plan:
        rows = batch.rows(access.tower)
        gates.read_before(access, mediator, batch)
        of_keys = batch.rows(derived.key_tower(model, access)) if access.kind == "pattern" else rows
        values = _values(model, access, mediator, of_keys, gates)
        for keys in keys_of(access.paths, rows, next(iter(values.values())).shape[1], spans):
            value = values[site_of(keys[0]).index]
            packs.append(Pack(keys, _picked(value if keep_graph else value.detach(), keys, rows, spans)))
            if access.kind == "ungated":
                derived.check_open(keys[0].place, packs[-1].tensor)
    return packs


class _Gates:
    """The gates of slices that are captured before their gate; read in the course of the run."""

    def __init__(self, model: engine.Model, paths: Sequence[Path]) -> None:
        self.model, self.known = model, engine.map_of(model)
        #: Slice before its gate -> the gate.
        self.of = {path.site: derived.gate_place(model, path) for path in paths if site_of(path).kind == "ungated"}
        self.plan = accesses(model, sorted(dict.fromkeys(self.of.values()), key=self.known.rank))
        self.waiting = list(self.plan)
        self.values: dict[object, Tensor] = {}

    def read_before(self, access: Access, mediator: Any, batch: engine.Batch) -> None:
        """Read the gates that come before a value in the run."""
        while self.waiting and self.known.rank(self.waiting[0].paths[0]) <= self.known.rank(access.paths[0]):
            gate = self.waiting.pop(0)
            tensor = live_value(gate, mediator, batch.rows(gate.tower)).tensor
            for path in gate.paths:
                start, stop = site_of(path).columns or (0, tensor.shape[-1])
                self.values[path.site] = tensor[..., start:stop]

    def before_gate(self, path: Path, slices: Tensor) -> Tensor:
        """A slice before its gate."""
        return derived.before_gate(path, slices, self.values[self.of[path.site].site])


def _values(
    model: engine.Model, access: Access, mediator: Any, rows: Rows, gates: _Gates
) -> Mapping[int | None, Tensor]:
    """`[prompt, token, width]` of one value of the run, by the number of the head, expert or feature."""
    if access.kind in (*features.KINDS, features.TRANSCODED):
        sites = [site_of(path) for path in access.paths]
        return features.parts(features.sae_of(model, access.paths[0]), sites, live_value(access, mediator, rows).tensor)
    if access.kind == "pattern":
        return derived.patterns(access, mediator, rows)
    if access.kind == "expert":
        return derived.experts(access, mediator, rows)
    tensor = live_value(access, mediator, rows).tensor
    if access.kind == "ungated":
        return {site_of(path).index: gates.before_gate(path, tensor) for path in access.paths}
    return {None: tensor}


def _picked(values: Tensor, keys: Sequence[Path], rows: Rows, spans: Spans | None) -> Tensor:
    positions = [key.position for key in keys]
    where = columns(positions, rows, values.shape[1], spans)  # type: ignore[arg-type]  # concrete() made them single
    everything = isinstance(where, list) and where == list(range(values.shape[1]))
    site = site_of(keys[0])
    part = None if site.kind == "ungated" else site.columns  # `before_gate` has cut it out
    return wire.pick(values, None if everything else where, part)


def _check_positions(paths: Sequence[Path], given: Prompts) -> None:
    """Raise, before any forward pass, for a position that a prompt does not have."""
    for path in paths:
        rows = given.rows(site_of(path).tower)
        assert path.position is not None and rows.width is not None
        with circumstances(str(path)):
            given.check_span(path.position, site_of(path).tower)
            columns(concrete(path.position, rows, rows.width, given.spans), rows, rows.width, given.spans)


def _local(
    model: engine.Model,
    wanted: Sequence[Path],
    inputs: Mapping[str, Tensor] | Tensor,
    batch: engine.Batch,
    spans: Spans | None,
    keep_graph: bool,
) -> list[Pack]:
    packs: list[Pack] = []

    def body() -> None:
        mediator = engine.worker(model, "ns.capture")
        packs.extend(gather(model, mediator, wanted, batch, keep_graph=keep_graph, spans=spans))

    with torch.set_grad_enabled(keep_graph):
        engine.run(model, inputs, body, last=True)
    return packs


def joined(parts: Sequence[Sequence[Pack]], batches: Sequence[Sequence[int]]) -> list[Pack]:
    """The packs of all batches, with rows in the order of the prompts."""
    if len(parts) == 1 and list(batches[0]) == sorted(batches[0]):
        return list(parts[0])
    order = torch.tensor([row for rows in batches for row in rows]).argsort()
    found: list[Pack] = []
    for packs in zip(*parts, strict=True):
        tensor = torch.cat([pack.tensor for pack in packs])
        found.append(packs[0].with_tensor(tensor[order.to(tensor.device)]))
    return found


def _tokens(batch: engine.Batch) -> tuple[tuple[int, ...], ...] | None:
    if batch.ids is None:
        return None
    rows = batch.decoder
    if rows.starts is None or rows.lengths is None:
        return tuple(tuple(row) for row in batch.ids.tolist())
    return tuple(
        tuple(row[start : start + length])
        for row, start, length in zip(batch.ids.tolist(), rows.starts, rows.lengths, strict=True)
    )


def _ids(given: Prompts, wanted: Sequence[Path]) -> tuple[tuple[int, ...], ...] | None:
    if given.values is not None:
        return None
    if given.decoder_ids is None:
        return given.ids
    # Positions count the tokens of a site's tower, so with sites of both towers there is no single row of ids.
    towers = {site_of(path).tower for path in wanted}
    return (
        None
        if len(towers) > 1 or (given.sounds is not None and towers == {"encoder"})
        else given.decoder_ids
        if towers == {"decoder"}
        else given.ids
    )
