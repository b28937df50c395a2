"""Where a model stands once it is wrapped: where it was, or where `device_map` says."""

from __future__ import annotations

import copy
import importlib
import logging
from contextlib import nullcontext

import pytest
import torch

import nnsplice as ns
import zoo


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


def test_without_the_argument_transformers_moves_the_module(machine, monkeypatch):
    machine(2)
    monkeypatch.setattr(importlib.import_module("nnsplice.engine.tracing"), "staying", lambda *_: nullcontext({}))
    assert devices(ns.load(zoo.build("llama"), tokenizer=zoo.tokenizer())) == {"cuda:0"}
