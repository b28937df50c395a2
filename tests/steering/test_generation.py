"""Greedy generation is the same tokens however it is run: with and without a cache, alone, in a batch, padded."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import nnsplice as ns
import zoo
from activations.oracle import run
from caches import CACHE, filled
from nnsplice.activations.access import site_of
from nnsplice.activations.encoding import encode
from nnsplice.steering.generate import continued
from nnsplice.steering.padding import padded
from steering.oracle import BLOCKS, WHERE, added, block, greedy, policy
from steering.vectors import PROMPTS, ids, precise, vector
from sweeps import test_towers as towers

NEW = 5
#: Families that are run with every rule for tokens; the others, which differ in how they are built, with a few.
THOROUGH = ("gpt2", "llama", "mixtral")
CASES = [
    (family, name)
    for family in sorted(BLOCKS)
    for name in WHERE
    if family in THOROUGH or name in ("all", "from_token(4)")
]


def tokens(model: Any, prompts: Any, **kwargs: Any) -> list[list[int]]:
    """What the Hugging Face module generates in the block that is open."""
    given = {"max_new_tokens": NEW, "do_sample": False, **kwargs}
    return continued(model, encode(model, prompts), given).tolist()


made = functools.cache(precise)


@pytest.fixture(params=THOROUGH)
def model(request) -> Any:
    return made(request.param)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_every_way_of_running_gives_the_tokens_of_a_plain_loop(family: str, name: str) -> None:
    model = made(family)
    direction, where = vector(1), policy(name)
    step = 2.0 * direction["layers[1].output[-1]"][0]
    there = block(model._module, family, 1)
    expected = [greedy(model._module, row, NEW, there, lambda n: added(step, WHERE[name], n)) for row in ids(model)]
    with ns.steering.steer(model, direction, 2.0, where=where):
        together = tokens(model, PROMPTS)
        uncached = tokens(model, PROMPTS, use_cache=False)
        alone = [tokens(model, prompt)[0] for prompt in PROMPTS]
        alone_uncached = [tokens(model, prompt, use_cache=False)[0] for prompt in PROMPTS]
    assert together == uncached == alone == alone_uncached == expected
    if name == "all":  # a check that cannot fail otherwise: the steering does something
        assert expected != tokens(model, PROMPTS)


def test_rows_have_coefficients_of_their_own(model) -> None:
    direction = vector(0, 1)
    prompts = [PROMPTS[0]] * 4
    coefficients = [-2.0, 0.0, 1.0, 3.0]
    with ns.steering.steer(model, direction, coefficients):
        together = tokens(model, prompts)
    apart = []
    for coefficient in coefficients:
        with ns.steering.steer(model, direction, coefficient):
            apart += tokens(model, PROMPTS[0])
    assert together == apart
    assert together[1] == tokens(model, PROMPTS[0])[0]
    assert len({tuple(row) for row in together}) > 1


def test_a_steered_row_changes_nothing_in_its_neighbours(model) -> None:
    plain = tokens(model, PROMPTS)
    with ns.steering.steer(model, vector(1), [0.0, 5.0, 0.0]):
        steered = tokens(model, PROMPTS)
    assert (steered[0], steered[2]) == (plain[0], plain[2])
    rows, mask = padded(ids(model), 0, left=True)
    with torch.no_grad():
        before = model._module(rows, attention_mask=mask).logits
        with ns.steering.steer(model, vector(1), [0.0, 5.0, 0.0]):
            after = model._module(rows, attention_mask=mask).logits
    # Bit for bit, except in a mixture, whose experts are fed whatever tokens chose them, from all rows.
    mixture = hasattr(model._module.config, "num_experts_per_tok")
    torch.testing.assert_close(after[[0, 2]], before[[0, 2]], rtol=0, atol=1e-12 if mixture else 0)
    assert not torch.allclose(after[1], before[1])


# --- the other ways in which transformers runs a model ----------------------------------------------------------------


@pytest.fixture
def llama() -> Any:
    return made("llama")


@pytest.mark.parametrize("name", ["all", "generated", "from_token(4)", "span(-2, -1)"])
@pytest.mark.parametrize(
    "way",
    [
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 2},
        {"prompt_lookup_num_tokens": 3},
        {"use_cache": False, "cache_implementation": None},
    ],
    ids=["static cache", "chunked prefill", "prompt lookup", "no cache"],
)
def test_other_caches_and_decoders_give_the_same_tokens(llama, name: str, way: dict) -> None:
    prompts = PROMPTS[:1] if "prompt_lookup_num_tokens" in way else PROMPTS
    with ns.steering.steer(llama, vector(1), 2.0, where=policy(name)):
        assert tokens(llama, prompts, **way) == tokens(llama, prompts)


def test_beams_have_the_coefficient_of_their_prompt(llama) -> None:
    direction = vector(1)
    with ns.steering.steer(llama, direction, [3.0, -2.0, 0.0]):
        together = tokens(llama, PROMPTS, num_beams=3)
    apart = []
    for prompt, coefficient in zip(PROMPTS, [3.0, -2.0, 0.0], strict=True):
        with ns.steering.steer(llama, direction, coefficient):
            apart += tokens(llama, prompt, num_beams=3)
    assert together == apart


def test_sequences_that_are_returned_for_one_prompt_are_steered_as_it(llama) -> None:
    found = ns.steering.generate(llama, PROMPTS[:2], vector(1), [50.0, 0.0], max_new_tokens=3, num_beams=2,
                                 num_return_sequences=2, where="generated")  # fmt: skip
    plain = ns.steering.generate(llama, PROMPTS[:2], max_new_tokens=3, num_beams=2, num_return_sequences=2)
    assert len(found) == 4 and found[2:] == plain[2:] and found[:2] != plain[:2]


def test_a_loop_of_ones_own_with_a_cache_is_followed(llama) -> None:
    (row,) = ids(llama, PROMPTS[:1])
    for name in ("generated", "prompt", "from_token(7)"):
        with ns.steering.steer(llama, vector(1), 2.0, where=policy(name)), torch.no_grad():
            (expected,) = tokens(llama, PROMPTS[0])
            out = llama._module(torch.tensor([row]), use_cache=True)
            found = [int(out.logits[0, -1].argmax())]
            while len(found) < NEW:
                out = llama._module(torch.tensor([found[-1:]]), **{CACHE: filled(out)})
                found.append(int(out.logits[0, -1].argmax()))
        assert found == expected


def test_a_prompt_whose_beginning_is_in_the_cache_already(llama) -> None:
    (row,) = ids(llama, PROMPTS[:1])
    for name in ("generated", "prompt", "from_token(4)"):
        with ns.steering.steer(llama, vector(1), 2.0, where=policy(name)), torch.no_grad():
            (expected,) = tokens(llama, PROMPTS[0])
            cache = {CACHE: filled(llama._module(torch.tensor([row[:3]]), use_cache=True))}
            out = llama._module.generate(torch.tensor([row]), **cache, max_new_tokens=NEW, do_sample=False)
        assert out[0, len(row) :].tolist() == expected, name


def test_embeddings_in_place_of_tokens(llama) -> None:
    (row,) = ids(llama, PROMPTS[:1])
    with torch.no_grad():
        embeds = llama._module.get_input_embeddings()(torch.tensor([row]))
        for name in ("generated", "from_token(4)"):
            with ns.steering.steer(llama, vector(1), 2.0, where=policy(name)):
                (expected,) = tokens(llama, PROMPTS[0])
                found = llama._module.generate(inputs_embeds=embeds, max_new_tokens=NEW, do_sample=False)
            assert found[0].tolist() == expected


def test_a_cache_that_was_filled_before_the_block_says_nothing_about_the_prompt(llama) -> None:
    (row,) = ids(llama, PROMPTS[:1])
    with torch.no_grad():
        cache = {CACHE: filled(llama._module(torch.tensor([row]), use_cache=True))}
        with pytest.raises(ValueError, match="filled before"):
            with ns.steering.steer(llama, vector(1), where="generated"):
                llama._module(torch.tensor([[5]]), **cache)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_towers_are_steered_apart(name: str) -> None:
    model = precise(name)
    model._module.generation_config.forced_eos_token_id = None
    (row,) = ids(model, PROMPTS[:1])
    plain = ns.steering.generate(model, PROMPTS, max_new_tokens=NEW, do_sample=False)
    for tower, where in (("encoder", "prompt"), ("decoder", "generated"), ("decoder", "all")):
        drawn = torch.Generator().manual_seed(3)
        one = torch.randn(1, 16, dtype=torch.float64, generator=drawn)
        direction = ns.SavedActivation.from_pairs((f"{tower}.layers[1].output[-1]", 40 * one))
        options: dict[str, Any] = {"where": where, "max_new_tokens": NEW, "do_sample": False}
        together = ns.steering.generate(model, PROMPTS, direction, **options)
        alone = [ns.steering.generate(model, prompt, direction, **options)[0] for prompt in PROMPTS]
        uncached = ns.steering.generate(model, PROMPTS, direction, use_cache=False, **options)
        assert together == alone == uncached
        assert together != plain
    assert row


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize(
    "place", ["layers[1].output", "layers[0].cross.output", "layers[0].cross.heads[1].q", "encoder.layers[0].output"]
)
def test_the_decoder_goes_on_from_its_own_tokens(name: str, place: str) -> None:
    model, bare, words = towers.load(name), towers.build(name), zoo.tokenizer()
    (inputs, other), (site,) = towers.pair(name), (site_of(path) for path in ns.expand(model, place))
    direction = ns.steering.fit_from_prompts(model, inputs, other, f"{place}[-1]")
    moved = 2 * direction.get(place)
    tokens = inputs["decoder_input_ids"]
    for _ in range(NEW):
        logits = run(bare, {**inputs, "decoder_input_ids": tokens}, {site: lambda state: state + moved})
        tokens = torch.cat([tokens, logits[:, -1].argmax(-1)[:, None]], 1)
    expected = words.batch_decode(tokens[:, inputs["decoder_input_ids"].shape[1] :], skip_special_tokens=True)
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
    model._module.generation_config.forced_eos_token_id = None
    assert ns.steering.generate(model, inputs, direction, 2.0, **options) == expected
    begun = {"decoder_input_ids": inputs["decoder_input_ids"]}
    assert ns.steering.generate(model, inputs["input_ids"], direction, 2.0, **begun, **options) == expected


def test_decoders_of_different_lengths_are_no_one_generation() -> None:
    model, (one, other) = towers.load("t5"), towers.pair("t5")
    shorter = {**other, "decoder_input_ids": other["decoder_input_ids"][:, :2]}
    with pytest.raises(ValueError, match="3, 2 in number"):
        ns.steering.generate(model, [one, shorter], max_new_tokens=NEW)


@pytest.mark.parametrize("place", ["layers[0].cross.groups[1].v", "layers[1].cross.k.output"])
def test_keys_of_the_other_tower_are_refused_by_name(place: str) -> None:
    model, (one, other) = towers.load("t5"), towers.pair("t5")
    direction = ns.steering.fit_from_prompts(model, one, other, f"{place}[-1]")
    with pytest.raises(ns.errors.RefusedPlace, match=r"(?s)of the encoder's tokens.*cross\.output"):
        ns.steering.generate(model, one, direction, max_new_tokens=NEW)


def test_texts_are_what_follows_the_prompt() -> None:
    toy = ns.load("toy")
    fact = ns.models.toy_prompts().facts[0]
    (text,) = ns.steering.generate(toy, fact.clean, max_new_tokens=2)
    assert text.split()[0] == fact.answer
    assert ns.steering.generate(toy, [fact.clean, "The meal"], max_new_tokens=1)[0] == fact.answer
    with pytest.raises(ValueError, match="coefficient without a vector"):
        ns.steering.generate(toy, fact.clean, coefficient=2.0)
    with pytest.raises(ValueError, match="tokens"):
        ns.steering.generate(toy, torch.zeros(1, 2, 64))


def test_what_would_pass_by_the_edits_of_a_model_is_refused() -> None:
    model = precise("llama")
    with model.edit() as (_, edited):
        edited.model.layers[1].output[:] = 0
    for call in (
        lambda: ns.steering.generate(edited, PROMPTS, max_new_tokens=1),
        lambda: ns.steering.sweep(edited, PROMPTS, vector(1), [1.0], ns.logit_diff("w7", "w8"), progress=False),
        lambda: ns.steering.steer(edited, vector(1)).show(PROMPTS[0]),
    ):
        with pytest.raises(ValueError, match=r"has edits of nnsight[\s\S]*clear_edits"):
            call()


def test_a_text_past_the_positions_of_the_model_is_refused_with_the_number_that_fits() -> None:
    toy, prompt = ns.load("toy"), "I thought the film was"
    config: Any = ns.models.unwrap(toy).config
    limit = config.max_position_embeddings
    with pytest.raises(
        ValueError, match=rf"are more than the {limit} positions(?s:.)*write: max_new_tokens=(\d+)"
    ) as caught:
        ns.steering.generate(toy, prompt, max_new_tokens=limit)
    fits = int(str(caught.value).partition("max_new_tokens=")[2].split()[0])
    assert fits + len(toy.tokenizer(prompt)["input_ids"]) == limit
    assert len(ns.steering.generate(toy, prompt, max_new_tokens=fits)) == 1
