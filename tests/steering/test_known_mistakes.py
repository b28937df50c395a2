"""What steering libraries get wrong, each mistake with a test; those that have a test elsewhere are named.

a start position means "the prompt only" once there is a cache       here, and test_generation
masks and indices crash at the second token                          here
wrapped blocks hide what newer models ask of them                    here
only the first row is asked and steered; state is kept for all       test_conditions, test_block (two models)
an edit without a loop steers the prompt alone                       test_generation (all)
a batch that is padded is steered at other tokens                    test_generation, test_exactness
a vector is added twice                                              here, and test_exactness
layer n is read at one site and steered at another                  here
one strength for a whole batch                                       test_generation (rows)
centring by pair where the mean of all was meant                     test_fit (pca)
no intercept, so that a probe follows the states' mean               here
a strength without a unit                                            test_fit (norms), test_vector
a vector that says nothing of its quality                            test_fit (held out)
an option that is ignored                                            test_fit, test_block, test_sweep
control vectors shifted by one block; block 0                        test_gguf
no way to save, or pickles                                           test_vector
clean-up that takes the user's own hooks away                        here
a pad token that is written into the user's tokenizer                here
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import nnsplice as ns
from nnsplice.errors import ShapeError
from steering.vectors import PROMPTS, ids, precise, vector
from zoo import wrap

IDS = torch.tensor([[3, 4, 5, 6]])
OPTIONS: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}


def test_a_start_position_goes_on_through_what_is_generated() -> None:
    model = precise("llama")
    (row,) = ids(model, PROMPTS[:1])
    prompt_only = ns.steering.generate(model, PROMPTS[0], vector(1), 9.0, where="prompt", **OPTIONS)
    onwards = ns.steering.generate(model, PROMPTS[0], vector(1), 9.0, where=ns.steering.from_token(0), **OPTIONS)
    assert onwards == ns.steering.generate(model, PROMPTS[0], vector(1), 9.0, **OPTIONS) != prompt_only
    last = ns.steering.from_token(len(row) + 2)  # begins among the generated tokens
    for where in (last, ns.steering.span(len(row) + 1, len(row) + 3)):
        cached = ns.steering.generate(model, PROMPTS[0], vector(1), 9.0, where=where, **OPTIONS)
        assert cached == ns.steering.generate(
            model, PROMPTS[0], vector(1), 9.0, where=where, use_cache=False, **OPTIONS
        )
        assert cached != ns.steering.generate(model, PROMPTS[0], **OPTIONS)


def test_masks_hold_at_the_second_token_and_after() -> None:
    model = precise("llama")
    rows = torch.zeros(3, 8, dtype=torch.bool)
    rows[0, [1, 7]], rows[1, 2], rows[2, 5] = True, True, True
    where = ns.steering.mask(rows)
    found = ns.steering.generate(model, PROMPTS, vector(1), 9.0, where=where, **OPTIONS)
    assert found == ns.steering.generate(model, PROMPTS, vector(1), 9.0, where=where, use_cache=False, **OPTIONS)
    for prompt, own, text in zip(PROMPTS, rows, found, strict=True):
        assert ns.steering.generate(model, prompt, vector(1), 9.0, where=ns.steering.mask(own), **OPTIONS) == [text]


def test_blocks_are_not_wrapped() -> None:
    """A wrapper in a block's place hides its attributes, which Qwen's code asks for."""
    for family in ("qwen2", "qwen3"):
        model = wrap(family)
        module: Any = model._module
        modules, attributes = dict(module.named_modules()), set(dir(module.model.layers[1]))
        with ns.steering.steer(model, vector(1)):
            assert dict(module.named_modules()) == modules and attributes <= set(dir(module.model.layers[1]))
            ns.steering.generate(model, PROMPTS, max_new_tokens=3)


def test_a_vector_is_added_once() -> None:
    """Also where a block and its parts are all steered, and where a pass meets a module's hooks twice."""
    model = precise("gpt2")
    states = ns.capture(model, IDS, "layers[1].output[-1]")["layers[1].output[-1]"]
    step = vector(1)["layers[1].output[-1]"]
    for way in (lambda: ns.capture(model, IDS, "layers[1].output[-1]")["layers[1].output[-1]"],):
        with ns.steering.steer(model, vector(1), 0.5):
            torch.testing.assert_close(way() - states, 0.5 * step, rtol=0, atol=1e-13)
        with ns.steering.steer(model, vector(1), 0.5) + ns.steering.steer(model, vector(1), 0.5):
            torch.testing.assert_close(way() - states, step, rtol=0, atol=1e-13)


def test_a_layer_is_steered_where_it_was_read() -> None:
    """Transformers counts the embeddings as hidden state 0, so layer n leaves hidden state n + 1."""
    model = precise("llama")
    with torch.no_grad():
        before = model._module(IDS, output_hidden_states=True).hidden_states
        read = ns.capture(model, IDS, "layers[:].output[-1]")
        with ns.steering.steer(model, vector(1)):
            after = model._module(IDS, output_hidden_states=True).hidden_states
    assert torch.equal(read["layers[1].output[-1]"], before[2][:, -1])
    changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert changed == [False, False, True, True]


def test_a_probe_does_not_follow_the_mean_of_all_states() -> None:
    """Moving all states by a large constant changes what no direction between two groups may depend on."""
    drawn = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 30, 8, dtype=torch.float64, generator=drawn)
    a[:, 0] += 2
    far = 100 * torch.ones(8, dtype=torch.float64)

    def fitted(method: str, shift: torch.Tensor) -> torch.Tensor:
        groups = (ns.SavedActivation.from_pairs(("layers[0].output[-1]", rows + shift)) for rows in (a, b))
        return ns.steering.fit(*groups, method=method)["layers[0].output[-1]"]

    for method in ("mean_difference", "pca", "logistic", "lda"):
        torch.testing.assert_close(fitted(method, far), fitted(method, 0 * far), rtol=1e-6, atol=1e-8)


def test_hooks_and_settings_of_the_user_stay() -> None:
    model = precise("llama")
    seen = []
    handle = model._module.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
    tokenizer = model.tokenizer
    settings = (tokenizer.pad_token_id, tokenizer.padding_side, model._module.generation_config.to_dict())
    ns.steering.generate(model, PROMPTS, vector(1), **OPTIONS)
    with ns.steering.steer(model, vector(1)):
        model._module(IDS)
    count = len(seen)
    model._module(IDS)
    handle.remove()
    assert len(seen) == count + 1 > 3
    assert settings == (tokenizer.pad_token_id, tokenizer.padding_side, model._module.generation_config.to_dict())


def test_a_mask_with_rows_of_several_lengths_says_how_to_fill_them():
    rows = [[True, False, True], [False, True]]
    with pytest.raises(ShapeError, match=r"2 and 3 tokens(.|\n)*write: \[row \+ \[False\]"):
        ns.steering.mask(rows)
    width = 3
    filled = ns.steering.mask([row + [False] * (width - len(row)) for row in rows])  # what it says
    assert filled.mask == ((True, False, True), (False, True, False))
