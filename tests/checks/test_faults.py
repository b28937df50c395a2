"""Every check finds the fault that it is there for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

from nnsplice.atlas import Atlas, Block, atlas, fingerprint, unwrap
from nnsplice.checks import CHECKS, Finding, run_checks, subject_of, summary
from zoo import wrap


def _failed(findings: list[Finding]) -> set[str]:
    return {finding.what for finding in findings if finding.state == "FAILED"}


def _of(model: Any, check: str) -> list[Finding]:
    return list(CHECKS[check](subject_of(model)))


@pytest.fixture
def misread(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the atlas of a model say something else of every block."""

    def change(model: Any, **parts: Callable[[Block], Any]) -> None:
        root = unwrap(model)
        right = Atlas.of(root)
        towers = {
            name: replace(
                tower,
                blocks=tuple(
                    replace(block, **{part: new(block) for part, new in parts.items()}) for block in tower.blocks
                ),
            )
            for name, tower in right.towers.items()
        }
        monkeypatch.setitem(atlas._ATLASES, root, (fingerprint(root), replace(right, towers=towers)))

    return change


def _layout(**changes: Any) -> Callable[[Block], Any]:
    return lambda block: replace(block.layout, **changes)  # pyright: ignore[reportArgumentType]


def test_parts_finds_heads_that_the_config_does_not_speak_of(misread) -> None:
    model = wrap("gpt2")
    misread(model, layout=_layout(n_heads=8, n_kv=8, head_dim=2))
    (finding,) = _of(model, "parts")
    assert finding.state == "FAILED" and finding.detail == "the config says 4 heads"


def test_parts_finds_heads_of_unknown_number(misread) -> None:
    model = wrap("llama")
    misread(model, layout=lambda block: None)
    assert _failed(_of(model, "parts")) >= {"decoder: heads of layers 0, 1, 2"}


def test_parts_finds_a_checkpoint_that_was_read_as_another_class() -> None:
    model = wrap("gpt2")
    config: Any = unwrap(model).config
    config.architectures = ["BartForConditionalGeneration"]
    (finding,) = [finding for finding in _of(model, "parts") if finding.state == "FAILED"]
    assert finding.what == "read as GPT2LMHeadModel"
    assert finding.detail == "the checkpoint is a BartForConditionalGeneration"


def test_order_finds_layers_that_run_backwards() -> None:
    class Backwards(nn.ModuleList):
        def __iter__(self):
            return reversed(list(self._modules.values()))  # pyright: ignore[reportReturnType]

    model = wrap("gpt2")
    unwrap(model).transformer.h.__class__ = Backwards  # pyright: ignore
    (finding,) = _of(model, "order")
    assert finding.state == "FAILED"


def test_sites_finds_what_never_fires() -> None:
    model = wrap("llama")
    attention: Any = unwrap(model).get_submodule("model.layers.1.self_attn")
    attention.forward = lambda hidden_states, **_: (hidden_states, None)
    failed = _failed(_of(model, "sites"))
    assert {"layers[:].attn.q.output", "layers[:].heads[:].output", "layers[:].groups[:].v"} <= failed
    assert "layers[:].mlp.output" not in failed


def test_sites_finds_another_width_than_the_outline_has(monkeypatch) -> None:
    monkeypatch.setattr(sys.modules["nnsplice.checks.outline"], "stream_width", lambda *_: 17)
    findings = {finding.what: finding.detail for finding in _of(wrap("gpt2"), "sites")}
    assert findings["layers[:].output"] == "width 16, not 17" and not findings["layers[:].heads[:].q"]


def test_replay_finds_writes_that_do_nothing(monkeypatch) -> None:
    monkeypatch.setattr("nnsplice.activations.writing.write", lambda *_, **__: None)
    findings = _of(wrap("opt"), "replay")
    assert {f.detail for f in findings if f.state == "FAILED"} == {"writing another prompt's values changes nothing"}
    assert "layers[:].heads[:].output" in _failed(findings)


def test_replay_finds_a_model_that_is_not_the_same_twice(monkeypatch) -> None:
    forward = GPT2MLP.forward
    monkeypatch.setattr(GPT2MLP, "forward", lambda *args: forward(*args) + torch.randn(()) * 1e-3)
    finding = {f.what: f for f in _of(wrap("gpt2"), "replay")}["layers[:].attn.output"]
    assert finding.state == "FAILED" and finding.number and "changes its logits" in finding.detail


def test_replay_finds_a_hook_that_does_not_do_the_same_twice() -> None:
    model = wrap("gpt2")
    block = unwrap(model).get_submodule("transformer.h.2")
    block.register_forward_hook(lambda _, args, out: _added(out, lambda x: torch.randn_like(x) * 1e-3))
    finding = {f.what: f for f in _of(model, "replay")}["layers[:].attn.output"]
    assert finding.state == "FAILED" and "does not do the same in every run" in finding.detail


def _added(out: Any, more: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return (out[0] + more(out[0]), *out[1:]) if isinstance(out, tuple) else out + more(out)


def test_heads_finds_that_another_module_is_taken_for_attention(misread) -> None:
    model = wrap("gpt2")
    misread(model, attn=lambda block: block.mlp, attn_added=lambda block: block.mlp)
    findings = _of(model, "heads")
    assert {finding.state for finding in findings} == {"FAILED"}
    assert "does not make attn.output" in findings[0].detail


def test_heads_finds_slices_of_another_layer(misread) -> None:
    model = wrap("gemma2")  # through its post-norm
    misread(model, o=lambda block: f"model.layers.{(block.index + 1) % 3}.self_attn.o_proj")
    assert len(_failed(_of(model, "heads"))) == 3


@pytest.mark.parametrize(("family", "kind"), [("gpt2", "interleaved"), ("bloom", "concat"), ("falcon", "concat")])
def test_layouts_finds_a_wrong_layout(misread, family: str, kind: str) -> None:
    model = wrap(family)
    misread(model, layout=_layout(kind=kind))
    assert {"q of layers[0]", "parameters of layers[2]"} <= _failed(_of(model, "layouts"))


def test_causal_finds_that_earlier_tokens_read_later_ones() -> None:
    model = wrap("gpt2")
    block = unwrap(model).get_submodule("transformer.h.1")
    block.register_forward_hook(lambda _, args, out: _added(out, lambda x: x.mean(1, keepdim=True)))
    findings = {finding.what: finding for finding in _of(model, "causal")}
    assert findings["embed.output"].detail == "tokens before token 3 change"
    # What is written is the block's own output, which is before the hook's addition; no mixing follows layer 2.
    assert findings["layers[2].output"].state == "ok"


def test_causal_finds_that_no_later_token_moves() -> None:
    model = wrap("opt")
    for layer in range(3):
        nn.init.zeros_(unwrap(model).get_parameter(f"model.decoder.layers.{layer}.self_attn.out_proj.weight"))
    findings = {finding.what: finding for finding in _of(model, "causal")}
    assert findings["layers[0].output"].detail == "no token after token 3 changes"
    assert findings["layers[2].output"].state == "ok"


def test_causal_finds_writes_that_do_nothing(monkeypatch) -> None:
    monkeypatch.setattr("nnsplice.activations.writing.write", lambda *_, **__: None)
    assert all("itself does not change" in finding.detail for finding in _of(wrap("t5"), "causal"))


@pytest.mark.parametrize(("family", "what"), [("bert", "on the right"), ("llama", "by the tokenizer, on the left")])
def test_padding_finds_a_model_that_does_not_look_at_its_mask(family: str, what: str) -> None:
    model = wrap(family)

    def without_mask(_: nn.Module, args: tuple, kwargs: dict) -> tuple:
        return args, {name: value for name, value in kwargs.items() if name != "attention_mask"}

    unwrap(model).register_forward_pre_hook(without_mask, with_kwargs=True)
    findings = {finding.what: finding for finding in _of(model, "padding")}
    assert findings[what].state == "FAILED" and (findings[what].number or 0) > 1e-3


def test_padding_finds_positions_that_count_padding(monkeypatch) -> None:
    rows = sys.modules["nnsplice.engine.batch"]._rows  # pyright: ignore
    monkeypatch.setattr("nnsplice.engine.batch._rows", lambda *args: replace(rows(*args), starts=None, lengths=None))
    assert "on the right" in _failed(_of(wrap("gpt2"), "padding"))


def test_a_check_that_breaks_is_a_finding(monkeypatch) -> None:
    def broken(subject: Any):
        yield Finding("heads", "layers[0]", "ok")
        raise ZeroDivisionError("by zero\nand more")

    monkeypatch.setitem(CHECKS, "heads", broken)
    findings = [finding for finding in run_checks(wrap("gpt2"), 0) if finding.check == "heads"]
    assert findings[0].state == "ok"
    assert findings[1] == Finding("heads", "the check itself", "FAILED", detail="ZeroDivisionError: by zero")


def test_a_summary_hides_no_failure() -> None:
    findings = [
        Finding("heads", "a", "ok", 0.0),
        Finding("heads", "b", "FAILED", 1.0, "why"),
        Finding("heads", "c", "ok", 0.5),
        Finding("heads", "d", "FAILED", 2.0, "why"),
        Finding("heads", "e", "skipped", detail="as it is"),
        Finding("layouts", "f", "skipped", detail="as it is"),
    ]
    assert [(f.check, f.what, f.number) for f in summary(findings)] == [
        ("heads", "a and 1 more", 0.5),
        ("heads", "b", 1.0),
        ("heads", "d", 2.0),
        ("heads", "e", None),
        ("layouts", "f", None),
    ]
