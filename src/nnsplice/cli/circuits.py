"""`nnsplice circuit`: find a circuit, run it, look at it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from nnsplice.cli import settings as given
from nnsplice.cli.commands import Commands, WrongUsage, app
from nnsplice.cli.files import prompts_of, require_writable
from nnsplice.cli.loading import loaded
from nnsplice.cli.options import (
    AnswerOption,
    CircuitArgument,
    CleanOption,
    CorruptedOption,
    DeviceOption,
    DtypeOption,
    MaxTokensOption,
    ModelOption,
    NoCacheOption,
    WrongOption,
)
from nnsplice.cli.table import JsonOption, plain_warnings, say, tabulate
from nnsplice.errors import FileError

circuit: typer.Typer = typer.Typer(
    cls=Commands, rich_markup_mode=None, no_args_is_help=True, help="Find a circuit, run it, look at it."
)
app.add_typer(circuit, name="circuit")

#: How edges are chosen: by a method of `attribute`, and one after the other.
METHODS = ("eap", "eap-ig", "relp", "ifr", "acdc")
SITES = ["embed", "layers[:].heads[:]", "layers[:].mlp"]
#: Edges that are listed.
LISTED = 10


@circuit.command()
def find(
    model: ModelOption,
    clean: CleanOption,
    corrupted: CorruptedOption,
    answer: AnswerOption,
    wrong: WrongOption,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The file to write: .json.")],
    method: Annotated[
        str, typer.Option(metavar="NAME", help=f"{', '.join(METHODS)}: how edges are scored.")
    ] = "eap-ig",
    edges: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="How many of the best edges to keep. Default: --share.")
    ] = None,
    share: Annotated[
        float | None, typer.Option(metavar="X", help="The share of all edges to keep, from 0 to 1. Default: 0.02.")
    ] = None,
    by: Annotated[str, typer.Option(metavar="NAME", help="absolute or signed: the order of scores.")] = "absolute",
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Choose edges from the logits backwards, each connected to the logits.")
    ] = False,
    threshold: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="The least change of the metric of an edge that is kept, with acdc. Default: none; acdc needs one.",
        ),
    ] = None,
    max_tokens: MaxTokensOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    no_cache: NoCacheOption = False,
    as_json: JsonOption = False,
) -> None:
    """Choose the edges that matter most, by an estimate or one after the other, and show how much they keep.

    \b
    nnsplice circuit find --model toy --clean '...' --corrupted '...' --answer Mary --wrong John --out ioi.json
    """
    import nnsplice as ns

    if method not in METHODS:
        raise WrongUsage(f"There is no method {method!r}; write {', '.join(METHODS)}")
    if (method == "acdc") != (threshold is not None):
        raise WrongUsage("--threshold belongs to --method acdc, which needs one")
    if edges is not None and share is not None:
        raise WrongUsage("Give --edges or --share")
    if method == "acdc" and (edges is not None or share is not None or greedy):
        raise WrongUsage("acdc finds out how many edges stay: leave out --edges, --share and --greedy")
    require_writable(out, ".json")
    metric = ns.logit_diff(given.single(answer), given.single(wrong))
    clean, corrupted = prompts_of(clean), prompts_of(corrupted)
    question = (loaded(model, device, dtype, no_cache=no_cache), clean, corrupted)
    progress = sys.stderr.isatty()
    with plain_warnings():
        if threshold is not None:
            found = ns.acdc(*question, metric, threshold=threshold, max_tokens=max_tokens, progress=progress)
        else:
            scores = ns.attribute(*question, SITES, metric, method=method, max_tokens=max_tokens, progress=progress)
            n = edges if edges is not None else len(ns.Circuit.select(scores, 0.02 if share is None else share))
            chosen: Any = ns.Circuit.greedy if greedy else ns.Circuit.top
            found = chosen(scores, n, by)
        report = ns.faithfulness(question[0], found, *question[1:], metric, max_tokens=max_tokens, progress=False)
    found.to_file(out)
    _list(found, LISTED)
    say()
    say(f"keeps {report.f()[0]:.3f} of the metric; {report.points[0].connected} of {len(found)} edges on a way through")
    say(f"written to {out}")


@circuit.command()
def run(
    file: CircuitArgument,
    model: ModelOption,
    clean: CleanOption,
    answer: AnswerOption,
    wrong: WrongOption,
    corrupted: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="A prompt that gives ablated edges their values, one for each --clean; or @FILE. Default: none.",
        ),
    ] = None,
    ablation: Annotated[
        str, typer.Option(metavar="NAME", help="patch, zero or mean: the values outside the circuit.")
    ] = "patch",
    max_tokens: MaxTokensOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    no_cache: NoCacheOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run a circuit, with everything outside it ablated, beside the whole model and beside nothing.

    \b
    nnsplice circuit run ioi.json --model toy --clean '...' --corrupted '...' --answer Mary --wrong John
    """
    import nnsplice as ns

    loaded_model = loaded(model, device, dtype, no_cache=no_cache)
    one = _read(file, loaded_model)
    metric = ns.logit_diff(given.single(answer), given.single(wrong))
    options: dict[str, Any] = {"ablation": ablation, "max_tokens": max_tokens, "progress": sys.stderr.isatty()}
    with plain_warnings():
        report = ns.faithfulness(
            loaded_model, one, prompts_of(clean), prompts_of(corrupted or []) or None, metric, **options
        )
    rows = [
        (str(n), f"{value: .4g}", f"{full: .4g}", f"{empty: .4g}")
        for n, (value, full, empty) in enumerate(zip(report.values[:, 0], report.full, report.empty, strict=True))
    ]
    columns = (report.values[:, 0], report.full, report.empty)
    values = [
        {"prompt": n, "circuit": value, "model": full, "empty": empty}
        for n, (value, full, empty) in enumerate(zip(*columns, strict=True))
    ]
    say(repr(one))
    tabulate("prompts", rows, ("prompt", " circuit", " model", " empty"), values)
    low, high = report.ci()[0]
    interval = "" if low != low else f", {low:.3f} to {high:.3f} at 95%"
    say(f"\nkeeps {report.f()[0]:.3f} of {metric.name}{interval}")


@circuit.command(name="show")
def show_(
    file: CircuitArgument,
    edges: Annotated[int, typer.Option(metavar="N", min=1, help="How many of the strongest edges to list.")] = LISTED,
    html: Annotated[
        Path | None,
        typer.Option("--page", "--html", metavar="FILE", help="Write a page for a browser: .html. Default: none."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The model, for a graph of EAP-IG whose heads share keys and values. Default: not loaded.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what is in a circuit, and draw it.

    \b
    nnsplice circuit show ioi.json --page ioi.html
    """
    require_writable(html, ".html", option="--page")
    with plain_warnings():
        one = _read(file, None if model is None else loaded(model))
    _list(one, edges)
    if html is not None:
        one.to_html(html)
        say(f"\nwritten to {html}")


def _read(file: Path, model: Any) -> Any:
    """The circuit of a file: our own, or a graph of EAP-IG."""
    import nnsplice as ns
    from nnsplice.files import from_json, text_of

    if not file.is_file():
        raise FileError(f"there is no file {file}", expected="what `nnsplice circuit find` wrote")
    content = from_json(text_of(file), file)
    if isinstance(content, dict) and {"cfg", "nodes", "edges"} <= content.keys():
        return ns.Circuit.from_json(file, model=model)
    return ns.Circuit.from_file(file)


def _list(one: Any, most: int) -> None:
    """Print what is in a circuit, the strongest edges first."""
    say(repr(one))
    about = [f"{name} {one.provenance[name]}" for name in ("model", "method") if name in one.provenance]
    if about:
        say(", ".join(about))
    scores = one.scores or (float("nan"),) * len(one)
    order = sorted(range(len(one)), key=lambda n: -abs(scores[n]) if scores[n] == scores[n] else 0.0)[:most]
    numbers = [f"{scores[n]: .4g}" if scores[n] == scores[n] else "" for n in order]
    say()
    if one.kind == "edges":
        rows = [(str(one.edges[n][0]), str(one.edges[n][1]), score) for n, score in zip(order, numbers, strict=True)]
        values = [{"sender": str(one.edges[n][0]), "receiver": str(one.edges[n][1]), "score": scores[n]} for n in order]
        tabulate("edges", rows, ("sender", "receiver", " score"), values)
    else:
        rows = [(str(one.nodes[n]), score) for n, score in zip(order, numbers, strict=True)]
        values = [{"node": str(one.nodes[n]), "score": scores[n]} for n in order]
        tabulate("nodes", rows, ("node", " score"), values)
