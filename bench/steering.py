"""What steering costs: against generating without it, torch hooks, and other libraries where they are installed.

python -m bench.steering            the table
python -m bench.steering --quick    fewer rounds
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

import nnsplice as ns
from bench.activations import tokenizer
from bench.timing import Times, machine, race, table

LAYERS, WIDTH, LAYER = 8, 512, 4
ROWS, PROMPT, NEW = 8, 16, 16


def build() -> Any:
    """A random Llama of some 40M parameters, whose generation does not stop by itself."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=WIDTH, intermediate_size=1792, num_hidden_layers=LAYERS, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=8000, max_position_embeddings=256, bos_token_id=1, eos_token_id=1,
        pad_token_id=0,
    )  # fmt: skip
    module = hf.LlamaForCausalLM(config).eval()
    module.generation_config.eos_token_id = None
    return ns.load(module, tokenizer=tokenizer(8000))


def ways(model: Any, ids: torch.Tensor, layers: list[int]) -> dict[str, Callable[[], object]]:
    """One generation of a batch, with the same step added at every token of some layers."""
    module = model._module
    mask = torch.ones_like(ids)
    vector = ns.SavedActivation.from_pairs(*((f"layers[{n}].output[-1]", direction(n)) for n in layers))
    given: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    results: dict[str, torch.Tensor] = {}

    def bare() -> None:
        results["bare"] = module.generate(ids, **given)

    def hooks() -> None:
        handles = [
            module.model.layers[n].register_forward_hook(lambda _m, _a, out, n=n: out + steps[n]) for n in layers
        ]
        results["hooks"] = module.generate(ids, **given)
        for handle in handles:
            handle.remove()

    def ours() -> None:
        with ns.steering.steer(model, vector, 2.0):
            results["ours"] = module.generate(ids, **given)

    def generated() -> None:
        with ns.steering.steer(model, vector, 2.0, where="generated"):
            module.generate(ids, **given)

    def positions() -> None:
        with ns.steering.steer(model, vector, 2.0, where=ns.steering.from_token(4)):
            module.generate(ids, **given)

    def clamped() -> None:
        with ns.steering.steer(model, vector, 2.0, operator="clamp"):
            module.generate(ids, **given)

    steps = {n: 2.0 * direction(n) for n in layers}
    found: dict[str, Callable[[], object]] = {
        "bare generate": bare, "torch hooks": hooks, "steer": ours, 'steer where="generated"': generated,
        "steer where=from_token(4)": positions, 'steer operator="clamp"': clamped,
    }  # fmt: skip
    found |= peers(module, ids, given, layers, results)
    for way in found.values():
        way()
    for name, tokens in results.items():
        assert name == "bare" or torch.equal(tokens, results["hooks"]), f"{name} generates other tokens"
    return found


def direction(layer: int) -> torch.Tensor:
    """A direction as large as what a random model's blocks make."""
    return torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(layer)) * 0.3


def peers(module: Any, ids: torch.Tensor, given: dict, layers: list[int], results: dict) -> dict[str, Any]:
    """Other libraries that can do this, if they are installed."""
    found: dict[str, Any] = {}
    try:
        from steering_vectors import SteeringVector

        vector = SteeringVector({n: direction(n)[0] for n in layers}, "decoder_block")

        def by_steering_vectors() -> None:
            with vector.apply(module, multiplier=2.0):
                results["steering-vectors"] = module.generate(ids, **given)

        found["steering-vectors"] = by_steering_vectors
    except ImportError:
        pass
    try:
        import repeng

        control: Any = repeng.ControlVector("llama", {n: direction(n)[0].numpy() for n in layers})

        def by_repeng() -> None:
            wrapped = repeng.ControlModel(module, layers)
            try:
                wrapped.set_control(control, 2.0)
                results["repeng"] = module.generate(ids, **given)
            finally:
                wrapped.unwrap()

        by_repeng()
        found["repeng"] = by_repeng
    except ImportError:
        pass
    except (AttributeError, TypeError) as error:  # it wraps blocks, and hides what newer models ask of them
        print(f"(repeng does not run here: {error})")
    return found


def sweeping(model: Any, ids: torch.Tensor) -> dict[str, Callable[[], object]]:
    """24 cells of one prompt: as 24 generations, and as rows of one."""
    module, layers, numbers = model._module, [1, 2, 3, 4, 5, 6], [-2.0, -1.0, 1.0, 2.0]
    vector = ns.steering.SteeringVector.of(
        ns.SavedActivation.from_pairs(*((f"layers[{n}].output[-1]", direction(n)) for n in layers))
    )
    given: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    texts: dict[str, list[str]] = {}

    def apart() -> None:
        found = []
        for layer in layers:
            for number in numbers:
                with ns.steering.steer(model, vector.at(layer), number):
                    out = module.generate(ids, attention_mask=torch.ones_like(ids), **given)
                found.append(model.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
        texts["apart"] = found

    def together() -> None:
        grid = ns.steering.sweep(model, ids.tolist(), vector, numbers, len, max_new_tokens=NEW, progress=False)
        texts["together"] = [text for row in grid.texts[0] for text in row]

    def unguarded() -> None:
        ns.steering.sweep(model, ids.tolist(), vector, numbers, len, max_new_tokens=NEW, guard=False, progress=False)

    apart()
    together()
    assert texts["apart"] == texts["together"]
    return {"24 generations": apart, "ns.steering.sweep": together, "the same, guard=False": unguarded}


def measuring(model: Any, ids: torch.Tensor) -> dict[str, Callable[[], object]]:
    """The same 24 cells measured by their next token."""
    module, layers, numbers = model._module, [1, 2, 3, 4, 5, 6], [-2.0, -1.0, 1.0, 2.0]
    vector = ns.steering.SteeringVector.of(
        ns.SavedActivation.from_pairs(*((f"layers[{n}].output[-1]", direction(n)) for n in layers))
    )

    def apart() -> None:
        for layer in layers:
            for number in numbers:
                with ns.steering.steer(model, vector.at(layer), number):
                    module(ids, use_cache=False)

    def together() -> None:
        ns.steering.sweep(model, ids.tolist(), vector, numbers, ns.logit_diff(7, 8), progress=False)

    return {"24 forward passes": apart, "ns.steering.sweep": together}


def best(times: Times, base: str) -> str:
    """The medians' table, and each way's best round over that of `base`: the steadiest number on a shared machine."""
    lowest = {name: min(rounds) for name, rounds in times.rounds.items()}
    head, *lines = table(times, base).splitlines()
    return "\n".join(
        [
            f"{head}  {'best':>6}",
            *(f"{line}  {lowest[n] / lowest[base]:6.3f}" for line, n in zip(lines, lowest, strict=True)),
        ]
    )


def main(arguments: list[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    quick = parser.parse_args(arguments).quick
    torch.set_num_threads(1)
    print(machine())
    model = build()
    parameters = sum(parameter.numel() for parameter in model._module.parameters())
    ids = torch.arange(ROWS * PROMPT).reshape(ROWS, PROMPT) * 13 % 7900 + 5
    rounds = 3 if quick else 9
    with torch.no_grad():
        print(f"\n{parameters / 1e6:.0f}M parameters, {LAYERS} layers, batch {ROWS}, {PROMPT} + {NEW} tokens")
        for layers in ([LAYER], list(range(LAYERS))):
            print(f"\n{len(layers)} layer{'s' * (len(layers) != 1)} steered")
            print(best(race(ways(model, ids, layers), rounds=rounds, repeats=1), "bare generate"))
        print("\n24 cells, one prompt, generated")
        print(best(race(sweeping(model, ids[:1]), rounds=max(rounds // 2, 1), repeats=1), "ns.steering.sweep"))
        print("\n24 cells, one prompt, the next token")
        print(best(race(measuring(model, ids[:1]), rounds=rounds, repeats=1), "ns.steering.sweep"))


if __name__ == "__main__":
    main()
