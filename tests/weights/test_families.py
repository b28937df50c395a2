"""Every family of the long table: masks against the model's own gradients, and the laws of parts and wholes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from nnsplice import weights as w
from nnsplice.atlas import Atlas
from weights import long_table
from weights.oracle import IDS, dense, read_by, slices, support

#: XGLM's own attention cannot do float64.
FLOAT = {"xglm": torch.float32}


class Family:
    def __init__(self, name: str) -> None:
        self.name = name
        self.model: Any = long_table.build(name).to(FLOAT.get(name, torch.float64))
        self.atlas = Atlas.of(self.model)
        self.parameters = dict(self.model.named_parameters())
        self.blocks = self.atlas.towers["decoder"].blocks
        #: The layers that have attention: some families mix kinds.
        self.layers = [block.index for block in self.blocks if block.has_attention]

    def masks(self, restriction: Any) -> dict[str, torch.Tensor]:
        """Dense masks of the parameters that a restriction names."""
        found = w.create_param_masks(self.model, restriction)
        return dense(found, {name: self.parameters[name] for name in found})


@pytest.fixture(scope="module", params=long_table.ROWS)
def family(request):
    return Family(request.param)


def test_heads_are_what_the_gradients_say(family):
    for layer in {family.layers[0], family.layers[-1]}:
        block = family.blocks[layer]
        values = slices(family.model, block.o)
        width, d = values.shape[1], values.shape[1] // block.n_heads
        inside = {name: family.parameters[name] for name in w.create_param_masks(family.model, f"l{layer} attn")}
        projection = family.model.get_submodule(block.o)
        keys = block.projection("k")
        for head in range(block.n_heads):
            masks = dense(w.create_param_masks(family.model, f"l{layer}h{head}"), inside)
            columns = slice(head * d, (head + 1) * d)
            needed = support(values[:, columns], inside)
            needed[f"{block.o}.weight"] = read_by(projection, columns, width)
            for name, mask in masks.items():
                if name == f"{keys}.bias":  # the softmax ignores what all keys have in common
                    assert not (needed[name] & ~mask).any(), f"{name} of layer {layer}, head {head}"
                elif not name.endswith(".sinks"):  # one number per head: checked below
                    assert torch.equal(needed[name], mask), f"{name} of layer {layer}, head {head}"


def test_the_atlas_agrees_with_the_model(family):
    """Roles of the columns, and that what the branches add is all that is added to the stream."""
    layers = {family.layers[0], family.layers[-1], len(family.blocks) - 1}
    assert [check for check in family.atlas.verify(layers=layers) if not check.ok] == []


def test_groups_partition_and_heads_cover(family):
    for layer in family.layers:
        block = family.blocks[layer]
        attn = family.masks(f"l{layer} attn")
        times: dict[str, dict[str, torch.Tensor]] = {}
        for kind, number in (("h", block.n_heads), ("g", block.n_kv)):
            parts = [family.masks(f"l{layer}{kind}{i}") for i in range(number)]
            assert all(part.keys() == parts[0].keys() for part in parts)
            times[kind] = {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}
        assert times["h"].keys() == times["g"].keys()
        # Each number of every projection is in exactly one group ...
        assert all(bool((count == 1).all()) for count in times["g"].values())
        # ... and in at least one head: in exactly one, or in those that share a key/value head.
        shared = {1, block.n_heads // block.n_kv}
        assert all(set(count.unique().tolist()) <= shared for count in times["h"].values())
        # What no head has is the bias of the output projection, which is added once.
        assert all(name.endswith("bias") and attn[name].dim() == 1 for name in attn.keys() - times["h"].keys())
        union = family.masks([f"l{layer}h{head}" for head in range(block.n_heads)])
        assert all(mask.all() for mask in union.values())
        qkvo = [f"layers[{layer}].attn.{part}" for part in "qkvo"]
        others = {
            name for gate in block.head_gates for name in w.create_param_masks(family.model, f"model.{path(gate)}")
        }
        others |= {name for name in attn if name.endswith((".sinks", "dense_bias"))}
        assert w.create_param_masks(family.model, qkvo).keys() == attn.keys() - others
        assert set(w.create_param_masks(family.model, qkvo).values()) == {None}


def path(module: str) -> str:
    return ".".join(f"[{word}]" if word.isdigit() else word for word in module.split(".")).replace(".[", "[")


#: What is in a layer and neither attention nor MLP, beside norms.
NEITHER = ("encoder_attn.", "per_layer_", "adapter_modules.", ".conv.")


def test_a_layer_is_attention_mlp_and_norms(family):
    for block in family.blocks:
        layer = w.create_param_masks(family.model, f"l{block.index}")
        attn = w.create_param_masks(family.model, f"l{block.index} attn") if block.has_attention else {}
        mlp = w.create_param_masks(family.model, f"l{block.index} mlp")
        assert set({**layer, **attn, **mlp}.values()) == {None}
        assert not attn.keys() & mlp.keys() and attn.keys() | mlp.keys() <= layer.keys()
        for name in layer.keys() - attn.keys() - mlp.keys():
            module = type(family.model.get_submodule(name.rpartition(".")[0])).__name__
            assert "Norm" in module or any(word in name for word in NEITHER), f"{name} ({module})"
    layers = w.create_param_masks(family.model, [f"l{block.index}" for block in family.blocks])
    assert list(layers) == [name for i in range(3) for name in w.create_param_masks(family.model, f"l{i}")]


@pytest.mark.filterwarnings("ignore:.* is tied in this model")
def test_embed_and_unembed_are_what_reads_tokens_and_makes_logits(family):
    seen: dict[str, str] = {}

    def watch(name, module):
        def hook(_, args, output):
            ids = args[0] if args else None
            # (CPM-Ant puts the tokens of its own prompt before the text.)
            is_text = isinstance(ids, torch.Tensor) and torch.equal(ids[..., -IDS.shape[-1] :].long(), IDS)
            if isinstance(module, nn.Embedding) and is_text:
                seen.setdefault("embed", name)
            if isinstance(module, nn.Linear) and isinstance(output, torch.Tensor) and output.shape[-1] == logits_width:
                seen["unembed"] = name

        return module.register_forward_hook(hook)

    with torch.no_grad():
        output = family.model(IDS)
        logits_width = output.logits.shape[-1]
        handles = [watch(name, module) for name, module in family.model.named_modules()]
        family.model(IDS)
    for handle in handles:
        handle.remove()
    for role in ("embed", "unembed"):
        names = w.create_param_masks(family.model, role)
        tensor = family.model.get_submodule(seen[role]).weight
        assert any(family.parameters[name] is tensor for name in names), (seen[role], list(names))
        assert len(names) <= 2 and set(names.values()) == {None}


def test_full_is_every_parameter_in_order(family):
    assert w.create_param_masks(family.model, "full") == dict.fromkeys(family.parameters)


def test_out_of_range(family):
    layer = family.layers[-1]
    block = family.blocks[layer]
    for text, number in ((f"l{len(family.blocks)}", 3), (f"l{layer}h{block.n_heads}", block.n_heads),
                         (f"l{layer}g{block.n_kv}", block.n_kv)):  # fmt: skip
        with pytest.raises(ValueError, match=f"(?s)out of range.* has {number}"):
            w.create_param_masks(family.model, text)
    with pytest.raises(ValueError, match=r"out of range.* layer"):
        w.create_param_masks(family.model, "l99h99")
