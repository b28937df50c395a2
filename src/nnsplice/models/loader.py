"""`load`: a model ready for tracing, from whatever the user has."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from logging import CRITICAL
from pathlib import Path
from typing import Any

from torch import nn

from nnsplice import engine
from nnsplice.atlas import peel
from nnsplice.errors import BadArgument, BadType, FileError, NnspliceError, closest, named
from nnsplice.models.dequantise import Quantised, checkpoint, meant
from nnsplice.models.published import PUBLISHED, weights_of
from nnsplice.models.smallfiles import check_small_files

#: The last line of a traceback.
_CAUSE = re.compile(r"^\w*(?:Error|Exception): .+", re.MULTILINE)
#: Models that are part of the package: name -> folder.
EMBEDDED: Mapping[str, Path] = {name: Path(__file__).parent / "data" / name for name in ("toy", "toy-llama")}

#: How the name of a model's class ends -> what it is for, in the words of transformers' pipelines. Others are left to
#: nnsight, which asks the hub.
TASKS = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
}
#: Arguments that say where to find a model, and not only how to load it.
_WHERE = ("revision", "subfolder", "cache_dir", "token", "trust_remote_code", "local_files_only")
#: Those that mean something for a module that is loaded already.
_OF_MODULES = ("task", "peft", "rename", "envoys", "processor", "image_processor", "feature_extractor", "revision")
_TOY = 'model = ns.load("toy")   (embedded, needs no network)'


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
    quantised = _quantised(name_or_module, gguf_file, kwargs)
    if not cache and quantised is None:
        raise BadArgument(
            "cache=False is about the converted form of a GGUF file, and this is none, so it would do nothing",
            write="ns.load(name)",
        )
    if remote:
        kwargs["dispatch"] = False
        if not isinstance(name_or_module, str) or name_or_module in EMBEDDED or quantised or _is_here(name_or_module):
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
    _refuse_alone(kwargs)
    if isinstance(tokenizer, str | os.PathLike) and not remote:
        tokenizer = _tokenizer_from(os.fspath(tokenizer), trust_remote_code=kwargs.get("trust_remote_code", False))
    if isinstance(name_or_module, nn.Module):
        return _module(name_or_module, tokenizer, kwargs)
    if tokenizer is False:
        raise BadArgument(
            "tokenizer=False is for a module that is loaded already; a checkpoint is read with its tokenizer",
            write="ns.load(transformers.AutoModelForCausalLM.from_pretrained(name), tokenizer=False)",
        )
    if quantised is not None:
        return _converted(quantised, tokenizer, cache, kwargs)
    if isinstance(name_or_module, os.PathLike):
        return _folder(Path(name_or_module), tokenizer, kwargs)
    if not isinstance(name_or_module, str):
        raise BadType(
            f"{named(name_or_module)} is no model",
            expected="an embedded name, a folder with a checkpoint, a name on the hub, or a Hugging Face module",
            write=_TOY,
        )
    name = name_or_module
    if name in EMBEDDED:
        return _embedded(name, tokenizer, kwargs)
    if not name:
        raise BadArgument("an empty name", expected="an embedded name, a folder, or a name on the hub", write=_TOY)
    if _is_here(name):
        return _folder(Path(name).expanduser(), tokenizer, kwargs)
    return _named(name, tokenizer, kwargs)


def _quantised(name: object, gguf_file: str | None, kwargs: dict[str, Any]) -> Quantised | None:
    """The GGUF file that is asked for; None for any other model."""
    if isinstance(name, str) and name in PUBLISHED and gguf_file is None:
        if "revision" in kwargs:
            raise BadArgument(f"{name!r} comes in a package and has no revisions", write=f"ns.load({name!r})")
        return weights_of(name)
    if isinstance(name, str | os.PathLike) and name not in EMBEDDED:
        where = {key: kwargs[key] for key in _WHERE if key in kwargs}
        return meant(name, gguf_file, where) if str(name) else None
    if gguf_file is not None:
        raise BadArgument(
            f"{named(name) if not isinstance(name, str) else repr(name)} is loaded already, or comes with nnsplice, so "
            "gguf_file would do nothing",
            write="ns.load(folder, gguf_file=name)",
        )
    return None


def _converted(quantised: Quantised, tokenizer: Any, cache: bool, kwargs: dict[str, Any]) -> engine.Model:
    kwargs = {name: value for name, value in kwargs.items() if name not in _WHERE}
    with checkpoint(quantised, cache=cache) as folder, _no_bar():
        model = _folder(folder, tokenizer, kwargs)
    # What results say they were made with: what was asked for, and not where its converted form is kept.
    config: Any = peel(model).config
    config._name_or_path = quantised.name
    return model


def _refuse_alone(kwargs: Mapping[str, Any]) -> None:
    """Raise for sharding over processes where there is one process, in which it would do nothing."""
    given = [name for name in ("tp_plan", "tp_size") if kwargs.get(name) is not None]
    if given and int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise BadArgument(
            f"{given[0]} shards a model over several processes, and this is one: it would do nothing",
            expected="processes that torchrun started, or device_map for several devices in one process",
            write='ns.load(name, device_map="auto")',
        )


def embedded(name: str) -> Path:
    """The checkpoint folder of an embedded model: config, tokenizer and safetensors.

    >>> folder = ns.models.embedded("toy-llama")
    >>> sorted(file.name for file in folder.iterdir())
    ['card.json', 'config.json', 'generation_config.json', 'model.safetensors', 'tokenizer.json',
     'tokenizer_config.json']
    >>> ns.models.embedded("llama")
    Traceback (most recent call last):
    nnsplice.errors.BadArgument: no model 'llama' is embedded
      expected: 'toy' or 'toy-llama'
      write: ns.load(name)   (for a model on the hub or in a folder)

    Args:
        name: `"toy"` or `"toy-llama"`.

    Returns:
        The folder.

    Raises:
        BadArgument: no model of this name is embedded.
    """
    if name not in EMBEDDED:
        raise BadArgument(
            f"no model {name!r} is embedded",
            expected=" or ".join(map(repr, EMBEDDED)),
            write="ns.load(name)   (for a model on the hub or in a folder)",
        )
    return EMBEDDED[name]


def _is_here(name: str) -> bool:
    """Whether a name is meant as a folder of this machine."""
    try:
        return name.startswith(("/", "./", "../", "~")) or Path(name).exists()
    except OSError:  # no file can have such a name
        return False


def _embedded(name: str, tokenizer: Any, kwargs: dict[str, Any]) -> engine.Model:
    if "revision" in kwargs:
        raise BadArgument(f"{name!r} comes with nnsplice and has no revisions", write=f"ns.load({name!r})")
    with _no_bar():
        model = engine.wrap(str(EMBEDDED[name]), tokenizer, **{"task": "text-generation", **kwargs})
    # What results say they were made with: the name, and not where this machine keeps the package.
    config: Any = peel(model).config
    config._name_or_path = name
    return model


def _module(module: nn.Module, tokenizer: Any, kwargs: dict[str, Any]) -> engine.Model:
    if not hasattr(module, "config"):
        return _plain(module, tokenizer, kwargs)
    if late := ", ".join(name for name in kwargs if name not in (*_OF_MODULES, "dispatch")):
        raise BadArgument(
            f"this {type(module).__name__} is loaded already, so {late} would do nothing",
            expected="what says how to load it where it is loaded",
            write=f"transformers.AutoModelForCausalLM.from_pretrained(name, {late.partition(',')[0]}=...)",
        )
    if "processor" in kwargs:
        kwargs = {"task": "image-text-to-text", **kwargs}
        tokenizer = getattr(kwargs["processor"], "tokenizer", None) if tokenizer is None else tokenizer
    if tokenizer is None and getattr(module.config, "_name_or_path", ""):
        tokenizer = _tokenizer_of(module)
    if tokenizer is None or tokenizer is False:
        return _without_tokenizer(module, kwargs)
    with _quiet():
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
    kept = {name: value for name, value in kwargs.items() if name in ("rename", "envoys")}
    needs = ", ".join(name for name in kwargs if name not in (*kept, "dispatch", "task", "revision"))
    if needs:
        raise BadArgument(
            f"{needs} needs a tokenizer beside it, and this {type(module).__name__} names no checkpoint that has one",
            write=f"ns.load(module, tokenizer=tokenizer, {needs.partition(',')[0]}=...)",
        )
    return engine.wrap_bare(module, **kept)


def _tokenizer_of(module: nn.Module) -> Any:
    """The tokenizer of the checkpoint that a module was read from."""
    source: Any = getattr(module.config, "_name_or_path", "")
    if quantised := _quantised(source, None, {}):
        with checkpoint(quantised) as folder:
            return _tokenizer_from(folder)
    return _tokenizer_from(source)


def _tokenizer_from(source: Any, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint; transformers would stop and ask whether code of its own may run."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(EMBEDDED.get(source, source), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        if "custom code" in str(error):
            raise _own_code(
                f"the tokenizer of {source}",
                "ns.load(module, tokenizer=transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=True))",
            ) from error
        raise FileError(
            f"a tokenizer is not to be had from {source!r}: {_first_line(error)}",
            write="ns.load(module, tokenizer=tokenizer)   (or tokenizer=False, for prompts of token ids)",
        ) from error


def _folder(folder: Path, tokenizer: Any, kwargs: dict[str, Any]) -> engine.Model:
    held = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith(".")) if folder.is_dir() else []
    # A folder inside the folder may be meant.
    inside = folder / kwargs.get("subfolder", "")
    if not (inside / "config.json").is_file():
        if not folder.exists():
            found = "there is no such folder"
        elif not folder.is_dir():
            found = "this is a file, and a checkpoint is a folder"
        elif "adapter_config.json" in held:
            found = "this folder holds an adapter, and a model is needed below it"
        else:
            found = f"this folder holds no checkpoint: no config.json, but {', '.join(held[:5]) or 'nothing'}"
        files = [name for name in held if name.lower().endswith(".gguf")]
        instead = f'ns.load(name_of_its_base, peft="{folder}")' if "adapter_config.json" in held else None
        if files and instead is None:
            instead = f'ns.load("{folder}", gguf_file="{files[0]}")'
        raise FileError(
            found,
            path=folder,
            expected="a folder that save_pretrained wrote, with config.json, weights and a tokenizer",
            write=instead or _TOY,
        )
    check_small_files(inside)
    try:
        return _from(str(folder), tokenizer, kwargs)
    except NnspliceError:
        raise
    except (OSError, ValueError) as error:
        raise FileError(
            f"this folder holds no whole checkpoint, or not one that transformers takes: {_first_line(error)}",
            path=folder,
            expected="a folder that save_pretrained wrote, with config.json, weights and a tokenizer",
        ) from error
    except (ArithmeticError, LookupError, AttributeError) as error:  # transformers computes with what a config says
        raise FileError(
            f"transformers makes no model of this config.json: {type(error).__name__}: {_first_line(error)}",
            path=folder,
            expected="a config that save_pretrained wrote",
        ) from error


def _named(name: str, tokenizer: Any, kwargs: dict[str, Any]) -> engine.Model:
    try:
        return _from(name, tokenizer, kwargs)
    except OSError as error:
        raise FileError(
            f"{name!r} is {_why_not(error)}",
            expected="a name on the hub that can be reached or is cached, a folder, or one of "
            f"{', '.join((*EMBEDDED, *PUBLISHED))}",
            write=_meant(name),
        ) from error


def _from(source: str, tokenizer: Any, kwargs: dict[str, Any]) -> engine.Model:
    """A checkpoint by folder or name; transformers would stop and ask whether code of its own may run."""
    try:
        return _of_config(source, tokenizer, {"trust_remote_code": False, **kwargs})
    except ValueError as error:
        if "custom code" not in str(error):
            raise
        raise _own_code(source, "ns.load(name, trust_remote_code=True)") from error


def _own_code(what: str, write: str) -> FileError:
    return FileError(
        f"{what} brings code of its own, which would run on this machine",
        expected="a model of transformers' own, or leave to run that code once you have read it",
        write=write,
    )


def _of_config(source: str, tokenizer: Any, kwargs: dict[str, Any]) -> engine.Model:
    """What a checkpoint is for is read off its config, which works offline too."""
    from transformers import AutoConfig

    if "task" not in kwargs:
        where = {name: kwargs[name] for name in _WHERE if name in kwargs}
        config = kwargs.get("config") or AutoConfig.from_pretrained(source, **where)
        if _generates_beside(config) and kwargs.get("dispatch", True):
            if config.is_encoder_decoder or (Path(source).is_dir() and not _has_processor(Path(source), kwargs)):
                return _beside(source, config, tokenizer, kwargs)
            kwargs = {"task": "image-text-to-text", **kwargs} if _sees(config) else kwargs
        task = kwargs.get("task") or _task(config)
        kwargs = kwargs if task is None else {"task": task, **kwargs}
    with _explained(kwargs):
        return engine.wrap(source, tokenizer, **kwargs)


@contextmanager
def _explained(kwargs: Mapping[str, Any]) -> Iterator[None]:
    """What libraries below say about devices and shards that do not work, in words."""
    try:
        yield
    except ImportError as error:
        if "tp_plan" not in kwargs and "tp_size" not in kwargs:
            raise
        raise BadArgument(
            f"nnsight cannot shard a model with this version of transformers: {_first_line(error)}",
            expected="versions of both that go together, or device_map",
            write='ns.load(name, device_map="auto")',
        ) from error
    except RuntimeError as error:
        if "without a task" in str(error) or "infer task" in str(error):  # on line, and offline
            raise FileError(
                "its config.json names no architectures, so what the model is for is not known",
                expected="a config that save_pretrained wrote, or a task",
                write='ns.load(name, task="text-generation")',
            ) from error
        if "device string: disk" not in str(error):
            raise
        raise BadArgument(
            "device_map puts the model's first part on the disk, and the tokens have to be somewhere",
            expected="the embedding on a device, other parts on the disk",
            write='ns.load(name, device_map="auto", max_memory={...}, offload_folder=...)',
        ) from error


def _task(config: Any) -> str | None:
    for kind in getattr(config, "architectures", None) or ():
        for ending, task in TASKS.items():
            if kind.endswith(ending):
                return task
    return None


def _generates_beside(config: Any) -> bool:
    """Whether a model generates from more than the tokens before: it has an encoder, or towers for images."""
    return any(kind.endswith("ForConditionalGeneration") for kind in getattr(config, "architectures", None) or ())


def _has_processor(folder: Path, kwargs: Mapping[str, Any]) -> bool:
    """Whether a checkpoint says how images or sound become inputs."""
    inside = folder / kwargs.get("subfolder", "")
    return any((inside / name).is_file() for name in ("processor_config.json", "preprocessor_config.json"))


def _sees(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def _beside(source: str, config: Any, tokenizer: Any, kwargs: dict[str, Any]) -> engine.Model:
    """A model with an encoder, or with towers for images and no processor: transformers' pipelines would not read it.

    It is used by its tokens, which the text's tower alone can run from.
    """
    import transformers

    where = {"trust_remote_code": False, **{name: kwargs[name] for name in _WHERE if name in kwargs}}
    ours = {name: kwargs[name] for name in ("rename", "envoys") if name in kwargs}
    kwargs = {name: value for name, value in kwargs.items() if name not in ("dispatch", *ours)}
    kind: Any = getattr(transformers, config.architectures[0], transformers.AutoModelForSeq2SeqLM)
    with _explained(kwargs):
        module = kind.from_pretrained(source, **kwargs)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, **where) if tokenizer is None else tokenizer
    with _quiet():
        return engine.wrap(module, tokenizer, task="text-generation", **ours)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' list of all models that its pipeline supports, which this one need not be among."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _why_not(error: BaseException) -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "neither embedded nor a folder nor in this machine's cache, and the hub is switched off (HF_HUB_OFFLINE)"
    if "connect" in str(error):
        return "neither embedded nor a folder nor in this machine's cache, and the hub cannot be reached (offline?)"
    return f"neither embedded nor a folder nor to be had from the hub: {_first_line(error)}"


def _meant(name: str) -> str:
    near = closest(name, (*EMBEDDED, *PUBLISHED), n=1)
    return f'model = ns.load("{near}")' if near in (*EMBEDDED, *PUBLISHED) and near != "toy" else _TOY


def _first_line(error: BaseException) -> str:
    """What an error says first; of the tries that transformers lists, what the first of them failed with."""
    text = str(error).strip()
    if "See the original errors" in text and (causes := _CAUSE.findall(text)):
        return causes[0]
    return text.partition("\n")[0]


@contextmanager
def _no_bar() -> Iterator[None]:
    """Without transformers' bar over the weights, which would take longer to read than they to load."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
