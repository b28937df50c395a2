"""Alignments: gradients and accuracies against plain hooks, seeds, stops, files, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nnsplice as ns
import seeing
from alignment.planted import planted
from nnsplice import packed
from nnsplice.alignment import aligning, training
from nnsplice.alignment.measuring import memo_of
from nnsplice.alignment.pairs import pair_runs, split
from nnsplice.alignment.parametrisations import METHODS
from nnsplice.alignment.untrained import untrained
from nnsplice.atlas import unwrap
from nnsplice.errors import BadArgument, FileError, RefusedPlace, ShapeError, UnknownPath
from nnsplice.packed import BaseRuns
from nnsplice.sweeps import plan_sweep
from nnsplice.sweeps.packing import row_of
from zoo import double, wrap

BASE = ["w3 w4 w5 w6", "w7 w4 w5 w6", "w9 w4 w5 w6", "w11 w4 w5 w6", "w13 w4 w5 w6", "w15 w4 w5 w6"]
SOURCE = [*BASE[1:], BASE[0]]
ANSWERS = ["w20", "w21", "w22", "w23", "w24", "w25"]
SITES = ["layers[:].output[:]"]


def _align(model: Any = None, sites: Any = SITES, **options: Any) -> ns.Alignment:
    given: dict[str, Any] = {"k": 2, "epochs": 3, "batch_size": 2, "held_out": [1, 4], "progress": False, **options}
    answers = given.pop("answers", ANSWERS)
    return ns.align(double("gpt2") if model is None else model, BASE, SOURCE, answers, sites, **given)


def _stream(out: Any) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


def _hooked_loss(root: Any, module: Any, position: int, part: Any, pair: int) -> torch.Tensor:
    """What one pair loses by the interchange, with torch's hooks alone."""
    ids = [torch.tensor([[int(word[1:]) for word in text[pair].split()]]) for text in (SOURCE, BASE)]
    kept: list[torch.Tensor] = []
    hook = module.register_forward_hook(lambda _m, _a, out: kept.append(_stream(out).clone()))
    root(ids[0])
    hook.remove()

    def patch(_module: Any, _args: Any, out: Any) -> Any:
        new = _stream(out).clone()
        new[:, position] = part.change(new[:, position], kept[0][:, position])
        return (new, *out[1:]) if isinstance(out, tuple) else new

    hook = module.register_forward_hook(patch)
    logits = root(ids[1]).logits[0, -1]
    hook.remove()
    return -logits.log_softmax(-1)[20 + pair]


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "mixtral", "gpt_neox", "qwen3"])
def test_gradients_through_packed_rows_are_those_of_plain_hooks(family: str, method: str) -> None:
    model = double(family)
    plan = plan_sweep(model, SOURCE, BASE, ["layers[:].output[0]", "layers[:].mlp.output[2]"], ns.accuracy(ANSWERS))
    side = pair_runs("model", model, plan, 4096)
    root: Any = unwrap(model)
    root.requires_grad_(False)
    largest = 0.0
    for target in sorted({target for _, target in plan.jobs}):
        part = METHODS[method].make(16, 3, torch.Generator().manual_seed(target)).double()
        part.begin(0.5)
        jobs = side.jobs(target, range(len(BASE)))
        base = BaseRuns(model, plan.corrupted, memo=memo_of(side))
        ran = packed.run(base, [row_of(side.work, job, part.change) for job in jobs], keep_graph=True)
        logits = ran.head.logits(ran.states(), keep_graph=True)
        loss = -torch.stack([logits[n].log_softmax(-1)[20 + pair] for n, (pair, _) in enumerate(jobs)]).sum()
        found = torch.autograd.grad(loss, list(part.parameters()), allow_unused=True, retain_graph=True)

        place = plan.targets[target].places[0]
        position = plan.targets[target].cell.position
        assert isinstance(position, int)
        module = root.get_submodule(place.site.module)
        expected_loss = torch.stack([_hooked_loss(root, module, position, part, pair) for pair, _ in jobs]).sum()
        expected = torch.autograd.grad(expected_loss, list(part.parameters()), allow_unused=True)
        assert torch.allclose(loss.detach(), expected_loss.detach(), rtol=0, atol=1e-10 if family == "gpt2" else 1e-5)
        for a, b in zip(found, expected, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                # All but GPT-2 compute norms or angles of positions in float32, whatever the model's dtype.
                exact = family == "gpt2"
                assert torch.allclose(a, b, rtol=1e-8 if exact else 1e-4, atol=1e-12 if exact else 1e-6)
        largest = max([largest, *(float(a.abs().max()) for a in found if a is not None)])
    assert largest > 1e-5


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_the_accuracies_are_those_of_a_sweep_of_the_subspace() -> None:
    made = planted()
    found = ns.align(
        made.model, made.base, made.source, made.answers, "layers[:].output[:]", k=2, epochs=4, progress=False
    )
    held = found.result.asked["alignment"]["held_out"]
    source, base = ([prompts[n] for n in held] for prompts in (made.source, made.base))
    metric = ns.accuracy([made.answers[n] for n in held])
    for number, cell in enumerate(found.result.cells):
        if cell.path not in found.subspaces:
            continue
        part = ns.sweep(made.model, source, base, cell.path, metric, subspace=found.subspace(cell.path), progress=False)
        assert np.array_equal(part.table.values[:, 0], found.result.table.values[:, number, 0])
        whole = ns.sweep(made.model, source, base, cell.path, metric, progress=False)
        assert np.array_equal(whole.table.values[:, 0], found.result.table.values[:, number, 3])
    assert found.grid().sel(layer=1, position=1) > found.grid("random_subspace").sel(layer=1, position=1)
    assert len(found.subspaces) == 5  # behind the last block the first token is read by nobody


def test_the_random_model_is_new_and_the_same_for_a_seed() -> None:
    model = double("llama")
    one, same, other = (unwrap(untrained(model, seed)) for seed in (0, 0, 1))
    weights = [dict(module.named_parameters()) for module in (unwrap(model), one, same, other)]
    name = "model.layers.0.mlp.up_proj.weight"
    assert weights[1][name].dtype is torch.float64
    assert torch.equal(weights[1][name], weights[2][name])
    assert not torch.equal(weights[1][name], weights[0][name])
    assert not torch.equal(weights[1][name], weights[3][name])
    default = _align(model)
    given = _align(model, random_model=untrained(model, 0))
    assert np.array_equal(default.result.table.values, given.result.table.values, equal_nan=True)
    assert default.result.asked != given.result.asked


def test_one_seed_gives_the_same_bits_and_sites_do_not_depend_on_each_other() -> None:
    first, again, other = _align(), _align(), _align(seed=1)
    assert first.result == again.result
    assert all(torch.equal(first.subspaces[key].basis, again.subspaces[key].basis) for key in first.subspaces)
    assert first.subspace("layers[1].output[0]").angles(other.subspace("layers[1].output[0]")).max() > 1e-3
    alone = _align(sites="layers[1].output[0]").subspace("layers[1].output")
    assert alone.angles(first.subspace("layers[1].output[0]")).max() < 1e-7
    small = _align(max_tokens=8)
    assert small.subspace("layers[1].output[0]").angles(first.subspace("layers[1].output[0]")).max() < 1e-7


def test_the_model_is_left_as_it_was() -> None:
    model = double("llama")
    root: Any = unwrap(model)
    before, flags = root(torch.tensor([[3, 4, 5]])).logits, [p.requires_grad for p in root.parameters()]
    _align(model)
    assert torch.equal(root(torch.tensor([[3, 4, 5]])).logits, before)
    assert [p.requires_grad for p in root.parameters()] == flags
    assert all(p.grad is None for p in root.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in root.modules())


def test_base_prompts_are_recorded_once_for_all_layers_and_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    real = packed.run.__globals__["record"]

    def counted(base: Any, prompts: Any) -> Any:
        made.append(prompts)
        return real(base, prompts)

    monkeypatch.setitem(packed.run.__globals__, "record", counted)
    _align(epochs=5, patience=9)
    training_pairs = [prompts for prompts in made if len(prompts) == 2 and not set(prompts) & {1, 4}]
    # Two batches of four training pairs, for each of the two models.
    assert sorted(training_pairs) == sorted([*set(training_pairs)] * 2)
    assert len(training_pairs) == 4
    made.clear()
    monkeypatch.setattr(training, "KEPT", 0)  # nothing is kept: then they are recorded anew
    _align(epochs=5, patience=9)
    assert len(made) > 20


def test_training_stops_where_the_loss_no_longer_falls() -> None:
    found = _align(epochs=50, patience=1, learning_rate=1e-9)
    assert {s.about["epochs"] for s in found.subspaces.values()} == {2}


def test_spans_are_roles() -> None:
    spans = {"clean": {"subject": [(0, 1)] * 6}, "corrupted": {"subject": [(0, 1)] * 6}}
    found = _align(sites=['layers[0].output["subject"]', "layers[0].output[-1]"], spans=spans)
    named = found.subspace('layers[0].output["subject"]')
    assert named.place == "layers[0].output"
    assert found.grid().sizes == {"layer": 1, "position": 2}


# --- stops and files --------------------------------------------------------------------------------------------------


def test_a_run_goes_on_after_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _align()
    calls: list[int] = []
    real = aligning.train

    def stopping(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(aligning, "train", stopping)
    with pytest.raises(KeyboardInterrupt):
        _align(journal=tmp_path / "run")
    found = _align(journal=tmp_path / "run")
    assert len(calls) == 3 + 4  # six layers of two models, of which two were finished
    assert found.result == expected.result
    assert all(torch.equal(found.subspaces[k].basis, expected.subspaces[k].basis) for k in expected.subspaces)
    again = _align(journal=tmp_path / "run")
    assert len(calls) == 7
    assert again.result == expected.result
    with pytest.raises(FileError, match="another alignment"):
        _align(journal=tmp_path / "run", seed=1)
    file = next((tmp_path / "run").glob("*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(FileError, match="damaged"):
        _align(journal=tmp_path / "run")


def test_folders_keep_everything(tmp_path: Path) -> None:
    found = _align()
    found.to_folder(tmp_path / "found")
    read = ns.Alignment.from_folder(tmp_path / "found")
    assert read.result == found.result
    assert set(read.subspaces) == set(found.subspaces)
    assert all(torch.equal(read.subspaces[key].basis, found.subspaces[key].basis) for key in found.subspaces)
    assert repr(read) == repr(found)
    assert found.plot() is not None
    with pytest.raises(FileError, match="no alignment"):
        ns.Alignment.from_folder(tmp_path)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"method": "das2"}, BadArgument, "method='das2'"),
        ({"k": 0}, BadArgument, "k=0"),
        ({"k": 17}, ShapeError, "k=17, and this site is 16 wide"),
        ({"epochs": 0}, BadArgument, "epochs=0"),
        ({"learning_rate": -1.0}, BadArgument, "learning_rate"),
        ({"held_out": 0.01}, BadArgument, "held_out=0.01"),
        ({"held_out": [0, 1, 2, 3, 4, 5]}, BadArgument, "held_out"),
        ({"held_out": [7]}, BadArgument, "held_out"),
        ({"sites": [["layers[0].output[0]", "layers[1].output[0]"]]}, BadArgument, "a set of sites"),
        ({"sites": "layers[:].output[0:0]"}, IndexError, "selects none"),
        ({"answers": ["w20"]}, BadArgument, "answer"),
    ],
)
def test_bad_questions(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        _align(**options)


def test_places_without_a_value_of_their_own() -> None:
    with pytest.raises(RefusedPlace, match="derived from several values"):
        _align(wrap("gpt2", attn_implementation="eager"), "layers[0].heads[0].pattern[0]")


def test_a_model_in_train_mode_and_one_that_cannot_be_made_anew() -> None:
    model = double("gpt2")
    unwrap(model).train()
    with pytest.raises(BadArgument, match="train mode"):
        _align(model)
    unwrap(model).eval()
    unwrap(model).config = None  # type: ignore[assignment]
    with pytest.raises(BadArgument, match="no twin with random weights"):
        untrained(model, 0)


def test_a_site_that_was_not_trained() -> None:
    found = _align(sites="layers[0:2].output[0]")
    with pytest.raises(UnknownPath, match="no subspace was trained there"):
        found.subspace("layers[2].output[0]")
    with pytest.raises(BadArgument, match="no metric"):
        found.grid("accuracy")


def test_pairs_are_told_apart_once() -> None:
    one = split(10, 0.3, seed=0)
    assert len(one.held_out) == 3
    assert sorted((*one.training, *one.held_out)) == list(range(10))
    assert split(10, 0.3, seed=0) == one != split(10, 0.3, seed=1)


def test_prompts_with_images_in_the_model_and_in_its_twin_of_random_weights() -> None:
    model = ns.load(seeing.build(), processor=seeing.processor())

    def prompts(*seeds: int) -> dict[str, Any]:
        return {"text": ["w3 <image> w5 w6"] * len(seeds), "images": list(map(seeing.picture, seeds))}

    base, source, site = prompts(1, 2), prompts(3, 4), "layers[1].output[-1]"
    found = ns.align(model, base, source, ["w7", "w8"], site, k=2, epochs=1, held_out=[1], progress=False)
    basis = found.subspace(site).basis.double()
    states = [ns.capture(model, given, site).get(site) for given in (base, source)]
    moved = states[0] + (states[1] - states[0]) @ basis @ basis.T
    logits = ns.patched_logits(model, base, ns.SavedActivation.from_pairs((site, moved)))
    metric = ns.logit_diff("w7", "w8")
    result = ns.sweep(model, source, base, site, metric, subspace=found.subspace(site), progress=False)
    ids = model.tokenizer("w7 w8")["input_ids"]
    expected = logits[:, -1, ids[0]] - logits[:, -1, ids[1]]
    np.testing.assert_allclose(result.table.values.ravel(), expected.numpy().ravel(), atol=1e-12)
