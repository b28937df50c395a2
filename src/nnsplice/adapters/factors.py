"""An adapter as pairs of low-rank factors, by the weight that each pair changes: from a folder, or from two models."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nnsplice.adapters.folder import read_folder
from nnsplice.adapters.matrices import LoRAMatrices, expert_name, experts_transposed, is_transposed, unwrapped_module
from nnsplice.atlas import unwrap
from nnsplice.errors import BadArgument, ShapeError


@dataclass(eq=False)
class ExpertAdapter:
    """The change that an adapter makes to each weight, as low-rank factors, with tags of its domains.

    The keys of `layers` are the names of the base model's parameters: `model.layers.7.self_attn.q_proj.weight`.

    >>> from copy import deepcopy
    >>> tuned = deepcopy(ns.models.unwrap(model))
    >>> with torch.no_grad():
    ...     _ = tuned.transformer.h[1].mlp.c_fc.weight[3].add_(0.5)
    ...     _ = tuned.transformer.h[2].attn.c_proj.weight[:, 0].add_(0.25)
    >>> adapter = ns.adapters.ExpertAdapter.from_model_delta(model, tuned, rank=1)
    >>> adapter
    ExpertAdapter(2 matrices, rank 1)
    >>> adapter.layers["transformer.h.1.mlp.c_fc.weight"]
    LoRAMatrices(64 x 16, rank 1, energy 16)

    Attributes:
        layers: the factors by the base model's parameter names.
        domain_tags: the domains of the adapter.
        whole: parameters that the adapter replaces as a whole (`modules_to_save`, biases).
        computed_tags: the tags that were computed, which the next computation replaces.
    """

    layers: dict[str, LoRAMatrices]
    domain_tags: list[str] = field(default_factory=list)
    whole: tuple[str, ...] = ()
    computed_tags: list[str] = field(default_factory=list, repr=False)

    @classmethod
    def from_peft(cls, adapter_dir: str | os.PathLike[str], *, base: Any = None) -> ExpertAdapter:
        """Read an adapter from a folder of PEFT.

        Scales (alpha/r, rsLoRA, rank and alpha patterns) are multiplied into `lora_B`; fused experts become one pair
        each.

        >>> from copy import deepcopy
        >>> from tempfile import mkdtemp
        >>> from peft import LoraConfig, get_peft_model
        >>> folder = mkdtemp()
        >>> config = LoraConfig(r=4, target_modules=["c_fc"], fan_in_fan_out=True)
        >>> get_peft_model(deepcopy(ns.models.unwrap(model)), config).save_pretrained(folder)
        >>> ns.adapters.ExpertAdapter.from_peft(folder)
        ExpertAdapter(3 matrices, rank 4)

        Args:
            adapter_dir: the folder.
            base: the base model. With it DoRA's change is exact, and the orientation of each weight is looked up
                instead of taken from the config.

        Returns:
            The adapter.

        Raises:
            FileError: no such folder, or an adapter that has no pairs of factors.
        """
        layers, whole = read_folder(adapter_dir, base)
        return cls(layers, whole=whole)

    @classmethod
    def from_model_delta(cls, base: Any, tuned: Any, rank: int) -> ExpertAdapter:
        """The difference of two models, each matrix as its best approximation of a rank.

        Equal matrices are left out; biases and norms that differ are listed in `whole`.

        >>> from copy import deepcopy
        >>> tuned = deepcopy(ns.models.unwrap(model))
        >>> with torch.no_grad():
        ...     _ = tuned.transformer.h[1].mlp.c_fc.weight.mul_(2.0)
        ...     _ = tuned.transformer.h[1].mlp.c_fc.bias.add_(1.0)
        >>> adapter = ns.adapters.ExpertAdapter.from_model_delta(model, tuned, rank=4)
        >>> list(adapter.layers), adapter.whole
        (['transformer.h.1.mlp.c_fc.weight'], ('transformer.h.1.mlp.c_fc.bias',))

        Args:
            base: the model before.
            tuned: the model after.
            rank: the rank of the approximation.

        Returns:
            The adapter.

        Raises:
            BadArgument: a rank below 1, no difference, or models of different shapes.
        """
        if rank < 1:
            raise BadArgument(f"rank is {rank}", expected="at least 1")
        before, after = unwrap(base), unwrap(tuned)
        others = dict(after.named_parameters())
        layers: dict[str, LoRAMatrices] = {}
        whole: list[str] = []
        for name, parameter in before.named_parameters():
            if name not in others or others[name].shape != parameter.shape:
                raise BadArgument(
                    f"{name} of the base model, {list(parameter.shape)}, is "
                    + ("missing in" if name not in others else f"{list(others[name].shape)} in")
                    + " the tuned one",
                    expected="two models of one shape; merge an adapter first",
                )
            change = (others[name].detach().double() - parameter.detach().double()).cpu()
            if not change.any():
                continue
            if change.ndim < 2:
                whole.append(name)
                continue
            for full, matrix, transposed in _matrices(before, name, change):
                layers[full] = _best_approximation(matrix, rank, transposed)
        if not layers:
            raise BadArgument("no matrix differs between the two models", expected="a model and a tuned copy of it")
        return cls(layers, whole=tuple(whole))

    def __repr__(self) -> str:
        ranks = sorted({pair.rank for pair in self.layers.values()})
        tags = f", {', '.join(self.domain_tags)}" if self.domain_tags else ""
        whole = f", {len(self.whole)} whole parameters" if self.whole else ""
        shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}" if ranks else "none"
        return f"ExpertAdapter({len(self.layers)} matrices, rank {shown}{whole}{tags})"


def _matrices(root: nn.Module, name: str, change: Tensor) -> Iterator[tuple[str, Tensor, bool]]:
    """The matrices of a parameter as `[out, in]`: itself, or one for each expert."""
    if change.ndim == 2:
        transposed = is_transposed(root, name)
        yield name, change.mT if transposed else change, transposed
        return
    module, _, attribute = name.rpartition(".")
    if change.ndim != 3:
        raise ShapeError(f"{name} is {list(change.shape)}, not a matrix", expected="matrices, or one for each expert")
    transposed = experts_transposed(unwrapped_module(root, module))
    for index, matrix in enumerate(change):
        if matrix.any():
            yield expert_name(module, index, attribute), matrix.mT if transposed else matrix, transposed


def _best_approximation(matrix: Tensor, rank: int, transposed: bool) -> LoRAMatrices:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    left, right = u[:, :rank] * root, root[:, None] * vh[:rank]
    return LoRAMatrices(right.contiguous(), left.contiguous(), s[:rank].clone(), transposed)
