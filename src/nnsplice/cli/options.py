"""Options and arguments that several commands have, each with one form and one text."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

#: The types of `--dtype`: short names -> those of torch.
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}

_MODELS = "toy, toy-llama, smollm2, a folder with a checkpoint, a GGUF file, or a name on the Hugging Face hub."


class TowerName(StrEnum):
    """A stack of layers."""

    decoder = "decoder"
    encoder = "encoder"


# -- models ------------------------------------------------------------------------------------------------------------

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=_MODELS)]
ModelOption = Annotated[str, typer.Option("--model", metavar="MODEL", help=_MODELS)]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps; auto spreads the model. Default: cpu."),
]
DtypeOption = Annotated[
    str | None, typer.Option("--dtype", metavar="NAME", help=f"{', '.join(DTYPES)}. Default: the checkpoint's.")
]
NoCacheOption = Annotated[
    bool, typer.Option("--no-cache", help="Convert a GGUF file anew, and keep nothing of it on the disk.")
]
MaxTokensOption = Annotated[
    int | None,
    typer.Option(
        "--max-tokens", metavar="N", min=1, help="How many tokens run at once. Default: what suits the machine."
    ),
]

# -- prompts, answers, sites -------------------------------------------------------------------------------------------

PromptsOption = Annotated[
    list[str],
    typer.Option("--prompt", metavar="TEXT", help="A prompt; @FILE is one for each line. May be repeated."),
]
CleanOption = Annotated[
    list[str],
    typer.Option(
        "--clean", metavar="TEXT", help="A prompt that values come from; @FILE is one for each line. May be repeated."
    ),
]
CorruptedOption = Annotated[
    list[str],
    typer.Option(
        "--corrupted", metavar="TEXT", help="A prompt that is changed, one for each --clean in its order; or @FILE."
    ),
]
AnswerOption = Annotated[
    list[str],
    typer.Option(
        "--answer",
        metavar="TOKEN",
        help="The right token: one for all prompts, or repeated for each. Several for a single prompt are a set.",
    ),
]
WrongOption = Annotated[
    list[str],
    typer.Option(
        "--wrong",
        metavar="TOKEN",
        help="The wrong token: one for all prompts, or repeated for each. Several for a single prompt are a set.",
    ),
]
TowerOption = Annotated[
    TowerName | None, typer.Option("--tower", help="In a model with two towers, which one. Default: both.")
]

# -- files -------------------------------------------------------------------------------------------------------------

# A text, as a path would drop a slash of s3://
RunFolderArgument = Annotated[
    str, typer.Argument(metavar="DIR", help="A run folder, as ns.run(..., out=DIR) writes, or its s3:// address.")
]
CircuitArgument = Annotated[
    Path, typer.Argument(metavar="CIRCUIT.JSON", help="What `circuit find` wrote, or a graph of EAP-IG.")
]
VectorOption = Annotated[
    Path, typer.Option("--vector", metavar="FILE", help="What `steer fit` wrote, or a GGUF control vector.")
]
PageOption = Annotated[
    Path | None, typer.Option("--page", metavar="FILE", help="Write a page for a browser: .html. Default: none.")
]

# -- steering ----------------------------------------------------------------------------------------------------------

OperatorOption = Annotated[
    str, typer.Option("--operator", metavar="NAME", help="add, project_out, clamp, scale or rotate.")
]
WhereOption = Annotated[
    str,
    typer.Option("--where", metavar="NAME", help="all, prompt, generated, or a token N: it and all after it."),
]
