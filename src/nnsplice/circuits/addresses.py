"""The addresses of senders and receivers.

Senders are `embed`, `layers[i].heads[j]`, `layers[i].mlp` and `layers[i].experts[e]`, at all tokens or, as in
`layers[i].heads[j][-1]`, at some; and features of an SAE of `layers[i].mlp.output`, and its error. Receivers are
`layers[i].heads[j].q`, `layers[i].groups[g].k`, `layers[i].groups[g].v`, `layers[i].mlp` and `unembed`. Any spelling of
them that a path can have is taken, and one comes out.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Literal

from nnsplice.errors import BadArgument
from nnsplice.paths import Dictionary, Path, Position, parse_path

Role = Literal["sender", "receiver"]
#: An expert of an MLP, a feature of an SAE of its output, or that SAE's error; None for the whole sender.
Piece = int | Dictionary | None
#: At which tokens, None for all of them; and which piece.
SenderPart = tuple[Position | None, Piece]

SENDERS = (
    "embed, layers[i].heads[j], layers[i].mlp, layers[i].experts[e], "
    'layers[i].mlp.output.sae["name"].features[n], layers[i].mlp.output.sae["name"].error'
)
RECEIVERS = "layers[i].heads[j].q, layers[i].groups[g].k, layers[i].groups[g].v, layers[i].mlp, unembed"


@lru_cache(maxsize=1 << 18)
def address(given: str | Path, role: Role) -> Path:
    """The one spelling of a sender or a receiver.

    Raises:
        BadArgument: it is neither, or several sites at once.
    """
    path = parse_path(given)
    names = tuple(step.name for step in path.steps)
    if path.native or path.tower == "encoder":
        raise _unknown(path, role, "a circuit names its sites by their roles")
    if not path.concrete or any(isinstance(step.index, int) and step.index < 0 for step in path.steps):
        raise BadArgument(
            f"{path} can mean several sites, or depends on the model",
            expected="one site",
            write=f'Circuit.of(nodes=["{path}"], model=model)   (paths are expanded there)',
        )
    if path.position is not None and role == "receiver":
        raise BadArgument(
            f"{path} is at some tokens, and a receiver reads at all of them",
            expected="a receiver without a position; a sender may have one",
            write=str(replace(path.place, value=None if path.value == "output" else path.value)),
        )
    if names == ("layers", "heads") and path.value in ("k", "v"):
        group = f"layers[{path.steps[0].index}].groups[{path.steps[1].index}].{path.value}"
        raise _unknown(path, role, "keys and values belong to groups, which several heads may share", group)
    taken = _TAKEN[role].get(names, ())
    if path.sae is not None and (role == "receiver" or names != ("layers", "mlp") or path.value != "output"):
        why = "it has to be of an SAE of layers[i].mlp.output, as other sites are no sender's own"
        raise _unknown(path, role, why if role == "sender" else "")
    if path.value not in taken:
        raise _unknown(path, role)
    kept = path.value if path.sae is not None or path.value != "output" else None
    return replace(path, tower=None, value=kept, site=None)


#: By the names of a site: the values that a path may have, as a sender and as a receiver.
_TAKEN: dict[Role, dict[tuple[str, ...], tuple[str | None, ...]]] = {
    "sender": {
        ("embed",): (None, "output"),
        ("layers", "heads"): (None, "output"),
        ("layers", "mlp"): (None, "output"),
        ("layers", "experts"): (None, "output"),
    },
    "receiver": {
        ("layers", "heads"): ("q",),
        ("layers", "groups"): ("k", "v"),
        ("layers", "mlp"): (None, "output", "input"),
        ("unembed",): (None, "output"),
    },
}


def whole_of(sender: Path) -> Path:
    """The sender of a graph that a sender is, or is a part of: at all tokens, and of an expert or a feature the MLP."""
    place = sender.place
    if place.sae is not None:
        return replace(place, sae=None, value=None, site=None)
    if place.steps[-1].name != "experts":
        return place
    return replace(place, steps=(place.steps[0], replace(place.steps[1], name="mlp", index=None)))


def part_of(sender: Path) -> SenderPart | None:
    """The part of a sender: its tokens, and an expert or feature; None for all of it."""
    piece = sender.sae or (sender.steps[-1].index if sender.steps[-1].name == "experts" else None)
    return None if piece is None and sender.position is None else (sender.position, piece)  # type: ignore[return-value]


def _unknown(path: Path, role: Role, why: str = "", write: str | None = None) -> BadArgument:
    kind = f"no {role} of a circuit"
    return BadArgument(
        f"{path} is {kind}" + (f": {why}" if why else ""),
        expected=SENDERS if role == "sender" else RECEIVERS,
        write=write,
    )
