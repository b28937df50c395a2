"""Knockouts: against torch recomputing attention with an edited mask of the model's own, and by arithmetic."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import nnsplice as ns
from nnsplice.activations.access import site_of
from nnsplice.errors import BadArgument, MissingPosition, NnspliceError, PathError, RefusedPlace, ShortRow
from nnsplice.packed import Cost
from nnsplice.packed import running as packed_running
from nnsplice.sweeps import plan_sweep, run
from zoo import wrap

PROMPT = "w3 w9 w5 w6 w8 w11"
IDS = [int(word[1:]) for word in PROMPT.split()]
METRIC = ns.logit_diff("w7", "w8")
#: Those whose attention goes through transformers' registry; some with windows, sinks, shared keys, experts.
FAMILIES = (
    "gpt2", "gpt_neox", "opt", "llama", "mistral", "qwen3", "gemma2", "gemma3", "phi3", "mixtral", "gpt_oss", "olmo2",
    "stablelm", "gpt_bigcode", "cohere",
)  # fmt: skip
OWN_CODE = ("gptj", "gpt_neo", "bloom", "codegen")
Edge = tuple[int, int, int, int]  # layer, head, query, key


def _double(family: str, attention: str | None = None) -> Any:
    model = wrap(family)
    model._module.double()
    if attention:
        model._module.set_attn_implementation(attention)
    return model


def by_mask(model: Any, edges: Iterable[Edge], ids: list[int] = IDS) -> torch.Tensor:
    """The logits `[token, vocab]` with the masks that attention modules are given edited by hooks on them."""
    lost: dict[str, list[tuple[int, int, int]]] = {}
    for layer, head, query, key in edges:
        (place,) = ns.expand(model, f"layers[{layer}].heads[{head}].pattern")
        lost.setdefault(site_of(place).module, []).append((head, query, key))
    heads = model._module.config.num_attention_heads

    def editing(some: list[tuple[int, int, int]]) -> Any:
        def before(_module: Any, args: tuple, kwargs: dict) -> Any:
            size = len(ids)
            mask = kwargs.get("attention_mask")
            if mask is None:
                mask = torch.ones(size, size, dtype=torch.bool).tril()[None, None]
            if mask.dtype is torch.bool:
                mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
            new = mask.double().expand(1, heads, size, size).clone()
            for head, query, key in some:
                new[0, head, query, key] = torch.finfo(torch.float64).min
            return args, {**kwargs, "attention_mask": new}

        return before

    root = model._module
    hooks = [root.get_submodule(n).register_forward_pre_hook(editing(s), with_kwargs=True) for n, s in lost.items()]
    try:
        with torch.no_grad():
            return root(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    finally:
        for hook in hooks:
            hook.remove()


def _difference(logits: torch.Tensor) -> float:
    return float(logits[-1, 7] - logits[-1, 8])


def _sets(seed: int, count: int) -> list[list[Edge]]:
    chosen = random.Random(seed)
    found = []
    while len(found) < count:
        edges = []
        for _ in range(chosen.choice([1, 2, 5])):
            query = chosen.randrange(1, 6)
            edges.append((chosen.randrange(3), chosen.randrange(4), query, chosen.randrange(query)))
        if len(set(edges)) == len(edges):
            found.append(edges)
    return found


def _text(edge: Edge) -> str:
    return "layers[{}].heads[{}].pattern[{}][{}]".format(*edge)


@pytest.mark.parametrize("family", FAMILIES)
def test_knockouts_are_what_an_edited_mask_gives(family: str) -> None:
    model = _double(family)
    sets = _sets(0, 14)
    sites = [*([_text(edge) for edge in edges] for edges in sets), "layers[:].heads[1].pattern[-1][1:4]"]
    plan = plan_sweep(model, None, PROMPT, sites, METRIC, operation="knockout")
    singles = [[(layer, 1, 5, key)] for layer in range(3) for key in (1, 2, 3)]
    expected = np.array([_difference(by_mask(model, edges)) for edges in (*singles, *sets)])
    found = run(plan, model, progress=False)
    assert np.abs(found.table.values[0] - expected).max() < 1e-11
    assert np.abs(found.table.values[0] - found.corrupted[0]).max() > 1e-3
    for executor in ("reference", "batched"):
        other = run(plan, model, executor=executor, progress=False).table.values
        assert np.abs(other[0] - expected).max() < 1e-11


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_oss", "mistral"])
def test_packed_rows_run_knockouts(family: str) -> None:
    model = _double(family)
    result = ns.sweep(
        model, None, [PROMPT, "w3 w9 w5 w6"], "layers[:].heads[:].pattern[-1][0,1]", METRIC, operation="knockout",
        progress=False,
    )  # fmt: skip
    assert result.run.executor == "packed"
    assert result.grid().dims == ("prompt", "layer", "head", "position", "key")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_eager_attention_is_cut_too(family: str) -> None:
    model = _double(family, "eager")
    edges = [(1, 2, 4, 3), (1, 2, 4, 1), (0, 0, 5, 2)]
    result = ns.sweep(
        model, None, PROMPT, [[_text(edge) for edge in edges]], METRIC, operation="knockout", progress=False
    )
    assert abs(result.table.values[0, 0] - _difference(by_mask(model, edges))) < 1e-11


def _rows(saved: ns.SavedActivation) -> torch.Tensor:
    return torch.stack([value for _, value in saved.items()], 1)[0]


def test_the_other_keys_share_the_whole() -> None:
    model = _double("llama", "eager")
    whole = ns.capture(model, PROMPT, "layers[0].heads[2].pattern[:]")
    before = _rows(whole)
    values = _rows(ns.capture(model, PROMPT, "layers[0].groups[1].v[:]"))
    with ns.knockout(model, "layers[0].heads[2].pattern[4][1,3]"):
        cut = ns.capture(model, PROMPT, "layers[0].heads[2].output[:]")
    shares = before.clone()
    shares[4, [1, 3]] = 0
    shares[4] /= shares[4].sum()
    mixed = _rows(cut)
    assert (mixed - shares @ values).abs().max() < 1e-6  # eager attention takes its softmax in single precision
    assert (mixed - before @ values).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_by_hand_in_a_trace_and_in_a_call(family: str) -> None:
    model = _double(family)
    edges = [(0, 1, 5, 2), (2, 3, 4, 0), (2, 3, 4, 1)]
    expected = by_mask(model, edges)
    paths = ["layers[0].heads[1].pattern[-1][2]", "layers[2].heads[3].pattern[4][:2]"]
    with ns.knockout(model, paths):
        with torch.no_grad():
            called = model._module(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]
        with model.trace(PROMPT):
            traced = model.output.logits.save()
    assert (called - expected).abs().max() < 1e-11
    assert (traced[0] - expected).abs().max() < 1e-11
    after = model._module(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]
    assert (after - by_mask(model, [])).abs().max() < 1e-12


@pytest.mark.parametrize("side", ["left", "right"])
def test_by_hand_tokens_are_the_prompts_own_beside_padding(side: str) -> None:
    model = _double("llama")
    short, pad = IDS[:4], [0, 0]
    mask = [0, 0, 1, 1, 1, 1] if side == "left" else [1, 1, 1, 1, 0, 0]
    row = pad + short if side == "left" else short + pad
    batch = {"input_ids": torch.tensor([IDS, row]), "attention_mask": torch.tensor([[1] * 6, mask])}
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with ns.knockout(model, "layers[1].heads[2].pattern[-1][1]"), torch.no_grad():
        logits = model._module(**batch, position_ids=positions, use_cache=False).logits
    assert (logits[0] - by_mask(model, [(1, 2, 5, 1)])).abs().max() < 1e-11
    own = logits[1][torch.tensor(mask).bool()]
    assert (own - by_mask(model, [(1, 2, 3, 1)], short)).abs().max() < 1e-11


def test_places_are_measured_without_the_knockout() -> None:
    model = _double("llama")
    with ns.knockout(model, "layers[1].heads[2].pattern[5][1]"):  # behind the few tokens that are measured with
        found = ns.capture(model, PROMPT, ["layers[1].heads[2].output[-1]", "layers[1].mid[-1]"])
    assert len(found) == 2


def test_a_sweep_within_a_knockout_has_it_too() -> None:
    model, edges = _double("llama"), [(1, 2, 5, 1)]
    ns.sweep(model, PROMPT, "w3 w4 w5 w6 w8 w11", "layers[0].input[1]", METRIC, progress=False)  # packed, and known so
    with ns.knockout(model, _text(edges[0])):
        result = ns.sweep(model, PROMPT, "w3 w4 w5 w6 w8 w11", "layers[0].input[1]", METRIC, progress=False)
        with pytest.raises(BadArgument, match="within a knockout"):
            ns.sweep(model, None, PROMPT, _text(edges[0]), METRIC, operation="knockout", progress=False)
        with pytest.raises(BadArgument, match="within a knockout"), ns.knockout(model, _text(edges[0])):
            pass
    assert abs(result.clean[0] - _difference(by_mask(model, edges))) < 1e-11
    # With the one token that differs restored before the first layer the run is the clean one, knockout and all.
    assert abs(result.table.values[0, 0] - result.clean[0]) < 1e-11


def test_gradients_pass_a_knockout() -> None:
    model = _double("llama")
    root = model._module
    with ns.knockout(model, "layers[1].heads[2].pattern[-1][1]"):
        root(input_ids=torch.tensor([IDS]), use_cache=False).logits[0, -1, 7].backward()
    assert root.model.layers[0].mlp.down_proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_that_reads_both_ways(attention: str) -> None:
    model = _double("bert", attention)
    edges = [(1, 2, 0, 4), (0, 1, 3, 5)]
    result = ns.sweep(
        model, None, PROMPT, [[_text(edge) for edge in edges]], METRIC, operation="knockout", progress=False
    )
    with pytest.raises(AssertionError):  # a knockout of what causal models cannot see changes this one
        assert abs(result.table.values[0, 0] - result.corrupted[0]) < 1e-6
    root, lost = model._module, {}
    for layer, head, query, key in edges:
        lost.setdefault(layer, []).append((head, query, key))

    def before(layer: int) -> Any:
        def edit(_m: Any, args: tuple, kwargs: dict) -> Any:
            mask = torch.zeros(1, 4, 6, 6, dtype=torch.float64)
            for head, query, key in lost[layer]:
                mask[0, head, query, key] = torch.finfo(torch.float64).min
            if len(args) > 1:
                return (args[0], mask, *args[2:]), kwargs
            return args, {**kwargs, "attention_mask": mask}

        return edit

    for layer in lost:
        module = root.bert.encoder.layer[layer].attention.self
        module.register_forward_pre_hook(before(layer), with_kwargs=True)
    with torch.no_grad():
        logits = root(input_ids=torch.tensor([IDS])).logits[0]
    assert abs(result.table.values[0, 0] - _difference(logits)) < 1e-11


def test_layers_that_share_a_module_are_cut_one_by_one() -> None:
    model = _double("albert")
    results = [
        ns.sweep(model, None, PROMPT, _text((layer, 1, 5, 2)), METRIC, operation="knockout", progress=False)
        for layer in (0, 2)
    ]
    values = [result.table.values[0, 0] for result in results]
    assert abs(values[0] - values[1]) > 1e-8
    both = ns.sweep(
        model, None, PROMPT, [[_text((layer, 1, 5, 2)) for layer in range(3)]], METRIC, operation="knockout",
        progress=False,
    )  # fmt: skip
    assert abs(both.table.values[0, 0] - values[0]) > 1e-8


# --- spans, windows, what is known without computing ------------------------------------------------------------------


def test_spans_of_keys_stand_where_each_prompt_has_them() -> None:
    model = _double("llama")
    prompts = [PROMPT, "w3 w9 w5 w7"]
    result = ns.sweep(
        model, None, prompts, 'layers[1].heads[2].pattern[-1]["subject"]', METRIC, operation="knockout",
        spans={"subject": [(1, 4), (0, 2)]}, progress=False,
    )  # fmt: skip
    assert result.grid().key.values.tolist() == ['"subject"']
    ids = [int(word[1:]) for word in prompts[1].split()]
    expected = [
        _difference(by_mask(model, [(1, 2, 5, key) for key in (1, 2, 3)])),
        _difference(by_mask(model, [(1, 2, 3, key) for key in (0, 1)], ids)),
    ]
    assert np.abs(result.table.values[:, 0] - expected).max() < 1e-11


def test_a_window_cuts_neighbouring_layers() -> None:
    model = _double("gpt2")
    result = ns.sweep(
        model, None, PROMPT, "layers[:].heads[2].pattern[-1][1]", METRIC, operation="knockout", window=3, progress=False
    )
    expected = _difference(by_mask(model, [(layer, 2, 5, 1) for layer in range(3)]))
    assert abs(result.table.values[0, 1] - expected) < 1e-11


def test_keys_behind_their_query_are_known_without_computing() -> None:
    model = _double("llama")
    plan = plan_sweep(model, None, PROMPT, "layers[:].heads[0].pattern[1:3][:]", METRIC, operation="knockout")
    assert {plan.targets[n].cell.key for _, n in plan.known if plan.targets[n].cell.position == 1} == {2, 3, 4, 5}
    everything = replace(plan, jobs=[*plan.jobs, *plan.known], known=())
    values = run(everything, model, executor="reference", progress=False).table.values
    assert np.abs(values - run(plan, model, progress=False).table.values).max() < 1e-12


def test_an_edge_result_goes_to_a_file_a_figure_and_a_page(tmp_path: Any) -> None:
    model = _double("llama")
    result = ns.ablate(model, PROMPT, "layers[1].heads[:].pattern[-1][:]", METRIC, operation="knockout", progress=False)
    result.to_file(tmp_path / "edges.safetensors")
    assert ns.SweepResult.from_file(tmp_path / "edges.safetensors") == result
    result.plot()
    result.to_html(tmp_path / "edges.html")
    assert result.frame()["key"].tolist()[:3] == [0, 1, 2]
    assert str(result.best(1)["path"].iloc[0]).startswith("layers[1].heads[")
    with pytest.raises(BadArgument, match="two tokens"):
        result.by_role({"last": -1})


# --- what is refused --------------------------------------------------------------------------------------------------


def _in_registry(model: Any) -> bool:
    """Whether the attention of a model goes through transformers' table of functions, in the version that runs."""
    block = model._module.transformer.h[0]
    attention = block.self_attention if hasattr(block, "self_attention") else block.attn
    return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(type(attention).forward)


@pytest.mark.parametrize("family", OWN_CODE)
def test_attention_code_of_ones_own_is_refused(family: str) -> None:
    model = _double(family)
    if _in_registry(model):  # a newer transformers moved it there: then it is right
        edges = [(1, 1, 5, 2)]
        result = ns.sweep(model, None, PROMPT, _text(edges[0]), METRIC, operation="knockout", progress=False)
        assert abs(result.table.values[0, 0] - _difference(by_mask(model, edges))) < 1e-11
        return
    with pytest.raises(NnspliceError, match="code of its own"):
        ns.sweep(model, None, PROMPT, _text((1, 1, 5, 2)), METRIC, operation="knockout", progress=False)
    with pytest.raises(RefusedPlace, match="code of its own"), ns.knockout(model, _text((1, 1, 5, 2))):
        ns.capture(model, PROMPT, "layers[1].output[-1]")


@pytest.mark.parametrize(
    ("sites", "operation", "said"),
    [
        ("layers[0].heads[1].pattern[-1]", "knockout", "which keys"),
        ("layers[0].heads[1].output[-1]", "knockout", "this is none"),
        ("layers[0].heads[1].pattern[-1][2]", "zero", "no value to zero"),
        ("layers[0].heads[1].pattern[0][0]", "knockout", "token 0 of prompt 0 would be left without any key"),
        ([["layers[0].heads[1].pattern[2][0:3]"]], "knockout", "token 2 of prompt 0"),
        ([["L0H1.pattern[2][0]", "L0H1.pattern[1:3][1,2]"]], "knockout", "token 2 of prompt 0"),
        ("layers[0].heads[1].pattern[-1][9]", "knockout", "no prompt has"),
    ],
)  # fmt: skip
def test_mistakes_are_told(sites: Any, operation: str, said: str) -> None:
    with pytest.raises(NnspliceError, match=said):
        plan_sweep(_double("llama"), None, PROMPT, sites, METRIC, operation=operation)


def test_a_query_whose_window_holds_nothing_else_is_refused() -> None:
    model = _double("mistral")  # token 5 sees 3, 4 and 5
    gone = [["layers[0].heads[1].pattern[5][3:6]"]]
    with pytest.raises(NnspliceError, match="left without any key"):
        ns.sweep(model, None, PROMPT, gone, METRIC, operation="knockout", progress=False)
    for executor in ("reference", "batched", "packed"):
        with pytest.raises(NnspliceError, match="left without any key"):
            ns.sweep(model, None, PROMPT, gone, METRIC, operation="knockout", executor=executor, progress=False)


def test_packed_rows_find_a_query_whose_window_holds_nothing_else_by_themselves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A trial runs some cells one by one, and these refuse such a query; others are left to the packed rows."""
    monkeypatch.setattr("nnsplice.sweeps.running.choose", lambda *_: ("packed", "", Cost()))
    gone = [["layers[0].heads[1].pattern[5][3:6]"]]
    with pytest.raises(NnspliceError, match="left without any key"):
        ns.sweep(_double("mistral"), None, PROMPT, gone, METRIC, operation="knockout", progress=False)


def test_edges_are_no_values_to_capture() -> None:
    model = _double("llama", "eager")
    with pytest.raises(PathError, match="no value of its own"):
        ns.capture(model, PROMPT, "layers[0].heads[1].pattern[-1][2]")


def test_mistakes_by_hand_are_told() -> None:
    model = _double("llama")
    for error, path in (
        (MissingPosition, "layers[0].heads[1].pattern[-1]"),
        (BadArgument, 'layers[0].heads[1].pattern[-1]["subject"]'),
        (BadArgument, []),
    ):
        with pytest.raises(error), ns.knockout(model, path):
            pass
    with pytest.raises(ShortRow, match="no \\[9\\]"), ns.knockout(model, "layers[0].heads[1].pattern[9][2]"):
        model._module(input_ids=torch.tensor([IDS]), use_cache=False)
    with pytest.raises(RefusedPlace, match="cache"), ns.knockout(model, "layers[0].heads[1].pattern[1][0]"):
        model._module.generate(torch.tensor([IDS]), max_new_tokens=2, do_sample=False)
    # ... and nothing is left behind.
    assert (model._module(input_ids=torch.tensor([IDS])).logits[0] - by_mask(model, [])).abs().max() < 1e-12


@pytest.mark.parametrize("bucket", [1, 4, 64])
# Gemma 2 takes its softmax in float32, whatever the model's dtype.
@pytest.mark.parametrize(("family", "near"), [("gpt2", 1e-11), ("gemma2", 1e-6), ("gpt_oss", 1e-11)])
def test_rows_that_are_padded_to_share_a_call_are_cut_alike(
    family: str, near: float, bucket: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(packed_running.BUCKETS, "cpu", bucket)
    model, sets = _double(family), _sets(7, 12)
    sites = [[_text(edge) for edge in edges] for edges in sets]
    found = ns.sweep(model, None, PROMPT, sites, METRIC, operation="knockout", executor="packed", progress=False)
    expected = np.array([_difference(by_mask(model, edges)) for edges in sets])
    assert np.abs(found.table.values[0] - expected).max() < near
