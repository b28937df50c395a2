"""Checkpoints by folder or name: their pipeline task from the config, and errors for broken folders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nnsplice import engine
from nnsplice.errors import BadArgument, FileError, NnspliceError
from nnsplice.models.config_checks import check_config_files
from nnsplice.models.logs import first_line, quiet
from nnsplice.models.sources import LOCATION_OPTIONS, SUGGEST_TOY

#: End of a model class's name -> its pipeline task in transformers. For other classes nnsight asks the hub.
TASKS = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
}


def from_folder(folder: Path, tokenizer: Any, kwargs: dict[str, Any]) -> engine.Model:
    """A checkpoint in a folder.

    Raises:
        FileError: the folder holds none, or a broken one.
    """
    entries = folder.iterdir() if folder.is_dir() else ()
    names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
    inside = folder / kwargs.get("subfolder", "")
    if not (inside / "config.json").is_file():
        if not folder.exists():
            found = "there is no such folder"
        elif not folder.is_dir():
            found = "this is a file, and a checkpoint is a folder"
        elif "adapter_config.json" in names:
            found = "this folder holds an adapter, and a model is needed below it"
        else:
            found = f"this folder holds no checkpoint: no config.json, but {', '.join(names[:5]) or 'nothing'}"
        files = [name for name in names if name.lower().endswith(".gguf")]
        instead = f'ns.load(name_of_its_base, peft="{folder}")' if "adapter_config.json" in names else None
        if files and instead is None:
            instead = f'ns.load("{folder}", gguf_file="{files[0]}")'
        raise FileError(
            found,
            path=folder,
            expected="a folder that save_pretrained wrote, with config.json, weights and a tokenizer",
            write=instead or SUGGEST_TOY,
        )
    check_config_files(inside)
    try:
        return from_checkpoint(str(folder), tokenizer, kwargs)
    except NnspliceError:
        raise
    except (OSError, ValueError) as error:
        raise FileError(
            f"this folder holds no whole checkpoint, or not one that transformers takes: {first_line(error)}",
            path=folder,
            expected="a folder that save_pretrained wrote, with config.json, weights and a tokenizer",
        ) from error
    except (ArithmeticError, LookupError, AttributeError) as error:  # transformers computes with the config's values
        raise FileError(
            f"transformers makes no model of this config.json: {type(error).__name__}: {first_line(error)}",
            path=folder,
            expected="a config that save_pretrained wrote",
        ) from error


def from_checkpoint(source: str, tokenizer: Any, kwargs: dict[str, Any]) -> engine.Model:
    """A checkpoint by folder or name, without running code of its own unless that is trusted."""
    try:
        return _load(source, tokenizer, {"trust_remote_code": False, **kwargs})
    except ValueError as error:
        if "custom code" not in str(error):
            raise
        raise custom_code_error(source, "ns.load(name, trust_remote_code=True)") from error


def custom_code_error(what: str, write: str) -> FileError:
    return FileError(
        f"{what} brings code of its own, which would run on this machine",
        expected="a model of transformers' own, or leave to run that code once you have read it",
        write=write,
    )


def _load(source: str, tokenizer: Any, kwargs: dict[str, Any]) -> engine.Model:
    """Wrap a checkpoint, with the pipeline task that its config implies, so that it works offline."""
    from transformers import AutoConfig

    if "task" not in kwargs:
        location = {name: kwargs[name] for name in LOCATION_OPTIONS if name in kwargs}
        config = kwargs.get("config") or AutoConfig.from_pretrained(source, **location)
        if _is_conditional(config) and kwargs.get("dispatch", True):
            if config.is_encoder_decoder or (Path(source).is_dir() and not _has_processor(Path(source), kwargs)):
                return _load_text_tower(source, config, tokenizer, kwargs)
            kwargs = {"task": "image-text-to-text", **kwargs} if _reads_images(config) else kwargs
        task = kwargs.get("task") or _pipeline_task(config)
        kwargs = kwargs if task is None else {"task": task, **kwargs}
    with _translated_errors(kwargs):
        return engine.wrap(source, tokenizer, **kwargs)


@contextmanager
def _translated_errors(kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Raise our errors for what transformers and nnsight say about devices, shards and missing tasks."""
    try:
        yield
    except ImportError as error:
        if "tp_plan" not in kwargs and "tp_size" not in kwargs:
            raise
        raise BadArgument(
            f"nnsight cannot shard a model with this version of transformers: {first_line(error)}",
            expected="versions of both that go together, or device_map",
            write='ns.load(name, device_map="auto")',
        ) from error
    except RuntimeError as error:
        if "without a task" in str(error) or "infer task" in str(error):  # online, and offline
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


def _pipeline_task(config: Any) -> str | None:
    for kind in getattr(config, "architectures", None) or ():
        for ending, task in TASKS.items():
            if kind.endswith(ending):
                return task
    return None


def _is_conditional(config: Any) -> bool:
    """Whether a model generates from an encoder or from images, and not from tokens alone."""
    return any(kind.endswith("ForConditionalGeneration") for kind in getattr(config, "architectures", None) or ())


def _has_processor(folder: Path, kwargs: Mapping[str, Any]) -> bool:
    """Whether a checkpoint has a processor for images or audio."""
    inside = folder / kwargs.get("subfolder", "")
    return any((inside / name).is_file() for name in ("processor_config.json", "preprocessor_config.json"))


def _reads_images(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def _load_text_tower(source: str, config: Any, tokenizer: Any, kwargs: dict[str, Any]) -> engine.Model:
    """A model with an encoder, or with image towers and no processor, which transformers' pipelines do not load.

    It is used with tokens alone.
    """
    import transformers

    location = {"trust_remote_code": False, **{name: kwargs[name] for name in LOCATION_OPTIONS if name in kwargs}}
    wrap_options = {name: kwargs[name] for name in ("rename", "envoys") if name in kwargs}
    kwargs = {name: value for name, value in kwargs.items() if name not in ("dispatch", *wrap_options)}
    kind: Any = getattr(transformers, config.architectures[0], transformers.AutoModelForSeq2SeqLM)
    with _translated_errors(kwargs):
        module = kind.from_pretrained(source, **kwargs)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, **location) if tokenizer is None else tokenizer
    with quiet():
        return engine.wrap(module, tokenizer, task="text-generation", **wrap_options)
