"""`load_sae`: SAEs in the formats of SAELens (`cfg.json`, `sae_weights.safetensors`) and Gemma Scope (`params.npz`).

Nothing is unpickled: safetensors have no code, and numpy's files are read without objects. What a config asks for that
is not known here is refused by its name, as its numbers would be wrong.
"""

from __future__ import annotations

import json
import math
import numbers
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor

from nnsplice.errors import BadArgument, BadType, FileError, NnspliceError
from nnsplice.files import from_json, is_pickle, local_path, text_of, whole
from nnsplice.subspaces.sae import DECODER, KINDS, NORMS, SAE

CONFIG, WEIGHTS, PARAMS = "cfg.json", "sae_weights.safetensors", "params.npz"
EXPECTED = f"a folder with {CONFIG} and {WEIGHTS} (SAELens), or a file {PARAMS} (Gemma Scope)"
#: Transcoders by the names of SAELens, with the kind that each encodes as.
TRANSCODERS = {
    "transcoder": "standard",
    "skip_transcoder": "standard",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
#: Keys of a config that change the arithmetic, with the supported values.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "reshape_activations": ("none", "hook_z", None),  # heads side by side, as a site has them
    "finetuning_scaling_factor": (False, None),
    "hook_head_index": (None,),
    "use_error_term": (False, None),
}
#: Other keys that change it, with the types of their values.
_FORMS: Mapping[str, type] = {
    "architecture": str, "activation_fn": str, "activation_fn_str": str, "activation_fn_kwargs": dict,
    "normalize_activations": str, "apply_b_dec_to_input": bool, "rescale_acts_by_decoder_norm": bool, "k": int,
}  # fmt: skip
_IN_JSON: Mapping[type, str] = {str: "a text", dict: "an object", bool: "true or false", int: "a whole number"}


def load_sae(path: str | os.PathLike[str], *, scaling_factor: float | None = None) -> SAE:
    """Read an SAE from a folder or file.

    >>> ns.load_sae(ns.models.embedded("toy") / "sae")
    SAE: topk, 256 features of a site 64 wide

    Kinds: standard, topk, batchtopk, jumprelu, gated; transcoders, with and without a skip, that are standard or
    jumprelu. Gemma Scope's transcoders have the format of its SAEs: attach them with `reads=`.

    Args:
        path: a folder that holds `cfg.json` and `sae_weights.safetensors`, or `params.npz`; or the npz file.
        scaling_factor: what inputs are multiplied by before they are encoded, and outputs divided by; of SAEs whose
            config says `expected_average_only_in`, which leaves it out.

    Returns:
        The SAE.

    Raises:
        BadArgument: a `scaling_factor` that is not above 0 and finite, or for an SAE that scales nothing by a factor.
        BadType: a `scaling_factor` that is no number.
        FileError: the file is none of these, is damaged, has a kind or setting that is not known here, or needs a
            `scaling_factor`.
    """
    _check_factor(scaling_factor)
    place = FilePath(path)
    if place.is_dir():
        place = place / (CONFIG if (place / CONFIG).is_file() else PARAMS)
    if not place.is_file():
        raise FileError(f"there is no SAE at {path}", expected=EXPECTED)
    try:
        if place.suffix == ".npz":
            sae, scaled = _gemma_scope(place), False
        else:
            sae, scaled = _saelens(place.parent, scaling_factor)
    except FileError:
        raise
    except (NnspliceError, KeyError) as error:
        raise FileError(f"{path} holds no SAE that can be used: {error}", expected=EXPECTED) from None
    if scaling_factor is not None and not scaled:
        raise BadArgument(
            f"the SAE at {path} scales nothing by a factor; scaling_factor={scaling_factor} would change its numbers",
            expected="no scaling_factor",
            write=f"ns.load_sae({str(path)!r})",
        )
    return sae


def _check_factor(factor: object) -> None:
    if factor is None:
        return
    if isinstance(factor, bool) or not isinstance(factor, numbers.Real):
        raise BadType(f"scaling_factor={factor!r} is no number", expected="a number above 0")
    if not 0 < float(factor) < math.inf:
        raise BadArgument(f"scaling_factor={factor}", expected="a number above 0, by which inputs are multiplied")


def _gemma_scope(path: FilePath) -> SAE:
    import numpy as np

    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            tensors = {name: torch.from_numpy(file[name].copy()) for name in file.files}
    except (ValueError, OSError, zipfile.BadZipFile, EOFError, KeyError, TypeError) as error:
        raise FileError(
            f"{path} is damaged, or holds objects and no plain numbers: {error}", expected=EXPECTED
        ) from None
    wanted = {*KINDS["jumprelu"], *DECODER}
    if set(tensors) != wanted:
        raise FileError(f"{path} holds {', '.join(sorted(tensors))}", expected=f"just {', '.join(sorted(wanted))}")
    return SAE("jumprelu", tensors, about={"format": "Gemma Scope"})


def _saelens(folder: FilePath, scaling_factor: float | None) -> tuple[SAE, bool]:
    """The SAE, and whether it scales its inputs by a factor."""
    weights = folder / WEIGHTS
    if not weights.is_file() or not (folder / CONFIG).is_file():
        raise FileError(f"{folder} holds no {CONFIG} with {WEIGHTS}", expected=EXPECTED)
    config = from_json(text_of(folder / CONFIG), folder / CONFIG)
    if not isinstance(config, dict):
        raise FileError(f"{folder / CONFIG} is no config", expected="an object of JSON")
    for name, form in _FORMS.items():
        if config.get(name) is not None and type(config[name]) is not form:
            raise FileError(
                f"{folder / CONFIG} says that {name} is {config[name]!r}",
                expected=_IN_JSON[form],
            )
    tensors = _read(weights)
    transcoder = config.get("architecture") in TRANSCODERS
    kind = _kind(folder, config)
    for name, values in _PLAIN.items():
        if config.get(name, values[0]) not in values:
            raise FileError(f"{folder / CONFIG} has {name}={config[name]!r}, which is not known here")
    if "log_threshold" in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    if kind in ("batchtopk", "jumprelu") and "topk_threshold" in tensors and "threshold" not in tensors:
        tensors["threshold"] = tensors["topk_threshold"].to(tensors["b_enc"]).expand_as(tensors["b_enc"]).clone()
    if kind == "batchtopk" and "threshold" not in tensors:
        raise FileError(f"{weights} has no threshold, so which features are on would depend on the batch")
    norm = config.get("normalize_activations") or "none"
    by_decoder_norm = bool(config.get("rescale_acts_by_decoder_norm", False))
    scaled = norm == "expected_average_only_in"
    if scaled:
        tensors, norm = _scaled(tensors, scaling_factor, folder, by_decoder_norm), "none"
    if transcoder:
        _check_transcoder(folder, config, tensors, norm, scaled)
    if norm not in NORMS:
        raise FileError(f"{folder / CONFIG} has normalize_activations={norm!r}, which is not known here")
    held = config.get("metadata")
    metadata = held if isinstance(held, dict) else {}
    source = {name: metadata.get(name, config.get(name)) for name in ("model_name", "hook_name")}
    sae = SAE(
        kind,
        {name: tensor for name, tensor in tensors.items() if name in _names(kind, transcoder)},
        k=config.get("k", (config.get("activation_fn_kwargs") or {}).get("k")) if kind == "topk" else None,
        centred=bool(config.get("apply_b_dec_to_input", not transcoder)),
        norm=norm,
        transcoder=transcoder,
        by_decoder_norm=by_decoder_norm,
        about={"format": "SAELens", **{name: value for name, value in source.items() if value is not None}},
    )
    return sae, scaled


def _names(kind: str, transcoder: bool) -> set[str]:
    return {*KINDS[kind], *DECODER, *(("W_skip",) if transcoder else ())}


def _check_transcoder(
    folder: FilePath, config: Mapping[str, Any], tensors: Mapping[str, Tensor], norm: str, scaled: bool
) -> None:
    """Raise for a transcoder whose tensors do not fit its name."""
    kind = config["architecture"]
    if norm != "none" or scaled:
        raise FileError(
            f"{folder / CONFIG} is a {kind} that scales its inputs, which is not known here",
            expected="normalize_activations none",
        )
    if ("skip" in kind) != ("W_skip" in tensors):
        raise FileError(f"{folder / WEIGHTS} has {'no ' if 'skip' in kind else ''}W_skip, and its config says {kind!r}")


def _kind(folder: FilePath, config: Mapping[str, Any]) -> str:
    """The kind in a config; an older config has the activation function of a standard SAE instead."""
    named = config.get("architecture", "standard")
    kind: Any = TRANSCODERS.get(named, named)
    if kind not in KINDS:
        raise FileError(
            f"{folder / CONFIG} is of the kind {kind!r}, which is not known here",
            expected=f"one of {', '.join((*KINDS, *TRANSCODERS))}",
        )
    function = config.get("activation_fn", config.get("activation_fn_str", "relu"))
    if kind == "standard" and function == "topk":
        return "topk"
    if function not in ("relu", "topk") or (function == "topk" and kind != "topk"):
        raise FileError(
            f"{folder / CONFIG} is {kind} with the activation function {function!r}, which is not known here"
        )
    return kind


def _scaled(
    tensors: Mapping[str, Tensor], factor: float | None, folder: FilePath, by_decoder_norm: bool
) -> dict[str, Tensor]:
    if factor is None:
        raise FileError(
            f"{folder / CONFIG} scales inputs by the inverse of their expected norm, and does not say what that is",
            expected="the factor",
            write="ns.load_sae(folder, scaling_factor=...), or 1.0 where it is folded into the weights",
        )
    # Half precision would round every product.
    made = {name: tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for name, tensor in tensors.items()}
    made["W_enc"] = made["W_enc"] * factor
    made["W_dec"], made["b_dec"] = made["W_dec"] / factor, made["b_dec"] / factor
    if by_decoder_norm and "threshold" in made:  # features are as large as what they add, and so is their threshold
        made["threshold"] = made["threshold"] / factor
    return made


def _read(path: FilePath) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if is_pickle(path):
        raise FileError(f"{path} looks like a pickle, which can run any code when it is opened", expected=EXPECTED)
    try:
        return load_file(path)
    except (SafetensorError, RuntimeError) as error:
        raise FileError(f"{path} is damaged: {error}", expected=EXPECTED) from None


def write_sae(sae: SAE, folder: str | os.PathLike[str]) -> None:
    """Write an SAE in the format of SAELens."""
    from safetensors.torch import save_file

    path = local_path(folder)
    path.mkdir(exist_ok=True)
    config = {
        "architecture": sae.kind, "d_in": sae.width, "d_sae": sae.features, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": sae.centred, "normalize_activations": sae.norm, "reshape_activations": "none",
        "metadata": {name: sae.about[name] for name in ("model_name", "hook_name") if name in sae.about},
    }  # fmt: skip
    if sae.k is not None:
        config["k"] = sae.k
    if sae.kind in ("topk", "batchtopk"):
        config["rescale_acts_by_decoder_norm"] = sae.by_decoder_norm
    with whole(path / WEIGHTS) as temporary:
        save_file({name: tensor.contiguous().clone() for name, tensor in sae.tensors.items()}, temporary)
    with whole(path / CONFIG) as temporary:
        temporary.write_text(json.dumps(config, indent=1), encoding="utf-8")
