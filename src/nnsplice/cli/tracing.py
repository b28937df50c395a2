"""`nnsplice trace`: a sweep from the command line, with all results in one folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nnsplice.cli import estimating
from nnsplice.cli import settings as given
from nnsplice.cli.commands import WrongUsage, app
from nnsplice.cli.files import prompts_of
from nnsplice.cli.loading import dtype_of, loaded
from nnsplice.cli.options import DeviceOption, DtypeOption, NoCacheOption
from nnsplice.cli.table import JsonOption, TableRow, aligned, plain_warnings, say, show, tabulate
from nnsplice.errors import BadArgument, FileError, NnspliceError
from nnsplice.files import local_path

if TYPE_CHECKING:
    from nnsplice.metrics import Metric
    from nnsplice.results import SweepResult
    from nnsplice.sweeps import Plan

RESULT, FIGURE, PAGE, JOURNAL, RUN = "result.safetensors", "figure.png", "page.html", "journal.jsonl", "run"


def _choice(name: str) -> str:
    return "|".join(given.CHOICES[name])


@app.command()
def trace(
    file: Annotated[
        Path | None, typer.Argument(metavar="SWEEP.TOML", help="A file with options as keys; options win over it.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="toy, smollm2, a folder with a checkpoint, a GGUF file, or a name on the hub. Default: SWEEP.TOML's.",
        ),
    ] = None,
    clean: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="A prompt that values come from; @FILE is one for each line. May be repeated. Default: SWEEP.TOML's.",
        ),
    ] = None,
    corrupted: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="A prompt that is changed, one for each --clean in its order; or @FILE. Default: --clean itself.",
        ),
    ] = None,
    sites: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH",
            help="What is changed, each on its own, or 'A + B' together. May be repeated. Default: SWEEP.TOML's.",
        ),
    ] = None,
    answer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TOKEN", help="The right token: one for all prompts, or repeated for each. Default: SWEEP.TOML's."
        ),
    ] = None,
    wrong: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TOKEN",
            help="The wrong token, for logit_diff: one for all prompts, or repeated for each. Default: SWEEP.TOML's.",
        ),
    ] = None,
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="The folder to write results to. Default: SWEEP.TOML's.")
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    no_cache: NoCacheOption = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is in DIR.")] = False,
    metric: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"{_choice('metric')}. Default: logit_diff.")
    ] = None,
    operation: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"{_choice('operation')}. Default: patch.")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="A capture on disk that mean, resample and add take values from. Default: the prompts' own.",
        ),
    ] = None,
    window: Annotated[
        int | None, typer.Option(metavar="N", help="How many neighbouring layers are changed together. Default: 1.")
    ] = None,
    align: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help=f"{_choice('align')}: how two prompts' tokens correspond. Default: position."
        ),
    ] = None,
    executor: Annotated[str | None, typer.Option(metavar="NAME", help=f"{_choice('executor')}. Default: auto.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="How many tokens run at once. Default: what suits the machine.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", help="The seed of noise, of resample and of what is verified. Default: 0."),
    ] = None,
    method: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"{_choice('method')}. Default: exact; the others estimate.")
    ] = None,
    verify: Annotated[
        int | None, typer.Option(metavar="K", help="Compute the K largest estimates exactly, and K others. Default: 0.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(metavar="N", help="Gradients on the way, for ig and eap-ig. Default: 5.")
    ] = None,
    receivers: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH",
            help="Where edges end, with eap, eap-ig, relp, ifr, auto. May be repeated. Default: the logits.",
        ),
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(
            metavar="WHERE",
            help="local:8 (so many processes), folder, slurm or ray; the units are kept in DIR/run. Default: here.",
        ),
    ] = None,
    plan_only: Annotated[bool, typer.Option("--plan-only", help="Show what would be computed, and leave.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Change every site by itself, and see what the model then says: causal tracing, exact or estimated.

    \b
    nnsplice trace --model toy --out velmar \\
        --clean 'The Velmar Tower is located in the city of' \\
        --corrupted 'The Ostrin Bridge is located in the city of' \\
        --sites 'layers[:].output' --answer Athens --wrong Dublin
    nnsplice trace sweep.toml --out velmar
    nnsplice trace sweep.toml --out velmar-fast --method 'atp*' --verify 20
    nnsplice trace sweep.toml --out velmar --on local:8

    \b
    DIR/result.safetensors   the numbers, for ns.SweepResult.from_file
    DIR/figure.png           a heatmap; one for each kind of site
    DIR/page.html            a page for a browser
    DIR/journal.jsonl        what a stopped run goes on from, with --resume
    DIR/run                  the same with --on: finished units, for nnsplice status, work and merge

    In a TOML file the keys are the options without dashes before them, and several prompts or sites are a list.
    Effect: 0 where the change gained nothing on the corrupted run, 1 where the clean run is reached.
    """
    typed = {
        "model": model, "clean": clean, "corrupted": corrupted, "sites": sites, "answer": answer, "wrong": wrong,
        "out": out, "metric": metric, "operation": operation, "reference": reference, "window": window, "align": align,
        "executor": executor, "max-tokens": max_tokens, "seed": seed, "method": method, "verify": verify,
        "steps": steps, "receivers": receivers, "device": device, "dtype": dtype,
        "on": on,
    }  # fmt: skip
    typed = {name: value for name, value in typed.items() if value not in (None, [])}
    settings = {**({} if file is None else given.read(file)), **typed}
    given.check(settings)
    for name in ("clean", "corrupted"):
        if name in settings:
            texts = settings[name]
            settings[name] = prompts_of([texts] if isinstance(texts, str) else texts)
    _check_complete(settings, typed, plan_only)
    with plain_warnings():
        _trace(settings, resume, plan_only, no_cache)


def _check_complete(settings: dict[str, Any], typed: dict[str, Any], plan_only: bool) -> None:
    uses = given.METRICS[settings.get("metric", "logit_diff")]
    needed = ["model", "clean", "sites", *uses, *([] if plan_only else ["out"])]
    if settings.get("operation", "patch") == "patch":
        needed.insert(2, "corrupted")
    missing = [f"--{name}" for name in needed if name not in settings]
    if missing:
        raise WrongUsage(f"Missing: {', '.join(missing)}; as an option, or as a key of a TOML file")
    for name in ("answer", "wrong"):
        if name in typed and name not in uses:
            raise WrongUsage(f"--{name} says nothing to {settings['metric']}")


def _trace(settings: dict[str, Any], resume: bool, plan_only: bool, no_cache: bool) -> None:
    from nnsplice import run

    method = estimating.method_of(settings)
    if method is not None and "on" in settings:
        raise WrongUsage("--on is for exact sweeps; estimates run in this process")
    folder = None if plan_only else local_path(settings["out"])
    if folder is not None:
        _check_folder(folder, resume, method)
    model = loaded(settings["model"], settings.get("device"), settings.get("dtype"), no_cache=no_cache)
    plan = _plan(model, settings, method)
    if folder is None:
        say(plan.preview())
        return
    first = plan.preview(0).splitlines()[0]
    say(first.replace("to compute", f"to estimate by {method}") if method else first)
    result = _finished(folder, model, plan, settings, method) if resume else None
    if result is not None:
        say("finished already; this is what was found")
    else:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(f"{folder} cannot be made: {error.strerror}", expected="--out with a folder") from error
        try:
            if "on" in settings:
                result = _elsewhere(plan, settings, folder, no_cache)
            elif method is None:
                result = run(
                    plan, model, executor=settings.get("executor", "auto"), max_tokens=settings.get("max-tokens"),
                    journal=folder / JOURNAL, progress=sys.stderr.isatty(),
                )  # fmt: skip
            else:
                result = estimating.estimate(model, settings, _metric(settings), folder / JOURNAL)
        except KeyboardInterrupt:
            kept = RUN if "on" in settings else JOURNAL
            say(f"stopped; what is finished stands in {folder / kept}; --resume goes on", err=True)
            raise
        result.to_file(folder / RESULT)
    written = _draw(result, folder)
    show(_ends(result))
    say()
    tabulate("cells", *_best(result))
    say()
    show(aligned([(str(folder / name), about) for name, about in written]))


def _elsewhere(plan: Plan, settings: dict[str, Any], folder: Path, no_cache: bool) -> SweepResult:
    """The plan in other processes, which load the model as this one did."""
    from nnsplice import run

    options: dict[str, Any] = {"cache": False} if no_cache else {}
    if "device" in settings:
        options["device_map"] = settings["device"]
    if "dtype" in settings:
        options["dtype"] = str(dtype_of(settings["dtype"])).removeprefix("torch.")
    return run(
        plan, settings["model"], executor=settings.get("executor", "auto"), max_tokens=settings.get("max-tokens"),
        on=settings["on"], out=folder / RUN, load_options=options, progress=sys.stderr.isatty(),
    )  # fmt: skip


def _check_folder(folder: Path, resume: bool, method: str | None) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileError(f"{folder} is a file", expected="--out with a folder")
    there = [name for name in (JOURNAL, RUN, RESULT, FIGURE, PAGE) if (folder / name).exists()]
    if there and not resume:
        raise FileError(
            f"{folder} holds {', '.join(there)} of an earlier run",
            expected="--resume to go on with it, or another --out",
        )
    if there and not {JOURNAL, RUN} & {*there} and method is None:
        raise FileError(f"{folder} holds {', '.join(there)}, and no {JOURNAL} to go on from", expected="another --out")


def _metric(settings: dict[str, Any]) -> Metric:
    import nnsplice as ns

    name = settings.get("metric", "logit_diff")
    return getattr(ns, name)(**{key: given.single(settings[key]) for key in given.METRICS[name]})


def _plan(model: Any, settings: dict[str, Any], method: str | None) -> Plan:
    import nnsplice as ns

    reference = settings.get("reference")
    return ns.plan_sweep(
        model, settings["clean"], settings.get("corrupted"), given.sets(settings["sites"]), _metric(settings),
        operation=settings.get("operation", "patch"), window=settings.get("window", 1),
        align=settings.get("align", "position"),
        reference=None if reference is None else ns.SavedActivation.from_file(reference), seed=settings.get("seed", 0),
        together=method in estimating.EDGES or (method == "auto" and "receivers" in settings),
    )  # fmt: skip


def _finished(folder: Path, model: Any, plan: Plan, settings: dict[str, Any], method: str | None) -> SweepResult | None:
    """The complete result of the same sweep, else None; the journal then reports the difference."""
    from nnsplice import SweepResult

    if not (folder / RESULT).exists():
        return None
    result = SweepResult.from_file(folder / RESULT)
    if method is not None:
        estimating.check_same(result, settings, model, plan, folder)
        return result
    same = json.loads(json.dumps(dict(plan.asked))) == json.loads(json.dumps(dict(result.asked)))
    return result if same and result.is_complete else None


# --- output -----------------------------------------------------------------------------------------------------------


def _draw(result: SweepResult, folder: Path) -> list[TableRow]:
    """Write figures and page; the files with a description of each."""
    from nnsplice import plots

    written: list[TableRow] = [(RESULT, "the numbers, for ns.SweepResult.from_file")]
    for kind in result.components:
        try:
            name = FIGURE if len(result.components) == 1 else f"figure.{kind.replace('[:]', '')}.png"
            plots.save(result.plot(kind), folder / name, close=True, bbox_inches="tight")
            written.append((name, f"{kind}, as a heatmap"))
        except NnspliceError as error:
            say(f"no figure of {kind}: {error}", err=True)
    try:
        result.to_html(folder / PAGE)
        written.append((PAGE, "the same for a browser"))
    except NnspliceError as error:
        say(f"no page: {error}", err=True)
    return [*written, (JOURNAL, "what --resume goes on from")] if (folder / JOURNAL).exists() else written


def _ends(result: SweepResult) -> list[str]:
    many = f", in the mean of {len(result.clean)} prompts" if len(result.clean) > 1 else ""
    ran = f"{result.run.executor}, {result.run.seconds:.2f} s"
    more = estimating.about(result) if result.method else []
    return [
        f"{result.metric}: clean {result.clean.mean():.4g}, corrupted {result.corrupted.mean():.4g}{many}",
        f"{ran}; {result.run.note}" if result.run.note else ran,
        *more,
    ]


def _best(result: SweepResult) -> tuple[list[TableRow], TableRow, list[dict[str, Any]]]:
    if result.table.edges is not None:
        return estimating.rows(result)
    try:
        best = result.best(10)
    except BadArgument as error:  # prompts of unlike length, whose positions have no mean
        say(f"of prompt 0 alone, as {str(error).partition(chr(10))[0]}\n")
        best = result.best(10, prompt=0)
    by = "change" if bool(best["effect"].isna().to_numpy().all()) else "effect"
    frame = result.frame()
    tokens = {path: set(texts) for path, texts in frame.groupby("path")["token"]}
    rows: list[TableRow] = []
    values: list[dict[str, Any]] = []
    for path, value, share in zip(best["path"], best["value"], best[by], strict=True):
        token = tokens[path].pop().strip() if len(tokens[path]) == 1 else ""
        rows.append((path, token, f"{value: .4g}", f"{share: .3f}"))
        values.append({"site": path, "token": token or None, result.metric: value, by: share})
    head = ("site", "token", f" {result.metric}", f" {by}")
    if "exact" not in best:
        return rows, head, values
    exact = [f"{value: .4g}" if value == value else "" for value in best["exact"]]
    values = [{**row, "exact": value} for row, value in zip(values, best["exact"], strict=True)]
    return [(*row, one) for row, one in zip(rows, exact, strict=True)], (*head, " exact"), values
