"""How other processes load a model, as plain data, and the check of its weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from nnsplice import engine
from nnsplice.errors import BadArgument, named
from nnsplice.files import from_json, text_of
from nnsplice.stores import is_address
from nnsplice.work import RunFolder, imported, write_json
from nnsplice.work import named as named_function

LOAD, LOAD_SOURCE = "load.json", "load_source.json"
_FUNCTION = re.compile(r"[\w.]+:[\w.]+")


def load_of(model: Any) -> str:
    """How other processes load a model: a name, a folder, or `module:function`.

    Raises:
        BadArgument: other processes cannot load it.
    """
    if isinstance(model, str | PathLike):
        if is_address(model):
            raise BadArgument(
                f"{model} is in an object store, and weights are read from a file system",
                expected="a name, or a folder that all machines see",
            )
        return str(model)
    if callable(model) and not isinstance(model, torch.nn.Module) and not hasattr(model, "_module"):
        return named_function(model, "what loads the model")
    raise BadArgument(
        f"{named(model)} lives in this process, and other processes load one of their own",
        expected="a name or a folder as for ns.load, or module:function",
        write='ns.run(plan, "gpt2", on="local:2"), or in my_module.py: def load(): ...   then "my_module:load"',
    )


def write_load(folder: RunFolder, load: str, source: str | None, options: Mapping[str, Any] | None) -> None:
    """Write how workers load the model, and the second one of a question about two."""
    for name, spec in ((LOAD, load), (LOAD_SOURCE, source)):
        if spec is not None:
            write_json(folder.path / name, {"load": spec, "options": _options(options)})


def _options(given: Mapping[str, Any] | None) -> dict[str, Any]:
    options = {
        name: str(v).removeprefix("torch.") if isinstance(v, torch.dtype) else v for name, v in (given or {}).items()
    }
    wrong = [name for name, value in options.items() if not isinstance(value, str | int | float | bool | dict | None)]
    if wrong:
        raise BadArgument(
            f"load_options: {', '.join(wrong)} is no text and no number, and other processes cannot have it",
            expected="plain data",
            write='load="my_module:load", a function that says the rest itself',
        )
    return options


def loaded(folder: RunFolder, name: str, weights: str | None) -> Any:
    """Load the model in a worker.

    Args:
        name: the file that says how: `LOAD` or `LOAD_SOURCE`.
        weights: the digest that its weights must have.

    Raises:
        BadArgument: its weights differ, or the file is missing.
    """
    from nnsplice.models import load

    if not (folder.path / name).exists():
        if name == LOAD:
            raise BadArgument(
                f"{folder.address} does not say how the model is loaded, as who wrote it ended before",
                expected="the call of ns.run again that wrote it",
            )
        raise BadArgument(
            f"the question is about two models, and {folder.address} says of one how it is loaded",
            write='ns.run(plan, "base", source="tuned", on=..., out=...)',
        )
    how = from_json(text_of(folder.path / name), folder.path / name)
    spec, options = how["load"], how["options"]
    if _FUNCTION.fullmatch(spec) and not Path(spec).exists():
        make: Callable[..., Any] = imported(spec)
        made = make(**options)
        model = made if isinstance(made, engine.Model) else load(made)
    else:
        model = load(spec, **options)
    digest = engine.weights_digest(model)
    if digest != weights:
        raise BadArgument(
            f"the {'model' if name == LOAD else 'source'} {spec} has the weights {digest} here, and the plan was made "
            f"with {weights}",
            expected="the model that the plan was made with",
        )
    return model
