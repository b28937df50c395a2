"""Prompts with images: the numbers of plain hooks, an image's tokens as a span, and mistakes that are answered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import nnsplice as ns
import seeing
from activations.oracle import run, values
from families import images
from families.build import build, prompt
from nnsplice.activations.encoding import encode
from nnsplice.errors import BadArgument, BadType, NeverFired, ShapeError, SpanError

TEXTS = ["w3 <image> w5 w6", "<image> w7 w8 w9 w10"]


@pytest.fixture(scope="module")
def processor() -> Any:
    return seeing.processor()


@pytest.fixture(scope="module")
def bare() -> Any:
    return seeing.build()


@pytest.fixture(scope="module")
def model(processor) -> Any:
    return ns.load(seeing.build(), processor=processor)


def _hooked(bare: Any, model: Any, inputs: Any, path: str) -> Tensor:
    (place,) = ns.expand(model, path)
    assert place.site is not None
    doubled = {name: v.double() if v.is_floating_point() else v for name, v in inputs.items()}
    return values(bare, doubled, [place.site])[place.site][0]


@pytest.mark.parametrize("path", ["embed.output", "layers[1].output", "layers[2].heads[1].output", "layers[0].mid"])
def test_texts_and_images_are_read_through_the_processor(model, bare, processor, path: str) -> None:
    pictures = [seeing.picture(1), seeing.picture(2)]
    saved = ns.capture(model, {"text": TEXTS, "images": pictures}, f'{path}["image"]')
    for row, (text, picture, first) in enumerate(zip(TEXTS, pictures, (1, 0), strict=True)):
        expected = _hooked(bare, model, processor(text=text, images=picture, return_tensors="pt"), path)
        torch.testing.assert_close(saved.get(f'{path}["image"]')[row], expected[first : first + seeing.PIECES])


def test_an_encoding_gives_what_its_text_and_image_give(model, processor) -> None:
    path = 'layers[2].output["image"]'
    encoding = processor(text=TEXTS[0], images=seeing.picture(1), return_tensors="pt")
    by_text = ns.capture(model, {"text": TEXTS[0], "images": seeing.picture(1)}, path)
    assert torch.equal(ns.capture(model, encoding, path).get(path), by_text.get(path))
    assert torch.equal(ns.capture(model, [encoding], path).get(path), by_text.get(path))


def test_another_image_gives_other_numbers(model) -> None:
    path = "layers[2].output[-1]"
    one, other = (ns.capture(model, {"text": TEXTS[0], "images": seeing.picture(n)}, path).get(path) for n in (1, 2))
    assert (one - other).abs().max() > 1e-4


def test_messages_with_an_image_are_a_prompt(model) -> None:
    shown = [
        {"role": "user", "content": [{"type": "image", "image": seeing.picture(1)}, {"type": "text", "text": "w5 w6"}]}
    ]
    path = 'layers[1].output["image"]'
    expected = ns.capture(model, {"text": "<image> w5 w6", "images": seeing.picture(1)}, path).get(path)
    assert torch.equal(ns.capture(model, shown, path).get(path), expected)
    # Beside messages of text alone, which have no such span.
    both = ns.capture(model, [shown, [{"role": "user", "content": "w3 w4"}]], "layers[1].output[0]")
    torch.testing.assert_close(both.get("layers[1].output[0]")[:1], expected[:, 0])


def test_text_alone_runs_as_without_images(model, bare) -> None:
    found = ns.capture(model, "w3 w4 w5", "layers[1].output[:]").get("layers[1].output[:]")[0]
    torch.testing.assert_close(
        found, _hooked(bare, model, {"input_ids": torch.tensor([[3, 4, 5]])}, "layers[1].output")
    )


def test_a_trace_of_the_user_captures_prompts_with_images(model, bare, processor) -> None:
    encoding = processor(text=TEXTS[0], images=seeing.picture(1), return_tensors="pt")
    with model.trace(**encoding):
        saved = ns.save_activations(model, "layers[1].output[2:5]")
    torch.testing.assert_close(
        saved.get("layers[1].output[2:5]")[0], _hooked(bare, model, encoding, "layers[1].output")[2:5]
    )


# --- which image belongs to which prompt ------------------------------------------------------------------------------


def test_a_padded_batch_with_one_image_and_two_is_cut_by_prompt(model, processor) -> None:
    texts = ["w3 <image> w5 w6", "<image> w7 <image> w9", "w3 w4"]
    pictures = [seeing.picture(n) for n in range(3)]
    batch = processor(text=texts, images=[pictures[:1], pictures[1:], []], return_tensors="pt", padding=True)
    path = "layers[2].output[-1]"
    together = ns.capture(model, batch, path).get(path)
    alone = [
        ns.capture(model, {"text": text, "images": some}, path)
        for text, some in zip(texts[:2], [pictures[:1], pictures[1:]], strict=True)
    ]
    alone.append(ns.capture(model, "w3 w4", path))
    torch.testing.assert_close(together, torch.cat([one.get(path) for one in alone]))


def test_two_images_of_a_prompt_are_two_spans(model) -> None:
    given = encode(model, {"text": "<image> w7 <image>", "images": [seeing.picture(1), seeing.picture(2)]}, images=True)
    assert given.spans == {"image": ((0, 4),), "image 2": ((5, 9),)}
    assert given.take([0]).images == given.images


def _grids(rows: list[list[tuple[int, int]]]) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """A batch of Qwen's, padded on the left, of prompts with images of these grids, and each prompt by itself."""
    alone: list[dict[str, Tensor]] = []
    for number, grids in enumerate(rows):
        ids = [5 + number]
        for height, width in grids:
            ids += [1, *[images.IMAGE] * (height * width // 4), 2, 7]
        tokens = torch.tensor([ids])
        patches = sum(height * width for height, width in grids)
        alone.append(
            {
                "input_ids": tokens,
                "attention_mask": torch.ones_like(tokens),
                "mm_token_type_ids": (tokens == images.IMAGE).long(),
                "pixel_values": images.pixels(number, patches, 384),
                "image_grid_thw": torch.tensor([[1, h, w] for h, w in grids]),
            }
        )
    longest = max(one["input_ids"].shape[1] for one in alone)
    batch = {
        name: torch.cat(
            [torch.nn.functional.pad(one[name], (longest - one[name].shape[1], 0)) for one in alone]
            if one_per_token else [one[name] for one in alone]
        )
        for name, one_per_token in {
            "input_ids": True, "attention_mask": True, "mm_token_type_ids": True, "pixel_values": False,
            "image_grid_thw": False,
        }.items()
    }  # fmt: skip
    return batch, alone


def test_images_of_different_sizes_are_cut_by_their_grids() -> None:
    model, bare = ns.load(build("qwen2_vl"), tokenizer=False), build("qwen2_vl")
    batch, alone = _grids([[(4, 4)], [(4, 6), (4, 2)], [(2, 4)]])
    path = "layers[2].output[-1]"
    saved = ns.capture(model, batch, path).get(path)
    assert torch.equal(saved, ns.capture(model, alone, path).get(path))
    for row, inputs in enumerate(alone):
        torch.testing.assert_close(saved[row], _hooked(bare, model, inputs, "layers[2].output")[-1])


def test_which_image_belongs_to_which_prompt_is_not_guessed() -> None:
    model = ns.load(build("qwen2_vl"), tokenizer=False)
    batch, _ = _grids([[(4, 4)], [(4, 6)]])
    batch["image_grid_thw"] = torch.tensor([[1, 4, 10]])
    with pytest.raises(BadArgument, match="which image belongs to which prompt"):
        ns.capture(model, batch, "layers[0].output[-1]")


def test_a_model_that_keeps_a_prompts_images_is_left_as_it_was() -> None:
    """Qwen keeps the positions that it found in a prompt with an image, and the next prompt has others."""
    model, bare = ns.load(build("qwen2_vl"), tokenizer=False), build("qwen2_vl")
    ids = prompt(9)
    ns.capture(model, images.with_image("qwen2_vl", prompt(12), 1), "layers[2].output[-1]")
    found = ns.capture(model, ids, "layers[2].output[:]").get("layers[2].output[:]")[0]
    torch.testing.assert_close(found, _hooked(bare, model, {"input_ids": ids}, "layers[2].output"))


# --- spans of text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "bounds"),
    [(["w6", "w7 w8"], ((6, 7), (4, 6))), (["w3", "w10"], ((0, 1), (7, 8)))],
)
def test_a_span_of_text_counts_the_tokens_of_the_image_before_it(model, texts, bounds) -> None:
    prompts = {"text": TEXTS, "images": [seeing.picture(1), seeing.picture(2)]}
    given = encode(model, prompts, {"object": texts}, images=True)
    assert given.spans is not None
    assert given.spans["object"] == bounds
    words = seeing.processor().tokenizer
    assert [words.decode(given.ids[row][slice(*at)]) for row, at in enumerate(bounds)] == texts


def test_a_span_between_two_images_is_not_guessed(model) -> None:
    prompts = {"text": "<image> w7 <image> w8", "images": [seeing.picture(1), seeing.picture(2)]}
    with pytest.raises(SpanError, match="among the tokens of the images"):
        ns.capture(model, prompts, 'layers[0].output["object"]', spans={"object": "w7"})


# --- replays ----------------------------------------------------------------------------------------------------------


def test_an_images_tokens_are_written_into_a_run_with_another_image(model, bare, processor) -> None:
    one, other = (processor(text=TEXTS[0], images=seeing.picture(n), return_tensors="pt") for n in (1, 2))
    (place,) = ns.expand(model, "layers[1].heads[2].output")
    assert place.site is not None
    seen = _hooked(bare, model, one, "layers[1].heads[2].output")

    def edit(value: Tensor) -> Tensor:
        value[:, 1:5] = seen[1:5]
        return value

    inputs = {name: v.double() if v.is_floating_point() else v for name, v in other.items()}
    expected = run(bare, inputs, {place.site: edit})
    saved = ns.capture(model, one, 'layers[1].heads[2].output["image"]')
    torch.testing.assert_close(ns.patched_logits(model, other, saved), expected)
    assert (expected - bare(**inputs).logits).abs().max() > 1e-6


# --- mistakes ---------------------------------------------------------------------------------------------------------


def _with(processor: Any, **changed: Any) -> dict[str, Any]:
    encoding = dict(processor(text=TEXTS[0], images=seeing.picture(1), return_tensors="pt"))
    return {name: value for name, value in (encoding | changed).items() if value is not None}


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"pixel_values": torch.zeros(1, 1, 16, 16)}, ShapeError, "axis of channels has 1"),
        ({"pixel_values": torch.zeros(3, 16, 16)}, ShapeError, r"\[3, 16, 16\]"),
        ({"pixel_values": torch.zeros(1, 3, 16, 16, dtype=torch.long)}, ShapeError, "torch.int64"),
        ({"pixel_values": "a.png"}, BadType, "pixel_values of these prompts is"),
        ({"pixel_values": None}, BadArgument, "4 tokens that stand for an image"),
        ({"input_ids": torch.tensor([[3, 4, 5]]), "attention_mask": None}, BadArgument, "has no token for one"),
        ({"position_ids": torch.zeros(1, 7)}, BadArgument, "holds position_ids"),
        ({"pixel_values_videos": torch.zeros(1)}, BadArgument, "holds pixel_values_videos"),
        ({"token_type_ids": torch.zeros(1, 3)}, ShapeError, "token_type_ids of shape"),
    ],
)
def test_what_is_no_prompt_with_an_image_is_said(model, processor, changed, error, says: str) -> None:
    with pytest.raises(error, match=says):
        ns.capture(model, _with(processor, **changed), "layers[0].output[-1]")


@pytest.mark.parametrize(
    ("prompts", "error", "says"),
    [
        ("w3 <image>", BadArgument, "no image is given"),
        ({"text": TEXTS, "images": [None]}, ShapeError, "2 texts and 1 entries of images"),
        ({"text": [3], "images": [None]}, BadType, "the text beside the images"),
        ({"text": "w3", "images": [], "videos": []}, BadArgument, "has no 'videos'"),
    ],
)
def test_texts_and_images_that_do_not_go_together_are_said(model, prompts, error, says: str) -> None:
    with pytest.raises(error, match=says):
        ns.capture(model, prompts, "layers[0].output[-1]")


def test_a_model_without_a_processor_says_what_to_write() -> None:
    model = ns.load(seeing.build(), tokenizer=False)
    with pytest.raises(BadArgument, match="no processor") as caught:
        ns.capture(model, {"text": TEXTS[0], "images": seeing.picture(1)}, "layers[0].output[-1]")
    assert "processor=processor" in str(caught.value)


def test_a_model_of_text_takes_no_images(processor) -> None:
    with pytest.raises(BadArgument, match="reads no images"):
        ns.capture(ns.load("toy"), _with(processor), "layers[0].output[-1]")


@pytest.mark.parametrize("module", ["vision_tower.encoder.layers[0]", "vision_tower", "multi_modal_projector"])
def test_places_of_the_images_tower_are_refused_by_name(model, processor, module: str) -> None:
    with pytest.raises(NeverFired, match="does not run on tokens"):
        ns.capture(model, _with(processor), f"model.model.{module}.output[0]")


@pytest.mark.parametrize(
    "ask",
    [
        lambda model, prompts: ns.steering.generate(model, prompts),
        lambda model, prompts: ns.acdc(model, prompts, prompts, ns.logit_diff([3], [4]), threshold=0.1),
        lambda model, prompts: ns.lens.direct(model, prompts, ns.logit_diff([3], [4])),
    ],
)
def test_a_question_that_runs_on_tokens_alone_refuses_images(model, processor, ask) -> None:
    with pytest.raises(BadArgument, match="runs on tokens alone"):
        ask(model, _with(processor))


def test_a_list_of_texts_with_their_images_is_what_the_lists_of_both_are(model) -> None:
    path = 'layers[2].output["image"]'
    pictures = [seeing.picture(1), seeing.picture(2)]
    expected = ns.capture(model, {"text": TEXTS, "images": pictures}, path)
    each = [{"text": text, "images": picture} for text, picture in zip(TEXTS, pictures, strict=True)]
    assert ns.capture(model, each, path) == expected
