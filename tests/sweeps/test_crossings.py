"""Fed or computed: the four runs beside plain hooks on two bare models, and jobs over checkpoints."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import nnsplice as ns
from families.subject import after, first_tensor, hooks
from nnsplice.atlas import unwrap
from nnsplice.errors import BadArgument, BadType, KeyMismatch, NnspliceError
from sweeps.test_foreign import METRIC, PROMPTS, pair
from zoo import tokenizer, wrap


def output(root: Any, module: Any, ids: Tensor) -> Tensor:
    kept: list[Tensor] = []
    with torch.no_grad(), hooks(module.register_forward_hook(lambda _m, _a, out: kept.append(first_tensor(out)))):
        root(ids)
    return kept[0]


def module_of(root: Any, family: str, part: str, layer: int) -> Any:
    block = (root.transformer.h if family == "gpt2" else root.model.layers)[layer]
    names = {"attn": "attn" if family == "gpt2" else "self_attn", "mlp": "mlp", "layer": ""}
    return block.get_submodule(names[part])


def by_hand(base: Any, tuned: Any, family: str, part: str, layer: int, ids: Tensor) -> list[float]:
    """Neither, fed, computed, both: what the site puts out, written into the base model's run."""
    mixed = {"fed": copy.deepcopy(tuned), "computed": copy.deepcopy(base)}
    for name, other in (("fed", base), ("computed", tuned)):
        state = module_of(other, family, part, layer).state_dict()
        module_of(mixed[name], family, part, layer).load_state_dict(state)
    found: list[float] = []
    for root in (base, mixed["fed"], mixed["computed"], tuned):
        value = output(root, module_of(root, family, part, layer), ids)
        with torch.no_grad(), hooks(after(module_of(base, family, part, layer), lambda _, value=value: value)):
            found.append(float(METRIC(base(ids).logits[:, -1])))
    return found


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("part", ["attn", "mlp", "layer"])
def test_the_four_runs_are_those_of_hooks(family: str, part: str) -> None:
    base, tuned = pair(family)
    site = "layers[:]" if part == "layer" else f"layers[:].{part}"
    result = ns.crossings(base, tuned, PROMPTS, site, METRIC, progress=False)
    grid = result.grid()
    for row, ids in enumerate(PROMPTS):
        for layer in grid.layer.values:
            expected = by_hand(unwrap(base), unwrap(tuned), family, part, int(layer), torch.tensor([ids]))
            found = grid.sel(prompt=row, layer=layer, metric=["neither", "fed", "computed", "both"]).values
            np.testing.assert_allclose(found, expected, atol=1e-12)
    shares = grid.sel(metric=["share fed", "share computed"])
    whole = grid.sel(metric="both", drop=True) - grid.sel(metric="neither", drop=True)
    np.testing.assert_allclose(shares.sum("metric"), whole, atol=1e-12)
    swept = ns.sweep(base, PROMPTS, None, [[f"{site.replace(':', str(n))}.output"] for n in range(3)], METRIC,
                     source=tuned, progress=False)  # fmt: skip
    np.testing.assert_allclose(grid.sel(metric="both").values, swept.table.values, atol=1e-12)


def test_weights_that_did_not_change_compute_nothing() -> None:
    base = wrap("llama").to(torch.float64)
    other = copy.deepcopy(unwrap(base))
    root: Any = other
    with torch.no_grad():
        root.model.layers[1].mlp.down_proj.weight.mul_(2)
    tuned = ns.load(root, tokenizer=tokenizer())
    before = {name: value.clone() for name, value in unwrap(base).state_dict().items()}
    grid = ns.crossings(base, tuned, PROMPTS, "layers[:].mlp", METRIC, progress=False).grid()
    computed, fed = (grid.sel(metric=f"share {name}").values for name in ("computed", "fed"))
    assert (computed[:, [0, 2]] == 0).all() and (np.abs(computed[:, 1]) > 1e-6).all()
    assert (fed[:, :2] == 0).all() and (np.abs(fed[:, 2]) > 1e-9).all()
    assert all(torch.equal(value, before[name]) for name, value in unwrap(base).state_dict().items())


@pytest.mark.parametrize("site", ["layers[0].heads[:]", "layers[0].attn[-1]", "embed", "layers[0].neurons[0]"])
def test_places_that_are_no_parts_with_weights_are_refused(site: str) -> None:
    base, tuned = pair("gpt2")
    with pytest.raises(NnspliceError, match="fed and computes"):
        ns.crossings(base, tuned, PROMPTS, site, METRIC, progress=False)


def test_a_norm_behind_a_branch_is_none_of_its_weights() -> None:
    base = wrap("gemma2")
    tuned = ns.load(copy.deepcopy(unwrap(base)), tokenizer=tokenizer())
    with pytest.raises(NnspliceError, match=r"stands behind this site|layers\[i\]"):
        ns.crossings(base, tuned, PROMPTS, "layers[:].mlp", METRIC, progress=False)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers for it
@pytest.mark.parametrize("which", ["base", "tuned"])
def test_an_adapter_beside_the_weights_is_refused_with_the_way_to_merge_it(which: str, tmp_path: Path) -> None:
    base = wrap("llama")
    adapted = get_peft_model(
        copy.deepcopy(unwrap(base)), LoraConfig(target_modules=["down_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(str(tmp_path))
    tuned = ns.load(adapted.eval(), tokenizer=tokenizer())
    pair = (tuned, base) if which == "base" else (base, tuned)
    for ask in (
        lambda: ns.crossings(*pair, PROMPTS, "layers[:].mlp", METRIC, progress=False),
        lambda: ns.sweep_weights(*pair, PROMPTS, "layers[:].mlp", METRIC, progress=False),
        lambda: ns.weights.diff(*pair),
        ns.weights.swap(*pair, "l0 mlp").__enter__,
        ns.weights.interpolate(*pair, "l0 mlp", 0.5).__enter__,
    ):
        with pytest.raises(BadArgument, match=r"adapter of PEFT[\s\S]*down_proj\.base_layer[\s\S]*merge_and_unload"):
            ask()
    ns.crossings(*pair, PROMPTS, "layers[:].attn", METRIC, progress=False)  # there the two have the same names
    # As the message says.
    merged = ns.load(PeftModel.from_pretrained(copy.deepcopy(unwrap(base)), tmp_path).merge_and_unload(), tokenizer())
    found = ns.crossings(base, merged, PROMPTS, "layers[:].mlp", METRIC, progress=False)
    sites = [[f"layers[{n}].mlp.output"] for n in range(3)]
    foreign = ns.sweep(base, PROMPTS, None, sites, METRIC, source=tuned, progress=False)
    np.testing.assert_allclose(found.only("both").table.values, foreign.table.values, atol=1e-4)


# --- over revisions ---------------------------------------------------------------------------------------------------


def job(model: Any) -> ns.SweepResult:
    return ns.ablate(model, PROMPTS, "layers[:].mlp", METRIC, progress=False)


def loader(alive: list[weakref.ref[Any]]) -> Callable[[str], Any]:
    def load(name: str) -> Any:
        gc.collect()
        assert not [one for one in alive if one() is not None], "a model of an earlier revision is still there"
        model = wrap("gpt2", seed=int(name.removeprefix("step")))
        alive.append(weakref.ref(unwrap(model)))
        return model

    return load


def test_each_revision_is_its_own_and_one_is_in_memory() -> None:
    alive: list[weakref.ref[Any]] = []
    found = ns.over_revisions(loader(alive), ["step1", "step2", "step0"], job, progress=False)
    assert isinstance(found, ns.Revisions) and len(alive) == 3
    grid = found.grid()
    assert grid.dims == ("revision", "prompt", "layer") and grid.revision.values.tolist() == ["step1", "step2", "step0"]
    for name in ("step0", "step1", "step2"):
        alone = job(wrap("gpt2", seed=int(name[-1])))
        np.testing.assert_allclose(grid.sel(revision=name).values, alone.grid().values)
    assert len(found.frame()) == 3 * 9 and "step2" in repr(found)


def test_a_journal_goes_on_and_knows_its_job(tmp_path) -> None:
    seen: list[str] = []

    def load(name: str) -> Any:
        seen.append(name)
        if name == "main/3" and len(seen) == 2:
            raise RuntimeError("the power is gone")
        return wrap("gpt2", seed=int(name[-1]))

    with pytest.raises(RuntimeError, match="power"):
        ns.over_revisions(load, ["main/1", "main/3"], job, journal=tmp_path / "run", progress=False)
    found = ns.over_revisions(load, ["main/1", "main/3"], job, journal=tmp_path / "run", progress=False)
    assert seen == ["main/1", "main/3", "main/3"]
    assert found.results["main/1"] == job(wrap("gpt2", seed=1))
    with pytest.raises(KeyMismatch, match="another job"):
        ns.over_revisions(load, ["main/1"], lambda one: ns.ablate(one, PROMPTS, "embed", METRIC, progress=False),
                          journal=tmp_path / "run", progress=False)  # fmt: skip


def test_what_is_no_job_is_told() -> None:
    with pytest.raises(BadArgument, match="different names"):
        ns.over_revisions(lambda name: wrap("gpt2"), ["a", "a"], job, progress=False)
    with pytest.raises(BadType, match="the job returned"):
        ns.over_revisions(lambda name: wrap("gpt2"), ["a"], lambda model: 3, progress=False)  # type: ignore[arg-type,return-value]
    with pytest.raises(KeyMismatch, match="different cells"):
        ns.over_revisions(lambda name: wrap("gpt2", n_layer=int(name)), ["2", "3"], job, progress=False)
