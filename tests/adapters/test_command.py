"""`nnsplice adapter`: a table by layer, and an error where a guess would be needed."""

from __future__ import annotations

import json
import re

import pytest
import torch
from typer.testing import CliRunner

from adapters.peft_models import OPTIMIZERS, adapt, count, train
from nnsplice.adapters import ExpertAdapter, layer_health, map_param_ids_to_layers
from nnsplice.cli import app


def run(*arguments) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["adapter", *map(str, arguments)])
    return found.exit_code, found.output


def table(text: str, head: str) -> list[list[str]]:
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(head))
    return [re.split(r"  +", line) for line in lines[start + 1 :] if line.strip()]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    trained = adapt("all_linear", tmp_path_factory.mktemp("adapter"))
    optimizer = OPTIMIZERS["everything"](trained)
    train(trained, optimizer, steps=2)
    torch.save(optimizer.state_dict(), trained.folder / "optimizer.pt")
    return trained, optimizer


def test_energy_by_layer(made):
    code, text = run(made[0].folder)
    energies = [0.0, 0.0, 0.0]
    for name, pair in ExpertAdapter.from_peft(made[0].folder).layers.items():
        energies[int(name.split(".")[2])] += float(pair.delta().square().sum())
    rows = table(text, "layer")
    assert code == 0 and "21 matrices of rank 2" in text
    assert [row[0] for row in rows] == ["0", "1", "2"] and all(row[1] == "7" for row in rows)
    assert [float(row[2]) for row in rows] == pytest.approx(energies, rel=1e-2)
    assert max(len(row[4]) for row in rows) == 24  # the longest bar is whole
    assert sum(float(row[3].rstrip("%")) for row in rows) == pytest.approx(100, abs=0.2)


def test_with_the_optimizer(made):
    trained, optimizer = made
    code, text = run(trained.folder, "--optimizer", trained.folder / "optimizer.pt")
    state = optimizer.state_dict()
    health = layer_health(state, map_param_ids_to_layers(trained.folder, count(optimizer), state=state))
    rows = table(text, "layer  parameters")
    assert code == 0 and "3 layers, step 2" in text
    assert [float(row[2]) for row in rows] == pytest.approx([one.gradient for one in health.values()], rel=1e-2)


def test_each_weight(made):
    code, text = run(made[0].folder, "--each")
    assert code == 0 and len(table(text, "weight")) == 21 and "model.layers.2.mlp.down_proj.weight" in text


def test_json_has_numbers_that_are_not_rounded(made):
    trained, optimizer = made
    code, text = run(trained.folder, "--optimizer", trained.folder / "optimizer.pt", "--json")
    found = json.loads(text[text.index("{") :])
    energies = [0.0, 0.0, 0.0]
    for name, pair in ExpertAdapter.from_peft(trained.folder).layers.items():
        energies[int(name.split(".")[2])] += float(pair.energy)
    assert code == 0 and [row["layer"] for row in found["layers"]] == ["0", "1", "2"]
    assert [row["energy"] for row in found["layers"]] == pytest.approx(energies, rel=1e-9)
    assert sum(row["share"] for row in found["layers"]) == pytest.approx(1)
    state = optimizer.state_dict()
    health = layer_health(state, map_param_ids_to_layers(trained.folder, count(optimizer), state=state))
    assert [row["gradient"] for row in found["optimizer"]] == [one.gradient for one in health.values()]


def test_addresses_of_the_model(tmp_path):
    from peft import LoraConfig, get_peft_model

    import nnsplice as ns
    from nnsplice.atlas import unwrap

    module = unwrap(ns.load("toy-llama"))
    get_peft_model(module, LoraConfig(r=2, target_modules=["up_proj"], use_dora=True)).save_pretrained(str(tmp_path))  # pyright: ignore[reportArgumentType]
    code, text = run(tmp_path, "--each")
    assert code == 0 and "DoRA: without --model" in text
    code, text = run(tmp_path, "--each", "--model", "toy-llama")
    assert code == 0 and "layers[5].mlp.up" in text and "DoRA" not in text


def test_what_cannot_be_known_is_an_error(tmp_path):
    trained = adapt("t5", tmp_path)
    optimizer = OPTIMIZERS["trainable"](trained)
    train(trained, optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    code, text = run(tmp_path, "--optimizer", tmp_path / "optimizer.pt")
    assert code == 1 and "2 orders of the parameters fit" in text
    named = OPTIMIZERS["named"](trained)
    train(trained, named)
    torch.save(named.state_dict(), tmp_path / "named.pt")
    code, text = run(tmp_path, "--optimizer", tmp_path / "named.pt")
    assert code == 1 and 'tower="decoder"' in text
    code, text = run(tmp_path, "--optimizer", tmp_path / "named.pt", "--tower", "encoder")
    assert code == 0 and [row[1] for row in table(text, "layer  parameters")] == ["4", "4", "4"]
    code, text = run(tmp_path, "--tower", "encoder")
    assert code == 1 and "--optimizer" in text


def test_a_folder_that_is_none(tmp_path):
    code, text = run(tmp_path)
    assert code == 1 and "adapter_model.safetensors" in text
