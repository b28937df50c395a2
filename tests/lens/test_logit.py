"""The logit lens: at the last layer it is the model, at others what the model's own end makes of the state."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import nnsplice as ns
from families.lenses_of import logit_law
from families.subject import Subject
from nnsplice.errors import BadArgument, RefusedPlace
from zoo import build, wrap

PROMPTS = ["w3 w4 w5", "w6 w7"]
#: The same as token ids.
IDS = [[3, 4, 5], [6, 7]]

#: One of each way in which families end: norms, caps, scales, tied weights, biases, streams normalised at their end.
QUICK = ["gpt2", "llama", "gemma2", "cohere", "granite", "olmo2", "phi", "opt", "mixtral", "bloom", "openai-gpt"]


@pytest.mark.parametrize("family", QUICK)
def test_every_state_says_what_the_bare_model_says_whose_last_layer_puts_it_out(family: str) -> None:
    said = logit_law(Subject(family))
    assert said.refused == "" and said.gap is not None and said.gap < 1e-10


def test_the_law_sees_another_unembedding() -> None:
    """A control of the law itself: the bare module's head is a little off."""
    subject = Subject("llama")
    with torch.no_grad():
        subject.bare.lm_head.weight[7].mul_(1 + 1e-6)
    said = logit_law(subject)
    assert said.gap is not None and said.gap > 1e-10


# --- by hand ----------------------------------------------------------------------------------------------------------


def double() -> Any:
    model = wrap("llama")
    model._module.double()
    return model


@torch.no_grad()
def states(module: Any, ids: list[int]) -> dict[str, Tensor]:
    """`[token, width]` of the stream at sites of the second layer, and of the embedding, by plain hooks."""
    kept: dict[str, Tensor] = {}
    layer = module.model.layers[1]

    def before(name: str) -> Any:
        return lambda _m, args: kept.update({name: args[0][0].clone()})

    def after(name: str) -> Any:
        return lambda _m, _args, out: kept.update({name: (out[0] if isinstance(out, tuple) else out)[0].clone()})

    hooks = [
        module.model.embed_tokens.register_forward_hook(lambda _m, _a, out: kept.update(embed=out[0].clone())),
        layer.register_forward_pre_hook(before("layers[1].input")),
        layer.register_forward_hook(after("layers[1].output")),
        layer.post_attention_layernorm.register_forward_pre_hook(before("layers[1].mid")),
    ]
    module(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return kept


@torch.no_grad()
def said(module: Any, stream: Tensor) -> Tensor:
    """Log-probabilities of what norm and head make of states."""
    return module.lm_head(module.model.norm(stream)).log_softmax(-1)


SITES = ("embed", "layers[1].input", "layers[1].mid", "layers[1].output")


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("max_tokens", [None, 1])
def test_probabilities_ranks_and_tokens_are_those_of_norm_and_head(site: str, max_tokens: int | None) -> None:
    """Prompts of two lengths, an answer for each, token by token; all at once and one prompt after the other."""
    model, module = double(), build("llama").double()
    answers = ["w7", "w9"]
    lens = ns.lens.logit(model, PROMPTS, site, answers, 3, max_tokens=max_tokens, progress=False)
    assert [cell.position for cell in lens.results.cells] == [0, 1, 2]
    values = {name: lens.only(name).table.values for name in ("probability", "log_probability", "rank")}
    for row, (ids, answer) in enumerate(zip(IDS, (7, 9), strict=True)):
        logs = said(module, states(module, ids)[site])
        for token, line in enumerate(logs):
            np.testing.assert_allclose(values["log_probability"][row, token], line[answer], rtol=0, atol=1e-12)
            np.testing.assert_allclose(values["probability"][row, token], line[answer].exp(), rtol=0, atol=1e-12)
            assert values["rank"][row, token] == int((line > line[answer]).sum())
            shares, first = line.exp().topk(3)
            assert lens.ids[row, token].tolist() == first.tolist()
            np.testing.assert_allclose(lens.shares[row, token], shares, rtol=0, atol=1e-12)
    # The second prompt has no third token.
    assert all(np.isnan(of[1, 2]) for of in values.values())
    assert lens.ids[1, 2].tolist() == [-1, -1, -1] and np.isnan(lens.shares[1, 2]).all()


def test_the_reference_is_what_the_model_says_at_each_prompts_end() -> None:
    model, module = double(), build("llama").double()
    lens = ns.lens.logit(model, PROMPTS, "layers[0].output[-1]", ["w7", "w9"], progress=False)
    for row, (ids, answer) in enumerate(zip(IDS, (7, 9), strict=True)):
        with torch.no_grad():
            expected = module(torch.tensor([ids])).logits[0, -1].softmax(-1)[answer]
        np.testing.assert_allclose(lens.result.table.clean[row], expected, rtol=0, atol=1e-12)
    assert (lens.result.table.corrupted == 0).all()


def test_the_last_layer_says_what_the_model_says() -> None:
    model, module = double(), build("llama").double()
    lens = ns.lens.logit(model, PROMPTS, "layers[-1].output", ["w7", "w9"], progress=False)
    found = lens.only("log_probability").table.values
    for row, (ids, answer) in enumerate(zip(IDS, (7, 9), strict=True)):
        with torch.no_grad():
            expected = module(torch.tensor([ids])).logits[0].log_softmax(-1)[:, answer]
        np.testing.assert_allclose(found[row, : len(ids)], expected, rtol=0, atol=1e-12)


def test_without_answers_it_is_the_probability_of_the_first_token() -> None:
    model, module = double(), build("llama").double()
    lens = ns.lens.logit(model, PROMPTS[0], "layers[1].output", k=2, progress=False)
    shares = said(module, states(module, IDS[0])["layers[1].output"]).exp()
    np.testing.assert_allclose(lens.result.table.values[0], shares.amax(-1), rtol=0, atol=1e-12)
    frame = lens.tokens()
    assert frame["id"].tolist() == shares.topk(2).indices.flatten().tolist()
    assert frame["token"].tolist() == [f"w{one}" for one in frame["id"]]
    assert frame["rank"].tolist() == [0, 1] * 3
    assert lens.frame()["top"].tolist() == [f"w{one}" for one in shares.argmax(-1).tolist()]


def test_a_set_of_answers_counts_as_one() -> None:
    model, module = double(), build("llama").double()
    lens = ns.lens.logit(model, PROMPTS[0], "layers[1].output[-1]", [["w7", "w9"]], progress=False)
    shares = said(module, states(module, IDS[0])["layers[1].output"])[-1].exp()
    np.testing.assert_allclose(lens.result.table.values[0, 0], shares[7] + shares[9], rtol=0, atol=1e-12)


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["layers[0].attn.output[-1]", "layers[0].mlp", "layers[1].heads[0].output", "unembed"])
def test_what_is_no_state_of_the_stream_is_refused(site: str) -> None:
    with pytest.raises(RefusedPlace, match="no state of the stream"):
        ns.lens.logit(wrap("llama"), PROMPTS, site)


def test_a_hook_on_the_final_norm_has_to_treat_every_token_alike() -> None:
    def halved(_m: Any, _a: Any, out: Tensor) -> Tensor:
        return out * 0.5

    def at_the_last(_m: Any, _a: Any, out: Tensor) -> Tensor:
        out = out.clone()
        out[:, -1, :] *= 2
        return out

    def by_position(_m: Any, _a: Any, out: Tensor) -> Tensor:
        return out * torch.arange(1.0, 4)[:, None].expand(1, 3, 16)

    model = wrap("llama")
    norm = model._module.model.norm
    for hook, takes_any in ((halved, True), (at_the_last, False), (by_position, False)):
        handle = norm.register_forward_hook(hook)
        try:
            if takes_any:
                assert ns.lens.logit(model, PROMPTS[0], progress=False).result.is_complete
                continue
            with pytest.raises(RefusedPlace, match=r"model\.norm|more than a norm"):
                ns.lens.logit(model, PROMPTS[0], progress=False)
        finally:
            handle.remove()


@pytest.mark.parametrize("k", [0, -1, True, 1.5])
def test_a_number_of_tokens_below_one_is_refused(k: Any) -> None:
    with pytest.raises(BadArgument, match="how many tokens"):
        ns.lens.logit(wrap("llama"), PROMPTS, k=k)


def test_more_tokens_than_the_vocabulary_has_are_all_of_it() -> None:
    lens = ns.lens.logit(wrap("llama"), PROMPTS[0], "layers[0].output[-1]", k=100, progress=False)
    assert lens.ids.shape == (1, 1, 64) and sorted(lens.ids[0, 0].tolist()) == list(range(64))


def test_a_model_in_train_mode_and_sets_of_sites_are_refused() -> None:
    model = wrap("llama")
    with pytest.raises(BadArgument, match="set of sites"):
        ns.lens.logit(model, PROMPTS, [("layers[0].output[-1]", "layers[1].output[-1]")])
    with pytest.raises(BadArgument, match="several tokens"):
        ns.lens.logit(model, PROMPTS[0], 'layers[0].output["both"]', spans={"both": "w4 w5"})
    model._module.train()
    with pytest.raises(BadArgument, match="train"):
        ns.lens.logit(model, PROMPTS)


def test_the_figure_says_whose_probability_the_colour_is() -> None:
    toy, fact = ns.load("toy"), ns.models.toy_prompts().facts[0]
    for answers, label in ((fact.answer, "probability of the answer"), (None, "top probability")):
        axes: Any = ns.lens.logit(toy, fact.clean, "layers[:].output[-2:]", answers).plot()
        assert axes.figure.axes[-1].get_ylabel() == label
