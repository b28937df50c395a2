"""Patching between two images: every layer and token as plain hooks say, by every executor that is right for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import nnsplice as ns
from activations.oracle import Edit, run, values
from families import images
from families.build import build, prompt
from nnsplice.activations.encoding import encode
from nnsplice.errors import BadArgument, ShapeError, SpanError
from nnsplice.sweeps.plan_files import write_plan

METRIC = ns.logit_diff({5}, {9})
LENGTH = 10
FAMILIES = ("llava", "idefics3", "qwen2_vl", "qwen3_vl", "gemma3", "paligemma")


def _difference(logits: Tensor) -> float:
    return float(logits[0, -1, 5] - logits[0, -1, 9])


class Family:
    """A family's model inside nnsplice, the bare module, and prompts with an image."""

    def __init__(self, name: str) -> None:
        self.name, self.bare = name, build(name)
        self.model = ns.load(build(name), tokenizer=False)

    def prompt(self, seed: int, shift: int = 0) -> dict[str, Tensor]:
        return images.with_image(self.name, prompt(LENGTH, shift), seed)

    def metric(self, inputs: dict[str, Tensor], edits: dict[Any, Edit]) -> float:
        return _difference(run(self.bare, inputs, edits))

    def truth(self, clean: dict[str, Tensor], corrupted: dict[str, Tensor], paths: str) -> Tensor:
        """`[place, token]`: the metric of the corrupted run with one token of one site from the clean one."""
        sites = [place.site for place in ns.expand(self.model, paths)]
        seen = values(self.bare, clean, sites)  # type: ignore[arg-type]

        def patched(site: Any, token: int) -> float:
            def edit(value: Tensor) -> Tensor:
                value[:, token] = seen[site][:, token]
                return value

            return self.metric(corrupted, {site: edit})

        each = [[patched(site, token) for token in range(LENGTH)] for site in sites]
        return torch.tensor(each, dtype=torch.float64)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> Family:
    return Family(request.param)


@pytest.fixture(scope="module")
def llava() -> Family:
    return Family("llava")


@pytest.mark.parametrize("paths", ["layers[:].output", "layers[0,2].heads[:].output"])
def test_every_layer_and_token_between_two_images_is_exact(family: Family, paths: str) -> None:
    clean, corrupted = family.prompt(1), family.prompt(2)
    truth = family.truth(clean, corrupted, paths)
    result = ns.sweep(family.model, clean, corrupted, f"{paths}[:]", METRIC, progress=False)
    torch.testing.assert_close(torch.tensor(result.table.values[0]).reshape(truth.shape), truth, rtol=0, atol=1e-10)
    assert result.table.clean[0] == pytest.approx(family.metric(clean, {}), abs=1e-10)
    assert result.table.corrupted[0] == pytest.approx(family.metric(corrupted, {}), abs=1e-10)
    # A token of the image counts, in the first layer at least.
    moved = truth[0, images.FIRST : images.FIRST + images.PIECES] - family.metric(corrupted, {})
    assert moved.abs().max() > 1e-3


def test_tokens_of_the_image_are_a_cell_each_or_one_together(llava: Family) -> None:
    clean, corrupted = llava.prompt(1), llava.prompt(2)
    (site,) = (place.site for place in ns.expand(llava.model, "layers[1].output"))
    (seen,) = values(llava.bare, clean, [site]).values()  # type: ignore[list-item]
    at = slice(images.FIRST, images.FIRST + images.PIECES)

    def edit(value: Tensor) -> Tensor:
        value[:, at] = seen[:, at]
        return value

    path = 'layers[1].output["image"]'
    result = ns.sweep(llava.model, clean, corrupted, path, METRIC, progress=False)
    assert result.table.values[0].tolist() == pytest.approx([llava.metric(corrupted, {site: edit})], abs=1e-10)
    one = ns.sweep(llava.model, clean, corrupted, 'layers[1].output["image"][1]', METRIC, progress=False)
    truth = llava.truth(clean, corrupted, "layers[1].output")
    assert one.table.values[0].tolist() == pytest.approx([float(truth[0, images.FIRST + 1])], abs=1e-10)


def test_an_ablation_of_the_image_is_exact(llava: Family) -> None:
    inputs = llava.prompt(1)
    (site,) = (place.site for place in ns.expand(llava.model, "layers[0].attn.output"))

    def edit(value: Tensor) -> Tensor:
        value[:, images.FIRST : images.FIRST + images.PIECES] = 0
        return value

    result = ns.ablate(llava.model, inputs, 'layers[0].attn.output["image"]', METRIC, operation="zero", progress=False)
    assert result.table.values[0].tolist() == pytest.approx([llava.metric(inputs, {site: edit})], abs=1e-10)


@pytest.mark.parametrize("name", ["llava", "mistral3", "qwen2_vl", "gemma3"])
def test_an_edge_to_an_images_token_is_cut_as_its_share_says(name: str) -> None:
    """Attention of the vision tower runs beside it, which llava and mistral3 give arguments of its own."""
    family = Family(name)
    inputs, key, head = family.prompt(1), images.FIRST + 1, "layers[1].heads[1]"
    text = family.bare.config.get_text_config()
    group = text.num_key_value_heads // text.num_attention_heads
    out, value = (
        place.site for place in ns.expand(family.model, [f"{head}.output", f"layers[1].groups[{group}].v"])[::-1]
    )
    with torch.no_grad():
        shares = family.bare(**inputs, output_attentions=True).attentions[1][0, 1, -1].double()
    was, shares[key] = float(shares[key]), 0
    (seen,) = values(family.bare, inputs, [value]).values()  # type: ignore[list-item]

    def edit(slices: Tensor) -> Tensor:
        slices[0, -1] = shares / shares.sum() @ seen[0]
        return slices

    path = f"{head}.pattern[-1][{key}]"
    found = ns.ablate(family.model, inputs, path, METRIC, operation="knockout", progress=False)
    assert found.table.values[0].tolist() == pytest.approx([family.metric(inputs, {out: edit})], abs=1e-6)
    moved = bool(abs(found.table.values[0, 0] - found.table.clean[0]) > 1e-4)
    assert moved == (was > 0)  # outside of a window nothing is cut


def test_noise_on_an_image_is_drawn_in_the_size_of_what_enters_the_layers(llava: Family) -> None:
    inputs = llava.prompt(1)
    bounds = (images.FIRST, images.FIRST + images.PIECES)
    noise = torch.randn(1, images.PIECES, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (site,) = (place.site for place in ns.expand(llava.model, "embed.output"))

    def edit(value: Tensor) -> Tensor:
        value[:, slice(*bounds)] += noise[0]
        return value

    traced = ns.causal_trace(llava.model, inputs, bounds, noise=noise, answer=5, progress=False)
    expected = run(llava.bare, inputs, {site: edit})[0, -1].softmax(-1)[5]  # type: ignore[dict-item]
    assert float(traced.table.corrupted[0]) == pytest.approx(float(expected), abs=1e-10)
    one, two = (
        ns.causal_trace(llava.model, inputs, bounds, samples=1, noise=size, answer=5, progress=False).table.corrupted[0]
        for size in (1.0, 3.0)
    )
    assert one != two


# --- which executor ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gemma3", "no causal decoder"),
        ("paligemma", "no causal decoder"),
        ("qwen3_vl", "added to its stream between its layers"),
    ],
)
def test_packed_rows_are_refused_where_they_would_be_wrong(name: str, reason: str) -> None:
    family = Family(name)
    with pytest.raises(NotImplementedError, match=reason):
        ns.sweep(
            family.model, family.prompt(1), family.prompt(2), "layers[0].output[:]", METRIC, executor="packed",
            progress=False,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "causal"), [("llava", True), ("qwen2_vl", True), ("gemma3", False), ("paligemma", False)]
)
def test_whether_an_image_is_read_forwards_is_measured(name: str, causal: bool) -> None:
    family = Family(name)
    assert encode(family.model, family.prompt(1), images=True).is_causal(family.model) is causal


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_packed_rows_are_exact_where_images_are_read_forwards(name: str) -> None:
    family = Family(name)
    pairs = [family.prompt(1), family.prompt(3, 23)], [family.prompt(2), family.prompt(4, 23)]
    result = ns.sweep(family.model, *pairs, "layers[:].output[:]", METRIC, executor="packed", progress=False)
    for row, (clean, corrupted) in enumerate(zip(*pairs, strict=True)):
        truth = family.truth(clean, corrupted, "layers[:].output")
        torch.testing.assert_close(torch.tensor(result.table.values[row]), truth.flatten(), rtol=0, atol=1e-10)


# --- prompts that differ in their images alone ------------------------------------------------------------------------


def test_the_tokens_before_an_image_are_the_only_ones_that_are_known_without_a_run(family: Family) -> None:
    plan = ns.plan_sweep(family.model, family.prompt(1), family.prompt(2), "layers[0].output[:]", METRIC)
    known = {plan.targets[number].cell.path for _, number in plan.known}
    assert known <= {f"layers[0].output[{token}]" for token in range(images.FIRST)}


def test_one_image_twice_is_one_run_and_is_said(llava: Family) -> None:
    with pytest.warns(UserWarning, match="nothing can differ"):
        ns.plan_sweep(llava.model, llava.prompt(1), llava.prompt(1), "layers[0].output[:]", METRIC)


def test_another_image_is_another_sweep(llava: Family) -> None:
    plans = [
        ns.plan_sweep(llava.model, llava.prompt(1), llava.prompt(seed), "layers[0].output[3]", METRIC)
        for seed in (2, 3)
    ]
    assert plans[0].asked["clean"] == plans[1].asked["clean"]
    assert plans[0].asked["corrupted"] != plans[1].asked["corrupted"]


def _sized(name: str, height: int, width: int, more: int = 0) -> dict[str, Tensor]:
    """A prompt of Qwen's with an image of this grid."""
    tokens = torch.tensor([[5, 1, *[images.IMAGE] * (height * width // 4), 2, *range(7, 9 + more)]])
    return {
        "input_ids": tokens,
        "mm_token_type_ids": (tokens == images.IMAGE).long(),
        "pixel_values": images.pixels(height, height * width, 384),
        "image_grid_thw": torch.tensor([[1, height, width]]),
    }


def test_images_of_different_sizes_in_a_pair_are_refused() -> None:
    model = ns.load(build("qwen2_vl"), tokenizer=False)
    small, large = _sized("qwen2_vl", 4, 4, 2), _sized("qwen2_vl", 4, 6)
    with pytest.raises(ShapeError, match="positions do not correspond"):
        ns.sweep(model, _sized("qwen2_vl", 4, 4), large, "layers[0].output[:]", METRIC, progress=False)
    for align in ("position", "end"):
        with pytest.raises(SpanError, match="image"):
            ns.sweep(model, small, large, 'layers[0].output["image"]', METRIC, align=align, progress=False)


def test_images_of_different_sizes_run_beside_each_other() -> None:
    """Prompts of as many tokens, whose images have other grids and stand at other positions."""
    model, bare = ns.load(build("qwen2_vl"), tokenizer=False), build("qwen2_vl")
    rows = [_sized("qwen2_vl", 4, 4, 2), _sized("qwen2_vl", 4, 6), _sized("qwen2_vl", 6, 4)]
    assert len({one["input_ids"].shape for one in rows}) == 1
    zeroed = ns.ablate(model, rows, "layers[1].output[3]", METRIC, operation="zero", progress=False)
    (site,) = (place.site for place in ns.expand(model, "layers[1].output"))

    def edit(value: Tensor) -> Tensor:
        value[:, 3] = 0
        return value

    for row, inputs in enumerate(rows):
        expected = _difference(run(bare, inputs, {site: edit}))  # type: ignore[dict-item]
        assert zeroed.table.values[row].tolist() == pytest.approx([expected], abs=1e-10)


# --- what images are refused by ---------------------------------------------------------------------------------------


def test_answers_of_several_tokens_are_appended_behind_the_image() -> None:
    family = Family("qwen2_vl")
    inputs, answer = family.prompt(1), [5, 9]
    metric = ns.sequence_log_probability([answer])
    result = ns.ablate(family.model, inputs, "layers[0].output[3]", metric, operation="zero", progress=False)
    longer = torch.cat([inputs["input_ids"], torch.tensor([[5]])], 1)
    whole = {**inputs, "input_ids": longer, "attention_mask": torch.ones_like(longer),
             "mm_token_type_ids": (longer == images.IMAGE).long()}  # fmt: skip
    shares = run(family.bare, whole, {})[0].log_softmax(-1)
    assert float(result.table.clean[0]) == pytest.approx(float(shares[-2, 5] + shares[-1, 9]), abs=1e-10)
    with pytest.raises(BadArgument, match="does not read forwards only"):
        pali = Family("paligemma")
        ns.ablate(pali.model, pali.prompt(1), "layers[0].output[3]", metric, operation="zero", progress=False)


def test_a_plan_with_images_is_not_written_to_files(llava: Family, tmp_path) -> None:
    plan = ns.plan_sweep(llava.model, llava.prompt(1), llava.prompt(2), "layers[0].output[3]", METRIC)
    with pytest.raises(BadArgument, match="these prompts have images"):
        write_plan(plan, tmp_path)


# --- beside sweeps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen3_vl", "paligemma"])
def test_a_path_from_the_image_to_a_later_layer_is_exact(name: str) -> None:
    """Only the keys of one group learn of the patch: every other part is held as it was."""
    family = Family(name)
    clean, corrupted = family.prompt(1), family.prompt(2)
    parts = ["layers[:].attn.output", "layers[:].mlp.output"]
    sites = {str(place): place.site for place in ns.expand(family.model, parts)}
    receiver, sender = "layers[2].groups[1].k", "layers[0].attn.output"
    (read,) = (place.site for place in ns.expand(family.model, receiver))
    here, there = (values(family.bare, inputs, list(sites.values())) for inputs in (corrupted, clean))  # type: ignore[arg-type]
    at = images.FIRST + 1

    def held(path: str) -> Edit:
        def edit(value: Tensor) -> Tensor:
            value[:] = here[sites[path]]  # type: ignore[index]
            if path == sender:
                value[:, at] = there[sites[path]][:, at]  # type: ignore[index]
            return value

        return edit

    seen: dict[Any, Tensor] = {}

    def keep(value: Tensor) -> Tensor:
        seen["value"] = value.clone()
        return value

    run(family.bare, corrupted, {**{sites[path]: held(path) for path in sites}, read: keep})
    expected = family.metric(corrupted, {read: lambda _: seen["value"]})
    assert expected != family.metric(corrupted, {})
    result = ns.path_patch(family.model, clean, corrupted, f"{sender}[{at}]", receiver, METRIC, progress=False)
    assert result.table.values[0].tolist() == pytest.approx([expected], abs=1e-9)


def test_a_way_between_embeddings_is_refused_where_images_enter_elsewhere_too() -> None:
    asked = {"sites": "layers[1].output[:]", "metric": METRIC, "method": "ig", "progress": False}
    deep, llava = Family("qwen3_vl"), Family("llava")
    with pytest.raises(BadArgument, match="beside their embeddings"):
        ns.attribute(deep.model, deep.prompt(1), deep.prompt(2), **asked)
    result = ns.attribute(llava.model, llava.prompt(1), llava.prompt(2), **{**asked, "sites": "embed[:]", "steps": 20})
    table = result.table
    total = float((table.values[0] - table.corrupted[0]).sum())
    assert total == pytest.approx(float(table.clean[0] - table.corrupted[0]), rel=1e-3)
    with pytest.raises(BadArgument, match="not estimated for prompts with images"):
        ns.attribute(llava.model, llava.prompt(1), llava.prompt(2), **{**asked, "method": "eap"})


def test_the_logit_lens_reads_an_images_tokens(llava: Family) -> None:
    inputs = llava.prompt(1)
    found = ns.lens.logit(llava.model, inputs, 'layers[2].output["image"][1]', progress=False)
    expected = run(llava.bare, inputs, {})[0, images.FIRST + 1].argmax()
    assert int(found.ids[0, 0, 0]) == int(expected)
