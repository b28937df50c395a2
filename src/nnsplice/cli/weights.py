"""`nnsplice mask`: which weights belong to a site."""

from __future__ import annotations

import warnings
from typing import Annotated

import typer

from nnsplice.cli.commands import WrongUsage, app, blueprint
from nnsplice.cli.options import ModelArgument
from nnsplice.cli.table import JsonOption, plain_warnings, tabulate


@app.command()
def mask(
    model: ModelArgument,
    restriction: Annotated[
        list[str],
        typer.Argument(metavar="PLACE...", help="l5h3, 'l5 mlp', 'layers[0:5].attn.q', full, a parameter's name."),
    ],
    plain: Annotated[bool, typer.Option("--plain", help="One parameter's name per line, and nothing else.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Which parameters of MODEL belong to a site, and how much of each. Nothing is run.

    \b
    nnsplice mask toy l1h0
    nnsplice mask toy "l1 mlp" l2h3
    nnsplice mask toy 'layers[0:3].attn.q' --plain

    Several sites are shown together. A key/value head that several heads share is shown with each of
    them, with a note: what acts on weights takes it with the whole group (l1g0).
    """
    if plain and as_json:
        raise WrongUsage("Give --plain or --json")
    from nnsplice.weights import create_param_masks, preview_weight_restriction
    from nnsplice.weights.preview import rows_of

    found = blueprint(model)
    with plain_warnings():
        warnings.simplefilter("always")
        masks = create_param_masks(found, restriction[0] if len(restriction) == 1 else restriction)
    if as_json:
        rows = [(row.name, str(row.selected), str(row.total)) for row in rows_of(found, masks)]
        tabulate("parameters", rows, ("parameter", "selected", "total"))
        return
    preview_weight_restriction(found, masks, plain=plain)
