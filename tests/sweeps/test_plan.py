"""A plan is data: it counts, shows, splits, prunes what cannot differ, and refuses what makes no sense."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

import nnsplice as ns
from nnsplice.errors import BadArgument, BadType, RefusedPlace, ShapeError, ShortRow, SpanError
from nnsplice.sweeps import plan_sweep, run
from zoo import wrap

CLEAN, CORRUPTED = "w3 w4 w5 w6", "w3 w9 w5 w6"
METRIC = ns.logit_diff("w7", "w8")


@pytest.fixture(scope="module")
def model():
    return wrap("llama")


def test_positions_before_the_first_difference_and_unread_ones_are_known(model) -> None:
    plan = plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC)
    jobs = {plan.targets[number].cell.path for _, number in plan.jobs}
    assert jobs == {f"layers[{i}].output[{p}]" for i in (0, 1) for p in (1, 2, 3)} | {"layers[2].output[3]"}
    assert len(plan.known) == 12 - 7
    ablation = plan_sweep(model, None, CORRUPTED, "layers[:].output", METRIC, operation="zero")
    assert len(ablation) == 9  # an ablation changes equal tokens too


def test_a_masked_model_reads_backwards_so_nothing_is_pruned() -> None:
    plan = plan_sweep(wrap("bert"), CLEAN, CORRUPTED, "layers[:].output", METRIC)
    assert (len(plan), len(plan.known)) == (12, 0)


def test_shards_partition_the_plan(model) -> None:
    plan = plan_sweep(model, [CLEAN, "w5 w6"], [CORRUPTED, "w7 w6"], "layers[:].output", METRIC)
    for n in (1, 2, 3, 20):
        shards = [plan.shard(i, n) for i in range(n)]
        assert sorted(job for shard in shards for job in shard.jobs) == sorted(plan.jobs)
        assert sorted(job for shard in shards for job in shard.known) == sorted(plan.known)
    for bad in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(BadArgument, match="0 <= i < n"):
            plan.shard(*bad)


def test_the_preview_says_what_will_run(model) -> None:
    text = plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC).preview(2)
    assert "7 cells to compute, 5 known without" in text
    assert "layers[0].output[1]" in text
    assert "and 5 more" in text


def test_cells_come_in_execution_order_and_carry_their_numbers(model) -> None:
    plan = plan_sweep(model, CLEAN, CORRUPTED, ["layers[:].output[-1]", "layers[:].heads[:].output[-1]"], METRIC)
    cells = [t.cell for t in plan.targets]
    assert [c.path for c in cells[:5]] == [f"layers[0].heads[{h}].output[-1]" for h in range(4)] + [
        "layers[0].output[-1]"
    ]
    assert (cells[2].component, cells[2].layer, cells[2].head, cells[2].position) == (
        "layers[:].heads[:].output", 0, 2, -1,
    )  # fmt: skip


def test_prompts_of_different_length_have_the_cells_they_have(model) -> None:
    plan = plan_sweep(model, ["w3 w4 w5", "w6"], ["w9 w4 w5", "w8"], "layers[0].output", METRIC)
    table = run(plan, model, progress=False).table
    assert table.done.tolist() == [[True] * 3, [True, False, False]]


def test_native_sites_are_swept_too(model) -> None:
    plan = plan_sweep(model, CLEAN, CORRUPTED, "model.model.layers[:].self_attn.o_proj.input[-1]", METRIC)
    assert [t.cell.layer for t in plan.targets] == [0, 1, 2]


def test_a_plan_can_be_sent_to_another_process(model) -> None:
    plan = plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC)
    again = pickle.loads(pickle.dumps(plan))
    assert (
        run(again, model, progress=False).table.values.tolist()
        == run(plan, model, progress=False).table.values.tolist()
    )


def test_the_same_question_has_the_same_identity(model) -> None:
    ask = lambda **more: plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC, **more).asked  # noqa: E731
    assert ask() == ask()
    assert ask(seed=1) != ask()
    assert plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output[:]", METRIC).asked == ask()
    assert plan_sweep(wrap("llama", seed=1), CLEAN, CORRUPTED, "layers[:].output", METRIC).asked != ask()


def _bad(model: Any) -> list[tuple[Any, type[Exception], str]]:
    def plan(*args: Any, metric: Any = METRIC, **options: Any) -> Any:
        usual: tuple[Any, ...] = (CLEAN, CORRUPTED, "layers[:].output", metric)
        clean, corrupted, sites, metric = (*args, *usual[len(args) :])
        return lambda: plan_sweep(model, clean, corrupted, sites, metric, **options)

    return [
        (plan(CLEAN, CORRUPTED + " w61"), ShapeError, r"4 tokens, the corrupted one 5[\s\S]*align=\"end\""),
        (plan(CLEAN, None), BadArgument, "corrupted is None, so patching would change nothing"),
        (plan([CLEAN, CLEAN], CORRUPTED), ShapeError, "2 clean prompts and 1 corrupted"),
        (plan(CLEAN, CORRUPTED, []), BadArgument, "no sites"),
        (plan([], CORRUPTED), BadArgument, "no prompts"),
        (plan(None, CORRUPTED), BadArgument, "clean is None"),
        (plan(None, None), BadArgument, "neither"),
        (plan(CLEAN, CORRUPTED, "layers[:].output[9]"), ShortRow, r"no prompt has a position \[9\]"),
        (plan(CLEAN, CORRUPTED, 'layers[:].output["subject"]'), SpanError, "is not given"),
        (plan(CLEAN, CORRUPTED, "layers[9].output"), IndexError, "past the last layer"),
        (plan(CLEAN, CORRUPTED, "layers[:].output", 3), BadType, "is no metric"),
        (plan(metric="logit_diff"), BadType, "a str is no metric"),
        (plan(metric=[]), BadType, "a list of no metrics"),
        (plan(metric=ns.logit_diff("w7 w8", "w9")), BadArgument, r"is 2 tokens: 'w7', 'w8'"),
        (plan(metric=ns.logit_diff("Paris", "w9")), BadArgument, "not in this model's"),
        (plan([CLEAN] * 3, [CORRUPTED] * 3, metric=ns.rank(["w7", "w8"])), BadArgument, r"as answer=[\s\S]*a set"),
        (plan(operation="patsch"), BadArgument, r"no operation 'patsch'[\s\S]*patch"),
        (plan(operation=3), BadType, "operation of type int"),
        (plan(operation="mean"), BadArgument, r"takes its values from a reference[\s\S]*ns\.capture"),
        (plan(reference=ns.capture(model, CLEAN, "layers[0].output[-1]")), BadArgument, "does not use a reference"),
        (plan(reference=CLEAN, operation="mean"), BadType, r"reference of type str[\s\S]*reference=ns\.capture"),
        (plan(window=0), BadArgument, "window=0"),
        (plan(CLEAN, CORRUPTED, "embed.output", window=2), BadArgument, "has no layer"),
        (plan(align="middle"), BadArgument, "align="),
        (plan(CLEAN, CORRUPTED, "layers[:].output[2:]", METRIC.at(1)), ShortRow, "none can change it"),
        (plan(metric=METRIC.at(4)), ShortRow, r"reads position \[4\], and prompt 0 has 4 tokens"),
        (plan([CLEAN, "w3"], [CORRUPTED, "w9"], metric=METRIC.at(-2)), ShortRow, "prompt 1 has 1 token\n"),
        (plan("w3 w4", metric=METRIC.at(1), align="end"), ShortRow, r"which is \[-3\], and the clean one has 2 tokens"),
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(28))
def test_what_makes_no_sense_is_refused(model, number: int) -> None:
    call, kind, message = _bad(model)[number]
    with pytest.raises(kind, match=message):
        call()


def test_sites_after_the_position_that_is_read_are_known_with_a_warning(model) -> None:
    with pytest.warns(UserWarning, match="6 cells after the position"):
        plan = plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC.at(1))
    assert {plan.targets[n].cell.position for _, n in plan.jobs} == {1}


def test_running_refuses_train_mode_another_model_and_unknown_executors(model) -> None:
    plan = plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", METRIC)
    with pytest.raises(BadArgument, match="other weights"):
        run(plan, wrap("llama", seed=1), progress=False)
    with pytest.raises(BadArgument, match=r"no executor 'fast'[\s\S]*batched"):
        run(plan, model, executor="fast", progress=False)
    wrong: Any = "plan"
    with pytest.raises(BadType, match=r"ns\.plan_sweep"):
        run(wrong, model)
    swapped: Any = (model, plan)
    with pytest.raises(BadType, match=r"no plan[\s\S]*ns\.run\(plan, model\)"):
        run(*swapped)
    several: list[Any] = [0, -4, 1.5, "all"]
    for tokens in several:
        with pytest.raises(BadArgument, match="max_tokens="):
            run(plan, model, max_tokens=tokens, progress=False)
    model._module.train()
    try:
        with pytest.raises(BadArgument, match=r"train mode[\s\S]*model\.eval\(\)"):
            run(plan, model, progress=False)
    finally:
        model._module.eval()


def test_a_metric_that_is_not_a_number_is_refused(model) -> None:
    plan = plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", lambda logits: logits[:, 0] * float("nan"))
    with pytest.raises(BadArgument, match="NaN for prompt 0"):
        run(plan, model, progress=False)
    scalar = plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", lambda logits: logits.mean())
    with pytest.raises(BadArgument, match=r"shape \[\] of logits[\s\S]*one number for each row"):
        run(scalar, model, progress=False)
    of_all = plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", lambda logits: logits[0, -1, 5])
    with pytest.raises(BadArgument, match=r"given \[row, vocab\] = \[1, 64\], those of position -1[\s\S]*:, token\]"):
        run(of_all, model, progress=False)
    faulty = plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output", lambda logits: logits[:, 1000])
    with pytest.raises(IndexError, match="out of bounds") as caught:  # an error of the user's own stays what it is
        run(faulty, model, progress=False)
    assert "logits [row, vocab] = [1, 64] of position -1" in caught.value.__notes__[0]


def test_prompts_of_different_length_are_swept_by_their_spans(model) -> None:
    short, long = "w3 w4 w5 w6", "w3 w9 w8 w5 w6"
    spans = {"clean": {"name": "w4"}, "corrupted": {"name": "w9 w8"}}
    site = 'layers[1].output["name"][-1]'
    result = ns.sweep(model, short, long, site, METRIC, spans=spans, align="end", progress=False)
    saved = ns.capture(model, short, site, spans=spans["clean"])
    by_hand = METRIC.bind(model.tokenizer, 1)(
        ns.patched_logits(model, long, saved, spans=spans["corrupted"])[:, -1], [0]
    )
    assert result.table.values[0, 0] == pytest.approx(by_hand.item(), abs=1e-5)


def test_kl_compares_with_the_clean_run(model) -> None:
    plan = plan_sweep(model, CLEAN, CORRUPTED, "layers[:].output[-1]", ns.kl_divergence())
    table = run(plan, model, progress=False).table
    assert table.clean[0] == pytest.approx(0, abs=1e-7)
    assert table.corrupted[0] > 1e-4
    last = next(i for i, t in enumerate(plan.targets) if t.cell.path == "layers[2].output[-1]")
    assert table.values[0, last] == pytest.approx(0, abs=1e-6)
    logits = ns.patched_logits(model, CORRUPTED, ns.capture(model, CLEAN, "layers[0].output[-1]"))[0, -1]
    with torch.no_grad(), model.trace(CLEAN):
        there = model.output.logits[0, -1].save()
    expected = torch.nn.functional.kl_div(
        logits.log_softmax(-1), there.log_softmax(-1), log_target=True, reduction="sum"
    )
    assert table.values[0, 0] == pytest.approx(float(expected), rel=1e-4)


def test_a_span_may_be_called_clean(model) -> None:
    named = [
        plan_sweep(model, CLEAN, CORRUPTED, f'layers[0].output["{name}"]', METRIC, spans={name: (1, 3)})
        for name in ("clean", "s")
    ]
    assert named[0].jobs == named[1].jobs
    wrong: Any = {"s": 5}
    with pytest.raises(BadType, match='span "s" is 5'):
        plan_sweep(model, CLEAN, CORRUPTED, 'layers[0].output["s"]', METRIC, spans=wrong)


def test_decoder_prompts_of_different_length_are_no_pair() -> None:
    two, clean = wrap("t5"), {"input_ids": torch.tensor([[3, 4, 5]]), "decoder_input_ids": torch.tensor([[0, 4, 5]])}
    corrupted = {"input_ids": torch.tensor([[3, 9, 5]]), "decoder_input_ids": torch.tensor([[0, 4]])}
    with pytest.raises(ShapeError, match="3 tokens, the corrupted one 2"):
        plan_sweep(two, clean, corrupted, "layers[1].output", METRIC)


def test_a_clean_run_that_an_operation_never_sees_is_told() -> None:
    model = wrap("gpt2")
    sites: Any = "layers[:].output[-1]"
    for operation in ("zero", torch.zeros_like):
        with pytest.warns(UserWarning, match=r"takes nothing from the clean prompts[\s\S]*clean=None"):
            ns.sweep(model, CLEAN, CORRUPTED, sites, METRIC, operation=operation, progress=False)
        ns.sweep(model, None, CORRUPTED, sites, METRIC, operation=operation, progress=False)
        ns.sweep(model, CLEAN, None, sites, METRIC, operation=operation, progress=False)
        # One that compares the two runs does see it.
        ns.sweep(model, CLEAN, CORRUPTED, sites, ns.kl_divergence(), operation=operation, progress=False)


@pytest.mark.parametrize("sites", ["layers[1].mlp.router", [["layers[1].mlp.router", "layers[2].mlp"]]])
def test_the_logits_of_a_router_are_refused_before_any_executor_is_chosen(sites: Any) -> None:
    with pytest.raises(RefusedPlace, match="chosen inside the router") as refused:
        plan_sweep(wrap("mixtral"), CLEAN, CORRUPTED, sites, METRIC)
    assert "layers[1].experts[0].output" in str(refused.value)


def test_a_router_by_a_native_path_is_told_by_its_layer() -> None:
    with pytest.raises(RefusedPlace, match=r"layers\[1\]\.experts\[0\]\.output"):
        plan_sweep(wrap("mixtral"), CLEAN, CORRUPTED, "model.model.layers[1].mlp.gate.output", METRIC)
