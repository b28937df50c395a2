"""Parts of senders: some tokens, an expert, or a feature; checked against the model."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnsplice import engine, wire
from nnsplice.activations import features
from nnsplice.activations.access import site_of
from nnsplice.activations.prompts import Prompts
from nnsplice.atlas import Site, attached, host, unwrap
from nnsplice.attribution.branches import rounding_of
from nnsplice.circuits.ablations import AblationSource
from nnsplice.circuits.addresses import Piece, part_of, whole_of
from nnsplice.circuits.masks import EdgeMask
from nnsplice.circuits.recording import record, run_plainly
from nnsplice.circuits.streams import Slot, whole_slots
from nnsplice.circuits.wiring import Wiring
from nnsplice.errors import BadArgument, RefusedPlace
from nnsplice.paths import Dictionary, Path, Position
from nnsplice.sweeps.expansion import tokens_of


def check_parts(
    model: engine.Model, wiring: Wiring, prompts: Prompts, source: AblationSource, senders: Iterable[Path]
) -> None:
    """Raise where one of these is a part of a sender that this model, these prompts or this ablation do not have.

    Raises:
        UnknownPath, ShortRow, RefusedPlace, BadArgument: which of them.
    """
    parts = [sender for sender in dict.fromkeys(senders) if part_of(sender) is not None]
    if parts and source.trained_from is not None:
        raise BadArgument(
            f'{parts[0]} is a part of a sender, and ablation="optimal" trains constants for whole ones',
            expected=f"all of it: {whole_of(parts[0])}",
        )
    for sender in parts:
        (path,) = engine.expand(model, sender.place)
        tokens_of(path.at(sender.position), prompts)
        if sender.sae is not None:
            _check_sae(model, sender, path, wiring.layers[int(sender.steps[0].index)].mlp_added)  # type: ignore[arg-type]
        if sender.steps[-1].name != "experts":
            continue
        layer = wiring.layers[int(sender.steps[0].index)]  # type: ignore[arg-type]
        if layer.mlp_norm is not None:
            raise RefusedPlace(
                "a norm of all experts together stands between them and the stream, so no part of it is one expert's",
                path=sender,
                write=str(whole_of(sender)),
            )
        if not source.has_experts:
            raise BadArgument(
                f"{sender} is a sender by itself, and the ablation holds no value of single experts",
                expected='ablation="patch", "zero" or "mean"',
            )


def _check_sae(model: engine.Model, sender: Path, path: Path, added: Site) -> None:
    """Raise for a feature that is no part of the MLP's addition to the stream."""
    assert sender.sae is not None
    sae = attached(unwrap(model))[sender.sae.name].sae
    if site_of(path).kind == "transcoded":
        raise RefusedPlace(
            "a transcoder reads what enters the MLP, so its features are no shares of what the MLP adds",
            path=sender,
            write=str(whole_of(sender)),
        )
    if sae.identity["norm"] != "none":
        raise RefusedPlace(
            "this SAE scales its inputs by each token's size, so what the MLP adds is no sum of features and an error",
            path=sender,
            write=str(whole_of(sender)),
        )
    if site_of(host(path)).location != added.location:
        raise RefusedPlace(
            "what this SAE is of is not what the MLP adds to the stream", path=sender, write=str(whole_of(sender))
        )


def saes_of(model: engine.Model, members: Iterable[Path]) -> dict[str, Any]:
    """The SAEs whose features are senders, by their names, as plain data."""
    saes = features.identities(model, members)
    return {"saes": saes} if saes else {}


def experts_of(wiring: Wiring, masks: Iterable[EdgeMask]) -> set[tuple[int, int]]:
    """By layer and number."""
    layers = {sender + len(layer.q): number for number, ((sender, _), layer)
              in enumerate(zip(wiring.shape.starts, wiring.layers, strict=True))}  # fmt: skip
    return {(layers[sender], expert) for mask in masks for sender, expert in mask.experts}


#: A sender, one of its pieces, and at which tokens.
KeptPart = tuple[int, Piece, frozenset[Position] | None]


def _kept_by(mask: EdgeMask, receiver: int, sender: int) -> set[KeptPart]:
    """The part of its sender that an edge carries."""
    parts = mask.parts.get((receiver, sender))
    if parts is None:
        return {(sender, None, None)}
    pieces: dict[Piece, set[Position | None]] = {}
    for position, piece in parts:
        pieces.setdefault(piece, set()).add(position)
    return {
        (sender, piece, None if None in positions else frozenset(positions))  # type: ignore[arg-type]
        for piece, positions in pieces.items()
    }


def kept_by(mask: EdgeMask) -> set[Hashable]:
    """All that is kept of senders for a circuit."""
    return {kept for receiver, sender in np.argwhere(mask.edges).tolist() for kept in _kept_by(mask, receiver, sender)}


def slots_of(
    model: engine.Model, wiring: Wiring, prompts: Prompts, rows: Sequence[int], masks: Sequence[EdgeMask]
) -> tuple[list[Slot], np.ndarray]:
    """The recorded parts of senders, and which of them each receiver reads, `[circuit, receiver, slot]`."""
    edges = np.stack([mask.edges for mask in masks])
    if not any(mask.parts for mask in masks):
        return whole_slots(edges)
    found = {
        (circuit, receiver, kept)
        for circuit, mask in enumerate(masks)
        for receiver, sender in np.argwhere(mask.edges).tolist()
        for kept in _kept_by(mask, receiver, sender)
    }
    order = {kept: n for n, kept in enumerate(sorted({kept for _, _, kept in found}, key=lambda k: (k[0], repr(k))))}
    reads = np.zeros((*edges.shape[:2], len(order)), dtype=bool)
    for circuit, receiver, kept in found:
        reads[circuit, receiver, order[kept]] = True
    _check_once(reads, list(order))
    slots = [Slot(sender, piece, _tokens_at(model, wiring, prompts, rows, sender, at)) for sender, piece, at in order]
    return slots, reads


def _tokens_at(
    model: engine.Model,
    wiring: Wiring,
    prompts: Prompts,
    rows: Sequence[int],
    sender: int,
    positions: frozenset[Position] | None,
) -> Tensor | None:
    if positions is None:
        return None
    (place,) = engine.expand(model, wiring.shape.senders[sender])
    found = torch.zeros(len(rows), prompts.lengths("decoder")[rows[0]], 1)
    for position in positions:
        own = tokens_of(place.at(position), prompts)
        for number, row in enumerate(rows):
            found[number, own[row]] = 1.0
    return found.to(model.device)


def _check_once(reads: np.ndarray, order: Sequence[KeptPart]) -> None:
    """Raise if one receiver would read a part (an expert, a feature) twice: by itself, and in its whole.

    Raises:
        BadArgument: it would read one twice.
    """
    for number, (sender, piece, _) in enumerate(order):
        if piece is None:
            continue
        beside = [n for n, (other, one, _) in enumerate(order) if other == sender and _shares(piece, one)]
        if (reads[..., beside] & reads[..., [number]]).any():
            raise BadArgument(
                f"{_named(piece)} and another part of its MLP are both in a circuit: its part would count twice",
                expected="tokens of the MLP, its experts, or features of one SAE",
            )


def _shares(piece: Piece, other: Piece) -> bool:
    """Whether something of an MLP may be in both, other than as pieces of one kind have nothing in common."""
    if isinstance(piece, Dictionary) and isinstance(other, Dictionary):
        return piece.name != other.name
    return type(piece) is not type(other)


def _named(piece: Piece) -> str:
    return f"expert {piece}" if isinstance(piece, int) else str(piece)


def check_experts(model: engine.Model, wiring: Wiring, prompts: Prompts, experts: Collection[tuple[int, int]]) -> None:
    """Subtract one expert of each layer from the sum of all experts, and check that the MLP's output changes by it.

    Raises:
        RefusedPlace: it adds something else.
    """
    root = unwrap(model)
    for number in sorted({layer for layer, _ in experts}):
        layer = wiring.layers[number]
        every = [(number, expert) for expert in range(layer.block.n_experts)]
        own = record(root, model, wiring, prompts, [0], -1, every).values
        (key, part) = max(own.experts.items(), key=lambda pair: float(pair[1].abs().max()))
        added = own.mlp[number]
        less = _added_without(root, model, wiring, prompts, number, part)
        off = float((added - less - part.to(added)).abs().max())
        if not off <= rounding_of(added.dtype) * (1.0 + float(added.abs().max())):
            raise RefusedPlace(
                f"something stands between the experts and what their MLP adds: without one it is {off:.2g} off",
                path=f"layers[{layer.block.index}].experts[{key[1]}]",
                write=f"layers[{layer.block.index}].mlp",
            )


def _added_without(
    root: nn.Module, model: engine.Model, wiring: Wiring, prompts: Prompts, number: int, part: Tensor
) -> Tensor:
    """The output of an MLP when the sum of its experts is reduced by this."""
    layer = wiring.layers[number]
    captured: list[Tensor] = []

    def fewer(_module: nn.Module, _args: Any, output: Any) -> Any:
        made = wire.unpack(output, None)
        return wire.repack(output, None, made - part.to(made).reshape(made.shape))

    def added(_module: nn.Module, _args: Any, output: Any) -> None:
        captured.append(wire.as_rows(wire.unpack(output, layer.mlp_added.item), 1).clone())

    hooks = [
        root.get_submodule(str(layer.block.experts)).register_forward_hook(fewer),
        root.get_submodule(layer.mlp_added.module).register_forward_hook(added),
    ]
    try:
        with torch.no_grad():
            run_plainly(root, model, prompts, [0], -1)
    finally:
        for hook in hooks:
            hook.remove()
    return captured[0]
