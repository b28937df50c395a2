"""Path patching equals three passes with torch hooks, whatever the family; and says so where it has no meaning."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import nnsplice as ns
from attribution.oracle import NAMES, Names, Point, bare, ends, ids, kept, three_passes
from hooked import build as built
from hooked import wrapped
from nnsplice.attribution import packed_paths, path_patching
from nnsplice.packed import ways
from nnsplice.packed.frozen_forward import FrozenForward
from nnsplice.sweeps.running import run_fresh
from zoo import FAMILIES, MASKED, SEQ2SEQ, double, having, wrap

CLEAN, CORRUPTED = "w3 w4 w5 w6 w7", "w3 w9 w5 w16 w7"
METRIC = ns.logit_diff("w7", "w8")


def _values(model: Any, senders: Any, receivers: Any, **options: Any) -> np.ndarray:
    result = ns.path_patch(model, CLEAN, CORRUPTED, senders, receivers, METRIC, progress=False, **options)
    return result.table.values[0]


def _oracle(family: str, sender: Point, own: Point | None, receivers: list[Point], **options: Any) -> float:
    module = bare(family)
    return three_passes(module, NAMES[family].branches(), ids(CLEAN), ids(CORRUPTED), sender, own, receivers, **options)


@pytest.mark.parametrize("family", NAMES)
def test_heads_to_the_heads_of_a_later_layer(family: str) -> None:
    names, model = NAMES[family], double(family)
    values = _values(model, "layers[0:2].heads[:]", ["layers[2].heads[1].output", "layers[2].heads[3].output"])
    expected = [
        _oracle(family, names.z(layer, head), Point(names.attn.format(layer)), [names.z(2, 1), names.z(2, 3)])
        for layer in (0, 1)
        for head in range(4)
    ]
    assert np.abs(values - expected).max() < 1e-12
    assert np.ptp(values) > 1e-4


@pytest.mark.parametrize("family", NAMES)
def test_branches_to_a_later_branch_at_chosen_tokens(family: str) -> None:
    names, model = NAMES[family], double(family)
    values = _values(model, ["layers[0].attn[1,3]", "layers[0].mlp[1,3]"], "layers[1].mlp.output[2:]")
    expected = {}
    for part in ("attn", "mlp"):
        point = Point(getattr(names, part).format(0))
        for token in (1, 3):
            expected[f"layers[0].{part}.output[{token}]"] = _oracle(
                family, point, point, [Point(names.mlp.format(1))], sent=[token], received=[2, 3, 4]
            )
    plan = ns.plan_sweep(model, CLEAN, CORRUPTED, ["layers[0].attn[1,3]", "layers[0].mlp[1,3]"], METRIC)
    wanted = [expected[target.cell.path] for target in plan.targets]
    assert np.abs(values - wanted).max() < 1e-12
    # Token 1 reaches the MLP at token 1 only, which is none of the receiver's tokens.
    own = ends(bare(family), ids(CORRUPTED))
    moved = {path: abs(value - own) for path, value in expected.items()}
    assert moved["layers[0].mlp.output[1]"] == 0.0 < moved["layers[0].mlp.output[3]"]


def _projections(family: str, layer: int) -> dict[str, Point]:
    """The query of head 3, and the key and the value that it reads, in the family's own columns."""
    if family == "gpt2":  # q of all heads, k of all, v of all
        fused = f"transformer.h.{layer}.attn.c_attn"
        return {"heads[3].q": Point(fused, columns=(12, 16)), "groups[3].k": Point(fused, columns=(28, 32)),
                "groups[3].v": Point(fused, columns=(44, 48))}  # fmt: skip
    if family == "gpt_neox":  # q, k, v of one head after the other
        fused = f"gpt_neox.layers.{layer}.attention.query_key_value"
        return {"heads[3].q": Point(fused, columns=(36, 40)), "groups[3].k": Point(fused, columns=(40, 44)),
                "groups[3].v": Point(fused, columns=(44, 48))}  # fmt: skip
    home = f"model.layers.{layer}.self_attn"  # two groups of keys and values for four heads
    return {"heads[3].q": Point(f"{home}.q_proj", columns=(18, 24)),
            "groups[1].k": Point(f"{home}.k_proj", columns=(6, 12)),
            "groups[1].v": Point(f"{home}.v_proj", columns=(6, 12))}  # fmt: skip


@pytest.mark.parametrize("family", NAMES)
def test_to_queries_keys_and_values_also_where_heads_share_them(family: str) -> None:
    names, model = NAMES[family], double(family)
    for text, point in _projections(family, 2).items():
        values = _values(model, "layers[:].mlp", f"layers[2].{text}")
        own = ends(bare(family), ids(CORRUPTED))
        expected = [
            _oracle(family, Point(names.mlp.format(layer)), Point(names.mlp.format(layer)), [point]) for layer in (0, 1)
        ]
        assert np.abs(values - [*expected, own]).max() < 1e-12, text
        assert np.abs(np.array(expected) - own).max() > 1e-6


@pytest.mark.parametrize("family", NAMES)
def test_queries_as_senders(family: str) -> None:
    names, model = NAMES[family], double(family)
    text, point = next(iter(_projections(family, 0).items()))
    values = _values(model, f"layers[0].{text}", "layers[1].attn")
    attn = Point(names.attn.format(0))
    assert abs(values[0] - _oracle(family, point, attn, [Point(names.attn.format(1))])) < 1e-12


@pytest.mark.parametrize("family", NAMES)
def test_the_direct_effect_on_the_logits(family: str) -> None:
    """What a branch adds, put into the final stream of the corrupted run, through the final norm and the head."""
    names, model, module = NAMES[family], double(family), bare(family)
    values = _values(model, ["embed", "layers[:].attn", "layers[:].mlp"], "unembed")
    last = f"{names.mlp.format(2).rpartition('.')[0]}"
    branches = [*names.branches(), Point(last), Point(f"{last[:-1]}0", "input")]
    clean, corrupted = kept(module, ids(CLEAN), branches), kept(module, ids(CORRUPTED), branches)

    def final(added: torch.Tensor) -> float:
        handle = module.get_submodule(last).register_forward_hook(
            lambda _m, _a, out: (
                (corrupted[Point(last)] + added, *out[1:]) if isinstance(out, tuple) else corrupted[Point(last)] + added
            )
        )
        value = ends(module, ids(CORRUPTED))
        handle.remove()
        return value

    changes = {point: (clean[point] - corrupted[point]).reshape(1, 5, -1) for point in branches}
    expected = {"embed.output[:]": final(changes[branches[-1]])}
    for layer in range(3):
        expected[f"layers[{layer}].attn.output[:]"] = final(changes[Point(names.attn.format(layer))])
        expected[f"layers[{layer}].mlp.output[:]"] = final(changes[Point(names.mlp.format(layer))])
    result = ns.path_patch(
        model, CLEAN, CORRUPTED, ["embed", "layers[:].attn", "layers[:].mlp"], "unembed", METRIC, progress=False
    )
    wanted = [expected[cell.path] for cell in result.cells]
    assert np.abs(values - wanted).max() < 1e-12
    # The stream's end and the final norm are the same receiver.
    for other in ("layers[-1].output", "final_norm"):
        assert np.abs(_values(model, ["embed", "layers[:].attn", "layers[:].mlp"], other) - values).max() < 1e-12


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in (*SEQ2SEQ, *MASKED)])
def test_the_last_branch_has_no_other_path_than_the_direct_one(family: str) -> None:
    """On every family: a plain patch of it is its path to the logits, and one of the stream goes every way."""
    model = double(family)
    last = "layers[2].mlp.output[:]"
    swept = ns.sweep(model, CLEAN, CORRUPTED, last, METRIC, progress=False).table.values[0]
    assert np.abs(_values(model, last, "unembed") - swept).max() < 1e-12
    whole = ns.plan_sweep(model, CLEAN, CORRUPTED, "embed", METRIC, together=True)
    branches = ["layers[0].attn", "layers[0].mlp", "layers[0].output"]
    every = ns.run(whole, model, progress=False).table.values[0]
    alone = _values(model, "embed", branches)
    # The stream after layer 0 with the branches of layer 0 held still is not yet the patched run ...
    assert np.abs(alone - every).max() > 1e-9
    # ... and it is when it is the stream before them.
    assert np.abs(_values(model, "embed", "layers[0].input") - every).max() < 1e-12


def test_small_chunks_and_several_prompts_give_the_same_numbers() -> None:
    model = double("llama")
    clean, corrupted = [CLEAN, "w13 w14 w15", "w23 w24 w25"], [CORRUPTED, "w13 w24 w15", "w23 w14 w25"]
    args = (clean, corrupted, "layers[0:2].heads[:].output[:]", "layers[2].heads[1].q", METRIC)
    whole = ns.path_patch(model, *args, progress=False).table
    parts = ns.path_patch(model, *args, max_tokens=9, progress=False).table
    assert np.nanmax(np.abs(whole.values - parts.values)) < 1e-12
    alone = ns.path_patch(model, clean[1], corrupted[1], *args[2:], progress=False).table
    by_path = dict(zip((cell.path for cell in whole.cells), whole.values[1], strict=True))
    assert max(abs(by_path[c.path] - v) for c, v in zip(alone.cells, alone.values[0], strict=True)) < 1e-12


def test_a_path_patch_is_resumed_and_has_an_identity_of_its_own(tmp_path) -> None:
    model = double("gpt2")
    args = (CLEAN, CORRUPTED, "layers[0].heads[:]", "layers[2].heads[1].q", METRIC)
    journal = tmp_path / "paths.jsonl"
    result = ns.path_patch(model, *args, journal=journal, progress=False)
    again = ns.path_patch(model, *args, journal=journal, progress=False)
    assert again == result and again.run.forwards == 2 < result.run.forwards  # the two unedited runs
    assert result.run.executor == "packed paths" and result.asked["receivers"] == ["layers[2].heads[1].q"]
    with pytest.raises(ns.errors.FileError, match="receivers"):
        ns.path_patch(model, *args[:3], "layers[2].heads[2].q", METRIC, journal=journal, progress=False)
    result.to_file(tmp_path / "paths.safetensors")
    assert ns.SweepResult.from_file(tmp_path / "paths.safetensors") == result


def test_senders_behind_every_receiver_are_known_without_running() -> None:
    model = double("gpt2")
    result = ns.path_patch(model, CLEAN, CORRUPTED, "layers[:].mlp", "layers[1].attn", METRIC, progress=False)
    assert result.run.known == 2
    assert result.table.values[0, 1:].tolist() == [result.corrupted[0]] * 2
    with pytest.raises(ns.errors.BadArgument, match="nothing can reach"):
        ns.path_patch(model, CLEAN, CORRUPTED, "layers[2].mlp", "layers[1].attn", METRIC, progress=False)


@pytest.mark.parametrize(
    ("senders", "receivers", "words"),
    [
        ("layers[0].heads[0]", [], "no receivers"),
        ("layers[0].heads[0]", "layers[2].attn[9]", "no position"),
        ("model.transformer.h[0].ln_1.output", "layers[2].attn", "which branch"),
        ("layers[0].heads[0]", "layers[2].heads[0].pattern", "derived from several values"),
    ],
)
def test_mistakes_are_answered(senders: Any, receivers: Any, words: str) -> None:
    with pytest.raises(ns.errors.NnspliceError, match=words):
        ns.path_patch(double("gpt2"), CLEAN, CORRUPTED, senders, receivers, METRIC, progress=False)


def test_what_has_no_branches_is_refused() -> None:
    with pytest.raises(ns.errors.RefusedPlace, match="two towers"):
        ns.path_patch(double("t5"), CLEAN, CORRUPTED, "encoder.layers[0].mlp", "unembed", METRIC, progress=False)
    with pytest.raises(ns.errors.BadArgument, match="one way of running"):
        ns.path_patch(double("gpt2"), CLEAN, CORRUPTED, "embed", "unembed", METRIC, executor="batched")
    model = double("gpt2")
    model._module.train()
    with pytest.raises(ns.errors.BadArgument, match="train mode"):
        ns.path_patch(model, CLEAN, CORRUPTED, "embed", "unembed", METRIC, progress=False)


@pytest.mark.parametrize(("part", "token"), [("mlp", None), ("mlp", -1), ("attn", None)])
def test_a_window_of_whole_branches_sends_what_each_of_them_adds(part: str, token: int | None) -> None:
    """Direct changes of the stream add up in front of the final norm."""
    module, at = bare("llama"), slice(None) if token is None else token
    points = [Point(getattr(NAMES["llama"], part).format(layer)) for layer in (0, 1)]
    clean, corrupted = kept(module, ids(CLEAN), points), kept(module, ids(CORRUPTED), points)

    def moved(_m: Any, _a: Any, out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        out[:, at] += torch.stack([clean[point] - corrupted[point] for point in points]).sum(0)[:, at]
        return out

    module.model.layers[2].register_forward_hook(moved)
    sender = f"layers[1].{part}" + ("" if token is None else f"[{token}]")
    value = _values(double("llama"), sender, "unembed", window=2)[0]
    assert abs(value - ends(module, ids(CORRUPTED))) < 1e-12
    assert abs(value - ends(bare("llama"), ids(CORRUPTED))) > 1e-3


@pytest.mark.parametrize("sender", ["layers[1].heads[0]", "layers[1].attn[1]", "layers[1].neurons[2]"])
def test_windows_of_senders_that_would_reach_each_other_are_refused(sender: str) -> None:
    with pytest.raises(ns.errors.BadArgument, match="would reach each other's branches"):
        _values(double("llama"), sender, "unembed", window=2)


@pytest.mark.parametrize(
    ("sender", "receiver"), [("layers[0].mlp.router", "unembed"), ("layers[0].mlp", "layers[1].mlp.router")]
)
def test_the_logits_of_a_router_neither_send_nor_receive(sender: str, receiver: str) -> None:
    with pytest.raises(ns.errors.RefusedPlace, match="chosen inside the router"):
        _values(double("mixtral"), sender, receiver)


def test_an_oracle_that_holds_less_still_differs() -> None:
    """The control: leave one branch free, and the numbers are others."""
    names = NAMES["gpt2"]
    fewer = replace(names, mlp=names.attn)
    assert isinstance(fewer, Names)
    sender, own = names.z(0, 1), Point(names.attn.format(0))
    free = three_passes(
        bare("gpt2"), fewer.branches(), ids(CLEAN), ids(CORRUPTED), sender, own, [Point(names.attn.format(2))]
    )
    held = _oracle("gpt2", sender, own, [Point(names.attn.format(2))])
    assert abs(free - held) > 1e-6


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in (*SEQ2SEQ, *MASKED)])
def test_packed_paths_are_the_three_runs_at_every_kind_of_place(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = double(family)
    clean, corrupted = [CLEAN, "w3 w4 w15"], [CORRUPTED, "w3 w24 w15"]
    asked = [
        (["layers[:].heads[:]", "layers[:].mlp", "embed"], "unembed"),
        (["layers[0:2].heads[0].q", "layers[0].groups[:].v", "layers[1].mid"], ["layers[2].heads[:].q[-1]"]),
        (["layers[0].output[:]", "layers[:].neurons[2]"], ["layers[1].groups[0].k", "layers[2].heads[1].output"]),
        (["layers[0].heads[:].output[:]"], ["layers[0].mlp", "layers[1].mlp", "layers[2].input"]),
    ]
    for senders, receivers in asked:
        args = (having(model, senders), having(model, [receivers] if isinstance(receivers, str) else receivers), METRIC)
        if not args[0] or not args[1]:
            continue
        fast = ns.path_patch(model, clean, corrupted, *args, progress=False)
        with monkeypatch.context() as patched:
            patched.setattr(path_patching, "chosen", lambda work, _, slow: (slow, "", packed_paths.Cost()))
            slow = ns.path_patch(model, clean, corrupted, *args, progress=False)
        assert (fast.run.executor, slow.run.executor) == ("packed paths", "paths"), fast.run.note
        assert np.nanmax(np.abs(fast.table.values - slow.table.values)) < 1e-12
        assert np.nanmax(fast.table.values) - np.nanmin(fast.table.values) > 1e-9


@pytest.mark.parametrize(
    ("senders", "receivers"),
    [
        ("layers[0].groups[:].v[1]", "unembed"), ("layers[0].groups[:].k", "layers[2].groups[0].k[-1]"),
        ("layers[0].heads[0].q[3]", "layers[1].mlp[3]"), ("layers[0].mlp[1]", "layers[2].heads[1].output"),
        ("layers[0].mlp[1]", "layers[1].attn[3:]"), ("layers[0].mlp[1]", "layers[1].attn.o"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("family", ["gpt2", "llama", "olmo2"])
def test_packed_paths_need_no_second_way_where_attention_is_exchanged(
    family: str, senders: str, receivers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention that runs whole prompts would make up for rows that leave out tokens which a change reaches."""
    model = double(family)
    monkeypatch.setattr(packed_paths, "ways", lambda lengths: ways(lengths)[:1])
    fast = ns.path_patch(model, CLEAN, CORRUPTED, senders, receivers, METRIC, progress=False)
    monkeypatch.setattr(path_patching, "chosen", lambda work, _, slow: (slow, "", packed_paths.Cost()))
    slow = ns.path_patch(model, CLEAN, CORRUPTED, senders, receivers, METRIC, progress=False)
    assert fast.run.executor == "packed paths", fast.run.note
    assert np.abs(fast.table.values - slow.table.values).max() < 1e-12
    assert np.abs(slow.table.values - slow.corrupted[0]).max() > 1e-9


def test_logits_of_other_tokens_than_the_metric_reads_receive_nothing() -> None:
    result = ns.path_patch(double("llama"), CLEAN, CORRUPTED, "layers[0].mlp", "unembed[3]", METRIC, progress=False)
    assert (result.run.executor, result.run.known) == ("packed paths", 0)
    assert abs(result.table.values[0, 0] - result.corrupted[0]) < 1e-12


def test_paths_of_a_model_with_hooks_of_the_users_are_run_the_slow_way_and_say_why() -> None:
    model = double("llama")
    hook = model._module.model.layers[1].register_forward_hook(lambda _m, _a, out: out * 1.5)
    result = ns.path_patch(model, CLEAN, CORRUPTED, "layers[0].heads[:]", "unembed", METRIC, progress=False)
    hook.remove()
    assert result.run.executor == "paths" and "hooks of the user's" in result.run.note


@pytest.mark.parametrize("hooked_by_user", [False, True])
def test_in_bfloat16_a_path_says_how_small_an_effect_may_be_rounding(hooked_by_user: bool) -> None:
    model = wrap("llama")
    model._module.bfloat16()
    if hooked_by_user:  # the slow way
        model._module.model.layers[1].register_forward_hook(lambda *_: None)
    result = ns.path_patch(model, CLEAN, CORRUPTED, "layers[0].heads[:]", "unembed", METRIC, progress=False)
    assert ("packed" in result.run.executor) != hooked_by_user
    assert "in bfloat16, logit_diff is known to about 0.0" in result.run.note


@pytest.mark.parametrize("hooked_by_user", [False, True])
def test_how_small_an_effect_may_be_rounding_goes_by_the_size_of_the_logits(hooked_by_user: bool) -> None:
    model = wrap("llama")
    model._module.bfloat16()
    with torch.no_grad():
        logits = model._module(**model.tokenizer(CORRUPTED, return_tensors="pt")).logits[0, -1]
    order = logits[3:].float().argsort() + 3
    closest = int(logits[order].float().diff().argmin())
    # Nearly nothing, and a difference of logits that are rounded to steps of their own size.
    metric = ns.logit_diff(f"w{order[closest]}", f"w{order[closest + 1]}")
    if hooked_by_user:  # the slow way
        model._module.model.layers[1].register_forward_hook(lambda *_: None)
    result = ns.path_patch(model, CLEAN, CORRUPTED, "layers[0].heads[:]", "unembed", metric, progress=False)
    about = float(result.run.note.split("is known to about ")[1].split(":")[0])
    size = float(logits.abs().max())
    assert abs(result.table.corrupted[0]) < size / 10
    assert 0.3 * size <= about / torch.finfo(torch.bfloat16).eps <= 3 * size


def test_packed_paths_that_are_off_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = double("llama")
    args = (model, CLEAN, CORRUPTED, "layers[0:2].heads[:]", "layers[2].heads[1].q", METRIC)
    right = ns.path_patch(*args, progress=False)
    assert right.run.executor == "packed paths"
    packed_paths._trusted.clear()
    moved = FrozenForward._move
    monkeypatch.setattr(
        FrozenForward,
        "_move",
        lambda self, number, layer, read: moved(self, number, layer, {s: 1.01 * v for s, v in read.items()}),
    )
    result = ns.path_patch(*args, progress=False)
    assert (result.run.executor, "of its own point" in result.run.note) == ("paths", True)
    assert np.abs(result.table.values - right.table.values).max() < 1e-12


@pytest.mark.parametrize("received", [[2, 3], [3]])
@pytest.mark.parametrize("family", ["bloom", "gptj", "falcon"])
def test_attention_that_runs_whole_prompts_stands_still_at_its_own_tokens(family: str, received: list[int]) -> None:
    """Rows end before their prompts do, so a token stands elsewhere in a pack than inside an attention of this kind."""
    names = {
        "bloom": Names("transformer.h.{}.self_attention.dense", "transformer.h.{}.mlp.dense_4h_to_h", "", 4),
        "gptj": Names("transformer.h.{}.attn", "transformer.h.{}.mlp", "", 4),
        "falcon": Names("transformer.h.{}.self_attention", "transformer.h.{}.mlp", "", 4),
    }[family]
    model, module = double(family), bare(family)
    for sender, text in ((names.mlp, "layers[0].mlp"), (names.attn, "layers[0].attn")):
        point, receiver = Point(sender.format(0)), Point(names.mlp.format(1))
        value = _values(model, text, f"layers[1].mlp.output{received}".replace(" ", ""))[0]
        pair = ids(CLEAN), ids(CORRUPTED)
        expected = three_passes(module, names.branches(), *pair, point, point, [receiver], received=received)
        assert abs(value - expected) < 1e-12, text
        assert abs(expected - ends(module, pair[1])) > 1e-6


def test_layers_that_put_out_a_list() -> None:
    config = {"vocab_size": 64, "n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 64}
    model, module = wrapped(built("OpenAIGPTConfig", config, "eager")), built("OpenAIGPTConfig", config, "eager")
    names = Names("transformer.h.{}.attn.c_proj", "transformer.h.{}.mlp", "", 4)
    point = Point(names.mlp.format(0))
    value = _values(model, "layers[0].mlp", "layers[2].attn")[0]
    pair = ids(CLEAN), ids(CORRUPTED)
    expected = three_passes(module, names.branches(), *pair, point, point, [Point(names.attn.format(2))])
    assert abs(value - expected) < 1e-12
    assert abs(expected - ends(module, pair[1])) > 1e-6


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj"])
def test_spans_and_several_metrics_are_tokens_and_metrics_one_by_one(family: str) -> None:
    model = double(family)
    clean, corrupted = ["w3 w4 w5 w6 w7", "w13 w14 w15"], ["w3 w9 w10 w6 w7", "w13 w24 w15"]
    key = "groups[0].k" if family == "llama" else "heads[0].k"
    senders, spans = "layers[0:2].heads[:].output", {"subject": [(1, 3), (1, 2)]}
    metrics = [METRIC, ns.probability("w7")]
    receivers = ['layers[2].heads[1].q["subject"][-1]', f'layers[2].{key}["subject"]']
    both = ns.path_patch(
        model, clean, corrupted, f'{senders}["subject"][-1]', receivers, metrics, spans=spans, progress=False
    )
    assert both.grid().dims == ("prompt", "metric", "layer", "head", "position")
    for prompt, (last, tokens) in enumerate([(2, "1,2"), (1, "1,")]):
        for number, metric in enumerate(metrics):
            numbers = [f"layers[2].heads[1].q[{last}]", f"layers[2].{key}[{tokens}]"]
            one = ns.path_patch(
                model, clean[prompt], corrupted[prompt], f"{senders}[{last}]", numbers, metric, progress=False
            )
            assert np.abs(both.table.values[prompt, :, number] - one.table.values[0]).max() < 1e-12
            assert np.abs(one.table.values[0] - one.corrupted[0]).max() > 1e-10


@pytest.mark.parametrize("packed", [True, False])
def test_a_part_of_a_sender_is_all_that_is_sent(packed: bool) -> None:
    """Nothing stands between the last MLP and the logits, so its path there is its patch in a sweep."""
    model = wrap("gpt2")
    model._module.double()
    pair = ["w3 w4 w5", "w9 w4 w5"], ["w3 w4 w3", "w9 w4 w3"]
    metric, last = ns.logit_diff("w7", "w8"), "layers[2].mlp"
    part = ns.Subspace.of(f"{last}.output", torch.eye(16, dtype=torch.float64)[:3])
    plan = path_patching.planned(model, *pair, last, metric, subspace=part)
    plan, paths = path_patching.routed(model, plan, ["unembed"])
    found = run_fresh(plan, model, executor=paths.executor if packed else paths._three_runs, progress=False)
    assert found.run.executor == ("packed paths" if packed else "paths")
    there = ns.sweep(model, *pair, last, metric, subspace=part, together=True, progress=False)
    np.testing.assert_allclose(found.table.values, there.table.values, rtol=0, atol=1e-12)
    whole = ns.path_patch(model, *pair, last, "unembed", metric, progress=False)
    assert np.abs(found.table.values - whole.table.values).min() > 1e-3


def test_a_result_its_figure_and_its_page_name_the_receivers(tmp_path) -> None:
    args = wrap("gpt2"), CLEAN, CORRUPTED, "layers[0].heads[:]"
    result = ns.path_patch(*args, "layers[2].heads[1].q", METRIC, progress=False)
    assert "\n  through layers[2].heads[1].q\n" in repr(result)
    assert "layers[0].heads[:].output through layers[2].heads[1].q" in result.plot().get_title()
    result.to_html(tmp_path / "page.html")
    assert "patch through layers[2].heads[1].q" in (tmp_path / "page.html").read_text()
    many = ns.path_patch(*args, "layers[1:].heads[:].q", METRIC, progress=False)
    named = ", ".join(f"layers[1].heads[{head}].q" for head in range(4))
    assert f"through {named}, ... (8 in all)" in repr(many)
    swept = ns.sweep(*args, METRIC, progress=False)
    assert "through" not in repr(swept) + swept.plot().get_title()
