"""Wrapping modules that are already loaded: of transformers with a tokenizer, or any `nn.Module`."""

from __future__ import annotations

from typing import Any

from torch import nn

from nnsplice import engine
from nnsplice.errors import BadArgument, FileError
from nnsplice.models.dequantise import checkpoint
from nnsplice.models.folders import custom_code_error
from nnsplice.models.logs import first_line, quiet
from nnsplice.models.sources import EMBEDDED, quantised_of

#: The options that apply to a module that is already loaded.
_MODULE_OPTIONS = ("task", "peft", "rename", "envoys", "processor", "image_processor", "feature_extractor", "revision")


def from_module(module: nn.Module, tokenizer: Any, kwargs: dict[str, Any]) -> engine.Model:
    if not hasattr(module, "config"):
        return _plain(module, tokenizer, kwargs)
    if unused := ", ".join(name for name in kwargs if name not in (*_MODULE_OPTIONS, "dispatch")):
        raise BadArgument(
            f"this {type(module).__name__} is loaded already, so {unused} would do nothing",
            expected="what says how to load it where it is loaded",
            write=f"transformers.AutoModelForCausalLM.from_pretrained(name, {unused.partition(',')[0]}=...)",
        )
    if "processor" in kwargs:
        kwargs = {"task": "image-text-to-text", **kwargs}
        tokenizer = getattr(kwargs["processor"], "tokenizer", None) if tokenizer is None else tokenizer
    if tokenizer is None and getattr(module.config, "_name_or_path", ""):
        tokenizer = tokenizer_of(module)
    if tokenizer is None or tokenizer is False:
        return _without_tokenizer(module, kwargs)
    with quiet():
        return engine.wrap(module, tokenizer, **kwargs)


def _plain(module: nn.Module, tokenizer: Any, kwargs: dict[str, Any]) -> engine.Model:
    """A module of the user's own: prompts are what its forward takes."""
    if tokenizer not in (None, False):
        raise BadArgument(
            f"{type(module).__name__} has no config, so nnsight does not know how to give it a tokenizer's texts",
            expected="prompts of token ids or values, and no tokenizer",
            write="ns.load(module); then ns.capture(model, tokenizer(text).input_ids, sites)",
        )
    given = [name for name in kwargs if name not in ("rename", "envoys", "dispatch")]
    if given:
        raise BadArgument(
            f"{type(module).__name__} has no config, so {', '.join(given)} would do nothing", write="ns.load(module)"
        )
    return engine.wrap_bare(module, **{name: value for name, value in kwargs.items() if name != "dispatch"})


def _without_tokenizer(module: nn.Module, kwargs: dict[str, Any]) -> engine.Model:
    """A module whose prompts will be token ids."""
    wrap_options = {name: value for name, value in kwargs.items() if name in ("rename", "envoys")}
    needs = ", ".join(name for name in kwargs if name not in (*wrap_options, "dispatch", "task", "revision"))
    if needs:
        raise BadArgument(
            f"{needs} needs a tokenizer beside it, and this {type(module).__name__} names no checkpoint that has one",
            write=f"ns.load(module, tokenizer=tokenizer, {needs.partition(',')[0]}=...)",
        )
    return engine.wrap_bare(module, **wrap_options)


def tokenizer_of(module: nn.Module) -> Any:
    """The tokenizer of the checkpoint that a module was read from."""
    source: Any = getattr(module.config, "_name_or_path", "")
    if quantised := quantised_of(source, None, {}):
        with checkpoint(quantised) as folder:
            return tokenizer_from(folder)
    return tokenizer_from(source)


def tokenizer_from(source: Any, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint, without running code of its own unless that is trusted."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(EMBEDDED.get(source, source), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        if "custom code" in str(error):
            raise custom_code_error(
                f"the tokenizer of {source}",
                "ns.load(module, tokenizer=transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=True))",
            ) from error
        raise FileError(
            f"a tokenizer is not to be had from {source!r}: {first_line(error)}",
            write="ns.load(module, tokenizer=tokenizer)   (or tokenizer=False, for prompts of token ids)",
        ) from error
