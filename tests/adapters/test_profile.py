"""Where an adapter acts, and what that is taken to be good for."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn

import nnsplice as ns
import zoo
from nnsplice.adapters import DomainTable, ExpertAdapter, ExpertManifoldAligner, LoRAMatrices
from nnsplice.errors import BadArgument, BadType

NAMES = ("statute_recall", "logic_reasoning", "style_gutachtenstil")


class Stub(nn.Module):
    """Parameters of some names, and nothing that could be recognised."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self._add(name)

    def _add(self, name: str) -> None:
        home: nn.Module = self
        *path, last = name.split(".")
        for part in path:
            if part not in home._modules:
                home.add_module(part, nn.Module())
            home = home.get_submodule(part)
        home.register_parameter(last, nn.Parameter(torch.zeros(2, 2)))


def of_energy(energy: float) -> LoRAMatrices:
    return LoRAMatrices(torch.tensor([[energy**0.5, 0.0]]), torch.tensor([[1.0], [0.0]]))


@pytest.fixture(scope="module")
def twelve():
    """A model of twelve layers by its names alone."""
    return ExpertManifoldAligner(Stub("model.layers.11.weight"))


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        (Stub("model.layers.3.weight", "model.layers.10.weight"), 11),
        (Stub("encoder.layer.2.layer.7.weight"), 3),
        (nn.Linear(2, 2), 12),
        (zoo.build("gpt2"), 3),
        (zoo.build("t5"), 3),
        (zoo.build("gpt_neox", num_hidden_layers=2), 2),
        (zoo.build("bart", decoder_layers=2), 2),
    ],
)
def test_how_many_layers(model, layers):
    assert ExpertManifoldAligner(model).total_layers == layers


@pytest.mark.parametrize(
    ("name", "kind", "depth"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "attn", "early"),
        ("model.layers.3.mlp.gate_proj.weight", "mlp", "early"),
        ("model.layers.4.self_attn.o_proj.weight", "attn", "mid"),
        ("model.layers.7.mlp.down_proj.weight", "mlp", "mid"),
        ("model.layers.8.self_attn.v_proj.weight", "attn", "late"),
        ("model.layers.11.input_layernorm.weight", "other", "late"),
        ("model.layers.5.post_attention_layernorm.weight", "other", "mid"),
        ("model.embed_tokens.weight", "embed", "early"),
        ("transformer.wte.weight", "embed", "early"),
        ("lm_head.weight", "other", "late"),
        ("gpt_neox.embed_out.weight", "other", "late"),
        ("embed_out.weight", "other", "late"),
        ("model.norm.weight", "other", "mid"),
        ("gpt_neox.layers.9.attention.dense.weight", "attn", "late"),
        ("gpt_neox.layers.9.mlp.dense_h_to_4h.weight", "mlp", "late"),
        ("transformer.h.9.self_attention.dense.weight", "attn", "late"),
        ("transformer.h.9.self_attention.query_key_value.weight", "attn", "late"),
        ("bert.encoder.layer.2.attention.output.dense.weight", "attn", "early"),
        ("bert.encoder.layer.2.output.dense.weight", "mlp", "early"),
        ("bert.encoder.layer.2.intermediate.dense.weight", "mlp", "early"),
        ("model.decoder.layers.6.fc1.weight", "mlp", "mid"),
        ("model.decoder.layers.6.self_attn.out_proj.weight", "attn", "mid"),
        ("model.layers.6.block_sparse_moe.experts.3.w1.weight", "mlp", "mid"),
        ("decoder.block.9.layer.1.EncDecAttention.q.weight", "attn", "late"),
        ("decoder.block.9.layer.2.DenseReluDense.wo.weight", "mlp", "late"),
        ("base_model.model.model.layers.2.self_attn.q_proj.lora_A.default.weight", "attn", "early"),
        ("layers[9].attn.q", "attn", "late"),
    ],
)
def test_kind_and_depth_by_name(twelve, name, kind, depth):
    assert twelve.analyze_layer_profile(name) == (kind, depth)


@pytest.mark.parametrize(
    ("total", "depths"),
    [
        (1, "late"),
        (2, "early late"),
        (3, "early mid late"),
        (5, "early early mid late late"),
        (6, "early early mid mid late late"),
        (7, "early early mid mid late late late"),
    ],
)
def test_thirds(total, depths):
    aligner = ExpertManifoldAligner(Stub(f"layers.{total - 1}.weight"))
    found = [aligner.analyze_layer_profile(f"layers.{n}.mlp.up_proj.weight")[1] for n in range(total)]
    assert found == depths.split()


@pytest.mark.parametrize("family", [name for name in zoo.FAMILIES if name != "bert"])
def test_kinds_agree_with_the_atlas(family):
    """What an aligner says of a weight is what its model says, and what names alone say is not otherwise."""
    model = zoo.build(family)
    aligner, blind = ExpertManifoldAligner(model), ExpertManifoldAligner(Stub("layers.2.weight"))
    atlas = ns.Atlas.of(model)
    seen = set()
    for tower in atlas.towers.values():
        for block in tower.blocks:
            for module, kind in (
                (block.o, "attn"),
                (block.projection("q"), "attn"),
                (block.down, "mlp"),
                (block.up, "mlp"),
            ):
                if module is not None:
                    depth = ("early", "mid", "late")[block.index]
                    assert aligner.analyze_layer_profile(f"{module}.weight") == (kind, depth), module
                    assert blind.analyze_layer_profile(f"{module}.weight") == (kind, depth), module
                    seen.add(kind)
    assert seen >= {"attn"}


def test_the_table_of_domains(twelve):
    for name, shares in {
        "model.embed_tokens.weight": (0.75, 0.25, 0),
        "model.layers.0.mlp.up_proj.weight": (0.75, 0.25, 0),
        "model.layers.5.self_attn.q_proj.weight": (0, 1, 0),
        "model.layers.5.mlp.up_proj.weight": (0, 0.4, 0.6),
        "model.layers.5.input_layernorm.weight": (0, 0.4, 0.6),
        "model.layers.11.mlp.up_proj.weight": (0, 0, 1),
        "model.layers.11.self_attn.q_proj.weight": (0, 1.2 / 1.7, 0.5 / 1.7),
        "lm_head.weight": (0, 1.2 / 1.7, 0.5 / 1.7),
    }.items():
        found = twelve.profile_adapter(ExpertAdapter({name: of_energy(3.0)}))
        assert tuple(found) == NAMES
        assert list(found.values()) == pytest.approx(list(shares), abs=1e-6), name


def test_energies_add_up(twelve):
    adapter = ExpertAdapter(
        {"model.layers.0.self_attn.q_proj.weight": of_energy(2.0), "model.layers.11.mlp.up_proj.weight": of_energy(1.0)}
    )
    found = twelve.profile_adapter(adapter)
    assert found == pytest.approx(dict(zip(NAMES, (3 / 5.8, 1 / 5.8, 1.8 / 5.8), strict=True)))
    assert sum(found.values()) == pytest.approx(1.0)
    assert found.layers() == pytest.approx({"0": 2.0, "11": 1.0}) and found.total == pytest.approx(3.0)


def test_a_profile_prints_its_layers_and_takes_an_adapter_alone(twelve):
    adapter = ExpertAdapter(
        {"model.layers.0.self_attn.q_proj.weight": of_energy(2.0), "model.embed_tokens.weight": of_energy(1.0)}
    )
    text = "AdapterProfile: 2 weights, energy 3{}\n  embed  1\n  layer 0  2"
    assert repr(ns.adapters.profile(adapter)) == text.format("")
    table = DomainTable(("facts",), {("attn", "early"): (1.0,)})
    assert repr(ns.adapters.profile(adapter, table, total_layers=6)) == text.format(", {'facts': 1.0}")
    with pytest.raises(BadType, match="from_peft"):
        ns.adapters.profile("folder")  # type: ignore[arg-type]


def test_nothing_changed(twelve):
    assert twelve.profile_adapter(ExpertAdapter({"model.layers.0.mlp.weight": of_energy(1e-12)})) == dict.fromkeys(
        NAMES, 0.33
    )
    assert set(twelve.profile_adapter(ExpertAdapter({})).values()) == {0.33}
    assert twelve.tag_adapter(ExpertAdapter({})) == ["statute_recall"]  # the first of equals


def test_energy_that_is_no_number(twelve):
    broken = LoRAMatrices(torch.full((1, 2), torch.nan), torch.ones(2, 1))
    with pytest.raises(BadArgument, match=r"layers\.3\.mlp"):
        twelve.profile_adapter(ExpertAdapter({"model.layers.3.mlp.up_proj.weight": broken}))


def test_tags(twelve):
    adapter = ExpertAdapter({"model.layers.11.mlp.up_proj.weight": of_energy(1.0)}, domain_tags=["mine"])
    assert twelve.tag_adapter(adapter) == ["style_gutachtenstil"]
    assert adapter.domain_tags == ["mine", "style_gutachtenstil"]
    adapter.layers = {"model.layers.0.mlp.up_proj.weight": of_energy(1.0)}
    assert twelve.tag_adapter(adapter) == ["statute_recall"]
    assert adapter.domain_tags == ["mine", "statute_recall"]  # what was computed before is gone, what was set is not
    assert twelve.tag_adapter(adapter, replace=True) == ["statute_recall"]
    assert adapter.domain_tags == ["statute_recall"]


def test_a_share_of_35_is_enough(twelve):
    adapter = ExpertAdapter({"model.layers.5.mlp.up_proj.weight": of_energy(1.0)})
    assert twelve.tag_adapter(adapter) == ["logic_reasoning", "style_gutachtenstil"]


def test_a_table_of_ones_own():
    table = DomainTable(("facts", "form"), {("mlp", "mid"): (1, 0)}, default=(0, 1), threshold=0.9)
    aligner = ExpertManifoldAligner(Stub("layers.11.weight"), domains=table)
    adapter = ExpertAdapter({"layers.5.mlp.up_proj.weight": of_energy(3.0), "layers.0.attn.weight": of_energy(1.0)})
    assert aligner.profile_adapter(adapter) == pytest.approx({"facts": 0.75, "form": 0.25})
    assert aligner.tag_adapter(adapter) == ["facts"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"names": ("a",), "weights": {("mlp", "mid"): (1, 0)}}, "1 numbers"),
        ({"names": ("a",), "weights": {("mlp", "deep"): (1,)}}, "kind and depth"),
        ({"names": ("a", "a"), "weights": {}}, "different"),
        ({"names": ("a",), "weights": {("mlp", "mid"): (-1,)}}, "from 0"),
    ],
)
def test_a_table_that_is_none(arguments, text):
    with pytest.raises(BadArgument, match=text):
        DomainTable(**arguments)


def test_tables_and_a_picture():
    model = zoo.build("llama")
    aligner = ExpertManifoldAligner(model)
    adapter = ExpertAdapter(
        {
            "model.layers.1.self_attn.q_proj.weight": of_energy(3.0),
            "model.layers.0.mlp.up_proj.weight": of_energy(1.0),
            "lm_head.weight": of_energy(4.0),
        }
    )
    found = aligner.profile_adapter(adapter)
    frame = found.frame()
    assert list(frame["path"]) == ["layers[0].mlp.up", "layers[1].attn.q", "unembed"]
    assert frame["share"].tolist() == pytest.approx([1 / 8, 3 / 8, 1 / 2])
    assert frame["layer"].isna().tolist() == [False, False, True]
    rows, parts, values = found.grid()
    assert rows == ["0", "1", "unembed"] and parts == ["attn.q", "mlp.up", "other"]
    assert values[1, 0] == pytest.approx(3.0) and values[0, 0] != values[0, 0]
    ax = found.plot()
    assert [label.get_text() for label in ax.get_yticklabels()] == rows
    assert ax.images[0].get_clim() == (0.0, pytest.approx(4.0))  # energies of one size have one colour
    plt.close("all")


def test_without_a_table_there_are_energies_and_no_domains():
    adapter = ExpertAdapter({"model.layers.0.mlp.up_proj.weight": of_energy(1.0)})
    found = ns.adapters.profile(adapter, total_layers=4)
    assert found == {} and found.layers() == pytest.approx({"0": 1.0})
    assert list(ns.adapters.profile(adapter, ns.adapters.DOMAINS, total_layers=4)) == list(NAMES)
