"""Real PEFT adapters on tiny models of many families, their optimizers, and the truth, told without nnsplice."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import zoo

#: Name -> (family, arguments of LoraConfig).
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "all_linear": ("llama", {"target_modules": "all-linear"}),
    "dora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "rslora": ("qwen3", {"target_modules": ["q_proj", "up_proj"], "use_rslora": True, "lora_alpha": 6}),
    "ranks": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 4},
            "alpha_pattern": {"v_proj": 7},
        },
    ),
    "sparse": ("llama", {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [0, 2]}),
    "uneven": ("llama", {"target_modules": r".*(layers\.0\.self_attn\.(q|k)_proj|layers\.2\.mlp\.up_proj)"}),
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "dora_embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "saved_embedding": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "saved_head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "saved_norms": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm", "norm"]}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "biases": ("gpt2", {"target_modules": ["c_attn"], "bias": "lora_only"}),
    "neox": ("gpt_neox", {"target_modules": ["query_key_value", "dense"]}),
    "bert": ("bert", {"target_modules": ["query", "value"]}),
    "opt": ("opt", {"target_modules": ["q_proj"], "modules_to_save": ["final_layer_norm"]}),
    "experts": (
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "one_expert_tensor": ("qwen3_moe", {"target_modules": ["v_proj"], "target_parameters": ["mlp.experts.down_proj"]}),
    "t5": ("t5", {"target_modules": ["q", "v"]}),
    "t5_decoder": ("t5", {"target_modules": r".*decoder.*\.(q|v)"}),
    "bart": ("bart", {"target_modules": ["q_proj", "fc1"]}),
}


@dataclass
class Trained:
    """An adapted model, and the folder that it was saved to."""

    name: str
    model: Any
    folder: Path

    @property
    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]


def adapt(name: str, folder: Path, *, random: bool = True, **more: Any) -> Trained:
    """A model with the adapter of this name, whose factors are random numbers, saved as PEFT saves it."""
    from peft import LoraConfig, get_peft_model

    family, arguments = ADAPTERS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out, saved embeddings: peft says what it does
        model = get_peft_model(zoo.build(family), LoraConfig(**{"r": 2, "lora_alpha": 3, **arguments, **more}))
        if random:
            with torch.no_grad():
                for key, p in model.named_parameters():
                    if "lora_" in key and "magnitude" not in key:
                        p.copy_(torch.randn_like(p) * 0.2)
                    elif "magnitude" in key or (p.requires_grad and "delta" not in key):
                        p.mul_(1.1)
    save(model, folder)
    return Trained(name, model, folder)


def save(model: Any, folder: Path) -> None:
    """As PEFT saves it, without what it says of embeddings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(folder))


def train(trained: Trained, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    """Some steps that move every trainable parameter which the model uses."""
    family = ADAPTERS[trained.name][0]
    for _ in range(steps):
        optimizer.zero_grad()
        trained.model(**zoo.inputs(family)).logits.square().mean().backward()
        optimizer.step()


# -- optimizers, as people make them -----------------------------------------------------------------------------------


def _params(pairs: list[tuple[str, nn.Parameter]], test: Callable[[str, nn.Parameter], bool]) -> list[nn.Parameter]:
    return [p for name, p in pairs if test(name, p)]


def _groups(trained: Trained, *tests: Callable[[str, nn.Parameter], bool]) -> torch.optim.Optimizer:
    left, groups = trained.trainable, []
    for test in tests:
        groups.append({"params": _params(left, test)})
        left = [(name, p) for name, p in left if not test(name, p)]
    return torch.optim.AdamW([group for group in groups if group["params"]])


def _loraplus(trained: Trained) -> torch.optim.Optimizer:
    from peft.optimizers import create_loraplus_optimizer

    return create_loraplus_optimizer(trained.model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=4)


def _decay(trained: Trained) -> torch.optim.Optimizer:
    """As transformers' Trainer splits them."""
    from transformers.trainer_pt_utils import get_parameter_names

    patterns = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    decayed = set(get_parameter_names(trained.model, [nn.LayerNorm], patterns))
    return torch.optim.AdamW(
        [
            {"params": [p for name, p in trained.trainable if name in decayed]},
            {"params": [p for name, p in trained.trainable if name not in decayed]},
        ]
    )


def _by_layer(trained: Trained, *, last_first: bool) -> torch.optim.Optimizer:
    """A learning rate for each layer."""
    by: dict[Any, list[nn.Parameter]] = {}
    for name, p in trained.trainable:
        by.setdefault(layer_of(name), []).append(p)
    groups = [{"params": group} for group in by.values()]
    return torch.optim.AdamW(groups[::-1] if last_first else groups)


OPTIMIZERS: dict[str, Callable[[Trained], torch.optim.Optimizer]] = {
    "trainable": lambda t: torch.optim.AdamW([p for _, p in t.trainable]),
    "everything": lambda t: torch.optim.AdamW(t.model.parameters()),
    "named": lambda t: torch.optim.AdamW(t.trainable),
    "named_everything": lambda t: torch.optim.AdamW(list(t.model.named_parameters())),
    "loraplus": _loraplus,
    "a_then_b": lambda t: torch.optim.AdamW(
        _params(t.trainable, lambda n, _: "lora_A" in n) + _params(t.trainable, lambda n, _: "lora_A" not in n)
    ),
    "decay": _decay,
    "by_dimension": lambda t: _groups(t, lambda n, p: p.ndim > 1, lambda n, p: True),
    "by_layer": lambda t: _by_layer(t, last_first=False),
    "by_layer_last_first": lambda t: _by_layer(t, last_first=True),
    "one_by_one": lambda t: torch.optim.AdamW([{"params": [p]} for _, p in t.trainable]),
    "by_size": lambda t: torch.optim.AdamW(sorted((p for _, p in t.trainable), key=lambda p: -p.numel())),
    "backwards": lambda t: torch.optim.AdamW([p for _, p in reversed(t.trainable)]),
}  # fmt: skip

# -- the truth ---------------------------------------------------------------------------------------------------------

_LAYER = re.compile(r"\.(?:layers|h|block)\.(\d+)\.|\.encoder\.layer\.(\d+)\.")


def layer_of(name: str) -> tuple[str, int] | None:
    """Tower and layer of a parameter of these families, by a pattern of its own."""
    found = _LAYER.search(name)
    if found is None:
        return None
    tower = "encoder" if ".encoder." in name and "bert" not in name else "decoder"
    return tower, int(found[1] or found[2])


def truth(trained: Trained, optimizer: torch.optim.Optimizer) -> dict[int, tuple[str, int]]:
    """Id in `state_dict()` -> tower and layer of every trained parameter of a layer."""
    names = {id(p): name for name, p in trained.model.named_parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    found = {i: layer_of(names[id(p)]) for i, p in enumerate(parameters) if p.requires_grad}
    return {i: layer for i, layer in found.items() if layer is not None}


def count(optimizer: torch.optim.Optimizer) -> int:
    """How many parameters an optimizer has."""
    return sum(len(group["params"]) for group in optimizer.param_groups)
