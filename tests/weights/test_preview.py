"""What is printed of masks: names one by one, or a tree with bars."""

from __future__ import annotations

import io
import re
import sys

import pytest
import torch

import zoo
from nnsplice import weights as w
from nnsplice.atlas import by_number


@pytest.fixture
def shown(capsys):
    def show(model, masks, **options):
        assert w.preview_weight_restriction(model, masks, **options) is None
        return capsys.readouterr().out

    return show


def test_plain_is_one_name_per_line(shown):
    model = zoo.build("llama", num_hidden_layers=12)
    masks = w.create_param_masks(model, ["l10 mlp", "l2h1", "embed"])
    lines = shown(model, masks, plain=True).splitlines()
    assert set(lines) == set(masks) and len(lines) == len(masks)
    assert lines == sorted(masks, key=by_number)
    assert [line.split(".")[2] for line in lines if "layers" in line] == ["2"] * 4 + ["10"] * 3


def test_a_tree_of_modules_with_bars(shown):
    model = zoo.build("gpt2")
    assert shown(model, w.create_param_masks(model, ["l1h2", "l0 mlp"])).splitlines() == [
        "transformer.h",
        "├── 0.mlp",
        "│   ├── c_fc",
        "│   │   ├── weight     ████████████████████████  100.0%  (1,024 of 1,024)",
        "│   │   └── bias       ████████████████████████  100.0%  (64 of 64)",
        "│   └── c_proj",
        "│       ├── weight     ████████████████████████  100.0%  (1,024 of 1,024)",
        "│       └── bias       ████████████████████████  100.0%  (16 of 16)",
        "└── 1.attn",
        "    ├── c_attn",
        "    │   ├── weight     ██████░░░░░░░░░░░░░░░░░░   25.0%  (192 of 768)",
        "    │   └── bias       ██████░░░░░░░░░░░░░░░░░░   25.0%  (12 of 48)",
        "    └── c_proj.weight  ██████░░░░░░░░░░░░░░░░░░   25.0%  (64 of 256)",
        "7 parameters  (2,396 of 3,200)",
    ]


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_numbers_are_those_of_the_masks(name, shown):
    model = zoo.build(name)
    for restriction in ("layers[1].heads[1]", "layers[:]", "full"):
        masks = w.create_param_masks(model, restriction)
        parameters = dict(model.named_parameters())
        lines = [line for line in shown(model, masks).splitlines() if not line.startswith("note: ")]
        counts = [line.rpartition("(")[2].replace(",", "") for line in lines if " of " in line]
        found = [tuple(map(int, re.findall(r"\d+", count))) for count in counts]
        sizes = {name: parameters[name].numel() for name in masks}
        expected = [(sizes[n] if m is None else int(m.clone().sum()), sizes[n]) for n, m in masks.items()]
        assert sorted(found[:-1]) == sorted(expected)
        assert found[-1] == tuple(map(sum, zip(*expected, strict=True)))
        bars = [re.findall("[█░]+", line) for line in lines]
        assert all(len(bar[0]) == 24 for bar in bars if bar) and sum(map(len, bars)) == len(masks)


def test_layers_are_in_the_order_of_their_numbers(shown):
    model = zoo.build("llama", num_hidden_layers=12)
    masks = w.create_param_masks(model, "layers[:].mlp.up")
    turned = dict(reversed(masks.items()))
    numbers = [int(found) for found in re.findall(r"── (\d+)\.mlp", shown(model, turned))]
    assert numbers == list(range(12))


def test_colour_on_a_terminal_only(monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    model = zoo.build("gpt2")
    masks = w.create_param_masks(model, "l1h2")
    w.preview_weight_restriction(model, masks)
    plain = capsys.readouterr().out
    assert "\x1b" not in plain
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", Terminal())
    w.preview_weight_restriction(model, masks)
    coloured = sys.stdout.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "\x1b[" in coloured and re.sub(r"\x1b\[\d+m", "", coloured) == plain
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    w.preview_weight_restriction(model, masks)
    assert sys.stdout.getvalue() == plain  # pyright: ignore[reportAttributeAccessIssue]


def test_wrapped_models_and_any_masks(shown):
    model = zoo.build("gpt2")
    compiled = torch.compile(model, backend="eager")
    name = "_orig_mod.transformer.wte.weight"
    assert shown(compiled, w.create_param_masks(compiled, "embed"), plain=True) == f"{name}\n"
    assert "transformer.wte.weight" in shown(zoo.wrap("gpt2"), w.create_param_masks(model, "embed"))
    some = torch.zeros(64, 16, dtype=torch.bool)
    some[3, 5] = True
    assert "(1 of 1,024)" in shown(model, {"transformer.wte.weight": some})


def test_mistakes():
    model = zoo.build("gpt2")
    with pytest.raises(AttributeError, match=r"(?s)no parameter transformer\.wt\.weight.*transformer\.wte\.weight"):
        w.preview_weight_restriction(model, {"transformer.wt.weight": None})
    with pytest.raises(TypeError, match="create_param_masks"):
        w.preview_weight_restriction(model, "l1h0")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"shape \[3\]"):
        w.preview_weight_restriction(model, {"transformer.wte.weight": torch.ones(3, dtype=torch.bool)})


def test_names_that_a_terminal_would_obey_are_spelled_out(shown):
    model = zoo.build("gpt2")
    model.transformer.add_module("red\x1b[31m", torch.nn.Linear(2, 2))
    masks = {name: None for name, _ in model.named_parameters() if "red" in name}
    assert masks
    for plain in (True, False):
        out = shown(model, masks, plain=plain)
        assert "\x1b" not in out and r"red\x1b[31m" in out
