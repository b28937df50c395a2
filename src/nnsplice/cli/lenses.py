"""`nnsplice lens`: logit lens, direct attribution and fitted lenses."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nnsplice.cli import settings as given
from nnsplice.cli.commands import Commands, WrongUsage, app
from nnsplice.cli.files import prompts_in, prompts_of, require_writable
from nnsplice.cli.loading import loaded
from nnsplice.cli.options import (
    AnswerOption,
    DeviceOption,
    DtypeOption,
    MaxTokensOption,
    ModelOption,
    NoCacheOption,
    PageOption,
    PromptsOption,
)
from nnsplice.cli.table import JsonOption, plain_warnings, say, tabulate

if TYPE_CHECKING:
    from nnsplice.results import SweepResult

lens: typer.Typer = typer.Typer(
    cls=Commands, rich_markup_mode=None, no_args_is_help=True, help="Logit lens, direct attribution, fitted lenses."
)
app.add_typer(lens, name="lens")

#: Parts that are listed.
LISTED = 15


@lens.command()
def logit(
    model: ModelOption,
    prompt: PromptsOption,
    sites: Annotated[str, typer.Option(metavar="PATH", help="Sites of the residual stream.")] = "layers[:].output[-1]",
    answer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TOKEN",
            help="List probability and rank of this token: one for all prompts, or repeated for each. Default: none.",
        ),
    ] = None,
    k: Annotated[int, typer.Option(metavar="N", min=1, help="How many of the likeliest tokens to list.")] = 5,
    fitted: Annotated[
        Path | None,
        typer.Option("--lens", metavar="FILE", help="A lens that `lens fit` wrote. Default: the logit lens."),
    ] = None,
    page: PageOption = None,
    max_tokens: MaxTokensOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    no_cache: NoCacheOption = False,
    as_json: JsonOption = False,
) -> None:
    """List the tokens that each state would say, if it left the last layer.

    \b
    nnsplice lens logit --model toy --prompt 'The Velmar Tower is located in the city of' --answer Athens
    """
    import nnsplice as ns

    require_writable(page, ".html", option="--page")
    fitted_lens = None if fitted is None else ns.lens.FittedLens.from_file(fitted)
    answers = None if answer is None else given.single(answer)
    running = loaded(model, device, dtype, no_cache=no_cache)
    with plain_warnings():
        found = ns.lens.logit(
            running,
            prompts_of(prompt),
            sites,
            answers,
            k,
            lens=fitted_lens,
            max_tokens=max_tokens,
            progress=sys.stderr.isatty(),
        )
    numbers = None if answers is None else {name: found.only(name).table.values for name in ("probability", "rank")}
    rows: list[tuple[str, ...]] = []
    values: list[dict[str, Any]] = []
    for row in range(len(found.ids)):
        for number, cell in enumerate(found.results.cells):
            if found.results.table.exists[row, number]:
                tokens = [found.texts[int(one)] for one in found.ids[row, number]]
                answered = {} if numbers is None else {"answer": float(numbers["probability"][row, number]),
                                                       "rank": int(numbers["rank"][row, number])}  # fmt: skip
                shown = (f"{answered['answer']:.3f}", str(answered["rank"])) if answered else ()
                rows.append((str(row), cell.path, *shown, " ".join(map(repr, tokens))))
                values.append({"prompt": row, "site": cell.path, **answered, "tokens": tokens})
    tabulate("tokens", rows, ("prompt", "site", *(() if numbers is None else ("answer", "rank")), "tokens"), values)
    _write_page(page, found.result)


@lens.command()
def direct(
    model: ModelOption,
    prompt: PromptsOption,
    answer: AnswerOption,
    wrong: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TOKEN",
            help="The wrong token: one for all prompts, or repeated for each. Default: the right one alone is split.",
        ),
    ] = None,
    sites: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="Parts to list. May be repeated. Default: embeddings, heads and MLPs."),
    ] = None,
    page: PageOption = None,
    max_tokens: MaxTokensOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    no_cache: NoCacheOption = False,
    as_json: JsonOption = False,
) -> None:
    """List what each head, MLP and embedding adds to the logits directly.

    \b
    nnsplice lens direct --model toy --prompt '...' --answer Mary --wrong John
    """
    import nnsplice as ns
    from nnsplice.lens.direct import ALL

    require_writable(page, ".html", option="--page")
    right = given.single(answer)
    metric = right if wrong is None else ns.logit_diff(right, given.single(wrong))
    running = loaded(model, device, dtype, no_cache=no_cache)
    with plain_warnings():
        parts = ns.lens.direct(
            running, prompts_of(prompt), metric, list(sites or ALL), max_tokens=max_tokens, progress=sys.stderr.isatty()
        )
    mean = parts.table.values.mean(0)
    order = sorted(range(len(mean)), key=lambda n: -abs(mean[n]))[:LISTED]
    rows = [(parts.cells[n].path, f"{mean[n]: .4g}") for n in order]
    values = [{"site": parts.cells[n].path, parts.metric: float(mean[n])} for n in order]
    tabulate("parts", rows, ("site", parts.metric), values)
    say()
    say(f"all {len(mean)} parts {mean.sum():.4g}, the rest {parts.rest.mean():.4g}, together {parts.clean.mean():.4g}")
    _write_page(page, parts)


@lens.command()
def fit(
    model: ModelOption,
    prompts: Annotated[Path, typer.Argument(metavar="PROMPTS.TXT", help="A prompt on each line.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The file to write: .safetensors.")],
    kind: Annotated[str, typer.Option(metavar="NAME", help="tuned or jacobian.")] = "tuned",
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Steps of training, of a tuned lens.")] = 250,
    max_tokens: MaxTokensOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    no_cache: NoCacheOption = False,
    as_json: JsonOption = False,
) -> None:
    """Fit a lens to a model, and show how near each layer comes on prompts that were held out.

    \b
    nnsplice lens fit prompts.txt --model toy --out lens.safetensors
    """
    import nnsplice as ns

    if kind not in ("tuned", "jacobian"):
        raise WrongUsage(f"There is no kind {kind!r}; write tuned or jacobian")
    require_writable(out, ".safetensors")
    lines = prompts_in(prompts)
    running = loaded(model, device, dtype, no_cache=no_cache)
    progress = sys.stderr.isatty()
    with plain_warnings():
        if kind == "tuned":
            made = ns.lens.fit(running, lines, "tuned", steps=steps, max_tokens=max_tokens, progress=progress)
        else:
            made = ns.lens.fit(running, lines, "jacobian", max_tokens=max_tokens, progress=progress)
    made.to_file(out)
    if "kl" in made.about:
        columns = list(zip(made.layers, made.about["kl"], made.about["logit_lens"], strict=True))
        rows = [(str(layer), f"{kl:.4g}", f"{plain:.4g}") for layer, kl, plain in columns]
        head = ("layer", "held-out KL", "of the logit lens")
        tabulate("layers", rows, head, [dict(zip(head, row, strict=True)) for row in columns])
    say(f"{made!r}, written to {out}")


def _write_page(page: Path | None, result: SweepResult) -> None:
    if page is not None:
        result.to_html(page)
        say(f"written to {page}")
