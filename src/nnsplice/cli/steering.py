"""`nnsplice steer`: fit a vector, sweep layers and coefficients, generate with it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from nnsplice.cli.commands import Commands, WrongUsage, app
from nnsplice.cli.files import prompts_of, require_writable
from nnsplice.cli.loading import loaded
from nnsplice.cli.options import (
    DeviceOption,
    DtypeOption,
    MaxTokensOption,
    ModelOption,
    NoCacheOption,
    OperatorOption,
    PromptsOption,
    VectorOption,
    WhereOption,
)
from nnsplice.cli.table import JsonOption, TableRow, aligned, plain_warnings, say, show, tabulate
from nnsplice.errors import BadArgument, FileError, NnspliceError
from nnsplice.files import local_path

steer: typer.Typer = typer.Typer(
    cls=Commands, rich_markup_mode=None, no_args_is_help=True, help="Fit a steering vector, sweep it, generate with it."
)
app.add_typer(steer, name="steer")

SWEEP, FIGURE = "sweep.safetensors", "figure.png"


@steer.command()
def fit(
    model: ModelOption,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The file to write: .safetensors, or .gguf for llama.cpp.")],
    positive: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT", help="A prompt with the wanted property; @FILE is one for each line. May be repeated."
        ),
    ] = None,
    negative: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="A prompt without it, in the order of --positive; @FILE is one for each line. May be repeated.",
        ),
    ] = None,
    evals: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A/B questions as JSON lines, instead of --positive and --negative."),
    ] = None,
    sites: Annotated[
        list[str] | None,
        typer.Option(
            "--sites", "--path", metavar="PATH", help="Where to fit. May be repeated. Default: layers[:].output[-1]."
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(metavar="NAME", help="mean_difference, pca, logistic or lda.")
    ] = "mean_difference",
    unit: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="norm or means: a coefficient of 1 is the norm of the states, or the distance of the two means.",
        ),
    ] = "norm",
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts through the chat template.")] = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    no_cache: NoCacheOption = False,
    as_json: JsonOption = False,
) -> None:
    """Fit a direction for every layer, and show how well each tells prompts apart that it was not fitted on.

    \b
    nnsplice steer fit --model toy --positive @good.txt --negative @bad.txt --out mood.safetensors
    nnsplice steer fit --model my-model --evals corrigible.jsonl --chat --out corrigible.safetensors
    """
    from nnsplice import steering

    if unit not in ("norm", "means"):
        raise BadArgument(f"there is no unit {unit!r}", expected="norm or means")
    if (evals is None) == (not positive and not negative) or (evals is not None and (positive or negative)):
        raise WrongUsage("Give --positive and --negative, or --evals")
    require_writable(out, ".safetensors", ".gguf")
    if evals is not None:
        pairs = steering.read_evals(evals)
        good, bad = list(pairs.positive), list(pairs.negative)
    else:
        good, bad = prompts_of(positive or []), prompts_of(negative or [])
    vector = steering.fit_from_prompts(
        loaded(model, device, dtype, no_cache=no_cache),
        good,
        bad,
        sites or ["layers[:].output[-1]"],
        method=method,
        chat=chat,
        progress=sys.stderr.isatty(),
    )
    vector = vector.in_residual_norms() if unit == "norm" else vector
    _write(vector, out)
    rows = [
        (key, f"{vector.norms[key]:.4g}", f"{vector.quality[key]:.3f}" if key in vector.quality else "")
        for key in vector
    ]
    values = [{"site": key, "norm": vector.norms[key], "AUC held out": vector.quality.get(key)} for key in vector]
    tabulate("sites", rows, ("site", "norm", "AUC held out"), values)
    say(f"\n{len(good)} and {len(bad)} prompts; written to {out}")


@steer.command()
def sweep(
    model: ModelOption,
    vector: VectorOption,
    prompt: PromptsOption,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write numbers and a figure to.")],
    answer: Annotated[str, typer.Option(metavar="TOKEN", help="The token whose logit should rise.")],
    wrong: Annotated[str, typer.Option(metavar="TOKEN", help="The token whose logit should fall.")],
    coefficients: Annotated[
        str, typer.Option(metavar="NUMBERS", help="Numbers with commas between them.")
    ] = "-1,-0.5,0,0.5,1",
    limit: Annotated[
        float | None,
        typer.Option(
            metavar="KL", help="Choose the best cell whose KL divergence is at most this. Default: none is chosen."
        ),
    ] = None,
    operator: OperatorOption = "add",
    where: WhereOption = "all",
    max_tokens: MaxTokensOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    no_cache: NoCacheOption = False,
    as_json: JsonOption = False,
) -> None:
    """Steer every layer with every coefficient, side by side, and show what is gained and what it disturbs.

    \b
    nnsplice steer sweep --model toy --vector mood.safetensors --prompt 'I thought the film was' \\
        --answer great --wrong awful --limit 1 --out mood

    KL: how far the distribution of the next token moves.
    """
    import nnsplice as ns

    numbers = _numbers(coefficients)
    if local_path(out).exists() and not out.is_dir():
        raise FileError(f"{out} is a file", expected="--out with a folder")
    if there := [name for name in (SWEEP, FIGURE) if (out / name).exists()]:
        raise FileError(f"{out} holds {' and '.join(there)} of an earlier run", expected="another --out")
    found, running = _read(vector), loaded(model, device, dtype, no_cache=no_cache)
    with plain_warnings():
        grid = ns.steering.sweep(
            running, prompts_of(prompt), found, numbers, ns.logit_diff(answer, wrong),
            operator=operator, where=_where(where), max_tokens=max_tokens, progress=sys.stderr.isatty(),
        )  # fmt: skip
    chosen = None if limit is None else grid.choose(guard="kl", limit=limit)
    out.mkdir(parents=True, exist_ok=True)
    grid.to_file(out / SWEEP)
    written = [str(out / SWEEP)]
    try:
        ns.plots.save(grid.plot("lines"), out / FIGURE, close=True, bbox_inches="tight")
        written.append(str(out / FIGURE))
    except NnspliceError as error:
        say(f"no figure: {error}", err=True)
    say(f"{grid.metric} without steering: {grid.baseline.mean():.4g}\n")
    best = grid.best(8)
    columns = (best["layer"], best["coefficient"], best["value"], best["kl"])
    rows = [(str(n), f"{c:g}", f"{v:.4g}", f"{kl:.3g}") for n, c, v, kl in zip(*columns, strict=True)]
    head = ("layer", "coefficient", grid.metric, "KL")
    tabulate("cells", rows, head, [dict(zip(head, row, strict=True)) for row in zip(*columns, strict=True)])
    if chosen is not None:
        result = f"{chosen.score:.4g} with a KL of {chosen.kl:.3g}"
        say(f"\nbest within {limit:g}: layer {chosen.layer}, coefficient {chosen.coefficient:g}: {result}")
    say(f"\n{', '.join(written)}")


@steer.command()
def generate(
    model: ModelOption,
    vector: VectorOption,
    prompt: PromptsOption,
    layer: Annotated[
        list[int] | None,
        typer.Option(metavar="N", help="A layer to steer. May be repeated. Default: all of the vector."),
    ] = None,
    coefficient: Annotated[
        list[float] | None,
        typer.Option(
            metavar="NUMBER",
            help="A factor of the vector, with a text for each. May be repeated. Default: the vector's own, or 1.",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="The number of tokens to generate.")] = 40,
    operator: OperatorOption = "add",
    where: WhereOption = "all",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    no_cache: NoCacheOption = False,
    sample: Annotated[bool, typer.Option("--sample", help="Sample tokens. Default: the likeliest.")] = False,
    seed: Annotated[int, typer.Option(metavar="N", help="The seed of the sampling.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Generate from prompts, unsteered and with each coefficient, side by side.

    \b
    nnsplice steer generate --model toy --vector mood.safetensors --layer 3 --coefficient -0.5 --coefficient 0.5 \\
        --prompt 'I thought the film was' --max-new-tokens 14
    """
    import torch

    import nnsplice as ns

    found, running = _read(vector), loaded(model, device, dtype, no_cache=no_cache)
    chosen: Any = found.at(layer) if layer else found
    prompts = prompts_of(prompt)
    strengths = coefficient or [found.coefficient or 1.0]
    torch.manual_seed(seed)
    unsteered = ns.steering.generate(running, prompts, max_new_tokens=max_new_tokens, do_sample=sample)
    steered = [(text, c) for text in prompts for c in strengths]  # rows of one batch, each with its own
    with plain_warnings():
        texts = ns.steering.generate(
            running, [text for text, _ in steered], chosen, [c for _, c in steered], operator=operator,
            where=_where(where), max_new_tokens=max_new_tokens, do_sample=sample,
        )  # fmt: skip
    continuations = iter(texts)
    rows: list[TableRow] = []
    for text, plain in zip(prompts, unsteered, strict=True):
        lines = [("without", plain), *((f"{c:g}", next(continuations)) for c in strengths)]
        rows += [(text, name, line) for name, line in lines]
        if not as_json:
            say(text)
            show(f"  {line}" for line in aligned([(name, " ".join(line.split())) for name, line in lines]))
    if as_json:
        head = ("prompt", "coefficient", "text")
        tabulate("texts", rows, head, [dict(zip(head, row, strict=True)) for row in rows])


# --- arguments ----------------------------------------------------------------------------------------------------


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise BadArgument(f"--coefficients {text}", expected="numbers with commas between them: -1,0,0.5") from None


def _where(text: str) -> Any:
    from nnsplice import steering

    return steering.from_token(int(text)) if text.lstrip("-").isdigit() else text


def _read(path: Path) -> Any:
    from nnsplice import steering

    if not path.is_file():
        raise FileError(f"there is no file {path}", expected="what `nnsplice steer fit` wrote")
    return steering.from_gguf(path) if path.suffix == ".gguf" else steering.SteeringVector.from_file(path)


def _write(vector: Any, out: Path) -> None:
    from nnsplice import steering

    if out.suffix == ".gguf":
        steering.to_gguf(vector.at([layer for layer in vector.layers if layer > 0]), out)
    else:
        vector.to_file(out)
