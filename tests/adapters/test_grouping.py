"""Optimizer ids -> layers, on real PEFT adapters and real optimizers: each maps right or refuses, none maps wrong."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import nnsplice as ns
from adapters.peft_models import ADAPTERS, OPTIMIZERS, Trained, adapt, count, train, truth
from nnsplice.adapters import grouping
from nnsplice.errors import NnspliceError, ParamMappingError

adapters = ns.adapters
TWO_TOWERS = ("t5", "bart")

# -- the contract of the two-argument call -----------------------------------------------------------------------------


def write(folder, keys, config=None):
    folder.mkdir(exist_ok=True)
    save_file({key: torch.zeros(2, 3) for key in keys}, folder / "adapter_model.safetensors")
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def keys(layers, modules=("self_attn.q_proj", "mlp.up_proj"), stack="model.layers"):
    return [f"base_model.model.{stack}.{n}.{m}.lora_{x}.weight" for n in layers for m in modules for x in "AB"]


def test_layers_in_numeric_order(tmp_path):
    grouping = adapters.map_param_ids_to_layers(write(tmp_path, keys([10, 2, 0])), 12)
    assert grouping == adapters.LayerGrouping((0, 2, 10), 4, {i: (0, 2, 10)[i // 4] for i in range(12)})
    assert grouping.num_layers == 3 and grouping.how == "order"
    assert grouping.layer_of.get(12) is None


def test_a_grouping_is_frozen():
    grouping = adapters.LayerGrouping((0,), 1, {0: 0})
    with pytest.raises(AttributeError):
        grouping.params_per_layer = 2  # pyright: ignore[reportAttributeAccessIssue]
    assert not hasattr(grouping, "__dict__")


def test_a_tower_that_has_no_factors(tmp_path):
    write(tmp_path, keys(range(2)))
    assert adapters.map_param_ids_to_layers(tmp_path, 8, tower="decoder").num_layers == 2
    with pytest.raises(ParamMappingError, match="none of the towers"):
        adapters.map_param_ids_to_layers(tmp_path, 8, tower="encoder")


def test_more_parameters_than_keys(tmp_path):
    grouping = adapters.map_param_ids_to_layers(write(tmp_path, keys(range(3))), 20)
    assert max(grouping.layer_of) == 11


def test_a_head_after_the_layers_is_passed_over(tmp_path):
    names = [*keys(range(2)), "base_model.model.lm_head.weight", "base_model.model.model.norm.weight"]
    assert adapters.map_param_ids_to_layers(write(tmp_path, names), 10).layer_of == {i: i // 4 for i in range(8)}


def test_a_name_that_is_not_the_models_is_passed_over(tmp_path):
    names = [*keys(range(2)), "note"]
    assert adapters.map_param_ids_to_layers(write(tmp_path, names), 8).layer_of == {i: i // 4 for i in range(8)}


@pytest.mark.parametrize(
    "stack", ["model.layers", "transformer.h", "transformer.blocks", "bert.encoder.layer", "gpt_neox.layers", "layers"]
)
def test_every_spelling_of_a_layer(tmp_path, stack):
    grouping = adapters.map_param_ids_to_layers(write(tmp_path, keys(range(2), stack=stack)), 8)
    assert grouping.layer_of == {i: i // 4 for i in range(8)}


@pytest.mark.parametrize(
    ("names", "num_params", "texts"),
    [
        ([], 4, ["no keys found"]),
        (["base_model.model.lm_head.lora_A.weight"], 4, ["no keys carry a layer index", "lm_head"]),
        ([*keys([0]), *keys([1])[:2]], 6, ["heterogeneous", "model.layers.1: 2", "names="]),
        (keys(range(3)), 7, ["7", "12", "names="]),
        (
            [*keys([0, 1], stack="encoder.layers"), *keys([0, 1], stack="decoder.layers")],
            16,
            ["encoder.layers", "repeat"],
        ),
        ([*keys([0, 1]), "base_model.model.model.project_in.weight"], 9, ["project_in", "before or after", "state="]),
        ([*keys([0, 1]), "base_model.model.model.final_layer_norm.weight"], 9, ["final_layer_norm", "state="]),
        ([*keys([0, 1]), "base_model.model.model.embed_tokens.weight"], 12, ["embed_tokens", "before the layers"]),
    ],
)
def test_what_cannot_be_known_is_refused(tmp_path, names, num_params, texts):
    with pytest.raises(ParamMappingError) as caught:
        adapters.map_param_ids_to_layers(write(tmp_path, names), num_params)
    assert isinstance(caught.value, NnspliceError) and isinstance(caught.value, ValueError)
    for text in [*texts, str(tmp_path)]:
        assert text in str(caught.value)


def test_embeddings_before_the_layers_shift_the_ids(tmp_path):
    names = [*keys([0, 1]), "base_model.model.model.embed_tokens.weight"]
    assert adapters.map_param_ids_to_layers(write(tmp_path, names), 9).layer_of == {i + 1: i // 4 for i in range(8)}


def test_copies_of_frozen_embeddings_do_not_count(tmp_path):
    """PEFT writes resized embeddings down, trained or not; the config says which."""
    names = [*keys([0, 1]), "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"]
    config: dict[str, Any] = {"modules_to_save": None}
    assert min(adapters.map_param_ids_to_layers(write(tmp_path, names, config), 8).layer_of) == 0
    config = {"modules_to_save": ["embed_tokens", "lm_head"]}
    assert min(adapters.map_param_ids_to_layers(write(tmp_path, names, config), 10).layer_of) == 1


def test_no_file(tmp_path):
    with pytest.raises(ParamMappingError, match="no such folder"):
        adapters.map_param_ids_to_layers(tmp_path / "nowhere", 4)
    with pytest.raises(ParamMappingError, match="holds nothing"):
        adapters.map_param_ids_to_layers(tmp_path, 4)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ParamMappingError, match="pickle"):
        adapters.map_param_ids_to_layers(tmp_path, 4)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no header")
    with pytest.raises(ParamMappingError, match="damaged"):
        adapters.map_param_ids_to_layers(tmp_path, 4)


def test_without_safetensors(tmp_path, monkeypatch):
    write(tmp_path, keys([0]))
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ParamMappingError, match="not importable"):
        adapters.map_param_ids_to_layers(tmp_path, 4)


def test_no_tensor_is_read(tmp_path, monkeypatch):
    import safetensors

    real = safetensors.safe_open

    class Closed:
        def __init__(self, *args, **kwargs):
            self._file = real(*args, **kwargs)

        def __enter__(self):
            self._inner = self._file.__enter__()
            return self

        def __exit__(self, *error):
            return self._file.__exit__(*error)

        def __getattr__(self, name):
            assert name in ("keys", "get_slice"), f"{name} reads more than the header"
            return getattr(self._inner, name)

    monkeypatch.setattr(safetensors, "safe_open", Closed)
    assert adapters.map_param_ids_to_layers(write(tmp_path, keys([0])), 4).layer_of == dict.fromkeys(range(4), 0)


# -- real adapters, real optimizers ------------------------------------------------------------------------------------

_MADE: dict[str, Trained] = {}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    def make(name: str) -> Trained:
        if name not in _MADE:
            _MADE[name] = adapt(name, tmp_path_factory.mktemp(name))
        return _MADE[name]

    yield make
    _MADE.clear()


def plain(found: dict[int, tuple[str, int]], tower: str | None = None) -> dict[int, int]:
    return {i: layer for i, (name, layer) in found.items() if tower in (None, name)}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ADAPTERS)
def test_every_way_maps_right_or_refuses(made, name, optimizer):
    trained = made(name)
    found = OPTIMIZERS[optimizer](trained)
    train(trained, found)
    state, right = found.state_dict(), truth(trained, found)
    names = {id(p): key for key, p in trained.model.named_parameters()}
    listed = [names[id(p)] for group in found.param_groups for p in group["params"]]
    tower = "decoder" if name in TWO_TOWERS else None

    live = adapters.map_optimizer_to_layers(found, trained.model, tower=tower)
    assert live.layer_of == plain(right, tower) and live.how == "identity"

    by_name = adapters.map_param_ids_to_layers(trained.folder, count(found), names=dict(enumerate(listed)), tower=tower)
    assert by_name.layer_of == plain(right, tower) and by_name.how == "names"

    if optimizer.startswith("named"):
        held = adapters.map_param_ids_to_layers(trained.folder, count(found), state=state, tower=tower)
        assert held.layer_of == plain(right, tower) and held.how == "names"
        held = adapters.map_param_ids_to_layers(trained.folder, count(found), names=state["param_groups"], tower=tower)
        assert held.layer_of == plain(right, tower)
        for group in state["param_groups"]:
            del group["param_names"]

    try:
        by_shape = adapters.map_param_ids_to_layers(trained.folder, count(found), state=state, tower=tower)
    except ParamMappingError:
        assert (name, optimizer) not in SURE
    else:
        assert by_shape.layer_of == plain(right, tower) and by_shape.how == "shapes"
        assert adapters.layer_health(state, by_shape).keys() == set(by_shape.layer_indices)

    # Two arguments promise less: the order is taken to be PEFT's. A wrong one is found out where a state is used.
    try:
        by_order = adapters.map_param_ids_to_layers(trained.folder, count(found))
        adapters.layer_health(state, by_order)
    except ParamMappingError:
        assert optimizer != "trainable" or name in (*TWO_TOWERS, "uneven", "opt")  # nothing is refused needlessly
    else:
        assert by_order.layer_of == plain(right)


#: Adapters and optimizers whose state alone tells which id is which. It does not where layers of two towers look alike;
#: nor where OPT's norm outside the layers looks like the ones inside; nor where a token's delta looks like a factor.
SURE = {
    (name, optimizer)
    for name in ADAPTERS
    for optimizer in ("trainable", "everything", "a_then_b", "loraplus", "decay")
    if name not in (*TWO_TOWERS, "opt") and (name, optimizer) != ("tokens", "a_then_b")
}


def test_states_without_shapes_or_ids(made):
    trained = made("plain")
    optimizer = OPTIMIZERS["trainable"](trained)
    train(trained, optimizer)
    state = optimizer.state_dict()
    folder, total = trained.folder, count(optimizer)
    factored = {n: {"step": 1, "exp_avg_sq_row": torch.ones(2)} for n in state["state"]}
    with pytest.raises(ParamMappingError, match="no known order"):
        adapters.map_param_ids_to_layers(folder, total, state={**state, "state": factored})
    with pytest.raises(ParamMappingError, match="orders of the parameters fit"):  # never a step: nothing to go by
        adapters.map_param_ids_to_layers(folder, total, state={**state, "state": {}})
    with pytest.raises(TypeError, match="kept by name"):
        adapters.map_param_ids_to_layers(folder, total, state={"state": {"model.weight": {}}, "param_groups": []})
    with pytest.raises(ParamMappingError, match=f"write: .*{total}, state"):
        adapters.map_param_ids_to_layers(folder, total + 1, state=state)


def test_names_that_cannot_be(made):
    trained = made("plain")
    names = dict(enumerate(name for name, _ in trained.trainable))
    with pytest.raises(ParamMappingError, match="parameter 11, and the optimizer has 11"):
        adapters.map_param_ids_to_layers(trained.folder, 11, names=names)
    with pytest.raises(ParamMappingError, match="both called"):
        adapters.map_param_ids_to_layers(trained.folder, 12, names={**names, 3: names[0]})
    with pytest.raises(ParamMappingError, match="none of the 1 names"):
        adapters.map_param_ids_to_layers(trained.folder, 12, names={0: "something.weight"})
    with pytest.raises(ParamMappingError, match="param_names"):
        adapters.map_param_ids_to_layers(trained.folder, 12, names=[{"params": [0]}])
    assert adapters.map_param_ids_to_layers(trained.folder, 12, names=list(names.values())).num_layers == 3
    half = {n: name for n, name in names.items() if "lora_B" in name}  # LoRA-FA trains B alone
    assert set(adapters.map_param_ids_to_layers(trained.folder, 12, names=half).layer_of) == set(half)


def test_an_optimizer_of_another_model(made):
    optimizer = OPTIMIZERS["trainable"](made("plain"))
    with pytest.raises(ParamMappingError, match="none of this model"):
        adapters.map_optimizer_to_layers(optimizer, made("ranks").model)


def test_full_training_has_layers_too():
    model = ns.load("toy")
    module = model._module
    optimizer = torch.optim.AdamW(module.parameters())
    grouping = adapters.map_optimizer_to_layers(optimizer, model)
    names = [name for name, _ in module.named_parameters()]
    assert grouping.num_layers == 6 and grouping.params_per_layer == 12
    assert {names[i]: layer for i, layer in grouping.layer_of.items()} == {
        name: int(name.split(".")[2]) for name in names if name.startswith("transformer.h.")
    }


def test_the_towers_of_two(made):
    trained = made("t5")
    optimizer = OPTIMIZERS["trainable"](trained)
    right = truth(trained, optimizer)
    with pytest.raises(ParamMappingError, match='tower="decoder"'):
        adapters.map_optimizer_to_layers(optimizer, trained.model)
    for tower in ("encoder", "decoder"):
        grouping = adapters.map_optimizer_to_layers(optimizer, trained.model, tower=tower)
        assert grouping.layer_of == plain(right, tower)
    with pytest.raises(ParamMappingError, match="none of the towers"):
        adapters.map_optimizer_to_layers(optimizer, trained.model, tower="middle")


def test_the_names_that_are_proposed_are_those_of_an_optimizer_with_groups(made):
    """Its groups are not in the model's order, so the model's order would give ids to other layers."""
    trained = made("plain")
    model = trained.model
    parameters = [p for _, p in trained.trainable]
    optimizer = torch.optim.AdamW([{"params": parameters[1::2]}, {"params": parameters[::2], "weight_decay": 0.0}])
    code, _, given = grouping.NAMES.removeprefix("names=").partition("   (with of = ")
    of = eval(given.removesuffix(")"), {"model": model})
    names = eval(code, {"of": of, "optimizer": optimizer})
    found = adapters.map_param_ids_to_layers(trained.folder, len(parameters), names=names)
    known = adapters.map_optimizer_to_layers(optimizer, model)
    assert found.layer_of == known.layer_of
    assert list(known.layer_of.values()) != sorted(known.layer_of.values())
