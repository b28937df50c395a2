"""Adam's moments by layer; optimizer files that are data, and files that are not."""

from __future__ import annotations

import pickle

import matplotlib.pyplot as plt
import numpy as np
import peft
import pytest
import torch
from matplotlib.patches import Rectangle

import nnsplice as ns
import zoo
from adapters.peft_models import OPTIMIZERS, adapt, count, train
from nnsplice.adapters import (
    LayerGrouping,
    layer_health,
    map_optimizer_to_layers,
    map_param_ids_to_layers,
    read_optimizer,
)
from nnsplice.errors import BadArgument, FileError, ParamMappingError

TWO = LayerGrouping((0, 1), 2, {0: 0, 1: 0, 2: 1, 3: 1}, how="names")


def adam(m, v, step=3):
    return {"exp_avg": torch.as_tensor(m), "exp_avg_sq": torch.as_tensor(v), "step": torch.tensor(float(step))}


def test_means_are_over_numbers():
    state = {
        0: adam([1.0, -1.0, 3.0], [4.0, 1.0, 0.0]),
        1: adam([[2.0]], [[16.0]], step=5),
        2: adam([0.0], [0.0]),
        3: adam([0.0], [0.0]),
    }
    health = layer_health({"state": state, "param_groups": [{"params": [0, 1, 2, 3]}]}, TWO)
    first = health[0]
    assert first.exp_avg_sq == pytest.approx(21 / 4) and first.exp_avg == pytest.approx(5 / 4)
    assert first.step == 4.0 and first.dead_fraction == pytest.approx(1 / 4)
    assert (first.params, first.numbers) == (2, 4)
    # Without the bias to zero that Adam's moments have in their first steps.
    ratio = lambda step: (1 - 0.999**step) ** 0.5 / (1 - 0.9**step)  # noqa: E731
    assert first.agreement == pytest.approx((1.5 * ratio(3) + 0.5 * ratio(5)) / 3)
    assert first.gradient**2 == pytest.approx((5 / (1 - 0.999**3) + 16 / (1 - 0.999**5)) / 4)
    assert health[1].dead_fraction == 1.0 and health[1].agreement == 0.0
    assert layer_health(state, TWO)[0] == first
    assert layer_health(state, TWO, dead_below=1.0)[0].dead_fraction == pytest.approx(1 / 2)
    assert list(health.frame()["exp_avg_sq"]) == pytest.approx([21 / 4, 0.0])
    assert "dead 100.0%" in repr(health)
    ax = health.plot()
    bars = [patch.get_width() for patch in ax.patches if isinstance(patch, Rectangle)]
    assert bars == pytest.approx([first.gradient, 0.0])
    plt.close("all")


def test_a_parameter_that_was_never_reached():
    health = layer_health({"state": {0: adam([1.0], [1.0])}, "param_groups": [{"params": [0, 1, 2, 3]}]}, TWO)
    assert health[0].untouched == 1 and health[1].untouched == 2 and health[1].dead_fraction == 1.0


def test_a_state_that_is_of_something_else():
    with pytest.raises(ParamMappingError, match="has nothing for it"):
        layer_health({5: adam([1.0], [1.0])}, TWO)
    with pytest.raises(BadArgument, match="momentum_buffer"):
        layer_health({n: {"momentum_buffer": torch.ones(2)} for n in range(4)}, TWO)
    with pytest.raises(TypeError, match="no state"):
        layer_health({"weight": torch.ones(2)}, TWO)
    with pytest.raises(TypeError, match="list is no optimizer's state"):
        layer_health([1], TWO)  # pyright: ignore[reportArgumentType]


def test_an_order_that_the_state_contradicts(tmp_path):
    """Two arguments cannot know of frozen parameters or of LoRA+; the state does."""
    trained = adapt("plain", tmp_path)
    for name in ("everything", "loraplus", "backwards", "by_layer_last_first"):
        optimizer = OPTIMIZERS[name](trained)
        train(trained, optimizer)
        grouping = ns.adapters.map_param_ids_to_layers(tmp_path, count(optimizer))
        with pytest.raises(ParamMappingError, match=r"state=|map_optimizer_to_layers"):
            layer_health(optimizer.state_dict(), grouping)


def test_the_numbers_are_the_gradients(tmp_path):
    """After one step, Adam's moments are the gradient and its square, times one less beta."""
    trained = adapt("plain", tmp_path)
    optimizer = OPTIMIZERS["trainable"](trained)
    train(trained, optimizer)
    health = layer_health(
        optimizer.state_dict(), ns.adapters.map_param_ids_to_layers(tmp_path, 12, state=optimizer.state_dict())
    )
    for layer in range(3):
        grads = torch.cat([p.grad.flatten() for name, p in trained.trainable if f"layers.{layer}." in name])  # pyright: ignore[reportOptionalMemberAccess]
        assert health[layer].exp_avg == pytest.approx(0.1 * float(grads.mean()), rel=1e-4)
        assert health[layer].exp_avg_sq == pytest.approx(0.001 * float(grads.square().mean()), rel=1e-4)
        assert health[layer].gradient == pytest.approx(float(grads.square().mean().sqrt()), rel=1e-4)
        assert health[layer].agreement == pytest.approx(1.0, rel=1e-4)
        assert health[layer].dead_fraction == pytest.approx(float((grads == 0).double().mean()))


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"optimizer": s, "epoch": 3}, lambda s: {"optimizer_states": [s]}]
)
def test_a_file_is_read(tmp_path, wrap):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    torch.save(wrap(optimizer.state_dict()), tmp_path / "optimizer.pt")
    found = read_optimizer(tmp_path / "optimizer.pt")
    assert torch.equal(found["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


class Evil:
    ran = False

    def __reduce__(self):
        return (_run, ())


def _run():
    Evil.ran = True


def test_a_file_that_would_run_code_is_refused(tmp_path):
    torch.save({"state": {0: Evil()}, "param_groups": []}, tmp_path / "optimizer.pt")
    with pytest.raises(FileError, match="more than tensors and plain data"):
        read_optimizer(tmp_path / "optimizer.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(FileError):
        read_optimizer(tmp_path / "bare.pt")
    assert not Evil.ran


def test_files_that_are_no_optimizer(tmp_path):
    with pytest.raises(FileError, match="no such file"):
        read_optimizer(tmp_path / "nowhere.pt")
    torch.save({"weight": torch.ones(2)}, tmp_path / "model.pt")
    with pytest.raises(FileError, match="keys weight"):
        read_optimizer(tmp_path / "model.pt")
    (tmp_path / "damaged.pt").write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(FileError, match=r"cannot be read|more than"):
        read_optimizer(tmp_path / "damaged.pt")
    for content in (b"step,lr\n1,0.1\n", b'{"state": {}}', b"", b"hello"):
        (tmp_path / "text.pt").write_bytes(content)
        with pytest.raises(FileError, match=r"no file of torch\.save[\s\S]*optimizer\.state_dict\(\)"):
            read_optimizer(tmp_path / "text.pt")
    torch.save({"state": {}, "param_groups": []}, tmp_path / "optimizer.pt")
    with pytest.raises(FileError, match=r"write: .*optimizer\.pt"):
        read_optimizer(tmp_path)


def test_a_file_with_random_states_beside_the_optimizer_says_how_to_save_it(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(2)
    optimizer.step()
    path = tmp_path / "checkpoint.pt"
    torch.save({"optimizer": optimizer.state_dict(), "numpy": np.random.default_rng(0).bit_generator.state,
                "old": np.random.RandomState(0).get_state()}, path)  # fmt: skip
    with pytest.raises(FileError, match=r"without random states.*\n.*write: torch\.save\(torch\.load\("):
        read_optimizer(path)
    torch.save(torch.load(path, weights_only=False)["optimizer"], tmp_path / "optimizer.pt")  # what it says
    assert read_optimizer(tmp_path / "optimizer.pt")["state"][0]["exp_avg"].shape == (2,)


@pytest.mark.parametrize("order", ["sparse", "reversed", "factors apart"])
def test_the_call_that_is_proposed_works(tmp_path, order):
    model = peft.get_peft_model(zoo.build("llama"), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    model.save_pretrained(tmp_path)
    factors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    a, b = ({name: p for name, p in factors.items() if kind in name} for kind in ("lora_A", "lora_B"))
    given = {
        "sparse": dict(model.named_parameters()),
        "reversed": dict(reversed(factors.items())),
        "factors apart": {**a, **b},
    }[order]
    optimizer = torch.optim.AdamW(list(given.values()))
    ids = torch.tensor([[3, 4, 5]])
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    state = optimizer.state_dict()
    true = layer_health(state, map_optimizer_to_layers(optimizer, model))
    plain = map_param_ids_to_layers(tmp_path, len(given))
    with pytest.raises(ParamMappingError) as refused:
        layer_health(state, plain)
    said = str(refused.value)
    if "state=optimizer_state" in said:
        made = map_param_ids_to_layers(tmp_path, len(given), state=state)
    else:
        assert "map_optimizer_to_layers(optimizer, model)" in said
        made = map_param_ids_to_layers(tmp_path, len(given), names=dict(enumerate(given)))
    assert order != "reversed" or "state=optimizer_state" not in said  # no known order: the state alone is not enough
    assert dict(layer_health(state, made)) == dict(true)
