"""Ten tasks on one pretrained model, by each package: lines of code, seconds, and whether the numbers agree.

    OTHER/bin/python bench/compare/run.py FOLDER transformerlens     prints one line of JSON
    python -m bench.compare.run --peers tl=OTHER/bin/python ...      runs all, and prints the table

Each package runs in an environment of its own, on the same folder of weights.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
HERE = Path(__file__).parent
TASKS = {
    "next_token": "the next token",
    "capture": "the stream after every layer",
    "patch": "patch one layer and token",
    "sweep_stream": "patch every layer and token",
    "sweep_heads": "patch every head",
    "ablate_heads": "mean ablation of every head",
    "pattern": "an attention pattern",
    "direct_effects": "direct effect of every head",
    "steer": "steer a generation",
    "two_lengths": "last tokens of two lengths",
}
PACKAGES = ("nnsplice", "transformerlens", "nnsight", "pyvene")
CLEAN, CORRUPTED = "The Eiffel Tower is located in the city of", "The Brandenburg Gate is located in the city of"
OTHERS = ("The capital of Spain is", "My favourite colour has always been", "In the end the committee decided to")
SHORT = "The city of"


def lines_of(package: str) -> dict[str, int]:
    """Statements' lines of each task, with what it calls in the same file; imports and set-up are nobody's."""
    tree = ast.parse((HERE / f"with_{package}.py").read_text(encoding="utf-8"))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}

    def own(name: str) -> int:
        node = functions[name]
        inner = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and n.id.startswith("_") and n.id in functions}
        return node.end_lineno - node.lineno + sum(own(one) for one in inner)  # type: ignore[operator]

    return {name: own(name) for name in TASKS if name in functions}


def asked(folder: str) -> Any:
    """The model and the texts, as every package is given them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    module = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    one = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"][0]  # noqa: E731
    return SimpleNamespace(
        folder=folder, module=module.requires_grad_(False), tokenizer=tokenizer, clean=CLEAN, corrupted=CORRUPTED,
        others=list(OTHERS), short=SHORT, texts=[CLEAN, CORRUPTED, *OTHERS, SHORT], right=one(" Paris"),
        wrong=one(" Berlin"),
    )  # fmt: skip


def answers(package: str, folder: str) -> dict[str, Any]:
    """What a package says to each task, and the CPU seconds that it took the second time."""
    import torch

    tasks = importlib.import_module(f"with_{package}")
    given = asked(folder)
    model = tasks.setup(given)
    found: dict[str, Any] = {}
    for name in TASKS:
        if not hasattr(tasks, name):
            found[name] = {"reason": tasks.MISSING[name]}
            continue
        try:
            getattr(tasks, name)(model, given)
            start = time.process_time()
            value = getattr(tasks, name)(model, given)
            seconds = time.process_time() - start
        except Exception as error:
            found[name] = {
                "reason": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]
            }
            continue
        if isinstance(value, str | list):
            plain = value if isinstance(value, str) else "".join(value)
        else:
            value = value if isinstance(value, torch.Tensor) else torch.as_tensor(value.values)
            plain = value.detach().double().flatten().tolist()
        found[name] = {"value": plain, "seconds": seconds}
    return found


def agree(one: Any, other: Any) -> bool:
    """Whether two answers are the same within rounding."""
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    return len(one) == len(other) and all(
        abs(a - b) <= 2e-3 * max(1.0, abs(b)) for a, b in zip(one, other, strict=True)
    )


def main() -> None:
    """Run as a script: one package. With --peers: all, and a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="a folder of weights that transformers reads")
    parser.add_argument("package", nargs="?", choices=PACKAGES)
    parser.add_argument("--peers", nargs="*", default=[], metavar="PACKAGE=PYTHON")
    given = parser.parse_args()
    if given.package:
        sys.path.insert(0, str(HERE))
        print(json.dumps(answers(given.package, given.folder)))
        return
    pythons = {"nnsplice": sys.executable, "nnsight": sys.executable} | dict(one.split("=", 1) for one in given.peers)
    found = {}
    for package, python in pythons.items():
        command = [python, str(HERE / "run.py"), given.folder, package]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[package] = json.loads(done.stdout.splitlines()[-1])
    print("| task | " + " | ".join(found) + " |")
    print("|---|" + "---|" * len(found))
    for name, title in TASKS.items():
        cells = []
        for package, told in found.items():
            if "reason" in told[name]:
                cells.append(f"not: {told[name]['reason']}")
                continue
            same = agree(told[name]["value"], found["nnsplice"][name]["value"])
            cells.append(
                f"{lines_of(package)[name]} lines, {told[name]['seconds']:.2f} s" + ("" if same else ", differs")
            )
        print(f"| {title} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
