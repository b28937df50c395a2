"""Wrappers come off, in whatever order they were put on, and the atlas of the inside is the atlas of the whole."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zoo
from atlas.helpers import sites
from nnsplice.atlas import Atlas, fingerprint, unwrap
from nnsplice.errors import NnspliceError


class Distributed(nn.Module):
    """What DistributedDataParallel looks like from outside (the real one needs a process group)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def lora(model: nn.Module, **kwargs: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj"], **kwargs))  # pyright: ignore[reportArgumentType]


def test_a_bare_module_is_itself():
    model = zoo.build("gpt2")
    assert unwrap(model) is model


def test_wrappers_come_off():
    model = zoo.build("gpt2")
    compiled: Any = torch.compile(model, backend="eager")
    assert unwrap(compiled) is model
    assert unwrap(Distributed(model)) is model
    assert unwrap(nn.DataParallel(model)) is model
    assert unwrap(Distributed(compiled)) is model
    assert unwrap(torch.compile(Distributed(model), backend="eager")) is model


def test_nnsight_comes_off():
    wrapped = zoo.wrap("gpt2")
    assert unwrap(wrapped) is wrapped._module
    assert Atlas.of(wrapped) is Atlas.of(wrapped._module)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers for it
def test_peft_comes_off_and_its_layers_stay():
    model = zoo.build("llama")
    plain = Atlas.of(model)
    adapted = lora(model)
    assert unwrap(adapted) is model and unwrap(Distributed(adapted)) is model
    atlas = Atlas.of(adapted)
    assert atlas is not plain and atlas.towers["decoder"].n_layers == 3
    assert sites(atlas, "layers[1].heads[2].q") == sites(plain, "layers[1].heads[2].q")
    found = atlas.resolve("layers[1].heads[3]")
    prefix = "model.layers.1.self_attn."
    assert found.parts[f"{prefix}q_proj.base_layer.weight"] == (0, ((18, 24),))
    assert found.parts[f"{prefix}q_proj.lora_B.default.weight"] == (0, ((18, 24),))
    assert found.parts[f"{prefix}o_proj.lora_A.default.weight"] == (1, ((18, 24),))
    assert found.parts[f"{prefix}k_proj.weight"] == (0, ((6, 12),))
    assert f"{prefix}q_proj.lora_A.default.weight" not in found  # shared by all heads
    assert f"{prefix}q_proj.lora_A.default.weight" in atlas.resolve("layers[1].attn.q")
    assert atlas.resolve("model.model.layers[1].self_attn.q_proj.weight").names == (
        f"{prefix}q_proj.base_layer.weight",
    )
    assert all(check.ok for check in atlas.verify())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers for it
def test_names_of_an_adapted_model():
    adapted = lora(zoo.build("llama"), use_dora=True, modules_to_save=["lm_head"])
    atlas = Atlas.of(adapted)
    for name, _ in adapted.named_parameters():
        place = atlas.locate(name)
        assert not place.native, name
    assert str(atlas.locate("model.layers.0.self_attn.q_proj.weight")) == "layers[0].attn.q"
    assert str(atlas.locate("base_model.model.lm_head.modules_to_save.default.weight")) == "unembed"


@pytest.mark.parametrize("thing", [None, "gpt2", {"module": 1}])
def test_no_model(thing):
    with pytest.raises(TypeError, match="a model was expected"):
        unwrap(thing)


def test_a_name_is_no_model_yet():
    for name in ("gpt2", Path("gpt2")):
        with pytest.raises(TypeError, match=r"ns\.load"):
            unwrap(name)


def test_a_module_called_module_is_not_a_wrapper_when_more_stands_beside_it():
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)
            self.head = nn.Linear(2, 2)

    mine = Mine()
    assert unwrap(mine) is mine


# -- one atlas per model -----------------------------------------------------------------------------------------------


def test_an_atlas_is_read_once():
    model = zoo.build("gpt2")
    assert Atlas.of(model) is Atlas.of(model) is Atlas.of(nn.DataParallel(model))


def test_an_atlas_is_read_again_when_modules_change():
    model: Any = zoo.build("gpt2")
    before, mark = Atlas.of(model), fingerprint(model)
    del model.transformer.h[2]
    assert fingerprint(model) != mark
    assert Atlas.of(model).towers["decoder"].n_layers == 2 and before.towers["decoder"].n_layers == 3
    mark = fingerprint(model)
    model.transformer.h[0].mlp = nn.Sequential(model.transformer.h[0].mlp)
    assert fingerprint(model) != mark


def test_weights_may_change_freely():
    model = zoo.build("gpt2")
    atlas = Atlas.of(model)
    with torch.no_grad():
        next(model.parameters()).zero_()
    assert Atlas.of(model.double()) is atlas


def test_an_atlas_does_not_keep_its_model():
    model = zoo.build("gpt2")
    atlas, gone = Atlas.of(model), weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert atlas.resolve("layers[0].heads[1]").numel() > 0
    with pytest.raises(NnspliceError, match="gone"):
        atlas.verify()
