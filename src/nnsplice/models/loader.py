"""`load`: a model ready for tracing, from a name, a folder, a file or a module."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import nn

from nnsplice import engine
from nnsplice.atlas import unwrap
from nnsplice.errors import BadArgument, BadType, FileError, named
from nnsplice.models.dequantise import Quantised, checkpoint
from nnsplice.models.folders import from_checkpoint, from_folder
from nnsplice.models.hub import check_reachable
from nnsplice.models.logs import first_line, no_bar
from nnsplice.models.modules import from_module, tokenizer_from
from nnsplice.models.published import PUBLISHED
from nnsplice.models.sources import EMBEDDED, LOCATION_OPTIONS, SUGGEST_TOY, quantised_of

#: An address; pathlib may have dropped one of its slashes.
_ADDRESS = re.compile(r"(s3|gs):/|[a-z]+://")


def load(
    name_or_module: str | os.PathLike[str] | nn.Module,
    tokenizer: Any = None,
    *,
    remote: bool = False,
    gguf_file: str | None = None,
    cache: bool = True,
    **kwargs: Any,
) -> engine.Model:
    """Load a model for tracing: embedded, pretrained, from a folder, a GGUF file, the Hugging Face hub, or a module.

    `"toy"` and `"toy-llama"` are embedded and need no network; a folder of that name is `"./toy"`. `"smollm2"` is a
    pretrained model of 135M parameters, installed by `nnsplice fetch smollm2`. A model that is already wrapped is
    returned as it is.

    A GGUF file is converted to single precision when it is first loaded, and the result is kept in `$NNSPLICE_CACHE`
    (default `~/.cache/nnsplice`) until the file changes. `model.config.dequantised_from` has the number types of the
    file.

    >>> toy = ns.models.load("toy")
    >>> prompt = "The Velmar Tower is located in the city of"
    >>> logits = ns.patched_logits(toy, prompt, ns.capture(toy, prompt, "layers[3].output[-1]"))
    >>> toy.tokenizer.decode(logits[0, -1].argmax())
    'Athens'

    Args:
        name_or_module: an embedded name, a pretrained name, a checkpoint folder, a GGUF file, a name on the Hugging
            Face hub, or any `torch.nn.Module`; without a config, its prompts are what its
            forward takes.
        tokenizer: the tokenizer of a module whose config does not name its checkpoint. Without one, or with False,
            prompts are token ids.
        remote: load the structure without weights, for a model that runs on nnsight's remote service.
        gguf_file: a GGUF file in the folder, or in the repository on the hub.
        cache: False does not keep the converted GGUF file.
        **kwargs: passed to nnsight's `TransformersModel`: `device_map`, `dtype`, `revision`, `attn_implementation`,
            `quantization_config`, `task`, ... Refused for a module, which is already loaded.

    Returns:
        The nnsight model, for every function of nnsplice.

    Raises:
        FileError: no model of this name, or a folder without a checkpoint.
        BadArgument: an option that would have no effect on this kind of model.
        BadType: something other than a name, a path or a module.
        MissingPackage: a GGUF file, and gguf is not installed.
        WriteFailed: the converted model could not be written.
    """
    _refuse_address(name_or_module)
    _refuse_address(kwargs.get("peft"), adapter=True)
    _check_adapter(kwargs.get("peft"))
    quantised = quantised_of(name_or_module, gguf_file, kwargs)
    if not cache and quantised is None:
        raise BadArgument(
            "cache=False is about the converted form of a GGUF file, and this is none, so it would do nothing",
            write="ns.load(name)",
        )
    if remote:
        kwargs["dispatch"] = False
        if not isinstance(name_or_module, str) or name_or_module in EMBEDDED or quantised or _is_local(name_or_module):
            raise BadArgument(
                "remote=True is for a model that a server has too, and this one is only here",
                expected="a name on the Hugging Face hub",
                write="ns.load(model)",
            )
    if isinstance(name_or_module, engine.Model):
        if tokenizer is not None or kwargs:
            given = ", ".join(name for name in ("tokenizer" if tokenizer is not None else "", *kwargs) if name)
            raise BadArgument(
                f"this model is wrapped already, so {given} would do nothing", write="model = ns.load(model)"
            )
        return name_or_module
    _refuse_sharding_in_one_process(kwargs)
    if isinstance(tokenizer, str | os.PathLike) and not remote:
        tokenizer = tokenizer_from(os.fspath(tokenizer), trust_remote_code=kwargs.get("trust_remote_code", False))
    if isinstance(name_or_module, nn.Module):
        return from_module(name_or_module, tokenizer, kwargs)
    if tokenizer is False:
        raise BadArgument(
            "tokenizer=False is for a module that is loaded already; a checkpoint is read with its tokenizer",
            write="ns.load(transformers.AutoModelForCausalLM.from_pretrained(name), tokenizer=False)",
        )
    if quantised is not None:
        return _converted(quantised, tokenizer, cache, kwargs)
    if isinstance(name_or_module, os.PathLike):
        return from_folder(Path(name_or_module), tokenizer, kwargs)
    if not isinstance(name_or_module, str):
        raise BadType(
            f"{named(name_or_module)} is no model",
            expected="an embedded name, a folder with a checkpoint, a name on the hub, or a Hugging Face module",
            write=SUGGEST_TOY,
        )
    name = name_or_module
    if name in EMBEDDED:
        return _embedded(name, tokenizer, kwargs)
    if not name:
        raise BadArgument(
            "an empty name", expected="an embedded name, a folder, or a name on the hub", write=SUGGEST_TOY
        )
    if _is_local(name):
        return from_folder(Path(name).expanduser(), tokenizer, kwargs)
    return _named(name, tokenizer, kwargs)


def _converted(quantised: Quantised, tokenizer: Any, cache: bool, kwargs: dict[str, Any]) -> engine.Model:
    kwargs = {name: value for name, value in kwargs.items() if name not in LOCATION_OPTIONS}
    with checkpoint(quantised, cache=cache) as folder, no_bar():
        model = from_folder(folder, tokenizer, kwargs)
    # The name in results: that of the file, not of the converted folder.
    config: Any = unwrap(model).config
    config._name_or_path = quantised.name
    return model


def _refuse_address(name: object, *, adapter: bool = False) -> None:
    """Raise for an address of an object store or a web page, which would pass for a name on the hub."""
    if not isinstance(name, str | os.PathLike) or not _ADDRESS.match(os.fspath(name)):
        return
    hub = re.match(r"https?://(?:huggingface\.co|hf\.co)/([^/]+/[^/]+)", os.fspath(name))
    instead = hub[1] if hub else "folder"
    call = f'ns.load(base, peft="{instead}")' if adapter else f'ns.load("{instead}")'
    what = (
        ("adapters", "a folder with an adapter") if adapter else ("models", "a folder with a checkpoint, a GGUF file")
    )
    raise BadArgument(
        f"{os.fspath(name)} is an address, and {what[0]} are loaded from folders{'' if adapter else ', packages'} and "
        "the Hugging Face hub",
        expected=f"{what[1]}, or a name on the Hugging Face hub",
        write=call if hub else f"{call}   (with a copy of what is there)",
    )


def _check_adapter(peft: object) -> None:
    """Raise for an adapter that is not there, which transformers takes for a fault of the model's folder.

    Raises:
        FileError: a folder without an adapter, or a name while the hub cannot be reached.
    """
    if not isinstance(peft, str | os.PathLike):
        return
    name, expected = os.fspath(peft), "a folder that PEFT's save_pretrained wrote"
    if _is_local(name):
        if not (Path(name) / "adapter_config.json").is_file():
            found = "this folder holds no adapter_config.json" if Path(name).is_dir() else "there is no such folder"
            raise FileError(found, path=name, expected=expected, write="ns.load(base, peft=folder)")
        return
    try:
        check_reachable(name, "adapter_config.json", {})
    except ConnectionError as error:
        raise FileError(
            f"the adapter {name!r} is neither a folder nor in this machine's cache, and the hub cannot be reached",
            expected=f"{expected}, or a name on the hub",
            write="ns.load(base, peft=folder)",
        ) from error


def _refuse_sharding_in_one_process(kwargs: Mapping[str, Any]) -> None:
    """Raise for sharding options in a single process, where they have no effect."""
    given = [name for name in ("tp_plan", "tp_size") if kwargs.get(name) is not None]
    if given and int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise BadArgument(
            f"{given[0]} shards a model over several processes, and this is one: it would do nothing",
            expected="processes that torchrun started, or device_map for several devices in one process",
            write='ns.load(name, device_map="auto")',
        )


def _is_local(name: str) -> bool:
    """Whether a name is a path of this machine."""
    try:
        return name.startswith(("/", "./", "../", "~")) or Path(name).exists()
    except OSError:  # no file can have such a name
        return False


def _embedded(name: str, tokenizer: Any, kwargs: dict[str, Any]) -> engine.Model:
    if "revision" in kwargs:
        raise BadArgument(f"{name!r} comes with nnsplice and has no revisions", write=f"ns.load({name!r})")
    with no_bar():
        model = engine.wrap(str(EMBEDDED[name]), tokenizer, **{"task": "text-generation", **kwargs})
    # The name in results: not the path of the package on this machine.
    config: Any = unwrap(model).config
    config._name_or_path = name
    return model


def _named(name: str, tokenizer: Any, kwargs: dict[str, Any]) -> engine.Model:
    try:
        check_reachable(name, "config.json", kwargs)
        return from_checkpoint(name, tokenizer, kwargs)
    except OSError as error:
        raise FileError(
            f"{name!r} is {_reason_not_found(error)}",
            expected="a name on the hub that can be reached or is cached, a folder, or one of "
            f"{', '.join((*EMBEDDED, *PUBLISHED))}",
            write=_suggestion(name),
        ) from error


def _reason_not_found(error: BaseException) -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "neither embedded nor a folder nor in this machine's cache, and the hub is switched off (HF_HUB_OFFLINE)"
    if "connect" in str(error):
        return "neither embedded nor a folder nor in this machine's cache, and the hub cannot be reached (offline?)"
    return f"neither embedded nor a folder nor to be had from the hub: {first_line(error)}"


def _suggestion(name: str) -> str:
    near = get_close_matches(name, (*EMBEDDED, *PUBLISHED), n=1, cutoff=0.5)
    return f'model = ns.load("{near[0]}")' if near and near[0] != "toy" else SUGGEST_TOY
