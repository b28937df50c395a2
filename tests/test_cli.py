"""The command line, and the checks behind it: on models of many families, and each with a fault that it has to find."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from typer.testing import CliRunner

import nnsplice as ns
from nnsplice.atlas import Atlas, Block, atlas, fingerprint, peel
from nnsplice.checks import CHECKS, Finding, outline, run_checks, subject_of, summary
from nnsplice.cli import app, native
from nnsplice.cli.table import aligned
from nnsplice.errors import BadArgument
from nnsplice.paths import Slice
from zoo import MASKED, build, tokenizer, wrap

FAMILIES = ("gpt2", "llama", "gemma2", "opt", "mixtral", "bloom", "falcon", "gpt_neox", "granite", "t5", "bart", "bert")


def _failed(findings: list[Finding]) -> set[str]:
    return {finding.what for finding in findings if finding.state == "FAILED"}


def _of(model: Any, check: str) -> list[Finding]:
    return list(CHECKS[check](subject_of(model)))


# -- checks: models that are as they should be -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "attention"), [*((family, "eager") for family in FAMILIES), ("gpt2", "sdpa"), ("t5", "sdpa")]
)
def test_every_check_passes_on_every_family(family: str, attention: str) -> None:
    findings = list(run_checks(wrap(family, attn_implementation=attention)))
    assert _failed(findings) == set()
    ok = {finding.check for finding in findings if finding.state == "ok"}
    missing = {"causal"} if family in MASKED else {"heads"} if family == "granite" else set()
    assert ok == set(CHECKS) - missing
    patterns = {finding.state for finding in findings if finding.what.endswith("pattern")}
    assert patterns == {"ok" if attention == "eager" else "skipped"}


def test_every_check_passes_on_the_toy() -> None:
    assert not _failed(list(run_checks(ns.load("toy"), Slice(0, 2), seed=3)))


def test_a_check_leaves_the_model_as_it_was() -> None:
    model = wrap("llama")
    before = {name: tensor.clone() for name, tensor in peel(model).state_dict().items()}
    list(run_checks(model))
    after = peel(model).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in peel(model).modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in peel(model).parameters())


def test_layers_narrow_what_is_looked_at() -> None:
    findings = list(run_checks(wrap("t5"), -1))
    assert {f.what for f in findings if f.check == "heads"} == {
        "encoder.layers[2].heads[:].output",
        "layers[2].heads[:].output",
    }


def test_a_model_in_training_mode_is_refused(model) -> None:
    peel(model).train()
    try:
        with pytest.raises(BadArgument, match=r"training mode[\s\S]*model\.eval\(\)"):
            list(run_checks(model))
    finally:
        peel(model).eval()


def test_a_model_whose_parts_are_not_recognised_fails_one_check_and_skips_the_rest() -> None:
    module = hf.MambaForCausalLM(hf.MambaConfig(vocab_size=64, hidden_size=8, num_hidden_layers=1, state_size=4)).eval()
    findings = list(run_checks(ns.load(module, tokenizer=tokenizer(), task="text-generation")))
    assert [finding.state for finding in findings] == ["FAILED"] + ["skipped"] * (len(CHECKS) - 1)
    assert "cannot be told apart" in findings[0].detail


# -- checks: a fault for each ------------------------------------------------------------------------------------------


@pytest.fixture
def misread(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the atlas of a model say something else of every block."""

    def change(model: Any, **parts: Callable[[Block], Any]) -> None:
        root = peel(model)
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
    config: Any = peel(model).config
    config.architectures = ["BartForConditionalGeneration"]
    (finding,) = [finding for finding in _of(model, "parts") if finding.state == "FAILED"]
    assert finding.what == "read as GPT2LMHeadModel"
    assert finding.detail == "the checkpoint is a BartForConditionalGeneration"


def test_order_finds_layers_that_run_backwards() -> None:
    class Backwards(nn.ModuleList):
        def __iter__(self):
            return reversed(list(self._modules.values()))  # pyright: ignore[reportReturnType]

    model = wrap("gpt2")
    peel(model).transformer.h.__class__ = Backwards  # pyright: ignore
    (finding,) = _of(model, "order")
    assert finding.state == "FAILED"


def test_places_finds_what_never_fires() -> None:
    model = wrap("llama")
    attention: Any = peel(model).get_submodule("model.layers.1.self_attn")
    attention.forward = lambda hidden_states, **_: (hidden_states, None)
    failed = _failed(_of(model, "places"))
    assert {"layers[:].attn.q.output", "layers[:].heads[:].output", "layers[:].groups[:].v"} <= failed
    assert "layers[:].mlp.output" not in failed


def test_places_finds_another_width_than_the_outline_has(monkeypatch) -> None:
    monkeypatch.setattr(sys.modules["nnsplice.checks.outline"], "stream_width", lambda *_: 17)
    findings = {finding.what: finding.detail for finding in _of(wrap("gpt2"), "places")}
    assert findings["layers[:].output"] == "width 16, not 17" and not findings["layers[:].heads[:].q"]


def test_replay_finds_writes_that_do_nothing(monkeypatch) -> None:
    monkeypatch.setattr("nnsplice.activations.writing.write", lambda *_, **__: None)
    findings = _of(wrap("opt"), "replay")
    assert {f.detail for f in findings if f.state == "FAILED"} == {"writing another prompt's values changes nothing"}
    assert "layers[:].heads[:].output" in _failed(findings)


def test_replay_finds_a_model_that_is_not_the_same_twice() -> None:
    model = wrap("gpt2")
    block = peel(model).get_submodule("transformer.h.2")
    block.register_forward_hook(lambda _, args, out: _added(out, lambda x: torch.randn_like(x) * 1e-3))
    findings = {f.what: f for f in _of(model, "replay")}
    finding = findings["layers[:].attn.output"]
    assert finding.state == "FAILED" and finding.number and "changes its logits" in finding.detail


def _added(out: Any, more: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return (out[0] + more(out[0]), *out[1:]) if isinstance(out, tuple) else out + more(out)


def test_heads_finds_that_another_module_is_taken_for_attention(misread) -> None:
    model = wrap("gpt2")
    misread(model, attn=lambda block: block.mlp, attn_added=lambda block: block.mlp)
    findings = _of(model, "heads")
    assert {finding.state for finding in findings} == {"FAILED"}
    assert findings[0].detail == "they do not make layers[0].attn.output"


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
    block = peel(model).get_submodule("transformer.h.1")
    block.register_forward_hook(lambda _, args, out: _added(out, lambda x: x.mean(1, keepdim=True)))
    findings = {finding.what: finding for finding in _of(model, "causal")}
    assert findings["embed.output"].detail == "tokens before token 3 change"
    # What is written is the block's own output, which is before the hook's addition; no mixing follows layer 2.
    assert findings["layers[2].output"].state == "ok"


def test_causal_finds_that_no_later_token_moves() -> None:
    model = wrap("opt")
    for layer in range(3):
        nn.init.zeros_(peel(model).get_parameter(f"model.decoder.layers.{layer}.self_attn.out_proj.weight"))
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

    peel(model).register_forward_pre_hook(without_mask, with_kwargs=True)
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


# -- the outline -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_an_outline_needs_no_weights(family: str) -> None:
    module = build(family)
    with torch.device("meta"):
        empty = type(module)(module.config)
    assert outline(Atlas.of(empty)) == outline(Atlas.of(module))


# -- the commands ------------------------------------------------------------------------------------------------------


def _run(*args: str, code: int = 0, **extra: Any) -> str:
    result = CliRunner().invoke(app, list(args), **extra)
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout if code == 0 else result.stdout + result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A checkpoint of a family, with its tokenizer."""

    def save(family: str) -> str:
        where = tmp_path_factory.mktemp(family)
        build(family).save_pretrained(where)
        tokenizer().save_pretrained(where)
        return str(where)

    return save


TOY = """\
place              values               width
embed              .output              64
layers[0..5]       .input .mid .output  64
  attn             .output              64
    q              .output              64
    k              .output              64
    v              .output              64
    o              .output              64
  mlp              .output              64
    up             .output              256
    down           .output              64
  heads[0..3]      .output .q .k .v     16
                   .pattern             tokens  with eager attention; now it is sdpa
  groups[0..3]     .k .v                16
  neurons[0..255]  .output              1
final_norm         .output              64
unembed            .output              200
"""


def test_paths_shows_the_places_of_a_model() -> None:
    assert _run("paths", "toy") == TOY


def test_every_place_that_paths_shows_is_an_address() -> None:
    model, above = ns.load("toy"), []
    for line in TOY.splitlines()[1:]:
        name, values = line[:19].strip().replace("..", ":"), line[19:39].split()
        if name:
            above = [*above[: (len(line) - len(line.lstrip())) // 2], name]
        # The last number of a range stands for it: `0..5` is `0:5`, without the last as slices are.
        assert all(ns.expand(model, f"{'.'.join(above)}{value}") for value in values)


def test_paths_says_why_a_place_is_refused(folder) -> None:
    where = folder("falcon")
    lines = _run("paths", where).splitlines()
    (mid,) = [line.split(maxsplit=2) for line in lines if ".mid" in line]
    assert mid == [".mid", "refused", "runs attention and MLP in parallel: there is no stream between them"]
    (shared,) = [line for line in lines if ".k .v" in line and "refused" in line]
    assert shared.endswith("has 2 key/value heads for 4 heads: head 0 reads group 0")


def test_paths_of_two_towers(folder) -> None:
    where = folder("t5")
    both = _run("paths", where).splitlines()
    assert [line for line in both if not line.startswith(" ")][1:] == ["encoder", "decoder"]
    one = _run("paths", where, "--tower", "encoder").splitlines()
    assert "encoder" in one and "decoder" not in one
    assert "this model has one tower" in _run("paths", "toy", "--tower", "encoder", code=1)


def test_paths_of_all_layers() -> None:
    lines = _run("paths", "toy", "--all-layers").splitlines()
    assert [line.split()[0] for line in lines if line.startswith("layers")] == [f"layers[{i}]" for i in range(6)]


@pytest.mark.parametrize(
    ("under", "first", "count"),
    [
        ("layers[2:4].attn", "layers[2..3].attn  .output  64", 5),
        ("l5h3", "layers[5].heads[3]  .output .q .k .v  16", 2),
        ("layers[-1].heads[0,2].q", "layers[5].heads[0,2]  .q  16", 1),
        ("blocks.1.hook_resid_mid", "layers[1]  .mid  64", 1),
        ("layers[0]", "layers[0]  .input .mid .output  64", 13),
        ("embed", "embed  .output  64", 1),
        ("decoder.unembed", "unembed  .output  200", 1),
    ],
)
def test_paths_under_a_path(under: str, first: str, count: int) -> None:
    _, *lines = _run("paths", "toy", "--under", under).splitlines()
    assert " ".join(lines[0].split()) == " ".join(first.split()) and len(lines) == count


@pytest.mark.parametrize(
    ("under", "message"),
    [
        ("layers[9]", "past the last layer"),
        ("layers[0].heads[4]", "past the last head"),
        ("layers[0].mlp.gate", "has no gate"),
        ("layers[0].attn.q.mid", "a value of the layer"),
        ("layers[0].groups[0].output", "no output of its own"),
        ("layers[0].output[-1]", "tokens are no part of a place"),
        ("full", "names parameters"),
        ("model.transformer.blocks", "has no part blocks"),
        ("layers[", "layers["),
    ],
)
def test_paths_under_a_mistake_says_what_to_write(under: str, message: str) -> None:
    said = _run("paths", "toy", "--under", under, code=1)
    assert message in said and "Traceback" not in said and "Usage" not in said


def test_the_native_tree_names_the_portable_places() -> None:
    lines = [line.split() for line in _run("paths", "toy", "--native").splitlines()]
    assert ["h[0..5]", "GPT2Block", "layers[0..5]"] in lines
    assert ["c_fc", "Conv1D", "[64,", "256]", "layers[0..5].mlp.up"] in lines
    under = _run("paths", "toy", "--under", "model.transformer.h[2:4].mlp").splitlines()
    assert [line.split()[0] for line in under if not line.startswith(" ")] == [
        "module",
        "model.transformer.h[2].mlp",
        "model.transformer.h[3].mlp",
    ]


def test_the_native_tree_shows_a_shared_module_once() -> None:
    module = nn.Module()
    module.first = module.second = nn.Linear(2, 3)
    module.many = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.ReLU())
    assert native.rows(Atlas.of(module)) == [
        ("model", "Module", "", ""),
        ("  first", "Linear", "[3, 2]", ""),
        ("  second", "is first", "", ""),
        ("  many", "Sequential", "", ""),
        ("    [0..1]", "Linear", "[2, 2]", ""),
        ("    [2]", "ReLU", "", ""),
    ]


def test_check_prints_a_table_and_leaves_with_zero() -> None:
    head, *lines = _run("check", "toy", "--layers", "0:2", "--attn", "eager").splitlines()
    assert head.split() == ["check", "looked", "at", "difference", "result"]
    at = head.index("result")
    rows, total = lines[:-2], lines[-1]
    assert {line[at:].split()[0] for line in rows} == {"ok"}
    assert [line.split()[0] for line in rows] == list(CHECKS)
    assert total.endswith("0 failed, 0 skipped")


def test_check_leaves_with_one_when_something_fails(monkeypatch) -> None:
    monkeypatch.setattr("nnsplice.activations.writing.write", lambda *_, **__: None)
    said = _run("check", "toy", "--layers", "0", code=1)
    assert "FAILED" in said and "writing another prompt's values changes nothing" in said


def test_check_shows_each_finding_when_asked() -> None:
    lines = _run("check", "toy", "--layers=-1", "--each").splitlines()
    assert any(line.split()[:2] == ["replay", "layers[5].mlp.up.output"] for line in lines)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["check", "toy", "--layers", "x"], "no index of layers"),
        (["check", "toy", "--layers", ""], "no index of layers"),
        (["check"], "Missing argument"),
        (["check", "toy", "--layer", "1"], "No such option"),
        (["paths", "toy", "--tower", "left"], "'left'"),
        (["paths", "toy", "--native", "--tower", "decoder"], "portable places"),
        (["paths", "toy", "--native", "--under", "l5"], "starting with model."),
        (["pahts", "toy"], "No such command"),
    ],
)
def test_wrong_usage_shows_the_help(args: list[str], message: str) -> None:
    said = _run(*args, code=2)
    assert "Usage: nnsplice" in said and "Options:" in said and message in said


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["check", "toy", "--layers", "6"], "past the last layer"),
        (["check", "toy", "--attn", "none-such"], "cannot be loaded with none-such attention"),
        (["paths", "./no-such-folder"], "there is no such folder"),
        (["check", "no-such/model"], "the hub"),
    ],
)
def test_a_mistake_is_answered_with_its_message_on_stderr(args: list[str], message: str) -> None:
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 1 and message in result.stderr and not result.stdout
    assert "Traceback" not in result.output


def test_help_and_version() -> None:
    from importlib.metadata import version

    assert _run("--version") == f"nnsplice {version('nnsplice')}\n"
    for command in ("paths", "check"):
        assert f"nnsplice {command} toy" in _run(command, "--help")
    assert "paths" in _run("--help") and "check" in _run("--help")
    assert "Usage: nnsplice" in _run(code=2)


def test_help_names_every_check() -> None:
    said = _run("check", "--help")
    assert all(f"  {name} " in said for name in CHECKS)


def test_colour_is_for_terminals(monkeypatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    args = ("paths", "toy", "--under", "unembed")
    assert "\x1b" not in _run(*args) and "\x1b" in _run(*args, color=True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in _run(*args, color=True)


def test_colour_does_not_move_columns() -> None:
    plain = [line.replace("\x1b[32m", "").replace("\x1b[0m", "") for line in aligned([("ok", "a"), ("longer", "b")])]
    assert plain == ["ok      a", "longer  b"]


def test_the_script_is_the_app() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    module, _, name = project["scripts"]["nnsplice"].partition(":")
    assert getattr(sys.modules[module], name) is app


def test_python_m_nnsplice_in_a_process_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-m", "nnsplice", "paths", "toy"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, TOY)
    done = subprocess.run([sys.executable, "-m", "nnsplice", "paths", "./nowhere"], capture_output=True, text=True)
    assert done.returncode == 1 and "there is no such folder" in done.stderr and "Traceback" not in done.stderr
