"""Cells that share a pass have the values of runs of their own; the guard keeps what disturbs too much away."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import nnsplice as ns
from nnsplice.errors import FileError, NeverFired, NnspliceError
from nnsplice.steering import cells
from steering.vectors import PROMPTS, precise, vector

METRIC = ns.logit_diff("w20", "w21")
NUMBERS = [-1.0, 0.0, 0.5, 2.0]


@pytest.fixture(scope="module")
def model() -> Any:
    return precise("llama")


def logits(model: Any, prompt: str) -> torch.Tensor:
    with torch.no_grad():
        return model._module(torch.tensor([model.tokenizer(prompt)["input_ids"]])).logits[:, -1]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "bloom"])
@pytest.mark.parametrize("operator", ["add", "clamp", "rotate"])
@pytest.mark.parametrize("where", ["all", ns.steering.from_token(2)])
def test_every_cell_is_a_run_of_its_own(family: str, operator: str, where: Any) -> None:
    model = precise(family)
    found = ns.steering.sweep(
        model, PROMPTS, vector(0, 2), NUMBERS, METRIC, operator=operator, where=where, progress=False, max_tokens=40
    )
    assert found.layers == (0, 2) and found.coefficients == tuple(NUMBERS)
    tolerance = 1e-4 if family == "bloom" else 1e-10
    for p, prompt in enumerate(PROMPTS):
        before = logits(model, prompt)
        assert found.baseline[p] == pytest.approx(METRIC.bind(model.tokenizer, 1)(before, [0]).item(), abs=tolerance)
        for n, layer in enumerate(found.layers):
            for k, coefficient in enumerate(NUMBERS):
                with ns.steering.steer(model, vector(0, 2).at(layer), coefficient, operator=operator, where=where):
                    after = logits(model, prompt)
                value = METRIC.bind(model.tokenizer, 1)(after, [0]).item()
                there, here = before.log_softmax(-1), after.log_softmax(-1)
                kl = (there.exp() * (there - here)).sum().item()
                assert found.values[p, n, k] == pytest.approx(value, abs=tolerance)
                assert found.kl[p, n, k] == pytest.approx(kl, abs=tolerance)
    assert np.unique(found.values.round(6)).size > 12


@pytest.mark.parametrize("max_tokens", [None, 14])
def test_each_prompt_is_steered_at_the_tokens_that_are_its_own(model, max_tokens: int | None) -> None:
    prompts = [PROMPTS[0], *(f"w3 w4 w5 w{n}" for n in (6, 7))]
    spans = [(0, 1), (1, 3), (2, 3)]
    masks = torch.tensor([[True, False, False], [False, True, True], [False, False, True]])
    for where in (ns.steering.span(spans), ns.steering.mask(masks)):
        found = ns.steering.sweep(
            model, prompts, vector(0, 2), [0.5, 1.0], METRIC, where=where, progress=False, max_tokens=max_tokens
        )
        for p, prompt in enumerate(prompts):
            own = ns.steering.span([spans[p]])
            alone = ns.steering.sweep(model, prompt, vector(0, 2), [0.5, 1.0], METRIC, where=own, progress=False)
            np.testing.assert_allclose(found.values[p], alone.values[0], rtol=0, atol=1e-10)


def words(text: str) -> float:
    return float(len(set(text.split())))


@pytest.mark.parametrize(
    ("family", "where"), [("llama", "all"), ("llama", "generated"), ("mistral", "generated"), ("bloom", "all")]
)
def test_generated_cells_are_generations_of_their_own(family: str, where: str) -> None:
    model = precise(family)
    found = ns.steering.sweep(
        model, PROMPTS, vector(0, 2), NUMBERS, words, where=where, max_new_tokens=5, progress=False, max_tokens=70
    )
    for p, prompt in enumerate(PROMPTS):
        ids = model.tokenizer(prompt)["input_ids"]
        for n, layer in enumerate(found.layers):
            for k, coefficient in enumerate(NUMBERS):
                steering = ns.steering.steer(model, vector(0, 2).at(layer), coefficient, where=where)
                with steering, torch.no_grad():
                    out: Any = model._module.generate(
                        torch.tensor([ids]),
                        max_new_tokens=5,
                        do_sample=False,
                        return_dict_in_generate=True,
                        output_logits=True,
                    )
                steered = torch.stack(out.logits, dim=1)
                with torch.no_grad():
                    plain = model._module(out.sequences).logits[:, len(ids) - 1 : -1]
                text = model.tokenizer.decode(out.sequences[0, len(ids) :], skip_special_tokens=True)
                assert found.texts[p][n][k] == text and found.values[p, n, k] == words(text)
                kl = torch.nn.functional.kl_div(
                    steered.log_softmax(-1), plain.log_softmax(-1), log_target=True, reduction="none"
                )
                assert found.kl[p, n, k] == pytest.approx(
                    kl.sum(-1).mean().item(), abs=1e-6
                )  # transformers rounds to single
    assert len({text for rows in found.texts for row in rows for text in row}) > len(PROMPTS)


def test_a_guard_may_be_left_out_of_generations(model) -> None:
    given: Any = {"max_new_tokens": 4, "progress": False}
    whole = ns.steering.sweep(model, PROMPTS, vector(0, 1), NUMBERS, words, **given)
    found = ns.steering.sweep(model, PROMPTS, vector(0, 1), NUMBERS, words, guard=False, **given)
    assert found.texts == whole.texts and np.isnan(found.kl).all()
    free, guarded = found.choose(guard=None), whole.choose(guard=None)
    assert (free.path, free.coefficient, free.score) == (guarded.path, guarded.coefficient, guarded.score)
    with pytest.raises(ValueError, match="did not measure its guard"):
        found.choose(limit=1.0)
    with pytest.raises(ValueError, match="costs nothing"):
        ns.steering.sweep(model, PROMPTS, vector(1), NUMBERS, METRIC, guard=False, progress=False)


def test_the_guard_of_a_text_that_ends_counts_its_own_tokens_only() -> None:
    model = precise("llama")
    plain = ns.steering.generate(model, PROMPTS[0], max_new_tokens=6, do_sample=False)[0]
    ends = model.tokenizer(plain)["input_ids"][-1]
    model._module.generation_config.eos_token_id = ends
    model._module.generation_config.pad_token_id = 0
    found = ns.steering.sweep(model, PROMPTS, vector(1), [0.5, 1.0], words, max_new_tokens=8, progress=False)
    for p, prompt in enumerate(PROMPTS):
        alone = ns.steering.sweep(model, prompt, vector(1), [0.5, 1.0], words, max_new_tokens=8, progress=False)
        np.testing.assert_allclose(found.kl[p], alone.kl[0], rtol=0, atol=1e-9)
        assert found.texts[p] == alone.texts[0]


def test_a_metric_that_compares_is_given_the_unsteered_run(model) -> None:
    found = ns.steering.sweep(model, PROMPTS, vector(0, 1), NUMBERS, ns.kl_divergence(), progress=False)
    np.testing.assert_allclose(found.values, found.kl, rtol=0, atol=1e-10)
    earlier = ns.steering.sweep(model, PROMPTS[0], vector(1), [1.0], METRIC.at(2), progress=False)
    with ns.steering.steer(model, vector(1)), torch.no_grad():
        there = model._module(torch.tensor([model.tokenizer(PROMPTS[0])["input_ids"]])).logits[:, 2]
    assert earlier.values.item() == pytest.approx(METRIC.bind(model.tokenizer, 1)(there, [0]).item(), abs=1e-10)


def test_few_passes_serve_many_cells(model, monkeypatch) -> None:
    passes = []
    of = cells._LogitsMeasure._of
    monkeypatch.setattr(cells._LogitsMeasure, "_of", lambda self, prompts: (passes.append(1), of(self, prompts))[1])
    ns.steering.sweep(model, PROMPTS[0], vector(0, 1, 2), [-2, -1, 0, 1, 2, 3, 4, 5], METRIC, progress=False)
    assert len(passes) == 2  # the unsteered prompt, and 21 cells with another unsteered one


def test_the_model_is_left_as_it_was(model) -> None:
    before = logits(model, PROMPTS[0])

    def breaks(text: str) -> float:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ns.steering.sweep(model, PROMPTS, vector(1), [1.0], breaks, max_new_tokens=2, progress=False)
    assert torch.equal(logits(model, PROMPTS[0]), before) and not model._module._forward_hooks


# --- what is chosen ---------------------------------------------------------------------------------------------------


def made(values: Any, kl: Any, coefficients: tuple[float, ...] = (-1.0, 0.0, 1.0)) -> Any:
    return ns.steering.SteeringSweep(
        ("layers[3].output", "layers[5].output"), (3, 5), coefficients, np.array(values, dtype=float),
        np.array(kl, dtype=float), np.array([0.0, 0.0]), ("a", "b"), "liking",
    )  # fmt: skip


@pytest.fixture
def grid() -> Any:
    # The mean over two prompts: layer 3 reaches 4 at a KL of 2, layer 5 reaches 3 at a KL of 0.4.
    values = [[[-3, 0, 5], [-1, 0, 4]], [[-3, 0, 3], [-1, 0, 2]]]
    kl = [[[1, 0, 3], [0.2, 0, 0.5]], [[1, 0, 1], [0.2, 0, 0.3]]]
    return made(values, kl)


def test_the_best_cell_that_the_guard_lets_pass(grid) -> None:
    assert (grid.choose(guard=None).layer, grid.choose(guard=None).coefficient) == (3, 1.0)
    chosen = grid.choose(guard="kl", limit=0.5)
    assert (chosen.path, chosen.layer, chosen.coefficient) == ("layers[5].output", 5, 1.0)
    assert (chosen.score, chosen.kl, chosen.baseline) == (3.0, pytest.approx(0.4), 0.0)
    assert grid.choose(limit=0.4).layer == 5  # the limit itself passes
    low = grid.choose(limit=0.5, want="low")
    assert (low.layer, low.coefficient, low.score) == (5, -1.0, -1.0)
    with pytest.raises(ValueError, match=r"least that one has is 0.2"):
        grid.choose(limit=0.1)  # the unsteered cell, with no KL at all, is no choice
    for options, text in (
        ({"guard": "perplexity", "limit": 1.0}, "no guard 'perplexity'"),
        ({"guard": None, "limit": 1.0}, "no effect"),
        ({"guard": "kl"}, "without a limit"),
        ({"limit": 1.0, "want": "most"}, '"high" or "low"'),
    ):
        with pytest.raises(ValueError, match=text):
            grid.choose(**options)
    nothing = made([[[np.nan] * 3] * 2] * 2, [[[0.0] * 3] * 2] * 2)
    for options in ({"guard": None}, {"limit": 1.0}):
        with pytest.raises(ValueError, match="no cell that steers has a metric that is a number"):
            nothing.choose(**options)


def test_tables_and_figures(grid) -> None:
    assert grid.grid().sel(layer=5, coefficient=1.0).values.tolist() == [4, 2]
    assert grid.grid("kl").dims == ("prompt", "layer", "coefficient")
    best = grid.best(2)
    assert best["layer"].tolist() == [3, 5] and best["value"].tolist() == [4, 3]
    assert grid.best(1, want="low")["value"].tolist() == [-3]
    frame = grid.frame()
    assert len(frame) == 12 and frame.loc[5, ["layer", "coefficient", "value"]].tolist() == [5, 1.0, 4.0]
    for of in ("value", "change", "kl"):
        axes = grid.plot(of)
        expected = {"value": grid.values, "change": grid.values, "kl": grid.kl}[of].mean(0)
        np.testing.assert_array_equal(axes.images[0].get_array(), expected)
        plt.close(axes.figure)
    for prompt in (None, 0, 1):  # white is the unsteered metric of what is drawn, and the label says so
        unsteered = float(grid.baseline.mean() if prompt is None else grid.baseline[prompt])
        axes = grid.plot(prompt=prompt)
        low, high = axes.images[0].get_clim()
        assert (low + high) / 2 == pytest.approx(unsteered)
        assert f"unsteered: {unsteered:.3g}" in axes.figure.axes[-1].get_ylabel()
        plt.close(axes.figure)
    axes = grid.plot("lines", prompt=1)
    assert axes.lines[1].get_ydata().tolist() == [-1, 0, 2]
    plt.close(axes.figure)
    axes = grid.plot("frontier")
    assert axes.lines[0].get_xdata().tolist() == [1, 0, 2] and axes.get_xlabel() == "KL of the next token"
    plt.close(axes.figure)
    axes = replace(grid, texts=(((("w3",) * 3,) * 2),) * 2).plot("frontier")
    assert axes.get_xlabel() == "KL of the next token, mean along the text"
    plt.close(axes.figure)
    assert "highest 4 at layer 3, coefficient 1 with KL 2" in repr(grid) and "<b>SteeringSweep" in grid._repr_html_()
    for call in (
        lambda: grid.best(0),
        lambda: grid.best(-1),
        lambda: grid.grid("effect"),
        lambda: grid.plot("lines", prompt=2),
        lambda: made([[[1]]], [[[1]]]),
    ):
        with pytest.raises(NnspliceError):
            call()


def test_files(grid, model, tmp_path: Path) -> None:
    measured = ns.steering.sweep(model, PROMPTS, vector(1), [0.5, 1.0], words, max_new_tokens=3, progress=False)
    for sweep in (grid, measured):
        sweep.to_file(tmp_path / "s.safetensors")
        back = ns.steering.SteeringSweep.from_file(tmp_path / "s.safetensors")
        np.testing.assert_array_equal(back.values, sweep.values)
        np.testing.assert_array_equal(back.kl, sweep.kl)
        assert (back.texts, back.layers, back.metric, back.prompts) == (
            sweep.texts, sweep.layers, sweep.metric, sweep.prompts
        )  # fmt: skip
    vector(1).to_file(tmp_path / "v.safetensors")
    (tmp_path / "x").write_bytes(b"nothing")
    for name in ("v.safetensors", "x"):
        with pytest.raises(FileError):
            ns.steering.SteeringSweep.from_file(tmp_path / name)
    with pytest.raises(ValueError, match="read-only"):
        grid.values[0] = 1


@pytest.mark.parametrize("part", ["the last number", "a coefficient"])
def test_a_file_with_another_number_is_refused(grid, tmp_path: Path, part: str) -> None:
    path = tmp_path / "s.safetensors"
    grid.to_file(path)
    raw = bytearray(path.read_bytes())
    if part == "the last number":
        raw[-1] ^= 1
    else:
        at = raw.index(b"coefficients") + len(b'coefficients\\":[')
        raw[at] = ord("7") if raw[at] != ord("7") else ord("8")
    path.write_bytes(raw)
    with pytest.raises(FileError, match="not what was written"):
        ns.steering.SteeringSweep.from_file(path)


def test_a_stopped_sweep_goes_on_from_its_journal(model, tmp_path: Path, monkeypatch) -> None:
    from nnsplice.steering import cells as room

    arguments: dict[str, Any] = {"progress": False, "max_tokens": 12, "journal": tmp_path / "j.jsonl"}
    whole = ns.steering.sweep(model, PROMPTS, vector(0, 1), NUMBERS, METRIC, progress=False)
    real, calls = room._LogitsMeasure.__call__, []

    def stops(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(room._LogitsMeasure, "__call__", stops)
    with pytest.raises(KeyboardInterrupt):
        ns.steering.sweep(model, PROMPTS, vector(0, 1), NUMBERS, METRIC, **arguments)
    found = ns.steering.sweep(model, PROMPTS, vector(0, 1), NUMBERS, METRIC, **arguments)
    np.testing.assert_allclose(found.values, whole.values, rtol=0, atol=1e-10)
    np.testing.assert_allclose(found.kl, whole.kl, rtol=0, atol=1e-10)
    done = len(calls)
    ns.steering.sweep(model, PROMPTS, vector(0, 1), NUMBERS, METRIC, **arguments)
    assert len(calls) == done  # nothing was left
    with pytest.raises(FileError, match="another sweep"):
        ns.steering.sweep(model, PROMPTS, vector(0, 1, seed=1), NUMBERS, METRIC, **arguments)


def test_a_stopped_generation_goes_on_with_the_texts_that_were_written(model, tmp_path: Path, monkeypatch) -> None:
    from nnsplice.steering import cells as room

    real, calls = room._generated, []

    def stops(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    arguments: dict[str, Any] = {"max_new_tokens": 3, "progress": False, "max_tokens": 20}
    asked = (model, PROMPTS, vector(0, 1), NUMBERS, words)
    whole = ns.steering.sweep(*asked, **arguments)
    journal = tmp_path / "j.jsonl"
    monkeypatch.setattr(room, "_generated", stops)
    with pytest.raises(KeyboardInterrupt):
        ns.steering.sweep(*asked, journal=journal, **arguments)
    found = ns.steering.sweep(*asked, journal=journal, **arguments)
    assert found.texts == whole.texts and any(any(row) for rows in found.texts for row in rows)
    np.testing.assert_allclose(found.values, whole.values, rtol=0, atol=1e-10)
    np.testing.assert_allclose(found.kl, whole.kl, rtol=0, atol=1e-10)
    done = len(calls)
    again = ns.steering.sweep(*asked, journal=journal, **arguments)
    assert again.texts == found.texts and len(calls) == done  # nothing was left
    with pytest.raises(FileError, match="max_new_tokens"):
        ns.steering.sweep(*asked, journal=journal, **{**arguments, "max_new_tokens": 4})


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"where": "generated"}, "max_new_tokens=20"),
        ({"coefficients": []}, "at least one"),
        ({"coefficients": [1, 1]}, "each once"),
        ({"coefficients": [float("inf")]}, "finite"),
        ({"num_beams": 2}, "num_beams would have no effect"),
        ({"max_new_tokens": 0, "metric": words}, "at least 1"),
        ({"max_new_tokens": 2}, "function text -> number"),
        ({"max_new_tokens": 2, "metric": words, "num_beams": 2}, "several rows of a cell"),
        ({"vector": vector(1) | vector(1, site="mlp.output")}, "several sites for one"),
        ({"operator": "subtract"}, "no operator"),
        ({"prompts": torch.zeros(1, 2, 16)}, "values"),
        ({"vector": vector(5)}, "layers"),
        ({"where": ns.steering.span([(0, 1)] * 2)}, "given for 2 rows, and there are 3 prompts"),
        ({"metric": METRIC.at(40)}, r"reads position \[40\], and prompt 0 has"),
    ],
)
def test_mistakes_cost_no_pass(model, arguments: dict, text: str) -> None:
    given = {"prompts": PROMPTS, "vector": vector(1), "coefficients": [1.0], "metric": METRIC, **arguments}
    with pytest.raises(NnspliceError, match=text):
        ns.steering.sweep(model, progress=False, **given)


def test_tokens_that_no_prompt_has_are_an_error(model) -> None:
    with pytest.raises(NeverFired, match=r"from_token\(30\)"):
        ns.steering.sweep(model, PROMPTS, vector(1), [1.0], METRIC, where=ns.steering.from_token(30), progress=False)
    some = ns.steering.sweep(model, PROMPTS, vector(1), [1.0], METRIC, where=ns.steering.from_token(5), progress=False)
    assert some.values[1, 0, 0] == some.baseline[1] and some.values[0, 0, 0] != some.baseline[0]
    model._module.train()
    try:
        with pytest.raises(ValueError, match="train mode"):
            ns.steering.sweep(model, PROMPTS, vector(1), [1.0], METRIC, progress=False)
    finally:
        model._module.eval()
