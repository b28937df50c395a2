"""What capture and replay cost: against torch hooks that do the same, and against a trace written by hand.

python -m bench.activations            the table
python -m bench.activations --quick    fewer rounds
"""

from __future__ import annotations

import argparse
from typing import Any

import nnsight
import torch
import transformers as hf

import nnsplice as ns
from bench.timing import machine, race, table

LAYERS = 12


def build(width: int, heads: int, vocabulary: int) -> Any:
    """A random GPT-2 of twelve layers, wrapped for nnsight."""
    torch.manual_seed(0)
    config = hf.GPT2Config(
        n_embd=width,
        n_layer=LAYERS,
        n_head=heads,
        vocab_size=vocabulary,
        n_positions=128,
        bos_token_id=1,
        eos_token_id=1,
    )
    return ns.load(hf.GPT2LMHeadModel(config).eval(), tokenizer=tokenizer(vocabulary))


def tokenizer(vocabulary: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", eos_token="w1", unk_token="w0")


def capturing(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """All block outputs at the last position, five ways; every way runs the whole forward."""
    module, blocks = model._module, model._module.transformer.h
    mask = torch.ones_like(ids)
    inputs = {"input_ids": ids, "attention_mask": mask}

    def bare() -> None:
        module(**inputs)

    def hooks() -> None:
        kept = {}
        handles = [
            block.register_forward_hook(lambda _m, _a, out, n=n: kept.__setitem__(n, out[:, -1].clone()))
            for n, block in enumerate(blocks)
        ]
        module(**inputs)
        for handle in handles:
            handle.remove()

    def trace() -> None:
        with model.trace(**inputs):
            pass_through = model.transformer.h[0].output
            del pass_through

    def by_hand() -> None:
        with model.trace(**inputs):
            kept = nnsight.save([model.transformer.h[n].output[:, -1].clone() for n in range(LAYERS)])
        assert len(kept) == LAYERS

    def nnsplice() -> None:
        with model.trace(**inputs):
            kept = ns.save_activations(model, "layers[:].output[-1]")
        assert len(kept) == LAYERS

    return {"forward alone": bare, "torch hooks": hooks, "empty trace": trace, "nnsight by hand": by_hand,
            "save_activations": nnsplice}  # fmt: skip


def replaying(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """Writing twelve captured block outputs at the last position into a run."""
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    saved = ns.capture(model, ids, "layers[:].output[-1]")
    rows = [saved[f"layers[{n}].output[-1]"] for n in range(LAYERS)]
    module, blocks = model._module, model._module.transformer.h

    def hooks() -> None:
        def write(n: int) -> Any:
            def hook(_module: Any, _args: Any, out: torch.Tensor) -> torch.Tensor:
                out = out.clone()
                out[:, -1] = rows[n]
                return out

            return hook

        handles = [block.register_forward_hook(write(n)) for n, block in enumerate(blocks)]
        module(**inputs)
        for handle in handles:
            handle.remove()

    def by_hand() -> None:
        with model.trace(**inputs):
            for n in range(LAYERS):
                value = model.transformer.h[n].output.clone()
                value[:, -1] = rows[n]
                model.transformer.h[n].output = value

    def nnsplice() -> None:
        with model.trace(**inputs):
            saved.apply(model)

    return {"torch hooks": hooks, "nnsight by hand": by_hand, "apply": nnsplice}


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    quick = parser.parse_args(arguments).quick
    torch.set_num_threads(1)
    print(machine())
    sizes = {
        "tiny: width 32": (build(32, 4, 256), torch.arange(10)[None] + 3, 60, 20),
        "100M: width 768": (build(768, 12, 20000), torch.arange(32)[None] + 3, 15, 1),
    }
    for name, (model, ids, rounds, repeats) in sizes.items():
        rounds = 5 if quick else rounds
        parameters = sum(parameter.numel() for parameter in model._module.parameters())
        with torch.no_grad():
            print(f"\n{name}, {LAYERS} layers, {parameters / 1e6:.1f}M parameters, {ids.shape[1]} tokens")
            print("\ncapture of all block outputs at one position")
            print(table(race(capturing(model, ids), rounds=rounds, repeats=repeats), "torch hooks"))
            print("\nreplay of twelve entries")
            print(table(race(replaying(model, ids), rounds=rounds, repeats=repeats), "nnsight by hand"))


if __name__ == "__main__":
    main()
