"""Factors from real PEFT folders and from two models, against the weights that PEFT itself merges."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import zoo
from adapters.peft_models import ADAPTERS, OPTIMIZERS, Trained, adapt, save, train
from nnsplice.adapters import ExpertAdapter, ExpertManifoldAligner, LoRAMatrices, map_param_ids_to_layers
from nnsplice.errors import BadArgument, FileError, NnspliceError

MERGEABLE = [name for name in ADAPTERS if name != "tokens"]


def merged_change(trained: Trained) -> dict[str, torch.Tensor]:
    """What PEFT's own merging does to each weight of the base model."""
    base = zoo.build(ADAPTERS[trained.name][0])
    after = dict(copy.deepcopy(trained.model).double().merge_and_unload().named_parameters())
    before = dict(base.double().named_parameters())
    return {name: (after[name] - before[name]).detach() for name in before if name in after}


def expand(adapter: ExpertAdapter, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The change of each weight as it is stored, from an adapter's pairs."""
    found: dict[str, torch.Tensor] = {}
    for name, pair in adapter.layers.items():
        pair = LoRAMatrices(pair.lora_A.double(), pair.lora_B.double(), None, pair.transposed, pair.magnitude)  # pyright: ignore[reportArgumentType]
        delta = pair.delta(base.get(name))
        delta = delta.mT if pair.transposed else delta
        if name in base:
            found[name] = delta
            continue
        module, _, attribute = name.rpartition(".")  # one expert of a fused tensor
        owner, _, number = module.rpartition(".")
        fused = f"{owner}.{attribute}"
        found.setdefault(fused, torch.zeros_like(base[fused]))[int(number)] = delta
    return found


@pytest.mark.parametrize("name", MERGEABLE)
def test_a_folder_is_what_peft_merges(tmp_path, name):
    trained = adapt(name, tmp_path)
    base = dict(zoo.build(ADAPTERS[name][0]).double().named_parameters())
    expected = merged_change(trained)
    for adapter in (
        ExpertAdapter.from_peft(tmp_path),
        ExpertAdapter.from_peft(tmp_path, base=zoo.build(ADAPTERS[name][0])),
    ):
        found = expand(adapter, base)
        for weight, change in expected.items():
            if weight in adapter.whole:
                continue
            torch.testing.assert_close(found.pop(weight, torch.zeros_like(change)), change, atol=1e-6, rtol=1e-6)
        assert not found
        assert all(weight in expected for weight in adapter.whole)


def test_doras_energy_is_exact_with_the_base(tmp_path):
    trained = adapt("dora", tmp_path)
    expected = merged_change(trained)
    exact = ExpertAdapter.from_peft(tmp_path, base=zoo.build("llama"))
    for name, pair in exact.layers.items():
        assert float(pair.energy) == pytest.approx(float(expected[name].square().sum()), rel=1e-4)
    name, pair = next(iter(ExpertAdapter.from_peft(tmp_path).layers.items()))
    assert float(pair.energy) != pytest.approx(float(expected[name].square().sum()), rel=1e-2)
    with pytest.raises(BadArgument, match=r"delta\(weight\)"):
        pair.delta()


def as_peft_018_wrote(folder: Path, rank: int) -> None:
    """Write the folder anew as PEFT did before 0.19, which let A read what the matrix of an expert gives."""
    tensors = load_file(folder / "adapter_model.safetensors")
    for name in [name for name in tensors if "experts" in name and "lora_A" in name]:
        partner = name.replace("lora_A", "lora_B")
        a, b = tensors[name].unflatten(0, (-1, rank)), tensors[partner].unflatten(1, (rank, -1))
        tensors[name] = b.permute(2, 1, 0).flatten(0, 1).contiguous()
        tensors[partner] = a.permute(2, 1, 0).flatten(1, 2).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_version": "0.18.1"}))


@pytest.mark.parametrize("name", ["experts", "one_expert_tensor"])
def test_experts_that_an_older_peft_wrote_mirrored_are_read_as_what_they_were(tmp_path, name):
    trained = adapt(name, tmp_path)
    base = dict(zoo.build(ADAPTERS[name][0]).double().named_parameters())
    expected = merged_change(trained)
    as_peft_018_wrote(tmp_path, rank=2)
    for adapter in (
        ExpertAdapter.from_peft(tmp_path),
        ExpertAdapter.from_peft(tmp_path, base=zoo.build(ADAPTERS[name][0])),
    ):
        found = expand(adapter, base)
        assert any("experts" in weight for weight in found)
        for weight, change in found.items():
            torch.testing.assert_close(change, expected[weight], atol=1e-6, rtol=1e-6)


def test_experts_of_another_size_are_refused(tmp_path):
    adapt("one_expert_tensor", tmp_path)
    with pytest.raises(FileError, match=r"matrices of \d+ by \d+, and the model's are"):
        ExpertAdapter.from_peft(tmp_path, base=zoo.build("qwen3_moe", moe_intermediate_size=20))


def test_which_fused_tensor_is_which_is_read_off_their_sizes(tmp_path):
    trained = adapt("experts", tmp_path)
    names = ExpertAdapter.from_peft(tmp_path).layers
    assert "model.layers.0.mlp.experts.3.gate_up_proj" in names and "model.layers.2.mlp.experts.0.down_proj" in names
    assert names["model.layers.0.mlp.experts.3.gate_up_proj"].lora_B.shape == (64, 2)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.other"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(FileError, match="base=model"):
        ExpertAdapter.from_peft(trained.folder)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"use_qalora": True}, "use_qalora"),
        ({"r": 5}, "rank 2, and adapter_config.json says 5"),
    ],
)
def test_folders_whose_factors_are_not_the_change(tmp_path, change, text):
    adapt("plain", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(FileError, match=text):
        ExpertAdapter.from_peft(tmp_path)


def test_folders_that_are_incomplete(tmp_path):
    with pytest.raises(FileError, match="no adapter_model"):
        ExpertAdapter.from_peft(tmp_path)
    adapt("plain", tmp_path)
    with pytest.raises(FileError, match=r"the model has no model\.layers"):
        ExpertAdapter.from_peft(tmp_path, base=zoo.build("gpt2"))
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(FileError, match="no adapter_config"):
        ExpertAdapter.from_peft(tmp_path)


def test_an_adapter_with_a_name_of_its_own_is_found_a_folder_below(tmp_path):
    adapt("plain", tmp_path / "mine")
    for read in (ExpertAdapter.from_peft, lambda folder: map_param_ids_to_layers(folder, 12)):
        with pytest.raises(NnspliceError, match=f'write: "{tmp_path / "mine"}"'):
            read(tmp_path)


# -- two models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral", "t5"])
def test_the_difference_of_two_models(family):
    base, tuned = zoo.build(family).double(), zoo.build(family).double()
    torch.manual_seed(1)
    changed: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "layers.1." in name or ".h.1." in name or "block.1." in name:
                change = (
                    torch.randn_like(p) if p.ndim < 2 else torch.randn(*p.shape[:-1], 2) @ torch.randn(2, p.shape[-1])
                )
                p.add_(change.double())
                changed[name] = change.double()
    adapter = ExpertAdapter.from_model_delta(base, tuned, rank=2)
    found = expand(adapter, dict(base.named_parameters()))
    assert set(found) == {name for name, change in changed.items() if change.ndim >= 2}
    assert set(adapter.whole) == {name for name, change in changed.items() if change.ndim < 2}
    for name, delta in found.items():
        torch.testing.assert_close(delta, changed[name], atol=1e-6, rtol=1e-6)


def test_the_best_approximation_of_its_rank():
    base, tuned = zoo.build("llama").double(), zoo.build("llama").double()
    with torch.no_grad():
        weight = tuned.model.layers[0].mlp.up_proj.weight
        change = torch.randn_like(weight)
        weight.add_(change)
    (pair,) = ExpertAdapter.from_model_delta(base, tuned, rank=3).layers.values()
    values = torch.linalg.svdvals(change)
    torch.testing.assert_close(pair.singular_values, values[:3], atol=1e-9, rtol=1e-9)
    assert float((pair.delta() - change).norm()) == pytest.approx(float(values[3:].norm()))


def test_two_models_that_cannot_be_compared():
    base = zoo.build("llama")
    with pytest.raises(BadArgument, match="no matrix differs"):
        ExpertAdapter.from_model_delta(base, base, rank=1)
    with pytest.raises(BadArgument, match="one shape"):
        ExpertAdapter.from_model_delta(base, zoo.build("llama", num_hidden_layers=2), rank=1)
    with pytest.raises(BadArgument, match="at least 1"):
        ExpertAdapter.from_model_delta(base, zoo.build("llama", seed=1), rank=0)


# -- a run of an adapter -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["plain", "dora", "rslora", "ranks", "conv1d", "embedding", "dora_embedding", "experts", "t5"]
)
def test_a_step_of_the_factors_is_a_step_of_the_weight(tmp_path, name):
    trained = adapt(name, tmp_path)
    model = trained.model.double()
    before = merged_change(trained)
    aligner = ExpertManifoldAligner(model)
    train(trained, OPTIMIZERS["trainable"](trained), steps=2)
    steps = aligner.track_step(model, merged=True)
    after = merged_change(trained)
    moved = {
        weight: after[weight] - before[weight]
        for weight in after
        if (after[weight] - before[weight]).abs().max() > 1e-9
    }
    assert set(steps) == {weight for weight in moved if moved[weight].ndim >= 2}
    for weight, step in steps.items():
        torch.testing.assert_close(step, moved[weight], atol=1e-9, rtol=1e-9)
    save(trained.model, tmp_path / "after")
    adapter = ExpertAdapter.from_peft(tmp_path / "after")
    found = aligner.align(adapter, steps)
    assert set(found) == set(adapter.layers) and all(-1 <= cosine <= 1 for cosine in found.values())


@pytest.mark.parametrize("name", ["conv1d", "experts", "plain"])
def test_a_whole_step_along_the_adapter(tmp_path, name):
    """Full training that adds exactly what the adapter adds points where the adapter points, in every weight."""
    adapt(name, tmp_path)
    model = zoo.build(ADAPTERS[name][0]).double()
    aligner = ExpertManifoldAligner(model)
    adapter = ExpertAdapter.from_peft(tmp_path)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for weight, delta in expand(adapter, {k: p.detach() for k, p in parameters.items()}).items():
            parameters[weight].add_(delta * 1e-3)
    steps = aligner.track_step(model)
    for mode in ("cosine", "subspace"):
        found = aligner.align(adapter, steps, mode=mode)
        assert set(found) == set(adapter.layers)
        assert list(found.values()) == pytest.approx([1.0] * len(found), abs=1e-9)


def test_nothing_in_common(tmp_path):
    trained = adapt("plain", tmp_path)
    aligner = ExpertManifoldAligner(trained.model)
    with pytest.raises(BadArgument, match="merged=True"):
        aligner.align(ExpertAdapter.from_peft(tmp_path), aligner.track_step(trained.model))


def test_repeated_layers_need_the_model_that_repeats_them(tmp_path):
    """`layer_replication`: the adapter's layers are numbered in a longer model than the base."""
    model = zoo.build("llama")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[(0, 2), (1, 3)])
    longer: Any = peft.get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for name, parameter in longer.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    longer.save_pretrained(tmp_path)
    with pytest.raises(FileError, match=r"layer_replication=\[\[0, 2\], \[1, 3\]\], which repeats layers"):
        ExpertAdapter.from_peft(tmp_path, base=model)
    loaded = peft.PeftModel.from_pretrained(zoo.build("llama"), tmp_path)  # what the message says to write
    for adapter in (ExpertAdapter.from_peft(tmp_path, base=loaded), ExpertAdapter.from_peft(tmp_path)):
        assert len(adapter.layers) == 4
        factors = longer.base_model.model.model.layers[3].self_attn.q_proj
        expected = factors.get_delta_weight("default")
        found = adapter.layers["model.layers.3.self_attn.q_proj.weight"]
        assert torch.allclose(found.delta(), expected, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_factors_of_half_precision_are_multiplied_in_single(tmp_path, kind):
    adapt("plain", tmp_path, lora_alpha=5, r=3)
    path = tmp_path / "adapter_model.safetensors"
    held = {name: factor.to(kind) for name, factor in load_file(path).items()}
    save_file(held, path, metadata={"format": "pt"})
    for name, pair in ExpertAdapter.from_peft(tmp_path).layers.items():
        a, b = (held[f"base_model.model.{name.removesuffix('weight')}lora_{side}.weight"].double() for side in "AB")
        exact = b @ a * (5 / 3)
        torch.testing.assert_close(pair.delta().double(), exact, rtol=1e-5, atol=1e-7 * float(exact.abs().max()))
        assert float(pair.energy) == pytest.approx(float(exact.square().sum()), rel=1e-5)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_factors_that_are_no_numbers_are_refused(tmp_path, number):
    adapt("plain", tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    held = load_file(path)
    name = next(name for name in held if "layers.1.self_attn.v_proj.lora_B" in name)
    held[name][0, 0] = number
    save_file(held, path, metadata={"format": "pt"})
    with pytest.raises(FileError, match=r"layers\.1\.self_attn\.v_proj\.lora_B holds NaN or infinity"):
        ExpertAdapter.from_peft(tmp_path)


@pytest.mark.parametrize("name", ["plain", "conv1d", "embedding"])
def test_factors_of_another_size_than_the_models_weight_are_refused(tmp_path, name):
    adapt(name, tmp_path)
    ExpertAdapter.from_peft(tmp_path, base=zoo.build(ADAPTERS[name][0]))
    path = tmp_path / "adapter_model.safetensors"
    held = load_file(path)
    key = next(key for key in reversed(held) if key.endswith("lora_B.weight") or "lora_embedding_B" in key)
    held[key] = held[key][:-1].contiguous()
    save_file(held, path, metadata={"format": "pt"})
    with pytest.raises(FileError, match=r"are for a matrix of (\d+) by (\d+), and the model's is"):
        ExpertAdapter.from_peft(tmp_path, base=zoo.build(ADAPTERS[name][0]))
