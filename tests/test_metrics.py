"""A metric is a number for each row of logits: against plain torch, with answers that are checked."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import nnsplice as ns
from models import bpe
from nnsplice.errors import BadArgument, BadType
from zoo import build, tokenizer

LOGITS = torch.randn(3, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
OTHER = torch.randn(3, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
ROWS = torch.arange(3)
ANSWER, WRONG = [4, 5, 11], [0, 7, 3]


def test_each_metric_is_what_torch_makes() -> None:
    probabilities = torch.softmax(LOGITS, -1)
    expected = {
        "logit_diff": LOGITS[ROWS, ANSWER] - LOGITS[ROWS, WRONG],
        "probability": probabilities[ROWS, ANSWER],
        "log_probability": probabilities[ROWS, ANSWER].log(),
        "rank": (LOGITS.argsort(-1, descending=True) == torch.tensor(ANSWER)[:, None]).int().argmax(-1).double(),
    }
    metrics = [ns.logit_diff(ANSWER, WRONG), ns.probability(ANSWER), ns.log_probability(ANSWER), ns.rank(ANSWER)]
    for metric in metrics:
        torch.testing.assert_close(metric(LOGITS), expected[metric.name])
        assert metric.bind(None, 3).identity["name"] == metric.name
    kl = torch.nn.functional.kl_div(LOGITS.log_softmax(-1), OTHER.log_softmax(-1), log_target=True, reduction="none")
    torch.testing.assert_close(ns.kl_divergence()(LOGITS, OTHER), kl.sum(-1))
    assert ns.kl_divergence()(LOGITS, LOGITS).abs().max() < 1e-15
    assert (ns.kl_divergence()(LOGITS, OTHER) > 0).all()


def test_the_top_token_has_rank_zero_and_equals_share_a_rank() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0]])
    assert [int(ns.rank(n)(logits)) for n in range(4)] == [3, 0, 2, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ranks_are_whole_numbers_in_half_precision(dtype: torch.dtype) -> None:
    logits = torch.ones(1, 5000, dtype=dtype)
    logits[0, 0] = 0
    assert ns.rank(0)(logits).tolist() == [4999]


def test_an_answer_that_is_sure_has_a_finite_logarithm() -> None:
    logits = torch.tensor([[1000.0, 0.0]])
    assert ns.log_probability(1)(logits).tolist() == [-1000.0]
    assert ns.probability(1)(logits).tolist() == [0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_metric_of_half_precision_is_single_and_has_its_gradient(dtype: torch.dtype) -> None:
    logits = LOGITS.to(dtype).requires_grad_()
    for metric in (ns.logit_diff(1, 2), ns.probability(1), ns.log_probability(1), ns.rank(1)):
        value = metric(logits)
        assert value.shape == (3,)
        assert value.dtype == torch.float32
        assert value.requires_grad is (metric.name != "rank")
    (gradient,) = torch.autograd.grad(ns.logit_diff(1, 2)(logits).sum(), logits)
    assert gradient.sum(0).tolist() == [0, 3, -3] + [0] * 9


def test_answers_are_one_for_all_or_one_for_each() -> None:
    assert torch.equal(ns.probability(4)(LOGITS), ns.probability([4, 4, 4])(LOGITS))
    assert torch.equal(ns.logit_diff(ANSWER, 7)(LOGITS), ns.logit_diff(ANSWER, (7, 7, 7))(LOGITS))
    bound = ns.logit_diff(ANSWER, WRONG).bind(None, 3)
    # Rows may come in any order, and a prompt in many rows.
    order = [2, 0, 0]
    expected = LOGITS[ROWS, [11, 4, 4]] - LOGITS[ROWS, [3, 0, 0]]
    torch.testing.assert_close(bound(LOGITS, order), expected)


def test_texts_are_read_by_the_tokenizer() -> None:
    bound = ns.logit_diff(["w7", 9], "w8").bind(tokenizer(), 2)
    assert bound.ids == {"answer": (7, 9), "wrong": (8, 8)}
    assert bound.identity == {"name": "logit_diff", "position": -1, "ids": {"answer": [7, 9], "wrong": [8, 8]}}
    assert bound.identity == ns.logit_diff([7, 9], 8).bind(None, 2).identity
    assert ns.logit_diff("w7", "w8").at(2).bind(tokenizer(), 1).identity["position"] == 2
    assert ns.probability("w7", position=3).position == 3


# --- sets of answers


SETS, LESS = [{4, 5}, {11}, {0, 2, 3}], [{7}, {1, 8}, {6}]


def test_a_set_of_answers_counts_as_one_token_with_their_sum() -> None:
    probabilities = LOGITS.softmax(-1)
    sums = torch.stack([probabilities[row, sorted(one)].sum() for row, one in enumerate(SETS)])
    wrong = torch.stack([probabilities[row, sorted(one)].sum() for row, one in enumerate(LESS)])
    torch.testing.assert_close(ns.probability(SETS)(LOGITS), sums)
    torch.testing.assert_close(ns.log_probability(SETS)(LOGITS), sums.log())
    torch.testing.assert_close(ns.logit_diff(SETS, LESS)(LOGITS), (sums / wrong).log())
    ranks = [min(int((LOGITS[row] > LOGITS[row, token]).sum()) for token in one) for row, one in enumerate(SETS)]
    assert ns.rank(SETS)(LOGITS).tolist() == ranks
    # One set for all prompts; lists of one for each; a list for a single prompt.
    torch.testing.assert_close(ns.probability({4, 5})(LOGITS), probabilities[:, [4, 5]].sum(-1))
    torch.testing.assert_close(ns.probability([[4, 5], 11, (0, 2, 3)])(LOGITS), sums)
    torch.testing.assert_close(ns.probability([4, 5])(LOGITS[:1]), probabilities[:1, [4, 5]].sum(-1))
    assert ns.probability([{4}, {5}, {11}]).bind(None, 3).identity == ns.probability([4, 5, 11]).bind(None, 3).identity
    bound = ns.logit_diff(SETS, LESS).bind(None, 3)
    assert bound.identity["ids"] == {"answer": [[4, 5], 11, [0, 2, 3]], "wrong": [7, [1, 8], 6]}
    for order in ([2, 0, 0], [1], [1, 2]):
        at = LOGITS[order]
        local = bound.of_tokens(at.gather(-1, bound.tokens(order)), order)
        torch.testing.assert_close(local, bound(at, order))


def test_accuracy_is_whether_the_answer_is_first() -> None:
    top = LOGITS.argmax(-1).tolist()
    assert ns.accuracy(top)(LOGITS).tolist() == [1.0, 1.0, 1.0]
    assert ns.accuracy([top[0], top[1], (top[2] + 1) % 12])(LOGITS).tolist() == [1.0, 1.0, 0.0]
    assert ns.accuracy([{top[0], (top[0] + 1) % 12}, {(top[1] + 1) % 12}, {top[2]}])(LOGITS).tolist() == [1.0, 0.0, 1.0]


def test_the_divergence_of_jensen_and_shannon() -> None:
    p, q = LOGITS.softmax(-1), OTHER.softmax(-1)
    middle = (p + q) / 2
    expected = ((p * (p / middle).log()).sum(-1) + (q * (q / middle).log()).sum(-1)) / 2
    torch.testing.assert_close(ns.js_divergence()(LOGITS, OTHER), expected)
    torch.testing.assert_close(ns.js_divergence()(OTHER, LOGITS), expected)
    sure = torch.tensor([[500.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(ns.js_divergence()(sure, sure.flip(-1)), torch.tensor([2.0]).double().log())
    assert ns.js_divergence()(LOGITS, LOGITS).abs().max() < 1e-15


# --- the token that follows a prompt


def test_a_word_without_its_space_is_told_where_the_tokenizer_makes_another_token_of_it() -> None:
    words = bpe.tokenizer()
    (spaced,), (bare,) = (words(text, add_special_tokens=False)["input_ids"] for text in (" Paris", "Paris"))
    assert spaced != bare
    with pytest.warns(UserWarning, match=r"'Paris', given to logit_diff as answer=[\s\S]*write answer=' Paris'"):
        ns.logit_diff("Paris", " Rome").bind(words, 1, ["The Tower is in"])
    with pytest.warns(UserWarning, match="'Rome', given to probability"):
        ns.probability({" Paris", "Rome"}).bind(words, 1, ["The Tower is in:"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ns.logit_diff(" Paris", " Rome").bind(words, 1, ["The Tower is in"])
        ns.probability({" Paris", "Paris"}).bind(words, 1, ["The Tower is in"])  # both are meant
        ns.probability(bare).bind(words, 1, ["The Tower is in"])  # an id is what it is
        for ending in ("The Tower is in ", 'The Tower is "', "The Tower is in\n", "The Tower is ("):
            ns.probability("Paris").bind(words, 1, [ending])
        # A tokenizer of whole words has one token for both.
        ns.probability("w7").bind(tokenizer(), 1, ["w3 w4"])


def test_the_advice_for_an_answer_of_several_tokens_is_one_that_works() -> None:
    words = bpe.tokenizer()
    with pytest.raises(BadArgument, match=r"is 7 tokens[\s\S]*ns\.sequence_log_probability\(' Velmar'\)"):
        ns.probability(" Velmar").bind(words, 1)
    with pytest.raises(BadArgument, match="they have to stand in the prompts"):
        ns.sequence_log_probability(" Velmar").bind(words, 1)


def _bad() -> list[tuple[Callable[[], Any], type[Exception], str]]:
    anything: Any = None
    half: Any = 0.5
    words = tokenizer()
    return [
        (lambda: ns.probability("w7 w8").bind(words, 1), BadArgument, r"is 2 tokens: 'w7', 'w8'[\s\S]*one token"),
        (lambda: ns.probability("").bind(words, 1), BadArgument, "is 0 tokens: none"),
        (lambda: ns.probability("Paris").bind(words, 1), BadArgument, "'Paris'[\\s\\S]*not in this model's vocabulary"),
        (
            lambda: ns.logit_diff("w7", ["w8", "Rome"]).bind(words, 2),
            BadArgument,
            "'Rome', given to logit_diff as wrong",
        ),
        (lambda: ns.logit_diff(["w7", "w8"], "w9").bind(words, 3), BadArgument, r"2 tokens as answer=[\s\S]*3 prompts"),
        (lambda: ns.logit_diff("w7", []).bind(words, 1), BadArgument, "0 tokens as wrong="),
        (lambda: ns.probability("w7")(LOGITS), BadArgument, r"no tokenizer[\s\S]*token id"),
        (lambda: ns.probability(anything)(LOGITS), BadType, "None as answer="),
        (lambda: ns.probability([1, anything, 2])(LOGITS), BadType, "None as answer="),
        (lambda: ns.probability(True)(LOGITS), BadType, "True as answer="),
        (lambda: ns.probability(half)(LOGITS), BadType, "0.5 as answer="),
        (lambda: ns.probability(12)(LOGITS), BadArgument, r"given 12 as answer=[\s\S]*0 to 11"),
        (lambda: ns.rank(-1)(LOGITS), BadArgument, "given -1 as answer="),
        (lambda: ns.logit_diff(3, [3, 3, 3])(LOGITS), BadArgument, "answer and wrong are the same"),
        (lambda: ns.kl_divergence()(LOGITS), BadArgument, r"compares two runs, and there is one[\s\S]*reference="),
        (lambda: ns.Metric.of(anything), BadType, "NoneType is no metric"),
        (lambda: ns.Metric.of(lambda logits: logits)(LOGITS), BadArgument, r"shape \[1, 12\] of logits \[1, 12\]"),
        (lambda: ns.Metric.of(lambda logits: logits.mean())(LOGITS), BadArgument, r"shape \[\] of logits"),
        (lambda: ns.Metric.of(lambda logits: anything)(LOGITS), BadArgument, "a NoneType of logits"),
    ]


@pytest.mark.parametrize("number", range(19))
def test_what_makes_no_sense_is_refused(number: int) -> None:
    call, kind, message = _bad()[number]
    with pytest.raises(kind, match=message):
        call()


# --- functions of one's own


def entropy(logits: Tensor) -> Tensor:
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)


def test_a_function_is_a_metric() -> None:
    metric = ns.Metric.of(entropy)
    assert metric.name == "entropy" and ns.Metric.of(metric) is metric
    torch.testing.assert_close(metric(LOGITS), entropy(LOGITS))
    assert metric.at(2).position == 2
    assert ns.Metric.of(partial(torch.amax, dim=-1))(LOGITS).tolist() == LOGITS.amax(-1).tolist()


def _identity(rule: Any) -> Any:
    return ns.Metric("mine", rule).bind(None, 1).identity


def _of_token(token: Any, scale: float = 1.0) -> Callable[[Tensor], Tensor]:
    return lambda logits, scale=scale: logits[:, token] * scale


def _compiled(source: str) -> Any:
    """A function whose source stands in no file."""
    space: dict[str, Any] = {}
    exec(source, space)
    return space["rule"]


class Scaled:
    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, logits: Tensor) -> Tensor:
        return logits[:, 0] * self.scale

    def method(self, logits: Tensor) -> Tensor:
        return logits[:, 1] * self.scale


def test_the_identity_of_a_function_is_what_it_does() -> None:
    # Two on one line, and the same text with other values inside.
    first, second = (lambda logits: logits[:, 0]), (lambda logits: logits[:, 1])
    different = [
        first,
        second,
        entropy,
        _of_token(3),
        _of_token(4),
        _of_token(3, 2.0),
        _of_token(torch.tensor([3])),
        _of_token(torch.tensor([4])),
        _of_token([3]),
        _compiled("rule = lambda logits: logits[:, 5]"),
        _compiled("rule = lambda logits: logits[:, 6]"),
        _compiled("rule = lambda logits: logits.max(-1).values"),
        _compiled("rule = lambda logits: logits.min(-1).values"),
        partial(torch.amax, dim=-1),
        partial(torch.amin, dim=-1),
        partial(torch.amax, dim=1),
        Scaled(1.0),
        Scaled(2.0),
        Scaled(1.0).method,
        Scaled(2.0).method,
        _of_token(np.array([3])),
        _of_token(np.array([4])),
        _of_token(np.int64(3)),
        _of_token(np.int64(4)),
        _of_token(range(3)),
        _of_token(range(4)),
        *[_compiled(f"k = {k}\nrule = lambda logits: logits[:, k]") for k in (7, 8)],
        *[_compiled(f"k = {k}\ndef read(x): return x[:, k]\ndef rule(logits): return read(logits)") for k in (7, 8)],
        *[_compiled(f"k = {{'a': [{k}]}}\ndef rule(logits): return sum(logits[:, n] for n in k['a'])") for k in (7, 8)],
    ]
    identities = [_identity(rule)["source"] for rule in different]
    assert len(set(identities)) == len(different)
    assert _identity(_of_token(3)) == _identity(_of_token(3))
    assert _identity(Scaled(1.0)) == _identity(Scaled(1.0))
    assert _identity(_compiled("rule = lambda logits: logits[:, 5]")) == _identity(
        _compiled("rule = lambda logits: logits[:, 5]")
    )
    # What has the name of an attribute, or is no data, is not what it reads.
    assert _identity(_compiled("sum = 1\nrule = lambda logits: logits.sum(-1)")) == _identity(
        _compiled("sum = 2\nrule = lambda logits: logits.sum(-1)")
    )
    assert _identity(_compiled("import torch\nrule = lambda logits: torch.amax(logits, -1)"))["source"]
    assert "source" not in ns.probability(1).bind(None, 1).identity


def test_a_function_that_speaks_of_itself_has_an_identity() -> None:
    def falls(logits: Tensor, depth: int = 2) -> Tensor:
        return logits[:, 0] if depth == 0 else falls(logits, depth - 1)

    assert _identity(falls)["source"]


def test_the_identity_is_the_same_in_another_process() -> None:
    code = (
        "import nnsplice as ns\nfrom functools import partial\nimport torch\n"
        "def make(k):\n    return lambda logits: logits[:, k] if k in {'a', 'b', 3} else logits[:, 0]\n"
        "for rule in (make(3), partial(torch.amax, dim=-1)):\n"
        "    print(ns.Metric('mine', rule).bind(None, 1).identity)\n"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    }
    assert len(told) == 1 and "source" in told.pop()


def test_an_answer_whose_other_spelling_is_far_likelier_in_the_unedited_run_is_told() -> None:
    words = bpe.tokenizer()
    (spaced,), (bare,) = (words(text, add_special_tokens=False)["input_ids"] for text in (" Paris", "Paris"))
    logits = torch.zeros(2, len(words))
    logits[0, bare], logits[1, spaced] = 9.0, 9.0  # the first prompt ends with a quote, the second with a word
    texts = ['The Tower is "', 'The Tower is called "']
    bound = ns.probability(" Paris").bind(words, 2, texts)
    with pytest.warns(UserWarning, match=r"' Paris', given to probability[\s\S]*prompt 0[\s\S]*write answer='Paris'"):
        bound.check_answers(logits, [0, 1])
    with pytest.warns(UserWarning, match=r"'Paris'[\s\S]*prompt 1, and ' Paris' has 0\.9"):
        ns.probability("Paris").bind(words, 2, texts).check_answers(logits, [0, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bound.check_answers(logits[1:], [1])
        bound.check_answers(torch.zeros(2, len(words)), [0, 1])  # as likely: nothing says that another was meant
        ns.probability({" Paris", "Paris"}).bind(words, 2, texts).check_answers(logits, [0, 1])
        ns.probability(spaced).bind(words, 2, texts).check_answers(logits, [0, 1])  # an id is what it is
        ns.probability([spaced, "Paris"]).bind(words, 2, texts).check_answers(logits.flip(0), [0, 1])


def test_a_word_without_its_space_is_warned_of_once() -> None:
    words = bpe.tokenizer()
    (spaced,) = words(" Paris", add_special_tokens=False)["input_ids"]
    logits = torch.zeros(1, len(words))
    logits[0, spaced] = 9.0
    with pytest.warns(UserWarning, match=r"write answer=' Paris'") as warned:
        ns.probability("Paris").bind(words, 1, ["The Tower is in"]).check_answers(logits, [0])
    assert len(warned) == 1


def test_the_warning_is_of_the_line_that_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nnsplice.metrics.answers.LIKELY", 0.0)
    monkeypatch.setattr("nnsplice.metrics.answers.FAR", 0.0)  # a random model prefers neither spelling
    model = ns.load(build("gpt2", vocab_size=320), tokenizer=bpe.tokenizer())
    metric, site = ns.probability(" Paris"), "layers[0].output[-1]"
    with pytest.warns(UserWarning, match="has probability") as told:
        ns.ablate(model, 'The Tower is "', site, metric, progress=False)
        ns.attribute(model, 'The Tower is "', 'the Tower is "', site, metric, progress=False)
    assert [one.filename for one in told] == [__file__] * 2
