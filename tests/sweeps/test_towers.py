"""Models of two towers: every kind of site of both, and of the attention between them, against torch hooks alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import nnsplice as ns
import unusual
import zoo
from activations.oracle import hooked, run, values
from nnsplice.activations.access import site_of

_BARTS: dict[str, Any] = {
    "vocab_size": zoo.VOCAB, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 0,
}  # fmt: skip
_T5S: dict[str, Any] = {
    "vocab_size": zoo.VOCAB, "d_model": 16, "d_kv": 6, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2,
    "num_heads": 4, "relative_attention_num_buckets": 8, "decoder_start_token_id": 0, "pad_token_id": 0,
    "eos_token_id": 1,
}  # fmt: skip
#: Family -> its class and the arguments of its config.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", _T5S),
    "t5/gated": ("T5ForConditionalGeneration", {**_T5S, "feed_forward_proj": "gated-gelu"}),
    "longt5": ("LongT5ForConditionalGeneration", _T5S),
    "mt5": ("MT5ForConditionalGeneration", _T5S),
    "umt5": ("UMT5ForConditionalGeneration", _T5S),
    "bart": ("BartForConditionalGeneration", _BARTS),
    "mbart": ("MBartForConditionalGeneration", _BARTS),
    "marian": ("MarianMTModel", _BARTS),
    "pegasus": ("PegasusForConditionalGeneration", _BARTS),
    "m2m_100": ("M2M100ForConditionalGeneration", _BARTS),
    "plbart": ("PLBartForConditionalGeneration", _BARTS),
    "blenderbot": ("BlenderbotForConditionalGeneration", _BARTS),
}
HEARS = "whisper"
METRIC = ns.logit_diff(7, 8)

#: What a layer of each tower has, and a layer's attention to the other tower.
_LAYER = ("output", "input", "attn.output", "mlp.output", "heads[:].output", "heads[1].q", "groups[2].k", "groups[2].v",
          "neurons[3].output")  # fmt: skip
_CROSS = ("cross.output", "cross.heads[:].output", "cross.heads[1].q", "cross.groups[2].k", "cross.groups[2].v",
          "cross.q.output", "cross.v.output", "cross.o.output")  # fmt: skip
SITES = [
    *(f"{tower}.layers[:].{place}" for tower in ("encoder", "decoder") for place in _LAYER),
    *(f"layers[:].{place}" for place in _CROSS),
    "encoder.embed.output",
    "encoder.final_norm.output",
]


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def build(name: str) -> Any:
    """A tiny random model in float64; the same weights on every call."""
    if name == HEARS:
        return unusual.build(name)
    kind, arguments = FAMILIES[name]
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(hf, kind)(getattr(hf, kind).config_class(**arguments, attn_implementation="eager"))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.double().eval()


def load(name: str) -> Any:
    """The same inside nnsplice; the first prompt shows how a model runs that reads no tokens."""
    with quiet():
        model = ns.load(build(name), tokenizer=zoo.tokenizer(), task="text-generation")
    ns.capture(model, pair(name)[0], "layers[0].output[-1]")
    return model


def pair(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two prompts that differ in both towers."""
    decoders = torch.tensor([[0, 9, 5]]), torch.tensor([[0, 4, 5]])
    if name == HEARS:
        sounds = torch.randn(2, 1, 8, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return tuple({"input_features": s, "decoder_input_ids": d} for s, d in zip(sounds, decoders, strict=True))  # type: ignore[return-value]
    encoders = torch.tensor([[3, 4, 5, 6]]), torch.tensor([[3, 9, 5, 7]])
    return tuple({"input_ids": e, "decoder_input_ids": d} for e, d in zip(encoders, decoders, strict=True))  # type: ignore[return-value]


def _truth(bare: Any, clean: dict[str, Tensor], corrupted: dict[str, Tensor], place: ns.Path, at: int) -> float:
    site = site_of(place)
    source = values(bare, clean, [site])[site]

    def edit(value: Tensor) -> Tensor:
        value[:, at] = source[:, at]
        return value

    logits = run(bare, corrupted, {site: edit})[0, -1]
    return float(logits[7] - logits[8])


@pytest.mark.parametrize("name", [*FAMILIES, HEARS])
def test_sweeps_of_both_towers_and_between_them(name: str) -> None:
    model, bare = load(name), build(name)
    clean, corrupted = pair(name)
    sites = zoo.having(model, SITES)
    assert {site for site in SITES if "cross" in site} <= set(sites), name
    length = 16 if name == HEARS else 4
    # Two tokens of the encoder, and all of the decoder.
    asked = [f"{place}[{at}]" for site in sites for place in ns.expand(model, site)
             for at in ((1, length - 1) if site_of(place).tower == "encoder" else (0, 2))]  # fmt: skip
    result = ns.sweep(model, clean, corrupted, asked, METRIC, progress=False)
    cells = {cell.path: float(result.table.values[0, n]) for n, cell in enumerate(result.table.cells)}
    assert result.run.executor == "batched"
    plain = run(bare, corrupted, {})[0, -1]
    moved = 0
    for place in ns.expand(model, sites):
        for at in (1, length - 1) if site_of(place).tower == "encoder" else (0, 2):
            expected = _truth(bare, clean, corrupted, place, at)
            assert cells[str(place.at(at))] == pytest.approx(expected, abs=1e-11), (str(place), at)
            moved += abs(expected - float(plain[7] - plain[8])) > 1e-9
    assert moved > len(cells) // 2


@pytest.mark.parametrize("name", ["t5", "bart", HEARS])
def test_zeros_and_gradients_in_both_towers(name: str) -> None:
    model, bare = load(name), build(name)
    clean, corrupted = pair(name)
    places = [
        "encoder.layers[0].mlp.output[1]",
        "layers[1].cross.heads[2].output[-1]",
        "layers[0].cross.groups[1].v[2]",
        "layers[0].cross.output[1]",
        "encoder.layers[1].heads[0].output[0]",
    ]
    found = ns.ablate(model, corrupted, places, METRIC, progress=False)
    zeros = {cell.path: float(found.table.values[0, n]) for n, cell in enumerate(found.table.cells)}
    estimates = ns.attribute(model, clean, corrupted, places, METRIC, progress=False)
    slopes = {cell.path: float(estimates.table.values[0, n]) for n, cell in enumerate(estimates.table.cells)}
    base = float(estimates.table.corrupted[0])
    for place in ns.expand(model, places):
        site, at = site_of(place), place.position
        assert isinstance(at, int)

        def zero(value: Tensor, at: int = at) -> Tensor:
            value[:, at] = 0
            return value

        logits = run(bare, corrupted, {site: zero})[0, -1]
        assert zeros[str(place)] == pytest.approx(float(logits[7] - logits[8]), abs=1e-11)
        source, here = (values(bare, inputs, [site])[site][:, at] for inputs in (clean, corrupted))
        # The slope of a step along the way to the clean value.
        step = torch.zeros((), dtype=torch.float64, requires_grad=True)

        def along(value: Tensor, at: int = at, way: Tensor = source - here, step: Tensor = step) -> Tensor:
            value[:, at] = value[:, at] + step * way
            return value

        hook = hooked(bare, site, 1, along)
        logits = bare(**corrupted).logits[0, -1]
        hook.remove()
        (slope,) = torch.autograd.grad(logits[7] - logits[8], [step])
        assert slopes[str(place)] - base == pytest.approx(float(slope), abs=1e-11)


@pytest.mark.parametrize("name", ["t5", "bart", HEARS])
def test_patterns_of_cross_attention_are_read_and_written(name: str) -> None:
    model, bare = load(name), build(name)
    clean, corrupted = pair(name)
    head = 2
    path = f"layers[1].cross.heads[{head}].pattern"
    there, here = (ns.capture(model, inputs, f"{path}[:]") for inputs in (clean, corrupted))
    with torch.no_grad():
        shown = bare(**clean, output_attentions=True).cross_attentions[1][0, head]
    read = torch.stack([there[f"{path}[{query}]"][0] for query in range(3)])
    assert torch.allclose(read, shown, rtol=0, atol=1e-12) and read.shape[0] == 3 and read.shape[1] in (4, 16)
    # The own pattern changes nothing; another's mixes this run's values.
    plain = run(bare, corrupted, {})
    assert torch.allclose(ns.patched_logits(model, corrupted, here), plain, rtol=0, atol=1e-11)
    (value,) = ns.expand(model, f"layers[1].cross.groups[{head}].v")
    mixed = shown @ values(bare, corrupted, [site_of(value)])[site_of(value)][0]
    (slice_,) = ns.expand(model, f"layers[1].cross.heads[{head}].output")

    def write(tensor: Tensor) -> Tensor:
        tensor[0] = mixed
        return tensor

    expected = run(bare, corrupted, {site_of(slice_): write})
    assert torch.allclose(ns.patched_logits(model, corrupted, there), expected, rtol=0, atol=1e-11)
    assert float((expected - plain).abs().max()) > 1e-6
    result = ns.sweep(model, clean, corrupted, f"{path}[0:2]", METRIC, progress=False)
    assert result.table.values.shape == (1, 2) and result.run.executor == "reference"


def test_a_batch_of_sounds_runs_as_each_does_alone() -> None:
    model = load(HEARS)
    clean, corrupted = pair(HEARS)
    both = {name: torch.cat([clean[name], corrupted[name]]) for name in clean}
    other = {name: torch.cat([corrupted[name], clean[name]]) for name in clean}
    site = "layers[:].cross.heads[:].output[-1]"
    together = ns.sweep(model, both, other, site, METRIC, progress=False)
    for row, (one, two) in enumerate([(clean, corrupted), (corrupted, clean)]):
        alone = ns.sweep(model, one, two, site, METRIC, progress=False)
        assert together.table.values[row] == pytest.approx(alone.table.values[0], abs=1e-11)
    # The same sound on both sides, and one that is told apart by its last digit.
    with pytest.warns(UserWarning, match="nothing can differ"):
        same = ns.sweep(model, clean, clean, site, METRIC, progress=False)
    assert set(same.table.values[0]) == {same.table.corrupted[0]}
    bent = {**clean, "input_features": clean["input_features"] + 1e-12}
    assert len(ns.plan_sweep(model, clean, bent, site, METRIC)) == 12


def test_sounds_are_refused_where_they_would_be_left_out() -> None:
    model = load(HEARS)
    clean, _ = pair(HEARS)
    with pytest.raises(ns.errors.BadArgument, match=r"attention_mask stands beside input_features, and would be left"):
        ns.capture(model, {**clean, "attention_mask": torch.ones(1, 32)}, "encoder.layers[0].output[0]")
    with pytest.raises(ns.errors.ShapeError, match=r"takes no features of shape \[8, 30\]"):
        ns.capture(model, {"input_features": torch.zeros(1, 8, 30)}, "encoder.layers[0].output[0]")
    with pytest.raises(ns.errors.BadArgument, match="2 rows of decoder_input_ids"):
        ns.capture(model, {**clean, "decoder_input_ids": torch.ones(2, 3).long()}, "layers[0].output[0]")
    with pytest.raises(ns.errors.BadArgument, match=r"these prompts are input_features, .* tokens alone"):
        ns.lens.logit(model, clean, "layers[:].output[-1]")
    with pytest.raises(ns.errors.OutOfRange):
        ns.capture(model, clean, "layers[0].cross.heads[9].output[-1]")


def test_cross_attention_is_refused_by_name_where_there_is_none() -> None:
    gpt2 = zoo.wrap("gpt2")
    with pytest.raises(ns.errors.UnknownPath, match="attends to no other tower"):
        ns.capture(gpt2, "w3 w4", "layers[0].cross.heads[0].output[-1]")
    t5 = load("t5")
    with pytest.raises(ns.errors.UnknownPath, match="attends to no other tower"):
        ns.capture(t5, "w3 w4", "encoder.layers[0].cross.output[-1]")
    clean, corrupted = pair("t5")
    with pytest.raises(
        ns.errors.RefusedPlace, match=r"(?s)edges of cross-attention.*write: layers\[0\].*pattern\[-1\]"
    ):
        ns.ablate(t5, clean, "layers[0].cross.heads[0].pattern[-1][2]", METRIC, operation="knockout", progress=False)
    with pytest.raises(ns.errors.RefusedPlace, match="edges of cross-attention"):
        ns.ablate(t5, corrupted, "layers[0].cross.heads[0].pattern[-1]", METRIC, operation="knockout", progress=False)
    with pytest.raises(ns.errors.PathError, match=r"layers\[0\].cross.groups\[:\].v"):
        ns.capture(t5, "w3 w4", "layers[0].cross.groups[:].output[-1]")


def test_an_encoder_that_is_not_recognised_is_told() -> None:
    """LED's reads windows with projections of its own; its decoder, and what that reads of it, are served."""
    sizes: dict[str, Any] = {
        "max_encoder_position_embeddings": 64,
        "max_decoder_position_embeddings": 64,
        "attention_window": 4,
    }
    with quiet():
        config = hf.LEDConfig(**_BARTS, **sizes)
        model = ns.load(hf.LEDForConditionalGeneration(config).double().eval(), tokenizer=zoo.tokenizer())
    with pytest.raises(ns.errors.UnrecognisedModel, match="the layers of this model's encoder are not recognised"):
        ns.capture(model, pair("t5")[0], "encoder.layers[0].output[0]")
    saved = ns.capture(model, pair("t5")[0], ["layers[0].cross.heads[0].output[0]", "layers[0].cross.groups[0].k[3]"])
    assert len(saved) == 2


@pytest.mark.parametrize("sender", ["layers[0].cross.heads[0].output", "encoder.layers[0].mlp.output"])
def test_path_patching_refuses_two_towers(sender: str) -> None:
    clean, corrupted = pair("t5")
    with pytest.raises(ns.errors.NnspliceError, match="tower"):
        ns.path_patch(load("t5"), clean, corrupted, sender, "unembed", METRIC, progress=False)


def test_weights_of_cross_attention() -> None:
    atlas = ns.Atlas.of(build("t5"))
    attention = "decoder.block.1.layer.1.EncDecAttention"
    assert set(atlas.resolve("layers[1].cross").parts) == {f"{attention}.{row}.weight" for row in "qkvo"}
    assert atlas.resolve("layers[1].cross.heads[2]").parts == {
        **{f"{attention}.{row}.weight": (0, ((12, 18),)) for row in "qkv"},
        f"{attention}.o.weight": (1, ((12, 18),)),
    }
    assert set(atlas.resolve("layers[1].cross.q").parts) == {f"{attention}.q.weight"}
    assert not set(atlas.resolve("layers[1].attn").parts) & set(atlas.resolve("layers[1].cross").parts)


@pytest.mark.parametrize("tower", ["encoder", "decoder"])
def test_knockouts_inside_a_tower(tower: str) -> None:
    """BART's; T5's attention is given a bias by position, which is refused by that name."""
    model, bare = load("bart"), build("bart")
    clean, _ = pair("bart")
    place = f"{tower}.layers[1].heads[2]"
    found = ns.ablate(model, clean, f"{place}.pattern[2][1]", METRIC, operation="knockout", progress=False)
    with torch.no_grad():
        ran = bare(**clean, output_attentions=True)
    shares = (ran.encoder_attentions if tower == "encoder" else ran.decoder_attentions)[1][0, 2, 2].clone()
    shares[1] = 0
    slice_, value = (
        site_of(ns.expand(model, path)[0]) for path in (f"{place}.output", f"{tower}.layers[1].groups[2].v")
    )
    mixed = (shares / shares.sum()) @ values(bare, clean, [value])[value][0]

    def write(tensor: Tensor) -> Tensor:
        tensor[0, 2] = mixed
        return tensor

    logits = run(bare, clean, {slice_: write})[0, -1]
    assert float(found.table.values[0, 0]) == pytest.approx(float(logits[7] - logits[8]), abs=1e-11)
    with pytest.raises(ns.errors.NnspliceError, match="its attention is given position_bias"):
        ns.ablate(load("t5"), pair("t5")[0], f"{place}.pattern[2][1]", METRIC, operation="knockout", progress=False)
