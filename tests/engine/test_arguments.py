"""How many tokens came before a pass: under every name that a cache has had, and refused where it is not told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf

import nnsplice as ns
from caches import CACHE, TAKEN, filled
from nnsplice.engine.arguments import BLOCK_CACHE_NAMES, CACHE_NAMES, cache_argument, cache_of, tokens_before
from steering.oracle import added, block
from steering.vectors import ids, precise, vector
from zoo import build, tokenizer

ONE = torch.tensor([[5]])


def cache(tokens: int) -> hf.DynamicCache:
    """A cache that holds so many tokens."""
    made = hf.DynamicCache()
    if tokens:
        made.update(torch.zeros(1, 2, tokens, 4), torch.zeros(1, 2, tokens, 4), 0)
    return made


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("tokens", [0, 6])
def test_every_name_of_a_cache_tells_how_many_tokens_it_holds(name: str, tokens: int) -> None:
    assert tokens_before({"input_ids": ONE, name: cache(tokens)}, 1) == tokens


def test_the_installed_transformers_uses_names_of_the_table() -> None:
    for family in (hf.LlamaForCausalLM, hf.GPT2LMHeadModel, hf.MambaForCausalLM, hf.T5ForConditionalGeneration):
        assert cache_argument(family.__new__(family)) in CACHE_NAMES
    assert cache_argument(hf.LlamaForCausalLM.__new__(hf.LlamaForCausalLM)) == CACHE
    assert set(CACHE_NAMES) < BLOCK_CACHE_NAMES


def test_a_cache_is_found_in_outputs_with_names_and_without() -> None:
    model = precise("llama")._module
    with torch.no_grad():
        out = model(torch.tensor([[3, 4, 5]]), use_cache=True)
        bare = model(torch.tensor([[3, 4, 5]]), use_cache=True, return_dict=False)
    assert cache_of(out) is filled(out) and filled(out).get_seq_length() == 3
    assert cache_of(bare).get_seq_length() == 3
    assert cache_of(torch.zeros(1)) is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"kv_store": cache(4)}, "kv_store=a DynamicCache looks like a cache"),
        ({"past": ((torch.zeros(1, 2, 4, 4),) * 2,)}, "past=a tuple looks like a cache"),
        ({"kv_cache": [torch.zeros(1, 2, 4, 4)]}, "kv_cache=a list looks like a cache"),
        ({"mems": [torch.zeros(4, 1, 16)]}, "mems=a list looks like a cache"),
        ({"state": [torch.zeros(1, 16)]}, "state=a list looks like a cache"),
        ({"past_key_values": ((torch.zeros(1, 2, 4, 4),) * 2,)}, "does not say how many tokens it holds"),
        ({"attention_mask": torch.ones(1, 5)}, "mask has 5 columns and the pass 1, and no cache is given"),
        ({"attention_mask": torch.ones(1, 1, 1, 5)}, "mask has 5 columns and the pass 1, and no cache is given"),
        ({"position_ids": torch.tensor([[4]])}, "positions of this pass begin at 4"),
        ({"cache": cache(4), "attention_mask": torch.ones(1, 1)}, "mask has 1 columns for the 4 tokens"),
    ],
)
def test_a_pass_that_does_not_tell_what_came_before_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ns.errors.BadArgument, match=words) as raised:
        tokens_before({"input_ids": ONE, **given}, 1)
    assert "expected: " in str(raised.value)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"kv_cache": None, "past": (), "use_cache": True, "cache_position": torch.tensor([0]), "state": None},
        {"attention_mask": torch.ones(1, 1), "position_ids": torch.tensor([[7]])},
        {"position_ids": torch.tensor([[0]])},
        {"cache": cache(0), "attention_mask": torch.ones(1, 9)},
        {"encoder_hidden_states": torch.zeros(1, 3, 4), "labels": ONE},
    ],
)
def test_a_pass_that_nothing_came_before_is_not_refused(given: dict[str, Any]) -> None:
    assert tokens_before({"input_ids": ONE, **given}, 1) == 0


def test_a_cache_that_counts_no_tokens_tells_only_that_nothing_came() -> None:
    """Mamba's kind: one state, whatever came before."""
    config = hf.MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, state_size=4)
    made = hf.DynamicCache(config=config)
    assert tokens_before({"cache_params": made}, 3) == 0
    model = hf.MambaForCausalLM(config).eval()
    with torch.no_grad():
        used = cache_of(model(torch.tensor([[3, 4, 5]]), use_cache=True))
    with pytest.raises(ns.errors.BadArgument, match="does not count tokens"):
        tokens_before({"cache_params": used}, 1)


# --- the same, through steering and traces ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_loop_with_a_cache_by_either_name_equals_whole_passes_with_a_hook(family: str, name: str) -> None:
    model, direction = precise(family), vector(1)
    (row,) = ids(model, ["w3 w4 w5 w6"])
    step = 2.0 * direction["layers[1].output[-1]"][0]
    hook = added(step, lambda position, _length: position >= 5, len(row))
    whole, cached = list(row), list(row)
    with torch.no_grad():
        for _ in range(4):
            handle = block(model._module, family, 1).register_forward_hook(hook)
            expected = model._module(torch.tensor([whole]), use_cache=False).logits[0, -1]
            handle.remove()
            whole.append(int(expected.argmax()))
        plain = model._module(torch.tensor([whole[:-1]]), use_cache=False).logits[0, -1]
        with ns.steering.steer(model, direction, 2.0, where=ns.steering.from_token(5)):
            out = model._module(torch.tensor([row]), use_cache=True)
            cached.append(int(out.logits[0, -1].argmax()))
            for _ in range(3):
                out = model._module(torch.tensor([cached[-1:]]), **{name: filled(out)})
                cached.append(int(out.logits[0, -1].argmax()))
    assert cached == whole
    assert (out.logits[0, -1] - expected).abs().max() < 1e-10
    assert (plain - expected).abs().max() > 1e-3  # the steering does something


class Renamed(hf.LlamaForCausalLM):
    """A model whose call has another name for its cache, as the next version of transformers may."""

    def forward(self, input_ids: torch.Tensor, keys_and_values: Any = None) -> Any:  # pyright: ignore
        out = self.model(input_ids, use_cache=True, **{CACHE: keys_and_values})
        return SimpleNamespace(logits=self.lm_head(out.last_hidden_state), keys_and_values=filled(out))


Renamed.__name__ = "LlamaForCausalLM"  # a pipeline asks for one of the names it knows


def test_the_next_rename_is_refused_where_tokens_are_counted_and_not_where_they_are_not() -> None:
    module = build("llama").double()
    module.__class__ = Renamed
    model = ns.load(module, tokenizer=tokenizer())
    root: Any = ns.models.unwrap(model)
    with torch.no_grad():
        before = root(torch.tensor([[3, 4, 5, 6]])).keys_and_values
        for where in (ns.steering.from_token(2), "generated", ns.steering.span(1, 6)):
            with pytest.raises(ns.errors.BadArgument, match=r"keys_and_values=a DynamicCache[\s\S]*use_cache=False"):
                with ns.steering.steer(model, vector(1), where=where):
                    root(ONE, keys_and_values=before)
        plain = root(ONE, keys_and_values=before).logits
        with ns.steering.steer(model, vector(1)):  # every token: nobody has to count
            assert (root(ONE, keys_and_values=before).logits - plain).abs().max() > 1e-3


def test_a_place_that_holds_other_tokens_than_the_pass_was_given_is_refused() -> None:
    """A model that drops tokens by itself, as XLM does with a cache."""
    model = precise("llama")
    root = model._module
    handle = root.model.register_forward_pre_hook(
        lambda _m, args, kwargs: (args, {**kwargs, "input_ids": kwargs["input_ids"][:, -1:]}), with_kwargs=True
    )
    with torch.no_grad(), pytest.raises(ns.errors.BadArgument, match="holds 1 tokens in a pass that was given 3"):
        with ns.steering.steer(model, vector(1), where=ns.steering.from_token(1)):
            root(torch.tensor([[3, 4, 5]]))
    handle.remove()


def test_a_capture_in_a_step_of_an_unknown_cache_is_refused() -> None:
    model = precise("llama")
    with pytest.raises(ns.errors.BadArgument, match="mask has 5 columns and the pass 1"):
        with torch.no_grad(), model.trace(input_ids=ONE, attention_mask=torch.ones(1, 5)):
            ns.save_activations(model, "layers[1].output[2]")


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_prompts_that_bring_a_cache_are_refused_as_they_are_run_whole(name: str) -> None:
    model = precise("llama")
    with pytest.raises(ns.errors.BadArgument, match="go on with 4 tokens in a cache"):
        ns.capture(model, {"input_ids": ONE, name: cache(4)}, "layers[1].output[-1]")
    with pytest.raises(ns.errors.BadArgument, match="mask has 5 columns"):
        ns.capture(model, {"input_ids": ONE, "attention_mask": torch.ones(1, 5)}, "layers[1].output[-1]")
    whole = {"input_ids": torch.tensor([[3, 4, 5]]), name: None, "attention_mask": torch.ones(1, 3)}
    assert ns.capture(model, whole, "layers[1].output[-1]")["layers[1].output[-1]"].shape == (1, 16)
