"""Pretrained models by their names: what they are made of, and that they know something."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import nnsplice as ns
from nnsplice.atlas import unwrap
from real.pretrained import pretrained

pytestmark = pytest.mark.real
EIFFEL = "The Eiffel Tower is located in the city of"
GIVEN = "When Mary and John went to the store, John gave a drink to"
#: Name -> the class, its layers and heads, what most of its numbers were packed as, and how sure it is of Paris.
MODELS = {
    "smollm2": ("LlamaForCausalLM", 30, 9, "Q4_1", 0.70),
    "gemma3-270m": ("Gemma3ForCausalLM", 18, 4, "Q5_0", 0.76),
}


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_model_that_it_is_said_to_be(name: str) -> None:
    kind, layers, heads, packed, sure = MODELS[name]
    model = pretrained(name)
    config: Any = unwrap(model).config
    assert (type(unwrap(model)).__name__, config.num_hidden_layers, config.num_attention_heads) == (kind, layers, heads)
    types = config.dequantised_from["types"]
    assert packed in types and types[packed] == max(count for kind, count in types.items() if kind != "F32")
    with torch.no_grad():
        logits = unwrap(model)(torch.tensor([model.tokenizer(EIFFEL)["input_ids"]])).logits[0, -1]
    assert model.tokenizer.decode(logits.argmax()) == " Paris"
    assert float(logits.softmax(-1).max()) == pytest.approx(sure, abs=0.03)


@pytest.mark.parametrize("name", MODELS)
def test_its_places_are_what_they_promise(name: str) -> None:
    from nnsplice.checks import run_checks

    findings = list(run_checks(pretrained(name, attn_implementation="eager"), 1))
    assert [finding for finding in findings if finding.state == "FAILED"] == []
    assert sum(finding.state == "ok" for finding in findings) > 20


@pytest.mark.parametrize("name", MODELS)
def test_packed_rows_give_the_numbers_of_one_trace_for_each_cell(name: str) -> None:
    model = pretrained(name)
    metric = ns.logit_diff(" Mary", " John")
    fast, slow = (
        ns.sweep(
            model,
            GIVEN,
            GIVEN.replace("store, John", "store, Mary"),
            "layers[3,10].output[-1]",
            metric,
            executor=executor,
            progress=False,
        )
        for executor in ("packed", "reference")
    )
    torch.testing.assert_close(torch.tensor(fast.grid().values), torch.tensor(slow.grid().values), rtol=1e-3, atol=1e-3)
