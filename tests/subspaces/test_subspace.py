"""A subspace as a value: made of vectors, captures and files; compared, joined, refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import nnsplice as ns
from nnsplice.errors import BadArgument, BadType, FileError, PathError, ShapeError, UnknownPath
from nnsplice.steering import SteeringVector
from zoo import wrap

PLACE = "layers[1].output"


def _random(k: int, seed: int = 0, width: int = 16) -> ns.Subspace:
    return ns.Subspace.of(PLACE, torch.randn(k, width, generator=torch.Generator().manual_seed(seed)))


def _projector(subspace: ns.Subspace) -> torch.Tensor:
    return subspace.basis @ subspace.basis.T


@pytest.mark.parametrize("k", [1, 3, 16])
def test_a_basis_is_orthonormal_and_spans_the_vectors(k: int) -> None:
    vectors = torch.randn(k, 16, dtype=torch.float64) * torch.logspace(-6, 6, k, dtype=torch.float64)[:, None]
    subspace = ns.Subspace.of("L1", vectors)
    assert subspace.place == PLACE
    assert torch.allclose(subspace.basis.T @ subspace.basis, torch.eye(k, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(vectors @ _projector(subspace), vectors, rtol=1e-9, atol=0)


def test_orthonormal_vectors_stay_as_they_are() -> None:
    assert torch.equal(ns.Subspace.of(PLACE, torch.eye(8)[[3, 1]]).basis, torch.eye(8, dtype=torch.float64)[[3, 1]].T)


@pytest.mark.parametrize(
    ("vectors", "error", "text"),
    [
        (torch.full((1, 4), math.nan), BadArgument, "NaN"),
        (torch.tensor([[1.0, math.inf]]), BadArgument, "infinity"),
        (torch.zeros(1, 4), BadArgument, "zero vector"),
        (torch.tensor([[1.0, 2.0, 0.0], [2.0, 4.0, 0.0]]), BadArgument, "2 vectors of rank 1"),
        (torch.randn(5, 4), ShapeError, "5 vectors of width 4"),
        (torch.zeros(0, 4), BadArgument, "no vectors"),
        (torch.zeros(1, 2, 4), ShapeError, "shape"),
        (torch.ones(1, 4, dtype=torch.long), BadArgument, "real numbers"),
        ([[1.0]], BadType, "no vectors"),
    ],
)
def test_vectors_without_a_basis_are_refused(vectors: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        ns.Subspace.of(PLACE, vectors)  # type: ignore[arg-type]


def test_a_basis_that_is_not_orthonormal_is_refused() -> None:
    with pytest.raises(BadArgument, match="not orthonormal"):
        ns.Subspace(PLACE, torch.ones(4, 2))
    with pytest.raises(BadArgument, match="not finite"):
        ns.Subspace(PLACE, torch.full((4, 1), math.nan))
    with pytest.raises(ShapeError, match="width"):
        ns.Subspace(PLACE, torch.eye(4)[:2])


def test_a_place_with_slices_or_positions() -> None:
    with pytest.raises(PathError, match="one site"):
        ns.Subspace.of("layers[:].output", torch.eye(4))
    assert ns.Subspace.of("layers[2].heads[1].q[-1]", torch.eye(4)).place == "layers[2].heads[1].q"


def test_pca_finds_what_was_planted() -> None:
    generator = torch.Generator().manual_seed(0)
    plane = torch.linalg.qr(torch.randn(16, 2, generator=generator, dtype=torch.float64))[0]
    rows = torch.randn(50, 2, generator=generator, dtype=torch.float64) @ torch.diag(torch.tensor([3.0, 2.0]).double())
    values = rows @ plane.T + 7.0 + 1e-5 * torch.randn(50, 16, generator=generator, dtype=torch.float64)
    saved = ns.SavedActivation.from_pairs((f"{PLACE}[-1]", values))
    found = ns.Subspace.pca(saved, k=2)
    assert found.angles(ns.Subspace(PLACE, plane)).max() < 1e-4
    assert found.about["variance"] > 0.999
    spread = torch.linalg.eigvalsh(values.T.cov())
    assert math.isclose(ns.Subspace.pca(saved, k=1).about["variance"], float(spread[-1] / spread.sum()), rel_tol=1e-9)
    with pytest.raises(BadArgument, match="50 rows vary in 16"):
        ns.Subspace.pca(saved, k=17)
    with pytest.raises(BadArgument, match="vary in 1 direction"):
        ns.Subspace.pca(saved.slice[0:2], k=2)


def test_a_capture_of_several_places_needs_one_named() -> None:
    saved = ns.capture(wrap("gpt2"), ["w3 w4", "w5 w6", "w7 w8"], "layers[:].output[-1]")
    with pytest.raises(BadArgument, match="3 sites"):
        ns.Subspace.pca(saved, k=1)
    assert ns.Subspace.pca(saved, k=1, place="layers[2].output").place == "layers[2].output"
    with pytest.raises(UnknownPath):
        ns.Subspace.of("layers[0].mlp.output", saved)


def test_a_steering_vector_is_one_direction() -> None:
    vector = SteeringVector.of(ns.SavedActivation.from_pairs((f"{PLACE}[-1]", torch.tensor([[3.0, 4.0]]))))
    subspace = ns.Subspace.of(PLACE, vector)
    assert torch.allclose(subspace.basis[:, 0], torch.tensor([0.6, 0.8], dtype=torch.float64))
    assert subspace.about["method"] == "SteeringVector"


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-4, 0.3, 1.5, math.pi / 2])
def test_principal_angles_are_exact_for_small_and_large_ones(angle: float) -> None:
    turned = torch.zeros(16, dtype=torch.float64)
    turned[0], turned[5] = math.cos(angle), math.sin(angle)
    eye = torch.eye(16, dtype=torch.float64)
    a = ns.Subspace(PLACE, eye[:, :2])
    b = ns.Subspace(PLACE, torch.stack([turned, eye[1], eye[7]], dim=1))
    expected = torch.tensor([0.0, angle], dtype=torch.float64)
    assert torch.allclose(a.angles(b), expected, rtol=1e-6, atol=1e-12)
    assert torch.allclose(b.angles(a), expected, rtol=1e-6, atol=1e-12)


def test_intersections_and_unions() -> None:
    eye = torch.eye(16)
    turn = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))[0]
    a, b = (ns.Subspace(PLACE, turn @ eye[:, columns].double()) for columns in ([0, 1, 2], [2, 1, 5, 6]))
    both, either = a & b, a | b
    assert (both.k, either.k) == (2, 5)
    assert torch.allclose(_projector(both), turn[:, 1:3] @ turn[:, 1:3].T, atol=1e-8)
    assert torch.allclose(_projector(either), turn[:, [0, 1, 2, 5, 6]] @ turn[:, [0, 1, 2, 5, 6]].T, atol=1e-8)
    assert (a & ns.Subspace(PLACE, turn[:, 9:10])).k == 0
    with pytest.raises(BadArgument, match="of one site"):
        _ = a & ns.Subspace("layers[2].output", b.basis)
    with pytest.raises(ShapeError, match="16 wide"):
        a.angles(ns.Subspace(PLACE, torch.eye(4)))


def test_random_subspaces_depend_on_their_seed_alone() -> None:
    one = _random(3)
    assert torch.equal(one.random(seed=4).basis, _random(3, seed=9).random(seed=4).basis)
    assert one.random(seed=4).angles(one.random(seed=5)).max() > 0.1
    assert one.random(k=7).k == 7
    with pytest.raises(BadArgument, match="16 wide"):
        one.random(k=17)


def test_files_keep_everything_and_damage_is_told(tmp_path: Path) -> None:
    subspace, file = _random(3), tmp_path / "part.safetensors"
    subspace.to_file(file)
    read = ns.Subspace.from_file(file)
    assert torch.equal(read.basis, subspace.basis)
    assert (read.place, read.about, read.identity) == (subspace.place, subspace.about, subspace.identity)
    changed = load_file(file)["basis"].clone()
    changed[0, 0] += 1e-12
    header = {"kind": "Subspace", "format": 1, "place": PLACE, "about": {}, "digest": subspace.identity["basis"]}
    save_file({"basis": changed}, file, metadata={"nnsplice": json.dumps(header)})
    with pytest.raises(FileError, match="damaged"):
        ns.Subspace.from_file(file)
    ns.SavedActivation.from_pairs((f"{PLACE}[-1]", torch.ones(1, 4))).to_file(file)
    with pytest.raises(FileError, match="no subspace"):
        ns.Subspace.from_file(file)
    torch.save({"basis": changed}, file)
    with pytest.raises(FileError, match="pickle"):
        ns.Subspace.from_file(file)


def test_captures_are_projected_and_interchanged() -> None:
    a, b = (ns.capture(wrap("gpt2"), texts, f"{PLACE}[:]") for texts in (["w3 w4", "w5 w6"], ["w7 w8", "w9 w61"]))
    subspace = _random(3)
    projector = _projector(subspace)
    for key, value in a.interchange(b, subspace).items():
        expected = a[key].double() + (b[key].double() - a[key].double()) @ projector
        assert torch.allclose(value.double(), expected, atol=1e-6)
        assert torch.allclose(a.project(subspace)[key].double(), a[key].double() @ projector, atol=1e-6)
    assert all(torch.equal(value, a[key]) for key, value in a.interchange(a, subspace).items())
    whole = ns.Subspace(PLACE, torch.eye(16))
    assert a.interchange(b, whole).allclose(b, atol=1e-6)
    with pytest.raises(ShapeError, match="16 wide here"):
        a.project(ns.Subspace(PLACE, torch.eye(4)))
    with pytest.raises(BadType, match="no subspace"):
        a.project(torch.eye(16))  # type: ignore[arg-type]


@pytest.mark.parametrize("spelled", ["layers[-2].output[:]", "model.transformer.h[1].output[0]", "layers[1][-1]"])
def test_a_subspace_fits_its_place_however_it_is_spelled(spelled: str) -> None:
    saved = ns.capture(wrap("gpt2"), ["w3 w4", "w5 w6"], spelled)
    subspace = ns.Subspace("layers[1].output", _random(3).basis)
    for key, value in saved.project(subspace).items():
        assert torch.allclose(value.double(), saved[key].double() @ _projector(subspace), atol=1e-6)


@pytest.mark.parametrize("paths", ["layers[2].output[:]", "layers[1].input[-1]", "layers[:].output[:]"])
def test_a_capture_of_another_place_of_the_same_width_is_refused(paths: str) -> None:
    model = wrap("gpt2")
    a, b = (ns.capture(model, texts, paths) for texts in (["w3 w4", "w5 w6"], ["w7 w8", "w9 w61"]))
    subspace = ns.Subspace("layers[1].output", _random(3).basis)
    for call in (lambda: a.project(subspace), lambda: a.interchange(b, subspace)):
        with pytest.raises(BadArgument, match=r"the subspace is of layers\[1\].output") as raised:
            call()
        assert "subspace.basis) if its directions are meant to hold there" in str(raised.value)
