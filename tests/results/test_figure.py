"""A figure of a result: what is on its axes, and what it cannot show."""

from __future__ import annotations

from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest

from nnsplice.errors import BadArgument
from nnsplice.results import SweepResult
from results.tables import HEAD, STREAM, TOKENS, head_cells, stream_cells, table

mpl.use("agg")


@pytest.fixture
def result() -> SweepResult:
    return SweepResult(table())


def test_a_plot_is_labelled_and_can_be_drawn_into_axes(result: SweepResult) -> None:
    import matplotlib.pyplot as plt

    ax = result.plot(STREAM, prompt=0)
    assert (ax.get_ylabel(), ax.get_xlabel(), ax.get_title()) == (
        "layer", "position", f"{STREAM}, prompt 0",
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
