"""The list of layers that addresses speak of is the one between the tokens and the logits, or none is taken."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import nnsight
import pytest
import torch
from torch import nn

import nnsplice as ns
import unusual
import zoo
from nnsplice.atlas import Atlas
from nnsplice.errors import RefusedPlace, UnrecognisedModel

PROBE = torch.tensor([[3, 9, 4, 7]])


@pytest.mark.parametrize(
    ("name", "stack", "unembed"),
    [
        ("idefics2", "model.text_model.layers", "lm_head"),
        ("video_llava", "model.language_model.layers", "lm_head"),
        ("evolla", "model.layers", "lm_head"),
        ("gemma3", "model.language_model.layers", "lm_head"),
        ("llava", "model.language_model.layers", "lm_head"),
        ("instructblip", "language_model.model.decoder.layers", "language_model.lm_head"),
        ("pi0", "model.vlm.language_model.layers", None),
    ],
)
def test_the_decoder_among_several_towers_is_the_one_of_the_text(name: str, stack: str, unembed: str | None) -> None:
    model = unusual.build(name)
    atlas = Atlas.of(model)
    assert set(atlas.towers) == {"decoder"}
    tower = atlas.towers["decoder"]
    assert (tower.stack, tower.unembed, tower.n_layers) == (stack, unembed, 3)
    assert model.get_submodule(str(tower.embed)) is model.get_input_embeddings()


@pytest.mark.parametrize("name", ["idefics2", "video_llava", "evolla"])
def test_what_is_captured_there_is_what_a_hook_on_the_text_tower_sees(name: str) -> None:
    module = unusual.build(name)
    layers = module.get_decoder().layers
    seen: list[torch.Tensor] = []
    hook = layers[1].register_forward_hook(lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        module(input_ids=PROBE)
    hook.remove()
    saved = ns.capture(nnsight.NNsight(module), PROBE, "layers[1].output[-1]")
    assert torch.equal(saved["layers[1].output[-1]"], seen[0][:, -1])


@pytest.mark.parametrize(
    ("name", "stacks"),
    [
        ("blt", ["model.local_encoder.layers", "model.global_transformer.layers", "model.local_decoder.layers"]),
        ("hrm_text", ["model.L_module.layers", "model.H_module.layers"]),
    ],
)
def test_several_lists_that_fit_are_refused_with_their_names(name: str, stacks: list[str]) -> None:
    atlas = Atlas.of(unusual.build(name))
    with pytest.raises(UnrecognisedModel) as error:
        atlas.expand("layers[1].output[-1]")
    assert all(stack in str(error.value) for stack in stacks)
    assert f"write: model.{stacks[0]}[1].output[-1]" in str(error.value)
    assert atlas.expand(f"model.{stacks[0]}[1].output[-1]")
    with pytest.raises(UnrecognisedModel):
        atlas.resolve("layers[1]")


def test_an_encoder_whose_decoder_is_not_recognised_is_not_taken_for_it() -> None:
    with pytest.raises(UnrecognisedModel, match=r"the encoder alone is recognised: model\.encoder\.layers"):
        Atlas.of(unusual.build("moonshine")).expand("layers[0].output")


def test_a_nearer_list_that_is_not_recognised_is_not_passed_by() -> None:
    module = unusual.build("idefics2")
    for layer in module.model.text_model.layers:
        layer.self_attn.q_proj = nn.Identity()
    with pytest.raises(UnrecognisedModel, match=r"the layers of its decoder, model\.text_model\.layers"):
        Atlas.of(module).expand("layers[0].output")


# -- by the recorded order ---------------------------------------------------------------------------------------------


class Looped(nn.Module):
    """A GPT-2 whose blocks run so many times in a pass; or twice as many, as a second list after the first."""

    def __init__(self, loops: int = 1, second: bool = False) -> None:
        super().__init__()
        inner = zoo.build("gpt2").double()
        self.embed, self.blocks, self.ln_f, self.loops = (
            inner.transformer.wte,
            inner.transformer.h,
            nn.LayerNorm(16),
            loops,
        )
        self.after = nn.Module()
        if second:
            self.after.blocks = zoo.build("gpt2", seed=1).double().transformer.h
        self.lm_head = nn.Linear(16, 64, bias=False, dtype=torch.float64)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        stream = self.embed(input_ids)
        for block in [*self.blocks] * self.loops + [*getattr(self.after, "blocks", [])]:
            stream = block(stream)
            stream = stream[0] if isinstance(stream, tuple) else stream
        return self.lm_head(stream)


def test_a_layer_that_runs_several_times_is_refused_by_name() -> None:
    model = nnsight.NNsight(Looped(loops=4))
    for path in ("layers[1].output[-1]", "layers[1].attn.output[-1]", "layers[1].heads[0].output[-1]", "embed[-1]",
                 "model.blocks[1].output[-1]", "model.blocks[1].mlp.c_fc.input[-1]"):  # fmt: skip
        with pytest.raises(RefusedPlace, match=r"runs 4 times in one forward pass \(calls 0 to 3\)"):
            ns.expand(model, path, probe=PROBE)
    assert ns.expand(model, ["unembed[-1]", "model.embed.output[-1]"])


def test_the_call_that_the_refusal_writes_is_the_one_that_a_hook_counts() -> None:
    module = Looped(loops=4)
    model, seen = nnsight.NNsight(module), []
    hook = module.blocks[1].register_forward_hook(
        lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        module(PROBE)
    hook.remove()
    tracer: Any
    with torch.no_grad(), model.trace(PROBE) as tracer:
        for _ in tracer.iter[2]:
            value = model.blocks[1].output.save()
    assert torch.equal(value[0] if isinstance(value, tuple) else value, seen[2])
    assert not torch.equal(seen[0], seen[2])


def test_a_layer_that_runs_once_is_not_refused() -> None:
    model = nnsight.NNsight(Looped())
    assert len(ns.expand(model, ["layers[:].output", "layers[:].heads[0].q"], probe=PROBE)) == 6


def test_layers_of_one_module_in_albert_are_told_apart_by_their_calls_as_before() -> None:
    assert len(ns.expand(zoo.wrap("albert"), "layers[:].attn.output[-1]")) == 3


def test_a_second_list_that_runs_after_the_first_is_seen_in_the_order() -> None:
    model = nnsight.NNsight(Looped(second=True))
    with pytest.raises(UnrecognisedModel, match=r"run one after the other.*: blocks, after\.blocks"):
        ns.expand(model, "layers[0].output", probe=PROBE)
    assert ns.expand(model, "model.after.blocks[0].output")


def test_a_sequential_with_named_parts_has_native_addresses() -> None:
    module: Any = nn.Sequential(OrderedDict(first=nn.Linear(4, 4), then=nn.ReLU()))
    values = torch.randn(1, 3, 4)
    saved = ns.capture(nnsight.NNsight(module), values, "model.first.output[-1]")
    assert torch.equal(saved["model.first.output[-1]"], module.first(values)[:, -1])


def test_an_atlas_is_one_line() -> None:
    assert repr(Atlas.of(zoo.build("llama"))) == "Atlas(LlamaForCausalLM: model.layers with 3 layers of 4 heads)"
    assert repr(Atlas.of(nn.Linear(2, 2))) == "Atlas(Linear: its parts are not recognised)"
    assert "several lists could be the layers" in repr(Atlas.of(unusual.build("hrm_text")))
