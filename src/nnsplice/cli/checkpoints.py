"""`nnsplice convert`: a checkpoint folder into another one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nnsplice.cli.commands import WrongUsage, app
from nnsplice.cli.loading import dtype_of
from nnsplice.cli.options import DTYPES
from nnsplice.cli.table import say
from nnsplice.files import text_of

if TYPE_CHECKING:
    import torch

    from nnsplice.checkpoints import ModelStateMapper


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A folder with safetensors.")],
    dest: Annotated[
        Path | None, typer.Argument(metavar="DST", help="The folder to make or replace; not needed with --explain.")
    ] = None,
    rename: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OLD=NEW", help="Whole names between dots; * is any one name. May be repeated. Default: names stay."
        ),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            metavar="tl|hf", help="The names and shapes of TransformerLens, or of transformers. Default: those of SRC."
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"{', '.join(DTYPES)}. Default: the checkpoint's.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(metavar="INDEX", help="Which layers to keep: 0:4, -1, 0,5,11. Default: all.")
    ] = None,
    shard_size: Annotated[
        float, typer.Option(metavar="GB", help="The largest size of a file, in units of 1024**3 bytes.")
    ] = 4.0,
    workers: Annotated[int, typer.Option(metavar="N", min=1, help="The number of processes.")] = 1,
    explain: Annotated[bool, typer.Option("--explain", help="Show what would be done, and leave.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a call that was stopped.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress bar.")] = False,
) -> None:
    """Convert the checkpoint in SRC: other names, other numbers, fewer layers. Memory holds one tensor at a time.

    \b
    nnsplice convert gpt2/ renamed/ --rename 'transformer.h.*=layers.*' --rename 'transformer='
    nnsplice convert llama/ first-four/ --layers 0:4 --dtype bf16
    nnsplice convert llama/ lens/ --to tl
    nnsplice convert llama/ --rename 'self_attn=attn' --explain

    Config, tokenizer and other small files come along, and config.json says the type and, with the first N layers kept,
    their number. DST keeps
    what it held until the new checkpoint is whole.
    """
    from nnsplice import checkpoints
    from nnsplice.checkpoints.config import adapted_config

    chosen = None if layers is None else _layers(layers)
    numbers = None if dtype is None else dtype_of(dtype)
    mapper = (
        _derived(source, to, rename, numbers, chosen)
        if to
        else checkpoints.renaming(source, rename or (), dtype=numbers, layers=chosen)
    )
    if explain:
        say(repr(mapper.explain(source)))
        return
    if dest is None:
        raise WrongUsage("Missing: DST (or --explain, which needs none)")
    carry: dict[str, Path | str] = {}
    config = source / "config.json"
    first = isinstance(chosen, slice) and not chosen.start and chosen.step in (None, 1)
    if config.is_file() and (first or numbers is not None):
        text = text_of(config)
        carry["config.json"] = adapted_config(text, layers=_count(mapper) if first else None, dtype=numbers)
    checkpoints.convert(
        source, dest, mapper, shard_size_gb=shard_size, show_progress=not quiet, resume=resume, carry=carry,
        workers=workers,
    )  # fmt: skip
    say(f"{dest}: {len(checkpoints.Checkpoint.open(dest))} tensors")


def _derived(
    source: Path, to: str, rename: list[str] | None, dtype: torch.dtype | None, layers: object
) -> ModelStateMapper:
    """The mapper to the names and shapes of another library, then to a dtype."""
    from nnsplice.checkpoints import Cast, Parallel, Sequential, mapper_between
    from nnsplice.checkpoints.convert import check_unused
    from nnsplice.checkpoints.mapper.abc import outputs_of

    if to not in ("tl", "hf"):
        raise typer.BadParameter(f"{to!r} is no kind of checkpoint; write tl or hf")
    if rename or layers is not None:
        raise WrongUsage("--to gives every tensor its name; --rename and --layers are for a second conversion")
    between = mapper_between(source, to).complete()
    check_unused(source, between)
    if dtype is None:
        return between
    return Sequential([between, Parallel([Cast(name, dtype) for name in sorted(outputs_of(between))])])


def _layers(text: str) -> slice | tuple[int, ...]:
    from nnsplice.cli.commands import index
    from nnsplice.paths import Slice

    found = index(text)
    if isinstance(found, Slice):
        return slice(found.start, found.stop, found.step)
    return (found,) if isinstance(found, int) else found


def _count(mapper: object) -> int:
    from nnsplice.checkpoints import ModelStateMapper
    from nnsplice.checkpoints.config import layer_of
    from nnsplice.checkpoints.mapper.abc import inputs_of

    assert isinstance(mapper, ModelStateMapper)
    return 1 + max(layer for name in inputs_of(mapper) if (layer := layer_of(name)) is not None)
