"""The factors of a PEFT folder, with every scale multiplied in; peft is not needed."""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnsplice.adapters.header import CONFIG, WEIGHTS, read_config, read_header
from nnsplice.adapters.matrices import LoRAMatrices, expert_name, experts_transposed, is_transposed, unwrapped_module
from nnsplice.atlas import unwrap
from nnsplice.errors import FileError, ParamMappingError, circumstances
from nnsplice.shown import shown

#: Initialisations that change the base model's weights, so that the product of the factors is not the change.
CHANGED_BASE = ("pissa", "olora", "corda", "lora_ga")
#: Options with which the change is not a product of two factors.
NOT_A_PRODUCT = (
    "use_bdlora",
    "kasa_config",
    "use_qalora",
    "alora_invocation_tokens",
    "arrow_config",
    "monteclora_config",
)
PAIRS = {"lora_A": "lora_B", "lora_embedding_A": "lora_embedding_B"}

Tensors = Mapping[str, Tensor]


def read_folder(
    adapter_dir: str | os.PathLike[str], base: Any = None
) -> tuple[dict[str, LoRAMatrices], tuple[str, ...]]:
    """The pairs of factors by the weight that they change, and the parameters that are replaced as a whole."""
    try:
        entries, config = read_header(adapter_dir), read_config(adapter_dir)
    except ParamMappingError as error:
        raise FileError(str(error)) from None
    with circumstances(f"the adapter in {Path(adapter_dir)}"):
        if config is None:
            raise FileError(f"there is no {CONFIG}, which has the scale of the factors")
        _check_kind(config)
        tensors = _tensors(Path(adapter_dir) / WEIGHTS, {entry.name for entry in entries})
        root = None if base is None else unwrap(base)
        modules: defaultdict[tuple[str, int], dict[str, Tensor]] = defaultdict(dict)
        whole: list[str] = []
        for entry in entries:
            key = entry.key
            if key.factor is None or (key.factor == "lora_B" and key.attribute == "bias"):
                whole.append(f"{key.module}.{key.attribute}")
            elif key.factor.startswith("trainable_tokens"):
                whole.append(f"{key.module}.weight")
            else:
                modules[key.module, key.depth][key.factor] = tensors[entry.name]
        if root is not None and config.get("layer_replication"):
            _check_replicated(config["layer_replication"], root, [module for module, _ in modules])
        layers: dict[str, LoRAMatrices] = {}
        for (module, depth), factors in modules.items():
            layers |= _pairs(module, depth, factors, config, root, modules)
        if not layers:
            raise FileError("this adapter has no pair of factors", expected="lora_A and lora_B")
    return layers, tuple(sorted(whole))


def _check_kind(config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise FileError(
            f"this is a {shown(kind)} adapter, whose change is no product of two factors with a scale",
            expected="LoRA, or one of its variants",
            write="ExpertAdapter.from_model_delta(base, tuned, rank)   (with the adapter merged into `tuned`)",
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(CHANGED_BASE):
        raise FileError(
            f"this adapter was started by {start}, which moves a part of the base weights into the factors: their "
            "product is not what training changed",
            expected="an adapter that was saved with path_initial_model_for_weight_conversion",
            write="ExpertAdapter.from_model_delta(base, tuned, rank)   (with the adapter merged into `tuned`)",
        )
    strange = [name for name in NOT_A_PRODUCT if config.get(name)]
    if strange:
        raise FileError(
            f"this adapter was made with {strange[0]}, with which the change is no product of two factors",
            write="ExpertAdapter.from_model_delta(base, tuned, rank)   (with the adapter merged into `tuned`)",
        )


def _check_replicated(ranges: Any, root: nn.Module, modules: list[str]) -> None:
    """Raise for a base model without the layers that the adapter was trained on, each a copy of one of its own."""
    for module in modules:
        try:
            unwrapped_module(root, module)
        except FileError:
            raise FileError(
                f"this adapter was made with layer_replication={ranges}, which repeats layers: {module} is one of the "
                "longer model, and `base` has no such layer",
                expected="the model with its layers repeated, or no base",
                write="ExpertAdapter.from_peft(adapter_dir, base=PeftModel.from_pretrained(base, adapter_dir))",
            ) from None


def _tensors(path: Path, names: set[str]) -> dict[str, Tensor]:
    from safetensors import safe_open

    with safe_open(os.fspath(path), framework="pt") as file:
        return {name: file.get_tensor(name) for name in names}


def _pairs(
    module: str,
    depth: int,
    factors: dict[str, Tensor],
    config: Mapping[str, Any],
    root: nn.Module | None,
    modules: Mapping[tuple[str, int], Tensors],
) -> dict[str, LoRAMatrices]:
    first = next((name for name in PAIRS if name in factors), None)
    if first is None or PAIRS[first] not in factors:
        raise FileError(f"{module} has {', '.join(factors)}", expected="a pair of lora_A and lora_B")
    a, b = (_wide(factors[name], f"{module}.{name}") for name in (first, PAIRS[first]))
    parameter = _parameter(module, depth, config, modules, root)
    lacking = [name for name in ("r", "lora_alpha") if config.get(name) is None]
    if lacking:
        raise FileError(f"{CONFIG} does not say {' and '.join(lacking)}, so the scale of the factors is not known")
    rank = _pattern(config, "rank_pattern", parameter or module, config["r"])
    alpha = _pattern(config, "alpha_pattern", parameter or module, config["lora_alpha"])
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    if parameter is not None:
        return _experts(parameter, a, b, rank, scale, _is_transposed(parameter, a, b, config, root))
    name = f"{module}.weight"
    if a.ndim != 2 or b.ndim != 2:
        raise FileError(f"the factors of {module} are {list(a.shape)} and {list(b.shape)}", expected="matrices")
    if a.shape[0] != rank:
        raise FileError(
            f"the factors of {module} have rank {a.shape[0]}, and {CONFIG} says {rank}, so their scale is not known",
            expected="the config that was saved with these factors",
        )
    if first == "lora_embedding_A":  # the change of [token, width] is (B A)^T
        transposed = True
    else:
        transposed = bool(config.get("fan_in_fan_out")) if root is None else is_transposed(root, name)
    if root is not None:
        _check_shape(module, (b.shape[0], a.shape[1]), unwrapped_module(root, module), transposed)
    pair = LoRAMatrices(a, b * scale, transposed=transposed, magnitude=_flat(factors.get("lora_magnitude_vector")))
    if pair.magnitude is not None and root is not None:
        pair = _exact(pair, unwrapped_module(root, module))
    return {name: pair}


def _wide(factor: Tensor, name: str) -> Tensor:
    """A factor in float32 at least, as half precision would round its scale, and its product, to three digits."""
    if not torch.isfinite(factor.float()).all():
        raise FileError(f"{name} holds NaN or infinity", expected="finite numbers")
    return factor if factor.dtype == torch.float64 else factor.float()


def _flat(magnitude: Tensor | None) -> Tensor | None:
    return None if magnitude is None else magnitude.flatten()


def _check_shape(module: str, found: tuple[int, int], owner: nn.Module, transposed: bool) -> None:
    """Raise where the product of two factors has another shape than the weight; packed weights have none to compare."""
    weight = getattr(owner, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        return
    shape = tuple(weight.shape[::-1] if transposed else weight.shape)
    if found != shape:
        raise FileError(
            f"the factors of {module} are for a matrix of {found[0]} by {found[1]}, and the model's is {shape[0]} by "
            f"{shape[1]}",
            expected="the model that the adapter belongs to",
        )


def _exact(pair: LoRAMatrices, module: nn.Module) -> LoRAMatrices:
    """DoRA's change with the singular values that it really has, for which the base weight is needed."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise FileError(f"the base model has no weight where the adapter has {type(module).__name__}")
    change = pair.delta(weight.detach().cpu()).double()
    values = torch.linalg.svdvals(change)
    return LoRAMatrices(pair.lora_A, pair.lora_B, values, pair.transposed, pair.magnitude)


def _pattern(config: Mapping[str, Any], which: str, name: str, default: float) -> Any:
    """A module's own rank or alpha: the first pattern that its name ends with, as PEFT reads them."""
    for pattern, value in (config.get(which) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


# -- fused experts -----------------------------------------------------------------------------------------------------


def _parameter(
    module: str,
    depth: int,
    config: Mapping[str, Any],
    modules: Mapping[tuple[str, int], Tensors],
    root: nn.Module | None,
) -> str | None:
    """The parameter that factors without a layer of their own belong to: `model.layers.0.mlp.experts.gate_up_proj`."""
    targets = [t for t in config.get("target_parameters") or () if _ends(module, t.rpartition(".")[0])]
    if not targets:
        return None
    names = sorted({target.rpartition(".")[2] for target in targets})
    if len(names) == 1:
        return f"{module}.{names[0]}"
    # Several parameters of one module: the first one that the module registered lies innermost.
    if root is not None:
        order = [name for name, _ in unwrapped_module(root, module).named_parameters(recurse=False) if name in names]
    else:
        order = _by_size(names, {d: f for (m, d), f in modules.items() if m == module}, _mirrored(config))
    if len(order) != len(names):
        raise FileError(
            f"which factors of {module} belong to which of {', '.join(names)} is not known without the model",
            write="ExpertAdapter.from_peft(adapter_dir, base=model)",
        )
    return f"{module}.{order[len(order) - 1 - depth]}"


def _ends(module: str, target: str) -> bool:
    return module == target or module.endswith(f".{target}")


def _by_size(names: list[str], nested: Mapping[int, Tensors], mirrored: bool) -> list[str]:
    """The order of two fused tensors by their sizes: gate and up have twice the input width of down."""
    if names != ["down_proj", "gate_up_proj"] or sorted(nested) != [0, 1]:
        return []
    sizes = [(nested[d]["lora_A"].shape[1], nested[d]["lora_B"].shape[0]) for d in (1, 0)]
    (inner_in, inner_out), (outer_in, outer_out) = (size[::-1] for size in sizes) if mirrored else sizes
    if inner_out == 2 * outer_in and outer_out == inner_in:
        return ["gate_up_proj", "down_proj"]
    if outer_out == 2 * inner_in and inner_out == outer_in:
        return ["down_proj", "gate_up_proj"]
    return []


def _mirrored(config: Mapping[str, Any]) -> bool:
    """Whether a PEFT before 0.19 wrote the folder, which took every fused tensor for `[expert, in, out]`.

    For experts stored as `[expert, out, in]`, A then has the output dimension. Versions before 0.18 do not write their
    number.
    """
    version = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version") or "0.17"))
    return version is not None and (int(version[1]), int(version[2])) < (0, 19)


def _is_transposed(parameter: str, a: Tensor, b: Tensor, config: Mapping[str, Any], root: nn.Module | None) -> bool:
    """Whether `B A` of an expert is the transposed change of its matrix; by the sizes, if they differ."""
    module, _, attribute = parameter.rpartition(".")
    if root is None:
        return _mirrored(config)
    owner = unwrapped_module(root, module)
    shape = getattr(owner, attribute).shape
    if len(shape) != 3 or shape[1] == shape[2]:
        return _mirrored(config) or experts_transposed(owner)
    found = (a.shape[1], b.shape[0])
    if found not in (tuple(shape[1:]), tuple(shape[:0:-1])):
        raise FileError(
            f"the factors of {parameter} are for matrices of {found[1]} by {found[0]}, and the model's are "
            f"{shape[1]} by {shape[2]}",
            expected="the model that the adapter belongs to",
        )
    return found == tuple(shape[1:])


def _experts(
    parameter: str, a: Tensor, b: Tensor, rank: int, scale: float, transposed: bool
) -> dict[str, LoRAMatrices]:
    """One pair for each expert: rows of A go expert by expert, columns of B rank by rank."""
    module, _, attribute = parameter.rpartition(".")
    count, odd = divmod(a.shape[0], rank)
    if odd:
        raise FileError(f"the factors of {parameter} have {a.shape[0]} rows, which is no multiple of the rank {rank}")
    rows, columns = a.reshape(count, rank, -1), b.reshape(b.shape[0], rank, count)
    if count == 1:
        return {parameter: LoRAMatrices(a, b * scale)}
    return {
        expert_name(module, i, attribute): LoRAMatrices(
            rows[i].clone(), (columns[:, :, i] * scale).contiguous(), transposed=transposed
        )
        for i in range(count)
    }
