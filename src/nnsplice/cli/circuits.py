"""`nnsplice circuit`: find a circuit, run it, look at it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from nnsplice.cli import settings as given
from nnsplice.cli.commands import Commands, WrongUsage, app
from nnsplice.cli.loading import Device, Dtype, MaxTokens, ModelName, NoCache, loaded
from nnsplice.cli.table import Json, say, tabulate
from nnsplice.cli.tracing import plain_warnings
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

Clean = Annotated[
    list[str], typer.Option("--clean", metavar="TEXT", help="What circuits run on. Once for each prompt.")
]
Corrupted = Annotated[
    list[str] | None,
    typer.Option("--corrupted", metavar="TEXT", help="What everything outside has its values from, in the same order."),
]
Answer = Annotated[
    list[str], typer.Option("--answer", metavar="TOKEN", help="The right token: one for all prompts, or one for each.")
]
Wrong = Annotated[list[str], typer.Option("--wrong", metavar="TOKEN", help="The wrong token, in the same way.")]
File = Annotated[Path, typer.Argument(metavar="CIRCUIT.JSON", help="What `circuit find` wrote, or a graph of EAP-IG.")]


@circuit.command()
def find(
    model: ModelName,
    clean: Clean,
    corrupted: Annotated[list[str], typer.Option(metavar="TEXT", help="The other prompt of each pair.")],
    answer: Answer,
    wrong: Wrong,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the circuit goes: .json.")],
    method: Annotated[str, typer.Option(metavar="NAME", help=f"{'|'.join(METHODS)}.")] = "eap-ig",
    edges: Annotated[int | None, typer.Option(metavar="N", help="How many of the best edges.")] = None,
    share: Annotated[float | None, typer.Option(metavar="X", help="Which share of them. Default: 0.02.")] = None,
    by: Annotated[str, typer.Option(metavar="NAME", help="absolute or signed.")] = "absolute",
    greedy: Annotated[bool, typer.Option("--greedy", help="Grow from the logits backwards.")] = False,
    threshold: Annotated[
        float | None, typer.Option(metavar="X", help="For acdc: an edge stays that moves the metric so much.")
    ] = None,
    max_tokens: MaxTokens = None,
    device: Device = None,
    dtype: Dtype = None,
    no_cache: NoCache = False,
    as_json: Json = False,
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
    if not out.absolute().parent.is_dir():
        raise FileError(f"there is no folder {out.absolute().parent}", expected="--out in a folder that is there")
    metric = ns.logit_diff(given.single(answer), given.single(wrong))
    asked = (loaded(model, device, dtype, no_cache=no_cache), clean, corrupted)
    progress = sys.stderr.isatty()
    with plain_warnings():
        if threshold is not None:
            found = ns.acdc(*asked, metric, threshold=threshold, max_tokens=max_tokens, progress=progress)
        else:
            scores = ns.attribute(*asked, SITES, metric, method=method, max_tokens=max_tokens, progress=progress)
            n = edges if edges is not None else len(ns.Circuit.select(scores, 0.02 if share is None else share))
            chosen: Any = ns.Circuit.greedy if greedy else ns.Circuit.top
            found = chosen(scores, n, by)
        report = ns.faithfulness(asked[0], found, *asked[1:], metric, max_tokens=max_tokens, progress=False)
    found.to_file(out)
    _list(found, LISTED)
    say()
    say(f"keeps {report.f()[0]:.3f} of the metric; {report.points[0].connected} of {len(found)} edges on a way through")
    say(f"written to {out}")


@circuit.command()
def run(
    file: File,
    model: ModelName,
    clean: Clean,
    answer: Answer,
    wrong: Wrong,
    corrupted: Corrupted = None,
    ablation: Annotated[str, typer.Option(metavar="NAME", help="patch, zero or mean.")] = "patch",
    max_tokens: MaxTokens = None,
    device: Device = None,
    dtype: Dtype = None,
    no_cache: NoCache = False,
    as_json: Json = False,
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
        report = ns.faithfulness(loaded_model, one, clean, corrupted or None, metric, **options)
    rows = [
        (str(n), f"{value: .4g}", f"{full: .4g}", f"{empty: .4g}")
        for n, (value, full, empty) in enumerate(zip(report.values[:, 0], report.full, report.empty, strict=True))
    ]
    say(repr(one))
    tabulate("prompts", rows, ("prompt", " circuit", " model", " empty"))
    low, high = report.ci()[0]
    interval = "" if low != low else f", {low:.3f} to {high:.3f} at 95%"
    say(f"\nkeeps {report.f()[0]:.3f} of {metric.name}{interval}")


@circuit.command(name="show")
def show_(
    file: File,
    edges: Annotated[int, typer.Option(metavar="N", help="How many of the strongest are listed.")] = LISTED,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page for a browser.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="For a graph of EAP-IG whose heads share keys and values.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what is in a circuit, and draw it.

    \b
    nnsplice circuit show ioi.json --html ioi.html
    """
    with plain_warnings():
        one = _read(file, None if model is None else loaded(model))
    _list(one, edges)
    if html is not None:
        one.to_html(html)
        say(f"\nwritten to {html}")


def _read(file: Path, model: Any) -> Any:
    """A circuit, of our own file or of EAP-IG's."""
    import nnsplice as ns
    from nnsplice.files import from_json, text_of

    if not file.is_file():
        raise FileError(f"there is no file {file}", expected="what `nnsplice circuit find` wrote")
    told = from_json(text_of(file), file)
    if isinstance(told, dict) and {"cfg", "nodes", "edges"} <= told.keys():
        return ns.Circuit.from_json(file, model=model)
    return ns.Circuit.from_file(file)


def _list(one: Any, most: int) -> None:
    """What is in a circuit, the strongest first."""
    say(repr(one))
    about = [f"{name} {one.provenance[name]}" for name in ("model", "method") if name in one.provenance]
    if about:
        say(", ".join(about))
    scores = one.scores or (float("nan"),) * len(one)
    order = sorted(range(len(one)), key=lambda n: -abs(scores[n]) if scores[n] == scores[n] else 0.0)[:most]
    told = [f"{scores[n]: .4g}" if scores[n] == scores[n] else "" for n in order]
    say()
    if one.kind == "edges":
        rows = [(str(one.edges[n][0]), str(one.edges[n][1]), score) for n, score in zip(order, told, strict=True)]
        tabulate("edges", rows, ("sender", "receiver", " score"))
    else:
        tabulate(
            "nodes", [(str(one.nodes[n]), score) for n, score in zip(order, told, strict=True)], ("node", " score")
        )
