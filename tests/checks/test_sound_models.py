"""The checks pass on models of many families, and leave them as they were."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

import nnsplice as ns
from nnsplice.atlas import Atlas, unwrap
from nnsplice.checks import CHECKS, Finding, outline, run_checks
from nnsplice.errors import BadArgument
from nnsplice.paths import Slice
from zoo import MASKED, build, tokenizer, wrap

FAMILIES = ("gpt2", "llama", "gemma2", "opt", "mixtral", "bloom", "falcon", "gpt_neox", "granite", "t5", "bart", "bert")


def _failed(findings: list[Finding]) -> set[str]:
    return {finding.what for finding in findings if finding.state == "FAILED"}


@pytest.mark.parametrize(
    ("family", "attention"), [*((family, "eager") for family in FAMILIES), ("gpt2", "sdpa"), ("t5", "sdpa")]
)
def test_every_check_passes_on_every_family(family: str, attention: str) -> None:
    findings = list(run_checks(wrap(family, attn_implementation=attention)))
    assert _failed(findings) == set()
    ok = {finding.check for finding in findings if finding.state == "ok"}
    missing = {"causal"} if family in MASKED else set()
    assert ok == set(CHECKS) - missing
    patterns = {finding.state for finding in findings if finding.what.endswith("pattern")}
    assert patterns == {"ok" if attention == "eager" else "skipped"}


def test_every_check_passes_on_the_toy() -> None:
    assert not _failed(list(run_checks(ns.load("toy"), Slice(0, 2), seed=3)))


def test_a_check_leaves_the_model_as_it_was() -> None:
    model = wrap("llama")
    before = {name: tensor.clone() for name, tensor in unwrap(model).state_dict().items()}
    list(run_checks(model))
    after = unwrap(model).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in unwrap(model).modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in unwrap(model).parameters())


def test_layers_narrow_what_is_looked_at() -> None:
    findings = list(run_checks(wrap("t5"), -1))
    assert {f.what for f in findings if f.check == "heads"} == {
        "encoder.layers[2].heads[:].output",
        "layers[2].heads[:].output",
        "layers[2].cross.heads[:].output",
    }


def test_a_model_in_training_mode_is_refused(model) -> None:
    unwrap(model).train()
    try:
        with pytest.raises(BadArgument, match=r"training mode[\s\S]*model\.eval\(\)"):
            list(run_checks(model))
    finally:
        unwrap(model).eval()


def test_a_model_whose_parts_are_not_recognised_fails_one_check_and_skips_the_rest() -> None:
    module = hf.XLNetLMHeadModel(hf.XLNetConfig(vocab_size=64, d_model=8, n_layer=1, n_head=2, d_inner=8)).eval()
    findings = list(run_checks(ns.load(module, tokenizer=tokenizer(), task="text-generation")))
    assert [finding.state for finding in findings] == ["FAILED"] + ["skipped"] * (len(CHECKS) - 1)
    assert "two streams run through its layers" in findings[0].detail


@pytest.mark.parametrize("family", FAMILIES)
def test_an_outline_needs_no_weights(family: str) -> None:
    module = build(family)
    with torch.device("meta"):
        empty = type(module)(module.config)
    assert outline(Atlas.of(empty)) == outline(Atlas.of(module))
