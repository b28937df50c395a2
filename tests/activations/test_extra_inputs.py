"""Encodings that hold more than tokens: what a run reads of them is used or refused by name, and never left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import nnsplice as ns
import seeing
import zoo
from activations.oracle import values
from families import images
from families.build import build, prompt
from nnsplice.activations.access import site_of
from nnsplice.errors import BadArgument, ShapeError
from sweeps import test_towers as towers

IDS = torch.tensor([[3, 4, 5]])
SITE = "layers[1].output[-1]"


@pytest.fixture(scope="module")
def gpt2() -> Any:
    return zoo.wrap("gpt2")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("inputs_embeds", torch.zeros(1, 3, 16)),
        ("input_features", torch.zeros(1, 8, 32)),
        ("pixel_values_videos", torch.zeros(1, 3, 16, 16)),
        ("position_ids", torch.tensor([[0, 1, 3]])),
        ("token_type_ids", torch.ones_like(IDS)),
        ("token_type_ids", torch.zeros_like(IDS)),  # GPT-2 adds an embedding for kind 0 too
    ],
)
@pytest.mark.parametrize(
    "ask",
    [
        lambda model, prompts: ns.capture(model, prompts, SITE),
        lambda model, prompts: ns.ablate(model, prompts, SITE, ns.logit_diff(5, 9), progress=False),
        lambda model, prompts: ns.lens.logit(model, prompts, SITE, progress=False),
        lambda model, prompts: ns.steering.fit_from_prompts(model, prompts, prompts, SITE),
    ],
)
def test_what_would_be_left_out_of_a_text_is_refused_by_name(gpt2, ask, name: str, value: Tensor) -> None:
    with pytest.raises(BadArgument, match=f"this encoding holds {name} beside its input_ids"):
        ask(gpt2, {"input_ids": IDS, name: value})


def test_a_video_is_refused_and_not_run_as_its_tokens_alone() -> None:
    model, ids = ns.load(build("qwen2_vl"), tokenizer=False), prompt(10)
    ids[:, 2:6] = 62
    seen = {"pixel_values_videos": torch.rand(16, 384), "video_grid_thw": torch.tensor([[1, 4, 4]])}
    with pytest.raises(BadArgument, match="holds pixel_values_videos"):
        ns.capture(model, {"input_ids": ids, **seen}, SITE)


def test_what_changes_no_run_may_stand_in_an_encoding(gpt2) -> None:
    expected = ns.capture(gpt2, IDS, SITE)
    beside = {"labels": IDS, "length": [3], "position_ids": torch.arange(3)[None], "mm_token_type_ids": IDS}
    assert ns.capture(gpt2, {"input_ids": IDS, **beside}, SITE) == expected
    padded = {"input_ids": torch.tensor([[0, 3, 4, 5]]), "attention_mask": torch.tensor([[0, 1, 1, 1]])}
    assert ns.capture(gpt2, {**padded, "position_ids": torch.tensor([[1, 0, 1, 2]])}, SITE) == expected


@pytest.mark.parametrize("kind", [0, 1])
def test_kinds_of_tokens_of_a_text_are_read_where_the_family_reads_them(kind: int) -> None:
    """PaliGemma reads tokens of kind 0 both ways, and without kinds it reads forwards."""
    model, bare, ids = ns.load(build("paligemma"), tokenizer=False), build("paligemma"), prompt(10)
    inputs = {"input_ids": ids, "token_type_ids": torch.full_like(ids, kind)}
    (site,) = (site_of(place) for place in ns.expand(model, "layers[1].output"))
    found = ns.capture(model, inputs, "layers[1].output[:]")
    seen = torch.stack([found[f"layers[1].output[{token}]"][0] for token in range(10)])
    torch.testing.assert_close(seen, values(bare, inputs, [site])[site][0])
    plain = ns.capture(model, ids, "layers[1].output[0]").get("layers[1].output[0]")[0]
    assert torch.equal(seen[0], plain) is bool(kind)


@pytest.mark.parametrize(
    ("mask", "error", "says"),
    [
        (torch.tensor([[1, 0, 1]]), BadArgument, "has a 0 between tokens"),
        (torch.ones(1, 2), ShapeError, r"attention mask of shape \[1, 2\] for token ids of shape \[1, 3\]"),
        (torch.ones(1, 1, 3, 3), ShapeError, r"attention mask of shape \[1, 1, 3, 3\]"),
    ],
)
def test_a_mask_that_is_no_padding_is_said(gpt2, mask: Tensor, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        ns.capture(gpt2, {"input_ids": IDS, "attention_mask": mask}, SITE)


# --- the decoder's tokens ---------------------------------------------------------------------------------------------


def test_tokens_for_a_decoder_are_refused_by_a_model_of_one_tower(gpt2) -> None:
    with pytest.raises(BadArgument, match="has no decoder beside an encoder"):
        ns.capture(gpt2, {"input_ids": IDS, "decoder_input_ids": IDS[:, :2]}, SITE)


def test_tokens_for_a_decoder_go_to_folders_and_steering_vectors_with_their_prompts(tmp_path: Path) -> None:
    model, bare = towers.load("t5"), towers.build("t5")
    one, other = towers.pair("t5")
    (site,) = (site_of(place) for place in ns.expand(model, "layers[1].output"))
    here, there = (values(bare, inputs, [site])[site][:, -1] for inputs in (one, other))
    both = {name: torch.cat([one[name], other[name]]) for name in one}
    held = ns.capture_to(tmp_path, model, both, SITE, progress=False)
    torch.testing.assert_close(held.get(SITE), torch.cat([here, there]))
    fitted = ns.steering.fit_from_prompts(model, one, other, SITE).get(SITE)
    torch.testing.assert_close(fitted, here - there)
    torch.testing.assert_close(ns.capture(model, [one, other], SITE).get(SITE), torch.cat([here, there]))
    with pytest.raises(BadArgument, match="1 of 2 encodings hold decoder_input_ids"):
        ns.capture(model, [one, {"input_ids": other["input_ids"]}], SITE)


def test_a_list_of_sounds_runs_as_their_batch() -> None:
    model = towers.load(towers.HEARS)
    one, other = towers.pair(towers.HEARS)
    both = {name: torch.cat([one[name], other[name]]) for name in one}
    listed = ns.capture(model, [one, other], SITE)
    assert listed == ns.capture(model, both, SITE)
    assert listed.images is not None and len(set(listed.images)) == 2
    with pytest.raises(BadArgument, match="1 of 2 prompts to hear hold decoder_input_ids"):
        ns.capture(model, [one, {"input_features": other["input_features"]}], SITE)


def test_values_of_another_model_are_refused_for_sounds_by_their_name() -> None:
    one, _ = towers.pair(towers.HEARS)
    model, other = (towers.load(towers.HEARS) for _ in range(2))
    with pytest.raises(BadArgument, match="for prompts of text, and these are input_features"):
        ns.sweep(model, one, None, SITE, towers.METRIC, source=other, progress=False)


# --- where a capture comes from ---------------------------------------------------------------------------------------


def test_a_capture_holds_a_digest_of_each_prompts_images(tmp_path: Path) -> None:
    model = ns.load(seeing.build(), processor=seeing.processor())
    texts, pictures = ["w3 <image> w4", "w3 <image> w4"], [seeing.picture(1), seeing.picture(2)]
    saved = ns.capture(model, {"text": texts, "images": pictures}, SITE)
    assert saved.images is not None and len(set(saved.images)) == 2
    again = ns.capture(model, {"text": texts[0], "images": pictures[1]}, SITE)
    assert again.images == saved.slice[1:2].images and again.tokens == saved.slice[0:1].tokens
    saved.to_file(tmp_path / "a.safetensors")
    assert ns.SavedActivation.from_file(tmp_path / "a.safetensors").images == saved.images
    assert (saved - saved).images == saved.images
    assert (saved.slice[0:1] - again).images is None and saved.mean().images is None
    # Text beside an image has none, and prompts of text alone have no such row.
    both = [{"text": texts[0], "images": pictures[0]}, model.processor(text="w5 w6", return_tensors="pt")]
    assert ns.capture(model, both, SITE).images == (saved.images[0], None)
    assert ns.capture(model, "w3 w4", SITE).images is None


def test_kinds_of_tokens_alone_are_no_image() -> None:
    model, ids = ns.load(build("gemma3"), tokenizer=False), prompt(10)
    typed = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids)}
    assert ns.capture(model, typed, SITE) == ns.capture(model, ids, SITE)
    assert ns.capture(model, typed, SITE).images is None
    assert ns.capture(model, images.with_image("gemma3", ids, 1), SITE).images is not None
