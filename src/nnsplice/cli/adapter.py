"""`nnsplice adapter DIR`: what an adapter changed, layer by layer, and how its training went."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nnsplice.cli.commands import app
from nnsplice.cli.options import TowerOption
from nnsplice.cli.table import JsonOption, TableRow, say, tabulate
from nnsplice.errors import BadArgument

if TYPE_CHECKING:
    from nnsplice.adapters import AdapterProfile, ExpertAdapter, Health

#: A row of a table as JSON, with unrounded numbers.
Values = Mapping[str, Any]

#: The length of the longest bar, and the characters for eighths of a cell.
CELLS = 24
EIGHTHS = " ▏▎▍▌▋▊▉█"


@app.command()
def adapter(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What save_pretrained of PEFT wrote.")],
    optimizer: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The optimizer's state, such as optimizer.pt; read without unpickling. Default: none."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The base model: parts have addresses then, and DoRA's change is exact. Default: none.",
        ),
    ] = None,
    tower: TowerOption = None,
    each: Annotated[bool, typer.Option("--each", help="A row for each weight, instead of one for each layer.")] = False,
    as_json: JsonOption = False,
) -> None:
    """What the adapter in DIR changed, layer by layer, and with --optimizer how training went there.

    \b
    nnsplice adapter ./my-lora
    nnsplice adapter ./checkpoint-500 --optimizer ./checkpoint-500/optimizer.pt
    nnsplice adapter ./my-lora --model toy --each

    The energy of a layer is the squared size of its change (the sum of the squared singular values of all its factors),
    the bar its share of the whole. In the optimizer's table, `gradient` is the root mean square of the gradients,
    `agreement` how far steps go the same way (from 0 to 1), `dead` the share of numbers that never had a gradient.
    Where the optimizer's state does not tell which parameter is which, that is an error, and never a guess.
    """
    from nnsplice import Atlas, load
    from nnsplice.adapters import ExpertAdapter, layer_health, map_param_ids_to_layers, profile, read_optimizer

    base = None if model is None else load(model)
    found = ExpertAdapter.from_peft(folder, base=base)
    profiled = profile(found, atlas=None if base is None else Atlas.of(base))
    health = None
    if optimizer is not None:
        state = read_optimizer(optimizer)
        count = sum(len(group["params"]) for group in state["param_groups"])
        grouping = map_param_ids_to_layers(folder, count, state=state, tower=None if tower is None else tower.value)
        health = layer_health(state, grouping)
    elif tower is not None:
        raise BadArgument("--tower is about the optimizer's table", write="--optimizer FILE")
    say(f"{_summary(found)}\n")
    if each:
        rows, values = _weights(profiled)
        tabulate("weights", rows, ("weight", "rank", "energy", "share", ""), values)
    else:
        rows, values = _layers(profiled)
        tabulate("layers", rows, ("layer", "matrices", "energy", "share", ""), values)
    if health is not None:
        say(f"\noptimizer: {_progress(health)}\n")
        rows, values = _health(health)
        tabulate("optimizer", rows, ("layer", "parameters", "gradient", "agreement", "dead", ""), values)


def _progress(health: Health) -> str:
    """A line about the steps of training."""
    steps = sorted({one.step for one in health.values()})
    shown = f"{steps[0]:g}" if len(steps) == 1 else f"{steps[0]:g} to {steps[-1]:g}"
    return f"{len(health)} layers, step {shown}"


def _summary(found: ExpertAdapter) -> str:
    ranks = sorted({pair.rank for pair in found.layers.values()})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    energy = sum(float(pair.energy) for pair in found.layers.values())
    lines = [f"{len(found.layers)} matrices of {rank}, energy {energy:.3g}"]
    if found.whole:
        some = ", ".join(found.whole[:3]) + (", ..." if len(found.whole) > 3 else "")
        lines.append(f"trained as a whole, and not counted: {some}")
    if any(pair.magnitude is not None and len(pair.singular_values) <= pair.rank for pair in found.layers.values()):
        lines.append("DoRA: without --model, the energy is that of the factors alone")
    return "\n".join(lines)


def _layers(profile: AdapterProfile) -> tuple[list[TableRow], list[Values]]:
    """The rows of a table, and their unrounded numbers for JSON."""
    layers = profile.layers()
    total, most = profile.total or 1.0, max(layers.values(), default=0.0) or 1.0
    values: list[Values] = [
        {
            "layer": row,
            "matrices": sum(one.row == row for one in profile.energies),
            "energy": energy,
            "share": energy / total,
        }
        for row, energy in layers.items()
    ]
    rows = [
        (one["layer"], f"{one['matrices']}", f"{one['energy']:.3g}", f"{one['share']:.1%}", bar(one["energy"] / most))
        for one in values
    ]
    return rows, values


def _weights(profile: AdapterProfile) -> tuple[list[TableRow], list[Values]]:
    """The rows of a table, and their unrounded numbers for JSON."""
    total = profile.total or 1.0
    most = max((one.energy for one in profile.energies), default=0.0) or 1.0
    values: list[Values] = [
        {"weight": one.path or one.name, "rank": one.rank, "energy": one.energy, "share": one.energy / total}
        for one in profile.energies
    ]
    rows = [
        (one["weight"], f"{one['rank']}", f"{one['energy']:.3g}", f"{one['share']:.1%}", bar(one["energy"] / most))
        for one in values
    ]
    return rows, values


def _health(health: Health) -> tuple[list[TableRow], list[Values]]:
    """The rows of a table, and their unrounded numbers for JSON."""
    most = max(one.gradient for one in health.values()) or 1.0
    values: list[Values] = [
        {
            "layer": layer,
            "parameters": one.params,
            "gradient": one.gradient,
            "agreement": one.agreement,
            "dead": one.dead_fraction,
        }
        for layer, one in health.items()
    ]
    rows = [
        (f"{one['layer']}", f"{one['parameters']}", f"{one['gradient']:.2e}", f"{one['agreement']:.2f}",
         f"{one['dead']:.1%}", bar(one["gradient"] / most))
        for one in values
    ]  # fmt: skip
    return rows, values


def bar(share: float) -> str:
    """A bar as long as a share of the longest one, to an eighth of a cell.

    >>> from nnsplice.cli.adapter import bar
    >>> bar(0.13), bar(0.0)
    ('███▏', '')
    """
    eighths = round(share * CELLS * 8)
    return ("█" * (eighths // 8) + EIGHTHS[eighths % 8]).rstrip()
