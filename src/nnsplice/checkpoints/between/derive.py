"""`mapper_between`: two schemes joined into a mapper; tensors that cannot be derived are listed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from nnsplice.atlas import Atlas, unwrap
from nnsplice.checkpoints.between.huggingface import huggingface, spelled
from nnsplice.checkpoints.between.scheme import Scheme
from nnsplice.checkpoints.between.transformerlens import MARK, transformerlens
from nnsplice.checkpoints.io.folder import Checkpoint
from nnsplice.checkpoints.mapper.abc import ModelStateMapper, StateGroup, listing
from nnsplice.checkpoints.mapper.compose import Parallel, Sequential
from nnsplice.checkpoints.mapper.names import Copy, Drop
from nnsplice.errors import BadArgument, BadType, FileError, MapperError, MissingCheckpoint, circumstances, named
from nnsplice.files import local_path, text_of
from nnsplice.shown import shown

#: A source or target: a folder, a model, a config, and for the target `"tl"` or `"hf"`.
Side = object


@dataclass(frozen=True, repr=False)
class Between(ModelStateMapper):
    """A mapper of `mapper_between`, with the tensors that it does not cover.

    >>> from copy import deepcopy
    >>> from nnsplice.checkpoints import mapper_between
    >>> config = deepcopy(ns.models.unwrap(model).config)
    >>> config.n_layer = 4                     # one layer more than the model has
    >>> between = mapper_between(model, config)
    >>> len(between.underived), between.underived["transformer.h.3.ln_1.weight"]
    (12, 'the source has no L.3.norm1.weight')
    >>> between.complete()
    Traceback (most recent call last):
    nnsplice.errors.MapperError: not derived: transformer.h.3.attn.c_attn.bias, ... (12 in all)
        transformer.h.3.ln_1.weight: the source has no L.3.norm1.weight
      expected: a source that has all parts of the target
      write: between.mapper   (without what is not derived)

    Attributes:
        mapper: the mapper, without what could not be derived.
        underived: the tensors of the target that could not be derived, with the reason.
        unused: the tensors of the source that are not used.
        same: those of them that the target ties to another tensor, which has to be equal.
    """

    mapper: ModelStateMapper
    underived: Mapping[str, str] = field(default_factory=dict[str, str])
    unused: tuple[str, ...] = ()
    same: Mapping[str, str] = field(default_factory=dict[str, str])

    def state_dependency_groups(self) -> frozenset[StateGroup]:
        """The groups of the mapper."""
        return self.mapper.state_dependency_groups()

    def apply(self, group: dict[str, Tensor]) -> dict[str, Tensor]:
        """The outputs of one group.

        Args:
            group: the inputs by name.

        Returns:
            The outputs by name.
        """
        return self.mapper.apply(group)

    def complete(self) -> Between:
        """The same mapper, if it covers the whole target.

        Raises:
            MapperError: a tensor of the target cannot be derived.
        """
        if self.underived:
            name, reason = next(iter(self.underived.items()))
            raise MapperError(
                f"not derived: {listing(self.underived)}",
                path=f"{name}: {reason}",
                expected="a source that has all parts of the target",
                write="between.mapper   (without what is not derived)",
            )
        return self

    def __repr__(self) -> str:
        lines = [f"Between({len(self.state_dependency_groups())} groups)"]
        lines += [f"  not derived: {shown(name)}: {shown(reason)}" for name, reason in self.underived.items()]
        return "\n".join([*lines, *([f"  not used: {listing(self.unused)}"] if self.unused else [])])


def mapper_between(source: Side, target: Side) -> Between:
    """Derive the mapper from one kind of checkpoint to another from the addresses of their parts.

    It converts fused and separate queries, keys and values, GPT-2's transposed matrices, experts in one tensor or one
    by one, and TransformerLens' names and shapes. It does not check that two models compute the same.

    >>> from nnsplice.checkpoints import mapper_between
    >>> between = mapper_between(model, "tl")
    >>> between.underived, between.unused
    ({}, ())
    >>> between.explain().costs[0].group.outputs
    frozenset(...)

    Args:
        source: a checkpoint folder with config.json, a model, or a config.
        target: the same, or `"tl"` for TransformerLens, `"hf"` for transformers.

    Returns:
        The mapper, with the tensors that could not be derived and those that are not used.

    Raises:
        MissingCheckpoint: a folder without config.json.
        FileError: a config of which transformers makes no model.
        BadArgument: a target that is no kind of checkpoint, or the address of an object store.
    """
    here = _side(source)
    if target in ("tl", "hf"):
        plain = huggingface(here.atlas)
        wanted = plain if target == "hf" else transformerlens(here.atlas, plain, here.dtype)
    elif isinstance(target, str) and not Path(target).exists():
        raise BadArgument(f"{target!r} is no kind of checkpoint", expected='"tl", "hf", a folder, a model or a config')
    else:
        there = _side(target)
        differing = _differing(_shapes(here), _shapes(there)) | _scaled_otherwise(here, there)
        return join(here.scheme, there.scheme, differing)
    return join(here.scheme, wanted)


def join(source: Scheme, target: Scheme, differing: Mapping[str, str] | None = None) -> Between:
    """The mapper from one scheme to another.

    Args:
        differing: part -> the reason why the source's part does not fit the target.
    """
    differing = differing or {}
    holder = {part: stored for stored in source.values() for part in stored.parts}
    underived: dict[str, str] = {}
    chosen: dict[str, ModelStateMapper] = {}
    users: dict[str, list[str]] = {}
    same: dict[str, str] = {}
    for name, stored in target.items():
        lacking = [part for part in stored.parts if part not in holder and part not in stored.tied_parts]
        wrong = [differing[part] for part in stored.parts if part in differing and part not in stored.tied_parts]
        if lacking or wrong or stored.from_parts is None:
            reason = f"the source has no {', '.join(lacking)}" if lacking else "it is another name"
            underived[name] = ", ".join(wrong) if wrong and not lacking else reason
            continue
        needs = _needs(stored.from_parts)
        # A tied part of the source that the target does not tie is copied.
        own = [Copy(part, [part], apart=True) for part in sorted(needs) if part in holder[part].tied_parts]
        chosen[name] = Sequential([Parallel(own), stored.from_parts]) if own else stored.from_parts
        for part in needs:
            users.setdefault(part, []).append(name)
        for part in stored.tied_parts & holder.keys():
            if (left := holder[part].name) != (kept := holder[stored.parts[0]].name):
                same[left] = kept
    used = {holder[part].name for part in users}
    takes = [source[name].to_parts for name in source if name in used]
    made = {part for name in used for part in source[name].parts}
    drops = [Drop(part) for part in sorted(made - users.keys())]
    shared = [Copy(part, [part, *names[1:]]) for part, names in users.items() if len(names) > 1]
    if shared:
        raise MapperError(f"{listing(part for part, names in users.items() if len(names) > 1)} is needed twice")
    stages = [Parallel(takes), Parallel([*drops, *chosen.values()])]
    unused = tuple(name for name in source if name not in used)
    mapper = Sequential(stages) if chosen else Parallel([])
    return Between(mapper, underived, unused, {name: kept for name, kept in same.items() if name in unused})


def _needs(give: ModelStateMapper) -> set[str]:
    return {name for group in give.state_dependency_groups() for name in group.inputs}


# -- one side ----------------------------------------------------------------------------------------------------


#: Stored tensors or parts -> their shapes.
_Sizes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class _Side:
    """One side of a conversion."""

    atlas: Atlas
    scheme: Scheme
    dtype: torch.dtype
    sizes: _Sizes
    #: Whether the output of a decoder is scaled before the unembedding, as in T5 with tied embeddings.
    scaled: bool


def _shapes(side: _Side) -> _Sizes:
    """The shapes of the parts of a scheme."""
    found: dict[str, tuple[int, ...]] = {}
    for one in side.scheme.values():
        if one.parts:
            made = one.to_parts.apply({one.name: torch.empty(side.sizes[one.name], device="meta")})
            found |= {part: tuple(tensor.shape) for part, tensor in made.items()}
    return found


def _differing(source: _Sizes, target: _Sizes) -> dict[str, str]:
    """Parts of different shapes: key/value heads, vocabularies, neurons."""
    return {
        part: f"{part} is {list(source[part])} in the source and {list(shape)} in the target"
        for part, shape in target.items()
        if source.get(part, shape) != shape
    }


def _scaled_otherwise(source: _Side, target: _Side) -> dict[str, str]:
    """The tied tensors, if only one of two models scales the output of its decoder."""
    if source.scaled == target.scaled:
        return {}
    parts = {stored.parts[0] for stored in (*source.scheme.values(), *target.scheme.values()) if stored.tied_parts}
    words = "scales" if source.scaled else "does not scale"
    why = f"the source {words} what its decoder gives, and the target does otherwise (scale_decoder_outputs)"
    return dict.fromkeys([*sorted(parts), "as it is: lm_head.weight"], why)


def _side(side: Side) -> _Side:
    """Read one side."""
    if isinstance(side, str | Path):
        folder = local_path(side)
        with circumstances(f"reading {folder}"):
            checkpoint = Checkpoint.open(folder)
            model: Any = meta_model(folder)
            atlas = Atlas.of(model)
            own = huggingface(atlas)
            if MARK in checkpoint:
                dtype = checkpoint.entry(MARK).dtype
                every = transformerlens(atlas, own, dtype)
                found: Scheme = {name: every[name] for name in every if name in checkpoint}
            else:
                found = spelled(atlas, own, [name for name in checkpoint.sizes() if name not in checkpoint.tied])
                dtype = next((checkpoint.entry(name).dtype for name in found), torch.float32)
            return _Side(atlas, found, dtype, {name: checkpoint.entry(name).shape for name in found}, _scales(model))
    if hasattr(side, "model_type"):
        model = empty_model(side)
    elif isinstance(side, nn.Module) or hasattr(side, "_module"):
        model = unwrap(side)
    else:
        raise BadType(f"{named(side)} is no side of a conversion", expected="a folder, a model or a config")
    atlas = Atlas.of(model)
    dtype = next((parameter.dtype for parameter in model.parameters()), torch.float32)
    buffers = {name: tuple(model.get_buffer(name).shape) for name in atlas.tree.saved}
    return _Side(atlas, huggingface(atlas), dtype, {**atlas.tree.params, **buffers}, _scales(model))


def _scales(model: Any) -> bool:
    return bool(getattr(getattr(model, "config", None), "scale_decoder_outputs", False))


#: Meta models by the text of their config; kept, as an atlas holds its model weakly.
_META_MODELS: dict[str, nn.Module] = {}


def meta_model(folder: Path) -> nn.Module:
    """The model of a folder, on the meta device.

    Raises:
        MissingCheckpoint: there is no config.json.
    """
    import transformers

    path = folder / "config.json"
    if not path.is_file():
        raise MissingCheckpoint(f"{folder} has no config.json, so what its tensors mean is not known")
    text = text_of(path)
    if text not in _META_MODELS:
        try:
            _META_MODELS[text] = empty_model(
                cast("Any", transformers.AutoConfig).from_pretrained(folder, trust_remote_code=False)
            )
        except Exception as error:  # transformers raises many kinds
            raise FileError(
                f"transformers makes no model of {path}: {type(error).__name__}: {str(error).strip()[:200]}",
                expected="the config of a family that transformers has",
            ) from None
    return _META_MODELS[text]


def empty_model(config: Any) -> nn.Module:
    """A model on the meta device, of the class that its config names."""
    import transformers

    names: list[str] = getattr(config, "architectures", None) or []
    every = (getattr(transformers, name, None) for name in names)
    # A config may name anything in transformers; only models are used.
    kind: Any = next((k for k in every if isinstance(k, type) and issubclass(k, transformers.PreTrainedModel)), None)
    if kind is None:
        two = getattr(config, "is_encoder_decoder", False)
        kind = cast("Any", transformers.AutoModelForSeq2SeqLM if two else transformers.AutoModelForCausalLM).from_config
    with torch.device("meta"):
        return kind(config)
