"""A vector is a capture with all its algebra, knows where it comes from, and keeps that in files."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch

import nnsplice as ns
from nnsplice.errors import FileError, NnspliceError
from steering.vectors import vector
from zoo import wrap

GOOD = ["w3 w4 w5", "w6 w4 w8", "w9 w4 w11", "w12 w4 w14"]
BAD = ["w3 w20 w5", "w6 w20 w8", "w9 w20 w11", "w12 w20 w14"]


@pytest.fixture(scope="module")
def fitted(model) -> Any:
    return ns.steering.fit_from_prompts(model, GOOD, BAD, ["layers[:].output[-1]"], method="lda", shrinkage=0.3)


def test_it_is_a_capture_of_one_row_that_knows_how_it_was_found(fitted) -> None:
    assert issubclass(type(fitted), ns.SavedActivation) and fitted.rows == 1
    assert (fitted.method, fitted.about.options) == ("lda", {"shrinkage": 0.3})
    assert fitted.layers == [0, 1, 2] and list(fitted.quality) == list(fitted.norms) == fitted.keys()
    assert fitted.model and fitted.about.rows == (4, 4) and fitted.about.model_type == "gpt2"
    assert fitted.at(1).keys() == ["layers[1].output[-1]"] == list(fitted.at(1).quality)
    assert fitted.at([0, 2]).layers == [0, 2] == fitted.at(range(0, 3, 2)).layers


def test_all_the_algebra_works(fitted) -> None:
    key = "layers[1].output[-1]"
    for made, expected in (
        (fitted * 2, 2 * fitted[key]), (3 * fitted, 3 * fitted[key]), (fitted / 4, fitted[key] / 4),
        (-fitted, -fitted[key]), (fitted + fitted, 2 * fitted[key]), (fitted - fitted * 3, -2 * fitted[key]),
        (fitted.at(0) | fitted.at(1), fitted[key]), (fitted.mean(), fitted[key]), (fitted.clone(), fitted[key]),
        (fitted.detach(), fitted[key]), (copy.copy(fitted), fitted[key]), (copy.deepcopy(fitted), fitted[key]),
        (fitted.map(torch.abs), fitted[key].abs()), (fitted.to(torch.float64), fitted[key].double()),
        (fitted.slice[0], fitted[key]), (pickle.loads(pickle.dumps(fitted)), fitted[key]),
    ):  # fmt: skip
        assert isinstance(made, ns.steering.SteeringVector)
        torch.testing.assert_close(made[key], expected, rtol=1e-6, atol=0)
    assert fitted.project_out(fitted)[key].norm() < 1e-5
    assert fitted.cosine(fitted * 5)[key].item() == pytest.approx(1)
    assert fitted.normalised().norm()[key].item() == pytest.approx(1)
    assert fitted.stack("layer").shape == (3, 1, 16)


def test_what_was_measured_stays_only_where_it_still_holds(fitted) -> None:
    assert (fitted * 2).quality == fitted.quality == fitted.clone().quality == fitted.to(torch.float64).quality
    assert (-fitted).quality == {key: 1 - value for key, value in fitted.quality.items()}
    assert pickle.loads(pickle.dumps(fitted)).about == fitted.about
    for other in (
        fitted + fitted,
        fitted.map(torch.abs),
        fitted.project_out(fitted * 0.5),
        fitted.at(0) | fitted.at(1),
    ):
        assert other.quality == {} and other.norms == {} and other.method is None
    with pytest.raises(ValueError, match="was not measured"):
        (fitted + fitted).in_residual_norms()
    assert fitted.in_residual_norms().about.unit == "residual norm"
    assert (fitted.in_residual_norms() * 2).about.unit == "residual norm, times a number"


def test_files_hold_everything(fitted, tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    fitted.in_residual_norms().to_file(path, coefficient=0.25)
    back = ns.steering.SteeringVector.from_file(path)
    assert back.allclose(fitted.in_residual_norms()) and back.coefficient == 0.25
    assert (back.method, back.quality, back.norms) == (fitted.method, fitted.quality, fitted.norms)
    assert (back.model, back.about.unit, back.about.rows) == (fitted.model, "residual norm", (4, 4))
    part = ns.steering.SteeringVector.from_file(path, "layers[1].output[-1]")
    assert part.layers == [1] and list(part.quality) == ["layers[1].output[-1]"]
    assert ns.SavedActivation.from_file(path).allclose(back)  # a plain capture to those who know no vectors
    assert [file.name for file in tmp_path.iterdir()] == ["v.safetensors"]


def test_other_files_are_refused(fitted, tmp_path: Path, model) -> None:
    ns.capture(model, "w3 w4", "layers[1].output[-1]").to_file(tmp_path / "c.safetensors")
    with pytest.raises(FileError, match="nothing about a steering vector"):
        ns.steering.SteeringVector.from_file(tmp_path / "c.safetensors")
    torch.save({"a": torch.ones(2)}, tmp_path / "p.pt")
    with pytest.raises(FileError, match="pickle"):
        ns.steering.SteeringVector.from_file(tmp_path / "p.pt")
    from safetensors import safe_open
    from safetensors.torch import save_file

    fitted.to_file(tmp_path / "v.safetensors")
    with safe_open(tmp_path / "v.safetensors", framework="pt") as file:
        header, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for damage in ("{", "[]", '{"rows": 3}', '{"rows": null, "colour": 1}'):
        save_file(tensors, tmp_path / "d.safetensors", metadata={**header, "nnsplice.steering": damage})
        with pytest.raises(FileError, match="damaged"):
            ns.steering.SteeringVector.from_file(tmp_path / "d.safetensors")


def test_a_vector_from_elsewhere(model) -> None:
    made = vector(1, 2)
    assert (made.method, made.layers, made.quality) == ("given", [1, 2], {})
    measured = ns.steering.SteeringVector.of(made, norms=dict.fromkeys(made.keys(), 2.0))
    assert all(length.item() == pytest.approx(2) for length in measured.in_residual_norms().norm().values())
    with pytest.raises(ValueError, match="2 rows"):
        ns.steering.SteeringVector.of(ns.capture(model, ["w3", "w4"], "layers[1].output[-1]"))
    with pytest.raises(TypeError, match="from_pairs"):
        ns.steering.SteeringVector.of(torch.ones(4))  # pyright: ignore[reportArgumentType]
    zero = ns.SavedActivation.from_pairs(("layers[2].output[-1]", torch.zeros(1, 16)))
    half = made.at(1) | zero
    with pytest.raises(NnspliceError, match=r"zero vector[\s\S]*layers\[2\][\s\S]*write: vector\.subset") as error:
        ns.steering.SteeringVector.of(half).normalised()
    repaired = eval(str(error.value).partition("write: ")[2], {"vector": ns.steering.SteeringVector.of(half)})
    assert repaired.normalised().layers == [1]
    with pytest.raises(KeyError, match="no vector of layer 5"):
        made.at(5)
    with pytest.raises(KeyError, match="one of 1, 2"):
        made.at(-1)
    for wrong in (1.0, None, "layers[1].output"):
        with pytest.raises(TypeError, match=r"a layer[\s\S]*vector\.at\(3\)"):
            made.at(wrong)  # pyright: ignore[reportArgumentType]


def test_several_positions_of_a_place_are_no_one_direction(model) -> None:
    saved = ns.capture(model, "w3 w4 w5", "layers[1].output[:]")
    with pytest.raises(ValueError, match="3 positions of one site"):
        ns.steering.steer(model, saved)
    assert ns.steering.steer(model, saved.mean("position")).rules


def test_it_shows_itself(fitted) -> None:
    lines = repr(fitted).splitlines()
    assert lines[0].startswith("SteeringVector: 3 sites, width 16, method lda, shrinkage=0.3, unit from the negative")
    assert "AUC" in lines[1] and "of the states' norm" in lines[1]
    assert "<b>SteeringVector</b>" in fitted._repr_html_()
    assert "made of others" in repr(fitted + fitted)
    axes = fitted.plot()
    assert axes.get_xlabel() == "layer" and len(axes.lines) == 2
    assert axes.lines[0].get_ydata().tolist() == list(fitted.quality.values())
    plt.close(axes.figure)
    with pytest.raises(ValueError, match="no quality"):
        vector(1).plot()


def test_a_tensor_of_ones_own_is_a_vector(model) -> None:
    direction = torch.randn(16, generator=torch.Generator().manual_seed(0))
    made = ns.steering.SteeringVector.from_tensor(direction, layer=1, unit="mine")
    assert made.keys() == ["layers[1].output[-1]"] and made.layers == [1] and made.about.unit == "mine"
    with ns.steering.steer(model, made, 2.0):
        steered = ns.capture(model, "w3 w4 w5", "layers[1].output[:]")
    plain = ns.capture(model, "w3 w4 w5", "layers[1].output[:]")
    for difference in (steered - plain).values():
        torch.testing.assert_close(difference[0], 2 * direction, rtol=0, atol=1e-5)
    direction.zero_()  # the vector keeps its own memory
    assert made.norm()["layers[1].output[-1]"].item() > 1
    at_attention = ns.steering.SteeringVector.from_tensor(torch.ones(1, 16), "layers[2].attn.output")
    assert at_attention.keys() == ["layers[2].attn.output[-1]"]


@pytest.mark.parametrize(
    ("given", "layer", "message"),
    [
        (torch.ones(3, 16), 1, "shape \\[3, 16\\] is no one direction"),
        ([1.0, 2.0], 1, "list is no tensor"),
        (torch.ones(16), None, "a layer None"),
        (torch.ones(16), "layer 1", "layer"),
    ],
)
def test_a_tensor_that_is_no_direction_is_refused(given, layer, message) -> None:
    with pytest.raises(NnspliceError, match=message):
        ns.steering.SteeringVector.from_tensor(given, layer)


def test_a_tensor_in_the_place_of_a_vector_is_answered_with_how_to_make_one(model) -> None:
    with pytest.raises(ns.errors.BadType) as refused:
        ns.steering.steer(model, torch.ones(16))  # type: ignore[arg-type]
    (line,) = [line for line in str(refused.value).splitlines() if line.startswith("  write: ")]
    made = eval(line.removeprefix("  write: ").replace("layer=3", "layer=1"), {"ns": ns, "tensor": torch.ones(16)})
    assert ns.steering.steer(model, made).rules[0].vector.tolist() == [1.0] * 16


def test_a_vector_of_another_model_of_the_same_width_warns_once_for_each_line(model, fitted) -> None:
    other = wrap("llama")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for coefficient in (0.5, 1.0):
            ns.steering.steer(other, fitted.at(1), coefficient)
        ns.steering.sweep(other, "w3 w4", fitted.at(1), [1.0], ns.logit_diff("w7", "w8"), progress=False)
    text = "this vector comes from GPT2LMHeadModel; its directions may mean nothing to LlamaForCausalLM"
    assert [(one.filename, str(one.message)) for one in told] == [(__file__, text)] * 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ns.steering.steer(model, fitted.at(1))
        ns.steering.steer(other, ns.steering.SteeringVector.from_tensor(torch.ones(16), layer=1))  # knows no model
