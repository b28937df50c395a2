"""`nnsplice steer`: fit a vector, sweep layers and coefficients, generate with it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from nnsplice.cli.commands import Commands, WrongUsage, app
from nnsplice.cli.loading import Device, Dtype, ModelName, NoCache, loaded
from nnsplice.cli.table import Json, Row, aligned, say, show, tabulate
from nnsplice.cli.tracing import plain_warnings
from nnsplice.errors import BadArgument, FileError
from nnsplice.files import local_folder

steer: typer.Typer = typer.Typer(
    cls=Commands, rich_markup_mode=None, no_args_is_help=True, help="Fit a steering vector, sweep it, generate with it."
)
app.add_typer(steer, name="steer")

SWEEP, FIGURE = "sweep.safetensors", "figure.png"

VectorFile = Annotated[
    Path, typer.Option("--vector", metavar="FILE", help="What `steer fit` wrote, or a GGUF control vector.")
]
Prompts = Annotated[
    list[str], typer.Option("--prompt", metavar="TEXT", help="May be given often; @FILE is a prompt for each line.")
]
Operator = Annotated[str, typer.Option(metavar="NAME", help="add, project_out, clamp, scale or rotate.")]
Where = Annotated[str, typer.Option(metavar="NAME", help="all, prompt, generated, or a token N: it and all after it.")]


@steer.command()
def fit(
    model: ModelName,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the vector goes; .gguf writes it for llama.cpp.")],
    positive: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="A prompt with what is wanted. @FILE: one for each line.")
    ] = None,
    negative: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="A prompt without it, in its turn.")
    ] = None,
    evals: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A/B questions as JSON lines, in place of the two.")
    ] = None,
    path: Annotated[list[str] | None, typer.Option(metavar="PATH", help="Default: layers[:].output[-1].")] = None,
    method: Annotated[
        str, typer.Option(metavar="NAME", help="mean_difference, pca, logistic, lda.")
    ] = "mean_difference",
    unit: Annotated[
        str, typer.Option(metavar="NAME", help="norm: a coefficient of 1 is one norm of the states; means: their gap.")
    ] = "norm",
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts through the chat template.")] = False,
    device: Device = None,
    dtype: Dtype = None,
    no_cache: NoCache = False,
    as_json: Json = False,
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
    _check_folder(out)
    if evals is not None:
        pairs = steering.read_evals(evals)
        good, bad = list(pairs.positive), list(pairs.negative)
    else:
        good, bad = _texts(positive or []), _texts(negative or [])
    vector = steering.fit_from_prompts(
        loaded(model, device, dtype, no_cache=no_cache),
        good,
        bad,
        path or ["layers[:].output[-1]"],
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
    model: ModelName,
    vector: VectorFile,
    prompt: Prompts,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder for numbers and figure.")],
    answer: Annotated[str, typer.Option(metavar="TOKEN", help="The token whose logit should rise.")],
    wrong: Annotated[str, typer.Option(metavar="TOKEN", help="The token whose logit should fall.")],
    coefficients: Annotated[str, typer.Option(metavar="NUMBERS", help="Commas between them.")] = "-1,-0.5,0,0.5,1",
    limit: Annotated[
        float | None, typer.Option(metavar="KL", help="Choose the best cell whose KL is at most this.")
    ] = None,
    operator: Operator = "add",
    where: Where = "all",
    device: Device = None,
    dtype: Dtype = None,
    no_cache: NoCache = False,
    as_json: Json = False,
) -> None:
    """Steer every layer with every coefficient, side by side, and show what is gained and what it disturbs.

    \b
    nnsplice steer sweep --model toy --vector mood.safetensors --prompt 'I thought the film was' \\
        --answer great --wrong awful --limit 1 --out mood

    KL: how far the distribution of the next token moves.
    """
    import nnsplice as ns

    numbers = _numbers(coefficients)
    if local_folder(out).exists() and not out.is_dir():
        raise FileError(f"{out} is a file", expected="--out with a folder")
    with plain_warnings():
        grid = ns.steering.sweep(
            loaded(model, device, dtype, no_cache=no_cache), _texts(prompt), _read(vector), numbers,
            ns.logit_diff(answer, wrong),
            operator=operator, where=_where(where), progress=sys.stderr.isatty(),
        )  # fmt: skip
    chosen = None if limit is None else grid.choose(guard="kl", limit=limit)
    out.mkdir(parents=True, exist_ok=True)
    grid.to_file(out / SWEEP)
    ns.plots.save(grid.plot("lines"), out / FIGURE, close=True, bbox_inches="tight")
    say(f"{grid.metric} without steering: {grid.baseline.mean():.4g}\n")
    best = grid.best(8)
    columns = (best["layer"], best["coefficient"], best["value"], best["kl"])
    rows = [(str(n), f"{c:g}", f"{v:.4g}", f"{kl:.3g}") for n, c, v, kl in zip(*columns, strict=True)]
    head = ("layer", "coefficient", grid.metric, "KL")
    tabulate("cells", rows, head, [dict(zip(head, row, strict=True)) for row in zip(*columns, strict=True)])
    if chosen is not None:
        told = f"{chosen.score:.4g} with a KL of {chosen.kl:.3g}"
        say(f"\nbest within {limit:g}: layer {chosen.layer}, coefficient {chosen.coefficient:g}: {told}")
    say(f"\n{out / SWEEP}, {out / FIGURE}")


@steer.command()
def generate(
    model: ModelName,
    vector: VectorFile,
    prompt: Prompts,
    layer: Annotated[
        list[int] | None, typer.Option(metavar="N", help="Which layers; left out, all that the vector has.")
    ] = None,
    coefficient: Annotated[
        list[float] | None, typer.Option(metavar="NUMBER", help="May be given often: a text for each.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1)] = 40,
    operator: Operator = "add",
    where: Where = "all",
    device: Device = None,
    dtype: Dtype = None,
    no_cache: NoCache = False,
    sample: Annotated[bool, typer.Option("--sample", help="Sample, instead of taking the likeliest token.")] = False,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the sampling.")] = 0,
    as_json: Json = False,
) -> None:
    """Generate from prompts, unsteered and with each coefficient, side by side.

    \b
    nnsplice steer generate --model toy --vector mood.safetensors --layer 3 --coefficient -0.5 --coefficient 0.5 \\
        --prompt 'I thought the film was'
    """
    import torch

    import nnsplice as ns

    found, running = _read(vector), loaded(model, device, dtype, no_cache=no_cache)
    chosen: Any = found.at(layer) if layer else found
    prompts = _texts(prompt)
    strengths = coefficient or [found.coefficient or 1.0]
    torch.manual_seed(seed)
    unsteered = ns.steering.generate(running, prompts, max_new_tokens=max_new_tokens, do_sample=sample)
    steered = [(text, c) for text in prompts for c in strengths]  # rows of one batch, each with its own
    texts = ns.steering.generate(
        running, [text for text, _ in steered], chosen, [c for _, c in steered], operator=operator, where=_where(where),
        max_new_tokens=max_new_tokens, do_sample=sample,
    )  # fmt: skip
    told = iter(texts)
    rows: list[Row] = []
    for text, plain in zip(prompts, unsteered, strict=True):
        lines = [("without", plain), *((f"{c:g}", next(told)) for c in strengths)]
        rows += [(text, name, said) for name, said in lines]
        if not as_json:
            say(text)
            show(f"  {line}" for line in aligned([(name, " ".join(said.split())) for name, said in lines]))
    if as_json:
        head = ("prompt", "coefficient", "text")
        tabulate("texts", rows, head, [dict(zip(head, row, strict=True)) for row in rows])


# --- what is given ----------------------------------------------------------------------------------------------------


def _texts(given: list[str]) -> list[str]:
    """Prompts, with `@FILE` as one for each line of a file."""
    found: list[str] = []
    for text in given:
        if not text.startswith("@"):
            found.append(text)
            continue
        try:
            lines = Path(text[1:]).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise FileError(
                f"{text[1:]} cannot be read: {error}", expected="a file with a prompt in each line"
            ) from None
        found += [line for line in lines if line.strip()]
    return found


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


def _check_folder(out: Path) -> None:
    if not local_folder(out).parent.is_dir():
        raise FileError(f"there is no folder {out.parent} to write {out.name} in")


def _write(vector: Any, out: Path) -> None:
    from nnsplice import steering

    if out.suffix == ".gguf":
        steering.to_gguf(vector.at([layer for layer in vector.layers if layer > 0]), out)
    else:
        vector.to_file(out)
