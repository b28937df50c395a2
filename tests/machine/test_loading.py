"""Where a model stands once it is wrapped: where it was, or where `device_map` says."""

from __future__ import annotations

import copy
import importlib
import logging
from contextlib import nullcontext

import numpy as np
import pytest
import torch

import nnsplice as ns
import zoo
from models import quantised


def devices(model) -> set[str]:
    return {str(parameter.device) for parameter in model._module.parameters()}


@pytest.mark.parametrize("device_map", ["cuda:1", 1, {"": 1}, {"": "cuda:1"}, torch.device("cuda", 1)])
def test_a_model_is_loaded_onto_the_device_that_was_asked_for(machine, device_map, caplog):
    machine(2)
    with caplog.at_level(logging.WARNING):
        model = ns.load("toy", device_map=copy.copy(device_map))
    assert devices(model) == {"cuda:1"} and str(model.device) == "cuda:1"
    assert not caplog.records  # nor is anything said of arguments that nobody gave


@pytest.mark.parametrize("place", ["cpu", "cuda:0", "cuda:1"])
def test_a_module_stays_where_it_is(machine, place):
    simulated = machine(2)
    module = zoo.build("llama").to(place)
    with simulated.measured() as spent:
        model = ns.load(module, tokenizer=zoo.tokenizer())
        captured = ns.capture(model, "w3 w4", "layers[1].output[-1]")
    assert devices(model) == {place} and model._module is module
    assert [str(value.device) for _, value in captured.items()] == [place]
    assert (spent.launches > 0) is (place != "cpu")


def test_a_split_model_stays_split(machine):
    machine(2)
    assert devices(ns.load("toy", device_map="auto")) == {"cuda:0", "cuda:1"}


def test_a_gguf_file_is_loaded_onto_a_device_and_gives_the_numbers_of_the_cpu(machine, tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setenv("NNSPLICE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "tiny.Q4_1.gguf"
    quantised.write(file)
    clean, corrupted, sites = " the cat sat", " the sat cat", ["layers[:].output", "layers[:].heads[:].output[-1]"]
    metric = ns.logit_diff(" cat", " sat")

    def asked(model):
        swept = ns.sweep(model, clean, corrupted, sites, metric, progress=False)
        return ns.capture(model, clean, "layers[:].output[:]"), swept

    captured, swept = asked(ns.load(str(file), dtype=torch.float64))
    simulated = machine(1)
    model = ns.load(str(file), dtype=torch.float64, device_map="cuda:0")
    with simulated.measured() as spent:
        found, other = asked(model)
    assert devices(model) == {"cuda:0"} and spent.launches > 100
    assert other.run.executor == swept.run.executor == "packed"
    assert all(value.is_cuda and (value.cpu() - captured[path]).abs().max() < 1e-12 for path, value in found.items())
    assert np.nanmax(np.abs(other.table.values - swept.table.values)) < 1e-12 < np.nanstd(swept.table.values)


def test_without_the_argument_transformers_moves_the_module(machine, monkeypatch):
    machine(2)
    monkeypatch.setattr(importlib.import_module("nnsplice.engine.tracing"), "staying", lambda *_: nullcontext({}))
    assert devices(ns.load(zoo.build("llama"), tokenizer=zoo.tokenizer())) == {"cuda:0"}
