"""A steering vector as text, as HTML and as a figure."""

from __future__ import annotations

import html as escape
from collections.abc import Mapping, Sequence

from torch import Tensor

from nnsplice import plots
from nnsplice.errors import BadArgument
from nnsplice.paths import parse_path
from nnsplice.shown import counted
from nnsplice.steering.about import About
from nnsplice.steering.sites import layer_of

#: Vectors of more sites are shortened to the first and the last.
SHOWN, FIRST, LAST = 12, 6, 5


def text(directions: Mapping[str, Tensor], about: About) -> str:
    """One line for the vector, and one for each site."""
    return "\n".join(_lines(directions, about))


def html(directions: Mapping[str, Tensor], about: About) -> str:
    """The same lines for a notebook."""
    first, *rest = (escape.escape(line) for line in _lines(directions, about))
    kind, _, summary = first.partition(":")
    return f"<div><b>{kind}</b>:{summary}" + "".join(f"<br>&emsp;{line.strip()}" for line in rest) + "</div>"


def _lines(directions: Mapping[str, Tensor], about: About) -> list[str]:
    widths = "/".join(map(str, sorted({tensor.shape[-1] for tensor in directions.values()}))) or "0"
    options = "".join(f", {name}={value!r}" for name, value in about.options.items())
    method = f"{about.method or 'made of others'}{options}"
    head = f"SteeringVector: {counted(len(directions), 'site')}, width {widths}, method {method}, unit {about.unit}"
    if about.rows is not None:
        head += f", from {' and '.join(map(str, about.rows))} rows"
    keys = list(directions)
    lines = [_line(key, directions[key], about) for key in keys]
    return [head, *(lines if len(keys) <= SHOWN else [*lines[:FIRST], "  ...", *lines[-LAST:]])]


def _line(key: str, direction: Tensor, about: About) -> str:
    line = f"  {parse_path(key).place}"
    if key in about.norms:
        line += f"  {direction.norm().item() / about.norms[key]:.2f} of the states' norm"
    if key in about.quality:
        line += f", AUC {about.quality[key]:.2f} held out"
    return line


def plot(about: About, ax: plots.Axes | None) -> plots.Axes:
    """The held-out AUC by layer, a line for each kind of site."""
    if not about.quality:
        raise BadArgument(
            "there is no quality to draw: it was not measured", expected="a vector fitted on two pairs or more"
        )
    kinds: dict[str, dict[int, float]] = {}
    for key, value in about.quality.items():
        path = parse_path(key)
        kinds.setdefault(str(path).replace(f"[{layer_of(path)}]", "[:]", 1), {})[layer_of(path) or 0] = value
    layers: Sequence[int] = sorted({layer for values in kinds.values() for layer in values})
    return plots.lines(
        layers,
        {kind: [values.get(layer, float("nan")) for layer in layers] for kind, values in kinds.items()},
        x_label="layer",
        y_label="AUC, held out",
        title=about.method,
        level=0.5,
        ax=ax,
    )
