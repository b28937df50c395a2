"""The words of portable paths, and the role that a path ends in. No model is needed."""

from __future__ import annotations

from dataclasses import dataclass

from nnsplice.atlas.indices import column
from nnsplice.errors import RefusedPlace, UnknownPath, closest
from nnsplice.paths.path import Path

#: Names after `layers[i]`, and names after those.
INSIDE_LAYER = ("attn", "mixer", "mlp", "heads", "groups", "experts", "neurons", "cross", "cross.heads", "cross.groups")
INSIDE_ATTN = ("q", "k", "v", "o")
INSIDE_MLP = ("gate", "up", "down", "router")
#: Counted parts -> their names in messages, in the singular.
COUNTED = {"heads": "head", "groups": "group", "experts": "expert", "neurons": "neuron"}
COUNTED |= {"cross.heads": "head", "cross.groups": "group"}
ROOTS = ("embed", "layers", "final_norm", "unembed")
#: Values of each site; a site that is not listed has only `output`.
VALUES: dict[str, tuple[str, ...]] = {
    "layers": ("input", "mid", "output"),
    "heads": ("output", "q", "k", "v", "gate", "ungated", "pattern"),
    "groups": ("k", "v"),
    "cross.heads": ("output", "q", "k", "v", "pattern"),
    "cross.groups": ("k", "v"),
}


@dataclass(frozen=True, slots=True)
class PathRole:
    """The role of a portable path's site, the step with its index, and its value."""

    #: The last name: `layers`, `attn`, `q`, `heads`, ...
    role: str
    #: The number of the step of heads, groups, experts or neurons; None for other roles.
    counted: int | None
    value: str | None


def role_of(path: Path) -> PathRole:
    """Check the words of a portable path against the language (not yet against a model)."""
    names = [step.name for step in path.steps]
    if names[0] == "full":
        return PathRole("full", None, path.value)
    if names[0] not in ROOTS:
        raise UnknownPath(
            f"{names[0]} is no site", path=path, column=column(path, 0), expected=closest(names[0], ROOTS)
        )
    value = path.value
    if names[0] != "layers":
        if len(names) > 1:
            raise UnknownPath(f"{names[0]} has no part {names[1]}", path=path, column=column(path, 1))
        return PathRole(names[0], None, value)
    if len(names) == 1:
        return PathRole("layers", None, value)
    _refuse_projected_heads(path, names)
    allowed = {"attn": INSIDE_ATTN, "cross": INSIDE_ATTN, "mlp": INSIDE_MLP}
    for number, name in enumerate(names[1:], start=1):
        options = INSIDE_LAYER if number == 1 else allowed.get(names[1], ()) if number == 2 else ()
        if name not in options:
            raise UnknownPath(
                f"{names[number - 1]} has no part {name}",
                path=path,
                column=column(path, number),
                expected=closest(name, options) if options else "nothing more here",
            )
    return PathRole(names[-1], 1 if names[1] in COUNTED else None, value)


def _refuse_projected_heads(path: Path, names: list[str]) -> None:
    if names[1] != "attn" or not set(names[2:]) & {"heads", "groups"}:
        return
    number = next(i for i, name in enumerate(names) if i > 1 and name in ("heads", "groups"))
    write = ".".join(str(step) for step in (path.steps[0], *path.steps[number:]))
    raise RefusedPlace(
        "after the output projection heads are mixed; a head's own slice lies before it",
        path=path,
        column=column(path, number),
        write=f"{write}.{path.value}" if path.value else write,
    )
