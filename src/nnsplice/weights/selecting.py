"""`select`: the weights of addresses, parameter names, or lists of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, TypeAlias

from torch import nn

from nnsplice.atlas import Atlas, Selection, unwrap
from nnsplice.errors import BadArgument, BadType, NnspliceError, OutOfRange, PathError, UnknownPath, named
from nnsplice.paths import Path, parse_path
from nnsplice.warn import warn_caller
from nnsplice.weights import shared_heads

#: An address or the name of a parameter, or a list of them, which is their union.
Restriction: TypeAlias = "str | list[str] | list[Restriction]"
#: The forms of a restriction, for messages.
FORMS = (
    "full, embed, unembed, l<i>, l<i> attn, l<i> mlp, l<i>h<j>, l<i>g<j>, "
    "an address such as layers[0:3].mlp.up, or a parameter's name"
)
_SHORT = re.compile(r"l\d", re.IGNORECASE)


def select(model: Any, restriction: Restriction | Path | Selection, *, own: bool = False) -> Selection:
    """Select the weights of an address.

    >>> head = ns.weights.select(model, "l1h2")
    >>> len(head), head.numel()
    (3, 268)
    >>> print((ns.weights.select(model, "l1 attn") - head).tree())
    transformer.h.1.attn
    ├── c_attn
    │   ├── weight  ██████████████████░░░░░░   75.0%  (576 of 768)
    │   └── bias    ██████████████████░░░░░░   75.0%  (36 of 48)
    └── c_proj
        ├── weight  ██████████████████░░░░░░   75.0%  (192 of 256)
        └── bias    ████████████████████████  100.0%  (16 of 16)
    4 parameters  (820 of 1,088)

    Args:
        model: a model from `ns.load`, or a module.
        restriction: an address (`"l5h3"`, `"layers[0:5].attn.q"`), the name of a parameter, `"full"`, a list of these,
            or a selection.
        own: leave out keys and values that other heads read too, unless all heads of the group are selected. `swap`,
            `interpolate`, `ablate` and `freeze_except` select addresses this way. Without it a head includes its
            key/value head.

    Returns:
        The selection, a value with `|`, `&`, `-`, `~`, `numel()`, `masks()` and `tree()`.

    Raises:
        BadType: neither an address, a list nor a selection.
        BadArgument: an address that does not exist, or an empty list.
        OutOfRange: a layer, head or group that does not exist.
    """
    if isinstance(restriction, Selection):
        if own:
            raise BadArgument("a selection is what it is: own=True is for addresses", expected="an address or a list")
        return _checked(Atlas.of(model), restriction)
    if isinstance(restriction, Path):
        atlas = Atlas.of(model)
        found = atlas.resolve(restriction)
        return _union(atlas, shared_heads.own_parts(atlas, [(restriction, found)])) if own else found
    return selection_of(model, restriction, own=own)


def _checked(atlas: Atlas, selection: Selection) -> Selection:
    """The selection itself, after a check that it fits the model."""
    for name, shape in selection.shapes.items():
        if atlas.tree.params.get(name) != shape:
            found = f"has the shape {list(atlas.tree.params[name])}" if name in atlas.tree.params else "is not there"
            raise BadArgument(
                f"this selection is of another model: {name}, of shape {list(shape)}, {found} in this one",
                expected="a selection of this model",
                write="ns.weights.select(model, address)",
            )
    return selection


def selection_of(model: Any, restriction: Restriction, *, own: bool = False) -> Selection:
    """The selection of a text or a list of texts, in the model's order of parameters."""
    atlas = Atlas.of(model)
    texts = list(_texts(restriction))
    wanted = [_selection_of_text(model, atlas, text) for text in texts]
    _warn_of_towers_and_ties(atlas, texts)
    return _union(atlas, shared_heads.own_parts(atlas, wanted) if own else [selection for _, selection in wanted])


def _union(atlas: Atlas, found: list[Selection]) -> Selection:
    if len(found) == 1:
        return found[0]
    union = found[0]
    for selection in found[1:]:
        union |= selection
    return Selection.of({name: union.parts[name] for name in sorted(union, key=atlas.rank)}, atlas.tree.params)


def _texts(restriction: Any, inside: bool = False) -> Iterator[str]:
    """The texts of a nested list, stripped."""
    if isinstance(restriction, str):
        text = restriction.strip()
        if inside and text.lower() == "full":
            raise BadArgument(
                f"{restriction!r} is in a list, but it is the whole model, to which nothing can be added",
                expected='"full" by itself',
            )
        yield text
    elif isinstance(restriction, list):
        if not restriction:
            raise BadArgument("an empty list selects nothing", expected=f"at least one of {FORMS}")
        for one in restriction:
            yield from _texts(one, inside=True)
    else:
        raise BadType(
            f"a restriction is a str or a list of them, and this is {named(restriction)}",
            expected='"l5h3" or ["l5h3", "l6 mlp"]',
        )


def _selection_of_text(model: Any, atlas: Atlas, text: str) -> tuple[Path | None, Selection]:
    """The site that a text names, None for a parameter's name, and its weights."""
    params = atlas.tree.params
    name = exact(model, atlas, text)
    if name is not None:
        return None, Selection.of({name: None}, params)
    try:
        path = parse_path(text)
    except PathError as error:
        raise _unknown(atlas, text, error) from None
    try:
        return path, atlas.resolve(path)
    except OutOfRange as error:
        raise OutOfRange(f"{text!r} is out of range: {error}") from None
    except UnknownPath as error:
        # A native path may be mistyped, so the closest names are suggested; a portable one is just not in this model.
        raise (_unknown(atlas, text, error) if path.native else BadArgument(str(error))) from None


def exact(model: Any, atlas: Atlas, text: str) -> str | None:
    """The parameter with exactly this name, in the bare model or in its wrapper; None if there is none."""
    if text in atlas.tree.params:
        return text
    if text in atlas.tree.aliases:
        return atlas.tree.aliases[text]
    if not isinstance(model, nn.Module) or unwrap(model) is model:
        return None
    return {outer: inner for inner, outer in names(model).items()}.get(text)


def names(model: Any) -> Mapping[str, str]:
    """Name of a parameter in the bare model -> its name in `model.named_parameters()`, which may have a prefix."""
    root = unwrap(model)
    if model is root or not isinstance(model, nn.Module):
        return {name: name for name in Atlas.of(model).tree.params}
    outer = {id(parameter): name for name, parameter in model.named_parameters()}
    return {name: outer[id(parameter)] for name, parameter in root.named_parameters()}


def _unknown(atlas: Atlas, text: str, error: NnspliceError) -> BadArgument:
    return BadArgument(
        f"Unknown restriction {text!r}: {str(error).splitlines()[0]}",
        expected=FORMS,
        write=_near(text, atlas.tree.params, 0.9) or _repaired(atlas, error) or _closest(atlas, text),
    )


def _near(text: str, options: Iterable[str], cutoff: float) -> str | None:
    return next(iter(get_close_matches(text, list(options), n=1, cutoff=cutoff)), None)


def _repaired(atlas: Atlas, error: NnspliceError) -> str | None:
    """The repair that the error suggests, if this model has the address."""
    repair = next((line[9:] for line in str(error).splitlines() if line.startswith("  write: ")), "")
    try:
        atlas.resolve(repair)
    except NnspliceError:
        return None
    return repair


def _closest(atlas: Atlas, text: str) -> str | None:
    layers = max((tower.n_layers for tower in atlas.towers.values()), default=0)
    short = [f"l{i}{part}" for i in range(layers) for part in ("", " attn", " mlp", "h0", "g0")]
    found = _near(text.lower(), ["full", "embed", "unembed", "final_norm", *short], 0.5)
    return found or _near(text, atlas.tree.params, 0.5)


def _warn_of_towers_and_ties(atlas: Atlas, texts: Iterable[str]) -> None:
    """Warn, once for all texts, of short forms in a model with two towers, and of tied tensors."""
    texts = list(texts)
    if len(atlas.towers) > 1 and any(_SHORT.match(text) for text in texts):
        warn_caller("this model has two towers, and a short form means the decoder; write encoder.l0 for the encoder's")
    for text in texts:
        tied = atlas.tree.aliases.get(text) or ("the embedding" if atlas.tied and _is_unembed(text) else None)
        if tied is not None:
            warn_caller(f"{text!r} is tied in this model: it is the same tensor as {tied}, which changes with it")
            return


def _is_unembed(text: str) -> bool:
    try:
        path = parse_path(text)
    except PathError:
        return False
    return not path.native and path.steps[0].name == "unembed"
