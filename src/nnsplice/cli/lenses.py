"""`nnsplice lens`: logit lens, direct attribution and fitted lenses."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nnsplice.cli import settings as given
from nnsplice.cli.commands import Commands, WrongUsage, app
from nnsplice.cli.loading import Device, Dtype, MaxTokens, ModelName, NoCache, loaded
from nnsplice.cli.table import Json, say, tabulate
from nnsplice.cli.tracing import plain_warnings
from nnsplice.errors import FileError

if TYPE_CHECKING:
    from nnsplice.results import SweepResult

lens: typer.Typer = typer.Typer(
    cls=Commands, rich_markup_mode=None, no_args_is_help=True, help="What sites would say, and what they say directly."
)
app.add_typer(lens, name="lens")

#: Parts that are listed.
LISTED = 15

Prompt = Annotated[list[str], typer.Option("--prompt", metavar="TEXT", help="Once for each prompt.")]
Page = Annotated[Path | None, typer.Option("--page", metavar="FILE", help="Write a page that stands by itself: .html.")]


@lens.command()
def logit(
    model: ModelName,
    prompt: Prompt,
    sites: Annotated[str, typer.Option(metavar="PATH", help="Sites of the stream.")] = "layers[:].output[-1]",
    answer: Annotated[
        list[str] | None, typer.Option(metavar="TOKEN", help="Whose probability and rank: one for all, or for each.")
    ] = None,
    k: Annotated[int, typer.Option(metavar="N", help="How many of the first tokens.")] = 5,
    fitted: Annotated[
        Path | None, typer.Option("--lens", metavar="FILE", help="What `lens fit` wrote, to read states with.")
    ] = None,
    page: Page = None,
    max_tokens: MaxTokens = None,
    device: Device = None,
    dtype: Dtype = None,
    no_cache: NoCache = False,
    as_json: Json = False,
) -> None:
    """List the tokens that each state would say, if it left the last layer.

    \b
    nnsplice lens logit --model toy --prompt 'The Eiffel Tower is in' --answer Paris
    """
    import nnsplice as ns

    _check_page(page)
    read = None if fitted is None else ns.lens.FittedLens.from_file(fitted)
    answers = None if answer is None else given.single(answer)
    asked = loaded(model, device, dtype, no_cache=no_cache)
    with plain_warnings():
        found = ns.lens.logit(
            asked, prompt, sites, answers, k, lens=read, max_tokens=max_tokens, progress=sys.stderr.isatty()
        )
    numbers = None if answers is None else {name: found.only(name).table.values for name in ("probability", "rank")}
    rows: list[tuple[str, ...]] = []
    for row in range(len(found.ids)):
        for number, cell in enumerate(found.results.cells):
            if found.results.table.exists[row, number]:
                tokens = " ".join(repr(found.texts[int(one)]) for one in found.ids[row, number])
                said = [] if numbers is None else [f"{numbers['probability'][row, number]:.3f}",
                                                   f"{numbers['rank'][row, number]:.0f}"]  # fmt: skip
                rows.append((str(row), cell.path, *said, tokens))
    tabulate("tokens", rows, ("prompt", "site", *(() if numbers is None else ("answer", "rank")), "tokens"))
    _write_page(page, found.result)


@lens.command()
def direct(
    model: ModelName,
    prompt: Prompt,
    answer: Annotated[list[str], typer.Option(metavar="TOKEN", help="The right token: one for all, or for each.")],
    wrong: Annotated[
        list[str] | None,
        typer.Option(metavar="TOKEN", help="The wrong one; left out, the logit of the right is split."),
    ] = None,
    sites: Annotated[
        list[str] | None, typer.Option(metavar="PATH", help="Once for each kind; embeddings, heads, MLPs if left out.")
    ] = None,
    page: Page = None,
    max_tokens: MaxTokens = None,
    device: Device = None,
    dtype: Dtype = None,
    no_cache: NoCache = False,
    as_json: Json = False,
) -> None:
    """List what each head, MLP and embedding adds to the logits directly.

    \b
    nnsplice lens direct --model toy --prompt '...' --answer Mary --wrong John
    """
    import nnsplice as ns
    from nnsplice.lens.direct import ALL

    _check_page(page)
    right = given.single(answer)
    metric = right if wrong is None else ns.logit_diff(right, given.single(wrong))
    asked = loaded(model, device, dtype, no_cache=no_cache)
    with plain_warnings():
        parts = ns.lens.direct(
            asked, prompt, metric, list(sites or ALL), max_tokens=max_tokens, progress=sys.stderr.isatty()
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
    model: ModelName,
    prompts: Annotated[Path, typer.Argument(metavar="PROMPTS.TXT", help="A prompt on each line.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the lens goes: .safetensors.")],
    kind: Annotated[str, typer.Option(metavar="NAME", help="tuned or jacobian.")] = "tuned",
    steps: Annotated[int, typer.Option(metavar="N", help="Of training.")] = 250,
    max_tokens: MaxTokens = None,
    device: Device = None,
    dtype: Dtype = None,
    no_cache: NoCache = False,
    as_json: Json = False,
) -> None:
    """Fit a lens to a model, and show how near each layer comes on prompts that were held out.

    \b
    nnsplice lens fit prompts.txt --model toy --out lens.safetensors
    """
    import nnsplice as ns
    from nnsplice.files import text_of

    if kind not in ("tuned", "jacobian"):
        raise WrongUsage(f"There is no kind {kind!r}; write tuned or jacobian")
    if not out.absolute().parent.is_dir():
        raise FileError(f"there is no folder {out.absolute().parent}", expected="--out in a folder that is there")
    lines = [line for line in text_of(prompts).splitlines() if line.strip()]
    asked = loaded(model, device, dtype, no_cache=no_cache)
    progress = sys.stderr.isatty()
    with plain_warnings():
        if kind == "tuned":
            made = ns.lens.fit(asked, lines, "tuned", steps=steps, max_tokens=max_tokens, progress=progress)
        else:
            made = ns.lens.fit(asked, lines, "jacobian", max_tokens=max_tokens, progress=progress)
    made.to_file(out)
    if "kl" in made.about:
        told = zip(made.layers, made.about["kl"], made.about["logit_lens"], strict=True)
        rows = [(str(layer), f"{kl:.4g}", f"{plain:.4g}") for layer, kl, plain in told]
        tabulate("layers", rows, ("layer", "held-out KL", "of the logit lens"))
    say(f"{made!r}, written to {out}")


def _check_page(page: Path | None) -> None:
    if page is not None and not page.absolute().parent.is_dir():
        raise FileError(f"there is no folder {page.absolute().parent}", expected="--page in a folder that is there")


def _write_page(page: Path | None, result: SweepResult) -> None:
    if page is not None:
        result.to_html(page)
        say(f"written to {page}")
