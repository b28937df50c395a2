"""A figure of a result: what is on its axes, and what it cannot show."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest

import nnsplice as ns
from nnsplice.errors import BadArgument
from nnsplice.results import SweepResult
from results.tables import HEAD, STREAM, TOKENS, head_cells, stream_cells, table
from zoo import wrap

mpl.use("agg")


@pytest.fixture
def result() -> SweepResult:
    return SweepResult(table())


def test_a_plot_is_labelled_and_can_be_drawn_into_axes(result: SweepResult) -> None:
    import matplotlib.pyplot as plt

    ax = result.plot(STREAM, prompt=0)
    assert (ax.get_ylabel(), ax.get_xlabel(), ax.get_title()) == (
        "layer", "position", f"{STREAM}, prompt 0\nprompt: the catthe sat",
    )  # fmt: skip
    assert [tick.get_text() for tick in ax.get_xticklabels()] == list(TOKENS[0])
    np.testing.assert_allclose(np.asarray(ax.images[0].get_array()), result.effect(STREAM, per_prompt=True)[0].values)
    plt.close("all")
    figure, given_ax = plt.subplots()
    assert result.plot(HEAD, of="value", ax=given_ax) is given_ax
    assert (given_ax.get_ylabel(), given_ax.get_xlabel()) == ("layer", "head")
    np.testing.assert_allclose(
        np.asarray(given_ax.images[0].get_array()), result.grid(HEAD).mean("prompt").values[..., 0]
    )
    plt.close(figure)
    # In the mean over prompts of other tokens, positions are numbers.
    other = (("a", "b", "c", "d"), ("e", "f", "g", "h"))
    ax = SweepResult(table(stream_cells(), other)).plot(of="change")
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0", "1", "2", "3"]
    plt.close("all")


def test_a_title_has_the_indices_that_all_cells_share() -> None:
    model, pair, metric = wrap("gpt2"), ("w3 w4 w5", "w3 w9 w5"), ns.logit_diff("w7", "w8")
    for sites, title, rows in (
        ("layers[2].heads[1].output[:]", "layers[2].heads[1].output", "layer"),
        ("layers[:].heads[3].output[:]", "layers[:].heads[3].output", "layer"),
        ("layers[:].heads[:].output[-1]", "layers[:].heads[:].output[-1]", "layer"),
        ("layers[1].heads[:].output[:]", "layers[1].heads[:].output", "head"),
        ("layers[:].output", "layers[:].output", "layer"),
        ('layers[:].output["w"][-1]', 'layers[:].output["w"][-1]', "layer"),
        (["layers[0].output[1]", "layers[2].output[-1]"], "layers[:].output", "layer"),
    ):
        spans = {"clean": {"w": "w4"}, "corrupted": {"w": "w9"}}
        ax = ns.sweep(model, *pair, sites, metric, spans=spans, progress=False).plot()
        assert (ax.get_title().splitlines()[0], ax.get_ylabel()) == (title, rows), sites


def test_a_plot_of_an_ablation_shows_the_change(result: SweepResult) -> None:
    flat = SweepResult(replace(result.table, corrupted=result.clean))
    ax = flat.plot(HEAD)
    np.testing.assert_allclose(np.asarray(ax.images[0].get_array()), flat.change(HEAD).mean("prompt").values[..., 0])


def test_heads_at_several_tokens_are_rows_of_their_own() -> None:
    result = SweepResult(table(head_cells((0, 1))))
    ax = result.plot(of="value", prompt=1)
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("layer.head", "position")
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["0.0", "0.1", "0.2", "1.0", "1.1", "1.2"]
    np.testing.assert_array_equal(np.asarray(ax.images[0].get_array()), result.grid()[1].values.reshape(6, 2))


def test_a_mean_over_prompts_of_unlike_length_is_refused(result: SweepResult) -> None:
    with pytest.raises(BadArgument, match=r"3 and 4 tokens[\s\S]*prompt=0"):
        result.plot(STREAM)
    result.plot(HEAD)  # the last token is in all of them
    with pytest.raises(BadArgument, match="prompt=2"):
        result.plot(STREAM, prompt=2)
    with pytest.raises(BadArgument, match="of='share'"):
        result.plot(STREAM, of="share")


def _experiment(**labels: Any) -> SweepResult:
    made = table(stream_cells(), (TOKENS[0],))
    asked = {
        **made.asked, "model": "/home/somebody/models/toy",
        "metric": {"name": "logit_diff", "position": -1, "ids": {"answer": [3], "wrong": [4]}},
    }  # fmt: skip
    words = {"words": {"3": " Paris", "4": " Berlin"}, "clean": [["the", " dog", "the", " sat"]]}
    return SweepResult(replace(made, asked=asked, labels={**words, **labels}))


def test_a_figure_names_its_experiment() -> None:
    import matplotlib.pyplot as plt

    ax = _experiment().plot()
    assert ax.get_title().split("\n") == [
        STREAM, '" Paris" - " Berlin" (logit_diff)', "clean: the dogthe sat", "corrupted: the catthe sat",
    ]  # fmt: skip
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["the", "dog -> cat", "the", " sat"]
    assert "somebody" not in ax.get_title()
    # A clean prompt of another length has no token beside each.
    ax = _experiment(clean=[["the", " big", " dog", " that", " sat"]]).plot()
    assert [tick.get_text() for tick in ax.get_xticklabels()] == list(TOKENS[0])
    # Without texts the metric has its name alone.
    assert "logit_diff" not in _experiment(words={}).plot().get_title()
    plt.close("all")


def test_what_a_figure_says_is_kept_in_files_and_is_no_part_of_the_identity(tmp_path: Path) -> None:
    result = _experiment()
    result.to_file(tmp_path / "result.safetensors")
    again = SweepResult.from_file(tmp_path / "result.safetensors")
    assert dict(again.table.labels) == dict(result.table.labels)
    assert result == _experiment(words={}) == again


def test_a_sweep_knows_its_answers_and_its_clean_prompts(model) -> None:
    metric = ns.logit_diff("w7", "w8")
    result = ns.sweep(model, "w3 w4 w5", "w3 w6 w5", "layers[:].output[:]", metric, progress=False)
    title = result.plot().get_title()
    assert '"w7" - "w8" (logit_diff)' in title and "clean: w3 w4 w5" in title and "corrupted: w3 w6 w5" in title
    assert result.plot().get_xticklabels()[1].get_text() == "w4 -> w6"
    both = ns.sweep(
        model, "w3 w4 w5", "w3 w6 w5", "layers[:].output[:]", [metric, ns.probability("w7")], progress=False
    )
    assert 'probability of "w7"' in both.only("probability").plot().get_title()
    guess = ns.attribute(model, "w3 w4 w5", "w3 w6 w5", "layers[:].output[:]", metric, progress=False)
    assert '"w7" - "w8" (logit_diff)' in guess.plot().get_title()
    traced = ns.causal_trace(model, "w3 w4 w5", "w4", samples=2, answer="w7", progress=False)
    assert 'probability of "w7"' in traced.plot().get_title() and "prompt: w3 w4 w5" in traced.plot().get_title()
    assert 'probability of "w7"' in traced.by_role().plot().get_title()
    ablated = ns.ablate(model, "w3 w4 w5", "layers[:].output[-1]", metric, progress=False)
    ax = ablated.plot()
    assert not ax.images and len(ax.patches) == 3 and ax.get_xlabel() == 'change of "w7" - "w8" (logit_diff)'
