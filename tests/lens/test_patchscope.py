"""Patchscopes: the texts are those of hooks and greedy steps without a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import nnsplice as ns
from families.subject import after, before, first_tensor, hooks
from nnsplice.atlas import unwrap
from nnsplice.errors import NnspliceError
from zoo import wrap

SOURCES = ["w3 w4 w5", "w6 w7"]
TARGET = "w8 w9 w8 w9"


def greedy(root: Any, ids: list[int], steps: int, *made: Any) -> list[int]:
    """Each token from a run of its own over all that is there."""
    start = len(ids)
    with torch.no_grad(), hooks(*made):
        for _ in range(steps):
            ids = [*ids, int(root(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[start:]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
@pytest.mark.parametrize(
    ("position", "target"), [(-1, None), (1, None), (2, "layers[0].output"), (0, "layers[1].input")]
)
def test_texts_are_those_of_hooks(family: str, position: int, target: str | None) -> None:
    model = wrap(family)
    root: Any = unwrap(model)
    tokenizer: Any = model.tokenizer
    blocks = root.get_submodule(ns.Atlas.of(model).tower().stack)
    scope = ns.lens.patchscope(
        model, SOURCES, "layers[:].output", TARGET, position, target, max_new_tokens=4, max_tokens=16
    )
    grid = scope.grid()
    into = tokenizer(TARGET)["input_ids"]
    for prompt, source in enumerate(SOURCES):
        ids = torch.tensor([tokenizer(source)["input_ids"]])
        for layer, block in enumerate(blocks):
            kept: list[torch.Tensor] = []
            with (
                torch.no_grad(),
                hooks(block.register_forward_hook(lambda _m, _a, out, kept=kept: kept.append(first_tensor(out)))),
            ):
                root(ids)
            for token in range(ids.shape[1]):

                def put(states: torch.Tensor, state: torch.Tensor = kept[0][0, token]) -> torch.Tensor:
                    states = states.clone()
                    states[0, position % len(into)] = state
                    return states

                where = block if target is None else blocks[0 if "output" in target else 1]
                handle = before(where, put) if target and "input" in target else after(where, put)
                expected = tokenizer.decode(greedy(root, into, 4, handle), skip_special_tokens=True)
                assert grid.sel(prompt=prompt, layer=layer, position=token).item() == expected
    assert grid.sel(prompt=1, layer=0, position=2).item() == ""
    assert scope.unpatched == tokenizer.decode(greedy(root, into, 4), skip_special_tokens=True)
    assert len(scope.frame()) == 5 * len(blocks)


def test_a_state_of_the_target_itself_changes_nothing(model) -> None:
    scope = ns.lens.patchscope(model, TARGET, "layers[:].output[1]", TARGET, 1, max_new_tokens=6)
    assert set(scope.frame()["text"]) == {scope.unpatched}
    other = ns.lens.patchscope(model, "w3 w4 w5", "layers[0].output[-1]", TARGET, -1, "layers[2].output")
    assert other.texts[0, 0] != other.unpatched
    assert not any(module._forward_hooks for module in unwrap(model).modules())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"sites": "layers[0].mlp.output"}, "no state of the stream"),
        ({"position": 9}, "no position"),
        ({"target": "layers[1].attn.output"}, "enters or leaves a layer"),
        ({"target": "layers[:].output"}, "enters or leaves a layer"),
        ({"target_prompt": ["w3", "w4"]}, "written into one"),
    ],
)
def test_what_cannot_be_written_is_told(model, arguments: dict[str, Any], text: str) -> None:
    given = {"sites": "layers[0].output", "target_prompt": TARGET, "position": -1, **arguments}
    with pytest.raises(NnspliceError, match=text):
        ns.lens.patchscope(model, "w3 w4", **given)
