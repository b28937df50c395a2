"""The weight updates of a training run, compared with adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from nnsplice.adapters import alignment
from nnsplice.adapters.domains import DOMAINS, DomainTable
from nnsplice.adapters.factors import ExpertAdapter
from nnsplice.adapters.keys import read_key
from nnsplice.adapters.live import merged_steps
from nnsplice.adapters.matrices import LoRAMatrices, experts_transposed, is_transposed
from nnsplice.adapters.profile import AdapterProfile, describe, profile
from nnsplice.atlas import Atlas, unwrap
from nnsplice.atlas.names import layer_of, unwrapped
from nnsplice.errors import BadArgument, ShapeError

Mode = Literal["cosine", "subspace"]
MODES = {"cosine": alignment.cosine, "subspace": alignment.subspace_share}
#: The number of layers where neither atlas nor names tell it.
DEFAULT_LAYERS = 12


class ExpertManifoldAligner:
    """Compare the weight updates of a training run with adapters.

    >>> aligner = ns.adapters.ExpertManifoldAligner(model)
    >>> aligner.total_layers
    3
    >>> aligner.analyze_layer_profile("transformer.h.2.mlp.c_fc.weight")
    ('mlp', 'late')
    """

    def __init__(self, model: Any, *, domains: DomainTable = DOMAINS) -> None:
        """Read the model's parts and take the first snapshot.

        Args:
            model: any torch or nnsight model; its parts are found by the atlas, or by their names where it has none.
            domains: the weight of each part and depth for each domain.
        """
        self.domains = domains
        self.atlas: Atlas = Atlas.of(model)
        root = unwrap(model)
        self.total_layers: int = _number_of_layers(self.atlas, root)
        self._transposed = frozenset(name for name, _ in root.named_parameters() if is_transposed(root, name))
        self._transposed_experts = frozenset(
            name for name, module in root.named_modules() if experts_transposed(module)
        )
        self._snapshot: dict[str, Tensor] = {}
        self.track_step(model)

    def track_step(self, model: Any, *, merged: bool = False) -> dict[str, Tensor]:
        """The change of every trainable matrix since the last call; a new matrix is only recorded.

        >>> from copy import deepcopy
        >>> tuned = deepcopy(ns.models.unwrap(model))
        >>> aligner = ns.adapters.ExpertManifoldAligner(tuned)
        >>> with torch.no_grad():
        ...     _ = tuned.transformer.h[1].mlp.c_fc.weight.add_(0.5)
        >>> steps = aligner.track_step(tuned)
        >>> [name for name, step in steps.items() if step.any()]
        ['transformer.h.1.mlp.c_fc.weight']
        >>> any(step.any() for step in aligner.track_step(tuned).values())   # nothing more since then
        False

        Args:
            model: the model that is trained.
            merged: report the change of an adapter's `B A` under the weight's own name, instead of those of its
                factors.

        Returns:
            The change of each matrix by name.
        """
        root = _as_named(model)
        before = self._snapshot
        after = {
            name: p.detach().clone() for name, p in root.named_parameters() if p.requires_grad and _is_kept(name, p)
        }
        extra, used = merged_steps(root, before, after) if merged else ({}, frozenset())
        self._snapshot = {**before, **after}
        steps = {
            name: value - before[name]
            for name, value in after.items()
            if name in before and name not in used and value.ndim >= 2 and value.shape == before[name].shape
        }
        return steps | extra

    def compute_subspace_alignment(
        self, lora: LoRAMatrices, step_update: Tensor, *, mode: Mode = "cosine", name: str | None = None
    ) -> float:
        """The alignment of a weight update with an adapter's factors.

        `cosine` is the cosine similarity with `B A`, from -1 to 1. `subspace` is the share of the update's energy in
        the column space of B and the row space of A, from 0 to 1. Both are 0.0 for different shapes and for zeros.

        >>> pair = ns.adapters.LoRAMatrices(lora_A=torch.tensor([[1.0, 0.0]]), lora_B=torch.tensor([[1.0], [0.0]]))
        >>> step = torch.tensor([[-3.0, 0.0], [0.0, 4.0]])   # against the pair, and beside it
        >>> aligner = ns.adapters.ExpertManifoldAligner(model)
        >>> [round(aligner.compute_subspace_alignment(pair, step, mode=mode), 2) for mode in ("cosine", "subspace")]
        [-0.6, 0.36]

        Args:
            lora: the factors.
            step_update: the update of the weight, as it is stored.
            mode: `"cosine"` or `"subspace"`.
            name: the name of the weight, by which its orientation is looked up; that of the factors if left out.

        Returns:
            The alignment.

        Raises:
            ShapeError: an update of several experts at once.
            BadArgument: another mode.
        """
        if mode not in MODES:
            raise BadArgument(f"there is no mode {mode!r}", expected=" or ".join(MODES))
        if step_update.ndim > 2:
            raise ShapeError(
                f"an update of shape {list(step_update.shape)} holds several matrices, and the factors change one",
                expected="the update of one expert",
                write="aligner.align(adapter, steps)   (which finds each expert's), or step_update[expert]",
            )
        transposed = lora.transposed if name is None else self._is_transposed(name)
        update = step_update.mT if transposed and step_update.ndim == 2 else step_update
        if tuple(update.shape) != (lora.lora_B.shape[0], lora.lora_A.shape[1]):
            return 0.0
        return MODES[mode](lora.lora_B.to(update.device), lora.lora_A.to(update.device), update)

    def align(self, adapter: ExpertAdapter, steps: Mapping[str, Tensor], *, mode: Mode = "cosine") -> dict[str, float]:
        """`compute_subspace_alignment` of every weight that both an adapter and an update change.

        Args:
            adapter: the adapter.
            steps: updates by name, from `track_step`.
            mode: `"cosine"` or `"subspace"`.

        Returns:
            The alignment by name.

        Raises:
            BadArgument: no weight in common.
        """
        by_name = {unwrapped(name): step for name, step in steps.items()}
        found: dict[str, float] = {}
        for name, pair in adapter.layers.items():
            step = by_name.get(name)
            if step is None:
                step = _step_of_expert(by_name, name)
            if step is not None:
                found[name] = self.compute_subspace_alignment(pair, step, mode=mode, name=name)
        if not found:
            raise BadArgument(
                f"the adapter changes {next(iter(adapter.layers), 'nothing')}, ..., and the step "
                f"{next(iter(steps), 'nothing')}, ...: no weight is in both",
                expected="a step of the weights themselves",
                write="aligner.track_step(model, merged=True)   (where an adapter is trained)",
            )
        return found

    def analyze_layer_profile(self, name: str) -> tuple[str, str]:
        """The kind of a weight (`embed`, `attn`, `mlp`, `other`) and its depth (`early`, `mid`, `late`).

        Args:
            name: the name of the weight.

        Returns:
            Kind and depth.
        """
        found = describe(name, self.total_layers, self.atlas)
        return found.kind, found.depth

    def profile_adapter(self, adapter: ExpertAdapter) -> AdapterProfile:
        """The share of each domain in an adapter's energy, as `ns.adapters.profile`.

        Args:
            adapter: the adapter.

        Returns:
            The shares, which sum to 1, with the energies behind them.

        Raises:
            BadArgument: an energy that is not a number.
        """
        return profile(adapter, self.domains, total_layers=self.total_layers, atlas=self.atlas)

    def tag_adapter(self, adapter: ExpertAdapter, *, replace: bool = False) -> list[str]:
        """Tag an adapter with the domains of a large share, or with the largest one.

        The tags replace those computed before in the adapter's `domain_tags`; tags set by hand stay, unless `replace`.

        Args:
            adapter: the adapter, whose tags are changed.
            replace: remove all other tags.

        Returns:
            The domains.
        """
        scores = self.profile_adapter(adapter)
        tags = [name for name, score in scores.items() if score >= self.domains.threshold]
        tags = tags or [max(scores, key=lambda name: scores[name])]
        kept = [] if replace else [tag for tag in adapter.domain_tags if tag not in adapter.computed_tags]
        adapter.computed_tags = [tag for tag in tags if tag not in kept]
        adapter.domain_tags = [*kept, *adapter.computed_tags]
        return tags

    def _is_transposed(self, name: str) -> bool:
        if name in self._transposed:
            return True
        module, _, attribute = name.rpartition(".")
        # `gate_proj.base_layer.weight` where an adapter wrapped the layer, `experts.3.gate_up_proj` for one expert.
        return (
            f"{module}.base_layer.{attribute}" in self._transposed
            or module.rpartition(".")[0] in self._transposed_experts
        )


def _as_named(model: Any) -> nn.Module:
    """The module that was given, or the one inside an nnsight model."""
    return model if isinstance(model, nn.Module) else unwrap(model)


def _is_kept(name: str, parameter: Tensor) -> bool:
    """Whether a snapshot keeps a parameter: matrices, and DoRA's magnitudes, which the merged weight depends on."""
    return parameter.ndim >= 2 or read_key(name).factor == "lora_magnitude_vector"


def _number_of_layers(atlas: Atlas, root: nn.Module) -> int:
    if atlas.towers:
        return atlas.tower().n_layers
    numbers = [layer.number for name in root.state_dict() if (layer := layer_of(name)) is not None]
    return 1 + max(numbers) if numbers else DEFAULT_LAYERS


def _step_of_expert(steps: Mapping[str, Tensor], name: str) -> Tensor | None:
    """The part of a fused tensor's step that belongs to one expert: `...experts.3.gate_up_proj`."""
    module, _, attribute = name.rpartition(".")
    owner, _, number = module.rpartition(".")
    fused = steps.get(f"{owner}.{attribute}") if number.isdigit() else None
    return fused[int(number)] if fused is not None and fused.ndim == 3 else None
