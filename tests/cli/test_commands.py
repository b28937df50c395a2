"""`nnsplice paths` and `nnsplice check`, and what all commands have in common: help, mistakes, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from torch import nn
from typer.testing import CliRunner

import nnsplice as ns
from nnsplice.atlas import Atlas
from nnsplice.checks import CHECKS
from nnsplice.cli import app, native
from nnsplice.cli.table import aligned
from nnsplice.cli.wording import in_a_shell
from zoo import build, tokenizer


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
site               values               width
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


@pytest.mark.parametrize("command", ["adapter", "convert"])
def test_a_name_that_no_file_can_have_is_told_in_a_line(command: str) -> None:
    more = ["there"] if command == "convert" else []
    told = _run(command, "x" * 5000, *more, code=1)
    assert told.startswith("File name too long: xxx") and len(told) < 300 and len(told.splitlines()) == 1


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
        ("layers[0].output[-1]", "tokens are no part of a site"),
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
        (["paths", "toy", "--native", "--tower", "decoder"], "portable sites"),
        (["paths", "toy", "--native", "--under", "l5"], "starting with model."),
        (["pahts", "toy"], "No such command"),
    ],
)
def test_wrong_usage_shows_the_help(args: list[str], message: str) -> None:
    said = _run(*args, code=2)
    assert "Help: nnsplice" in said and "Options:" not in said and message in said


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
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, name = project["scripts"]["nnsplice"].partition(":")
    assert getattr(sys.modules[module], name) is app


def test_python_m_nnsplice_in_a_process_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-m", "nnsplice", "paths", "toy"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, TOY)
    done = subprocess.run([sys.executable, "-m", "nnsplice", "paths", "./nowhere"], capture_output=True, text=True)
    assert done.returncode == 1 and "there is no such folder" in done.stderr and "Traceback" not in done.stderr


# --- JSON, completion, short errors


def _json(*args: str) -> Any:
    result = CliRunner().invoke(app, [*args, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_tables_are_printed_as_json_and_nothing_else_is() -> None:
    places = {row["site"]: row for row in _json("paths", "toy")}
    assert places["layers[0..5]"]["width"] == 64 and "layers[0..5].attn" in places
    assert all(row["module"] for row in _json("paths", "toy", "--native", "--under", "model.transformer.h[0]"))
    masks = {row["parameter"]: row for row in _json("mask", "toy", "l1h0")}
    assert masks["transformer.h.1.attn.c_attn.weight"] == {
        "parameter": "transformer.h.1.attn.c_attn.weight", "selected": 3072, "total": 12288,
    }  # fmt: skip
    assert {row["name"] for row in _json("fetch")} == {"smollm2", "gemma3-270m"}
    checks = _json("check", "toy", "--layers", "0")
    assert {row["result"] for row in checks} <= {"ok", "skipped"}
    assert all(row["difference"] is None or isinstance(row["difference"], float) for row in checks)


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("'Athen', given to rank as answer=, is 2 tokens", "'Athen', given to rank as --answer, is 2 tokens"),
        ("where='end'", "--where end"),
        ("expected: 'all', 'prompt', 'generated', or ns.steering.from_token(p), span(start, stop), mask(rows)",
         "expected: all, prompt, generated, or a token N"),
        ("no parts\n  write: lambda logits: logits[:, 3]   (a metric)", "no parts"),
        ("another model\n  write: circuit.on(model)   (takes it over)\n  in: ns.faithfulness", "another model"),
    ],
)  # fmt: skip
def test_messages_of_functions_are_in_the_words_of_a_shell(message: str, shown: str) -> None:
    assert in_a_shell(message) == shown


def test_what_is_asked_as_json_once_is_text_the_next_time() -> None:
    assert _json("fetch")
    result = CliRunner().invoke(app, ["fetch"])
    assert result.stdout.startswith("name")


def test_every_command_that_prints_a_table_can_print_it_as_json() -> None:
    root: Any = typer.main.get_command(app)
    commands = dict(root.commands)
    for group in ("circuit", "lens", "steer"):
        commands |= {f"{group} {name}": command for name, command in commands.pop(group).commands.items()}
    tabular = {name for name, one in commands.items() if any("--json" in p.opts for p in one.params)}
    assert set(commands) - tabular == {"convert", "work"}  # which print none


@pytest.mark.parametrize(
    ("args", "error", "command"),
    [
        (["paths"], "Error: Missing argument 'MODEL'.", "paths"),
        (["trace", "--modell", "toy"], "Error: No such option: --modell", "trace"),
        (["circuit", "find", "--method", "best"], "Error: Missing option '--model'", "circuit find"),
        (["steer", "fit", "--model", "toy", "--out", "x"], "Error: Give --positive and --negative", "steer fit"),
        (["trasce"], "Error: No such command 'trasce'", ""),
    ],
)
def test_wrong_usage_is_told_in_two_lines(args: list[str], error: str, command: str) -> None:
    result = CliRunner().invoke(app, args, prog_name="nnsplice")
    first, *others = result.stderr.splitlines()
    assert result.exit_code == 2 and first.startswith(error) and not result.stdout
    assert others in ([], [f"Help: nnsplice {command} --help".replace("  ", " ")])


def test_the_shell_completes_commands_and_options() -> None:
    asked = {"_NNSPLICE_COMPLETE": "complete_bash", "COMP_WORDS": "nnsplice tr", "COMP_CWORD": "1"}
    code = "from nnsplice.cli import app; app(prog_name='nnsplice')"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True)
    assert done.stdout.split() == ["trace"], done.stderr
    assert "--install-completion" in CliRunner().invoke(app, ["--help"]).stdout
