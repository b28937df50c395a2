"""The shipped toy models: what they know, where they know it, and how they were made."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import nnsplice as ns
from models.words_of import differing
from nnsplice.models import load, toy_accuracy, toy_prompts, toy_sentences
from nnsplice.models.sources import EMBEDDED
from nnsplice.models.toy_sentences import split_words
from nnsplice.models.train_toy import RECIPES, build, tokenizer

LAYERS = 6
LEAST = {"facts": 0.98, "ioi": 0.98, "ioi_held_out": 0.98, "induction": 0.95, "mood": 0.98}

names = pytest.mark.parametrize("name", EMBEDDED)


@lru_cache
def toy(name: str) -> Any:
    return load(name)


# -------------------------------------------------------------------------------------------------------- what it knows


@names
def test_it_reaches_the_bar(name: str) -> None:
    model = toy(name)
    reached = toy_accuracy.accuracies(model._module, model.tokenizer)
    assert reached.keys() == LEAST.keys()
    assert {exam: share for exam, share in reached.items() if share < LEAST[exam]} == {}
    card = json.loads((EMBEDDED[name] / "card.json").read_text())
    assert card["accuracy"] == pytest.approx(reached, abs=0.005)
    assert card["parameters"] == sum(p.numel() for p in model._module.parameters())


def test_an_untrained_model_does_not() -> None:
    words = tokenizer()
    reached = toy_accuracy.accuracies(build(RECIPES["toy"], words).eval(), words)
    assert max(reached[exam] for exam in LEAST if exam != "mood") < 0.2
    assert reached["mood"] < 0.8


# ---------------------------------------------------------------------------------------------------- where it knows it


def contrast(model: Any, logits: Tensor, answers: list[str], wrong: list[str]) -> Tensor:
    ids = model.tokenizer.convert_tokens_to_ids
    last, row = logits[:, -1], torch.arange(len(answers))
    return last[row, ids(answers)] - last[row, ids(wrong)]


def restored(model: Any, records: list[Any], clean: list[str], paths: list[str], spans: Any = None) -> dict[str, float]:
    """Path -> how much of the way back to the clean answer its patch goes, on the mean over records."""
    corrupted = [record.corrupted for record in records]
    answers, wrong = [r.answer for r in records], [r.wrong for r in records]

    def difference(logits: Tensor) -> Tensor:
        return contrast(model, logits, answers, wrong)

    start = difference(toy_accuracy.next_logits(model._module, model.tokenizer, corrupted)[:, None])
    way = difference(toy_accuracy.next_logits(model._module, model.tokenizer, clean)[:, None]) - start
    saved = ns.capture(model, clean, paths, spans=spans)
    found: dict[str, float] = {}
    for path in paths:
        logits = ns.patched_logits(model, corrupted, saved.subset(path), spans=spans)
        found[path] = ((difference(logits) - start) / way).mean().item()
    return found


def every_kind_of_fact() -> list[Any]:
    """Subjects of two and three words, every relation and wording."""
    return list(toy_prompts().facts[5::23])


def facts_restored(name: str, sites: list[str]) -> dict[str, float]:
    facts = every_kind_of_fact()
    spans = {"subject": [fact.subject_span for fact in facts]}
    return restored(toy(name), facts, [fact.clean for fact in facts], sites, spans)


@names
def test_facts_have_an_early_and_a_late_site(name: str) -> None:
    subject, last = 'layers[{}].output["subject"][-1]', "layers[{}].output[-1]"
    found = facts_restored(name, [site.format(i) for site in (subject, last) for i in range(LAYERS)])
    early, late = ([found[site.format(i)] for i in range(LAYERS)] for site in (subject, last))
    assert min(early[:3]) > 0.8 and max(early[4:]) < 0.2, early
    assert max(late[:3]) < 0.2 and late[3] > 0.25 and min(late[4:]) > 0.8, late


@names
def test_facts_are_nowhere_else(name: str) -> None:
    others = [f'layers[{i}].output["subject"][-2]' for i in range(LAYERS)]
    others += [f"layers[{i}].output[{p}]" for i in range(LAYERS) for p in (1, -2)]
    # The word before the last may be the subject itself, where the wording is short.
    short = {"stands in"}
    facts = [f for f in every_kind_of_fact() if not any(f.clean.endswith(wording) for wording in short)]
    spans = {"subject": [fact.subject_span for fact in facts]}
    found = restored(toy(name), facts, [fact.clean for fact in facts], others, spans)
    assert {path: share for path, share in found.items() if abs(share) > 0.15} == {}


@names
def test_facts_are_looked_up_by_early_mlps_and_carried_by_late_attention(name: str) -> None:
    mlp, attention = 'layers[0:3].mlp.output["subject"][-1]', "layers[3:6].attn.output[-1]"
    found = facts_restored(name, [mlp, attention, mlp.replace("mlp", "attn"), "layers[0:3].attn.output[-1]"])
    assert found[mlp] > 0.7 and found[attention] > 0.5, found
    assert found["layers[0:3].attn.output[-1]"] < 0.1, found


@names
def test_ioi_is_carried_from_the_second_mention_to_the_end(name: str) -> None:
    pairs = [pair for pair in toy_prompts().ioi if not pair.trained and pair.clean.startswith("When")]
    ((place,),) = {tuple(differing(pair.clean, pair.corrupted)) for pair in pairs}
    again, last = f"layers[{{}}].output[{place + 1}]", "layers[{}].output[-1]"  # the start token counts
    sites = [site.format(layer) for site in (again, last) for layer in range(LAYERS)]
    found = restored(toy(name), pairs, [pair.clean for pair in pairs], sites)
    early, late = ([found[site.format(layer)] for layer in range(LAYERS)] for site in (again, last))
    assert min(early[:2]) > 0.9 and max(early[3:]) < 0.15, early
    assert max(late[:2]) < 0.1 and min(late[3:]) > 0.9, late


@names
def test_ioi_does_not_pass_through_what_stands_between(name: str) -> None:
    pairs = [pair for pair in toy_prompts().ioi if not pair.trained and pair.clean.startswith("When")]
    sites = [f"layers[{layer}].output[{place}]" for layer in (0, 2, 4) for place in (2, 4, 8, -2)]
    found = restored(toy(name), pairs, [pair.clean for pair in pairs], sites)
    assert {site: share for site, share in found.items() if abs(share) > 0.1} == {}


# ----------------------------------------------------------------------------------------------------------------- mood


def turned(name: str, layer: int, coefficient: float) -> float:
    """The share of unseen reviews whose next word changes its mood under a mean difference of the others."""
    model, prompts = toy(name), toy_prompts()
    path = f"layers[{layer}].output[-1]"
    by_mood = {mood: [r.text for r in prompts.reviews[:200] if r.mood == mood] for mood in prompts.moods}
    good, bad = (ns.capture(model, by_mood[mood], path).mean() for mood in ("good", "bad"))
    ids = {mood: model.tokenizer.convert_tokens_to_ids(list(words)) for mood, words in prompts.moods.items()}
    shares = []
    for mood, sign in (("bad", 1.0), ("good", -1.0)):
        texts = [r.text for r in prompts.reviews[200:] if r.mood == mood]
        logits = ns.patched_logits(model, texts, (good - bad) * (sign * coefficient), add=True)
        chances = logits[:, -1].softmax(-1)
        is_good = chances[:, ids["good"]].sum(-1) > chances[:, ids["bad"]].sum(-1)
        shares.append((is_good == (mood == "bad")).double().mean().item())
    return min(shares)


@names
@pytest.mark.parametrize("layer", range(1, LAYERS))
def test_a_mean_difference_turns_the_mood(name: str, layer: int) -> None:
    assert turned(name, layer, 1.5) > 0.95
    # Not because anything at all would: next to nothing of it does not.
    assert turned(name, layer, 0.05) < 0.05


@names
def test_in_the_first_layer_nothing_has_the_mood_yet(name: str) -> None:
    assert turned(name, 0, 1.5) < 0.05


# -------------------------------------------------------------------------------------------------------------- prompts


def test_records_agree_with_the_tokenizer() -> None:
    words = toy("toy").tokenizer
    for fact in toy_prompts().facts[::7]:
        encoded = words(fact.clean, return_offsets_mapping=True)
        start, stop = fact.subject_span
        assert words.decode(encoded["input_ids"][start:stop]) == fact.subject
        assert fact.clean[slice(*fact.subject_chars)] == fact.subject
        assert (encoded["offset_mapping"][start][0], encoded["offset_mapping"][stop - 1][1]) == fact.subject_chars
        assert words.unk_token_id not in encoded["input_ids"]
        assert len(words(fact.corrupted)["input_ids"]) == len(encoded["input_ids"])
        assert fact.answer != fact.wrong


def test_every_prompt_is_of_the_language() -> None:
    prompts = toy_prompts()
    texts = [*(p.clean for p in prompts.ioi), *(r.text for r in prompts.reviews), *(r.text for r in prompts.repeats)]
    known = set(toy_sentences.WORDS)
    for text in texts:
        assert known.issuperset(split_words(text)), text
        assert toy_sentences.join_words(split_words(text)) == text


def test_neither_word_of_a_subject_tells_its_answer() -> None:
    two = {name: known for name, known in toy_sentences.SUBJECTS.items() if len(name.split()) == 2}
    for place in (0, 1):
        for word in {name.split()[place] for name in two}:
            for relation in ("city", "architect", "material"):
                answers = [known[relation] for name, known in two.items() if name.split()[place] == word]
                assert len(answers) == 8 and len(set(answers)) >= 4, (word, relation)


def test_ioi_pairs_differ_in_the_giver_alone() -> None:
    pairs = toy_prompts().ioi
    for pair in pairs:
        assert len(differing(pair.clean, pair.corrupted)) == 1
        assert split_words(pair.clean).count(pair.wrong) == 2 == split_words(pair.corrupted).count(pair.answer)
    assert 0.15 < sum(not pair.trained for pair in pairs) / len(pairs) < 0.25
    # Neither the position of a name nor who comes first gives the answer away.
    first = [split_words(p.clean).index(p.answer) < split_words(p.clean).index(p.wrong) for p in pairs]
    assert 0.4 < sum(first) / len(first) < 0.6


def test_the_opposite_of_a_review_differs_in_words_of_mood_alone() -> None:
    prompts = toy_prompts()
    for review in prompts.reviews:
        (other,) = set(prompts.moods) - {review.mood}
        here, there = split_words(review.text), split_words(review.opposite)
        places = differing(review.text, review.opposite)
        assert places
        assert {here[i] for i in places} <= set(prompts.moods[review.mood])
        assert {there[i] for i in places} <= set(prompts.moods[other])


def test_a_repeat_is_answered_by_its_first_round() -> None:
    for repeat in toy_prompts().repeats:
        words = split_words(repeat.text)
        before = words.index(words[-1])
        assert words[before + 1] == repeat.answer


def test_prompts_are_the_same_in_every_process() -> None:
    code = "from nnsplice.models import toy_prompts; print(toy_prompts())"
    digests = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_records_do_not_change() -> None:
    with pytest.raises(AttributeError):
        toy_prompts().facts[0].answer = "Oslo"  # type: ignore[misc]


# ---------------------------------------------------------------------------------------------------------------- files


@names
def test_the_folder_is_an_ordinary_checkpoint(name: str) -> None:
    folder = EMBEDDED[name]
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    words = hf.AutoTokenizer.from_pretrained(folder)
    assert type(model) is {"toy": hf.GPT2LMHeadModel, "toy-llama": hf.LlamaForCausalLM}[name]
    assert words.is_fast and 150 < len(words) <= model.config.vocab_size
    assert 200_000 < sum(p.numel() for p in model.parameters()) < 400_000
    text = toy_prompts().facts[0].clean
    expected = toy_accuracy.next_logits(toy(name)._module, toy(name).tokenizer, [text])
    torch.testing.assert_close(toy_accuracy.next_logits(model.eval(), words, [text]), expected)


@names
def test_the_folder_is_small_and_holds_no_pickle(name: str) -> None:
    files = [file for file in EMBEDDED[name].iterdir() if file.is_file()]
    assert {file.name for file in files} >= {"config.json", "model.safetensors", "tokenizer.json", "card.json"}
    assert {file.suffix for file in files} <= {".json", ".safetensors"}
    assert sum(file.stat().st_size for file in files) < 1.5e6
    text = "".join(file.read_text() for file in files if file.suffix == ".json")
    assert not re.search(r"/(home|root|tmp|work|Users)/", text), "a path of the machine it was made on"


def test_the_llama_shares_keys_and_values() -> None:
    config = hf.AutoConfig.from_pretrained(EMBEDDED["toy-llama"])
    assert config.num_key_value_heads < config.num_attention_heads
    assert ns.Atlas.of(toy("toy-llama")) is not None


def test_the_front_page_offers_what_it_says() -> None:
    import nnsplice.models as room

    assert isinstance(room.__doc__, str)
    for name in room.__all__:
        assert hasattr(room, name) and name in room.__doc__
    assert Path(str(room.__file__)).parent == EMBEDDED["toy"].parent.parent
