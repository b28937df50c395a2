"""Public contrastive sets as prompts to fit on: readers of the common formats.

read_evals          A/B questions as JSON lines: the answer that matches a behaviour, and the one that does not
read_suffixes       a JSON list of texts, put behind two personas
read_pairs          a JSON list of inputs and outputs, as examples in the prompt: right ones, and shuffled ones
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nnsplice.errors import BadArgument, FileError
from nnsplice.files import from_json, text_of


@dataclass(frozen=True)
class Contrast:
    """Pairs of prompts with and without a property.

    >>> pairs = ns.steering.Contrast(("a b", "c d"), ("a e", "c f"))
    >>> pairs[:1]
    Contrast(positive=('a b',), negative=('a e',))

    Attributes:
        positive: the prompts with the property.
        negative: the prompts without it.
    """

    positive: tuple[str, ...]
    negative: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.positive) != len(self.negative) or not self.positive:
            raise BadArgument(
                f"{len(self.positive)} positive and {len(self.negative)} negative prompts are no pairs",
                expected="as many of each, at least one",
            )

    def __len__(self) -> int:
        return len(self.positive)

    def __getitem__(self, rows: slice) -> Contrast:
        return Contrast(self.positive[rows], self.negative[rows])

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(zip(self.positive, self.negative, strict=True))

    def shuffled(self, seed: int = 0) -> Contrast:
        """The pairs in random order.

        >>> ns.steering.Contrast(("a b", "c d", "e f"), ("a -", "c -", "e -")).shuffled()
        Contrast(positive=('a b', 'e f', 'c d'), negative=('a -', 'e -', 'c -'))

        Args:
            seed: the seed of the order.
        """
        order = list(range(len(self)))
        random.Random(seed).shuffle(order)
        return Contrast(tuple(self.positive[n] for n in order), tuple(self.negative[n] for n in order))


def read_evals(path: str | os.PathLike[str], *, template: str = "{question}\n\nAnswer:{answer}") -> Contrast:
    """Read questions with an answer that matches a behaviour and one that does not, a JSON object in each line.

    >>> import json
    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> row = {"question": "Do you agree?", "answer_matching_behavior": " Yes", "answer_not_matching_behavior": " No"}
    >>> with TemporaryDirectory() as folder:
    ...     _ = Path(f"{folder}/evals.jsonl").write_text(json.dumps(row))
    ...     ns.steering.read_evals(f"{folder}/evals.jsonl", template="{question}{answer}")
    Contrast(positive=('Do you agree? Yes',), negative=('Do you agree? No',))

    Args:
        path: the JSONL file, with `question`, `answer_matching_behavior` and `answer_not_matching_behavior`.
        template: the prompt, with `{question}` and `{answer}`; answers have their own leading space.

    Returns:
        Positive and negative prompts, in pairs.

    Raises:
        FileError: a line that is no such object, or has the same answer twice.
        BadArgument: a template without its fields.
    """
    _check_template(template, "question", "answer")
    # Only a line break ends a line: `splitlines` would also cut at separators inside of a JSON text.
    lines = enumerate(text_of(path).split("\n"), 1)
    rows = [(number, from_json(line, f"line {number} of {path}")) for number, line in lines if line.strip()]
    pairs = []
    for number, row in rows:
        names = ("question", "answer_matching_behavior", "answer_not_matching_behavior")
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in names):
            raise FileError(f"line {number} of {path} is no question", expected=f"an object with {', '.join(names)}")
        question, yes, no = (row[name] for name in names)
        if yes == no:
            raise FileError(f"line {number} of {path} has the same answer twice: {yes!r}")
        pairs.append([template.format(question=question, answer=answer) for answer in (yes, no)])
    return _contrast(path, pairs)


def read_suffixes(
    path: str | os.PathLike[str],
    positive: str,
    negative: str,
    *,
    template: str = "Pretend you're {persona}. {suffix}",
) -> Contrast:
    """Read beginnings of texts, each as a prompt of two personas.

    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     _ = Path(f"{folder}/suffixes.json").write_text('["That game", "I can see"]')
    ...     pairs = ns.steering.read_suffixes(f"{folder}/suffixes.json", "a happy person", "a sad person")
    >>> pairs.positive
    ("Pretend you're a happy person. That game", "Pretend you're a happy person. I can see")
    >>> pairs.negative
    ("Pretend you're a sad person. That game", "Pretend you're a sad person. I can see")

    Args:
        path: a JSON file with a list of texts.
        positive: the persona of the positive prompts.
        negative: the persona of the negative prompts.
        template: the prompt, with `{persona}` and `{suffix}`.

    Returns:
        Positive and negative prompts, in pairs.

    Raises:
        FileError: the file is no list of texts.
        BadArgument: equal personas, or a template without its fields.
    """
    _check_template(template, "persona", "suffix")
    if positive == negative:
        raise BadArgument(f"both personas are {positive!r}", expected="two that differ")
    found = from_json(text_of(path), path)
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise FileError(f"{path} is no list of texts", expected='["That game", "I can see", ...]')
    pairs = [[template.format(persona=p, suffix=text) for p in (positive, negative)] for text in found if text]
    return _contrast(path, pairs)


def read_pairs(
    path: str | os.PathLike[str],
    *,
    examples: int = 4,
    n: int = 100,
    seed: int = 0,
    template: str = "{input}:{output}",
) -> Contrast:
    """Read pairs of a function's input and output, as few-shot prompts that show it, and prompts with shuffled outputs.

    Both end with an input without its output; only the positive prompts define the function.

    >>> import json
    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> rows = [("hot", "cold"), ("up", "down"), ("in", "out")]
    >>> with TemporaryDirectory() as folder:
    ...     text = json.dumps([{"input": one, "output": other} for one, other in rows])
    ...     _ = Path(f"{folder}/antonyms.json").write_text(text)
    ...     pairs = ns.steering.read_pairs(f"{folder}/antonyms.json", examples=2, n=1)
    >>> print(pairs.positive[0])
    up:down
    in:out
    hot:
    >>> print(pairs.negative[0])
    up:out
    in:down
    hot:

    Args:
        path: a JSON file with a list of `{"input": ..., "output": ...}`.
        examples: the number of examples in each prompt.
        n: the number of prompts of each kind.
        seed: the seed of the choice and the shuffling.
        template: one example, with `{input}` and `{output}`; the last one is cut before its output.

    Returns:
        Positive and negative prompts, in pairs.

    Raises:
        FileError: the file is no list of inputs and outputs.
        BadArgument: fewer than 2 examples, fewer pairs than a prompt needs, or a template without its fields.
    """
    _check_template(template, "input", "output")
    found = from_json(text_of(path), path)
    good = isinstance(found, list) and all(isinstance(r, dict) and {"input", "output"} <= set(r) for r in found)
    if not good:
        raise FileError(f"{path} is no list of inputs and outputs", expected='[{"input": "hot", "output": "cold"}]')
    if examples < 2 or len(found) <= examples:
        raise BadArgument(f"examples={examples}, and {path} has {len(found)} pairs", expected="2 or more, and fewer")
    drawn, pairs = random.Random(seed), []
    for _ in range(n):
        *shown, query = drawn.sample(found, examples + 1)
        outputs = [row["output"] for row in shown]
        shift = drawn.randrange(1, len(outputs))
        wrong = outputs[shift:] + outputs[:shift]
        end = template.format(input=query["input"], output="\0").partition("\0")[0]
        pairs.append([])
        for dealt in (outputs, wrong):
            lines = [template.format(input=row["input"], output=o) for row, o in zip(shown, dealt, strict=True)]
            pairs[-1].append("\n".join([*lines, end]))
    return _contrast(path, pairs)


def _contrast(path: Any, pairs: Sequence[Sequence[str]]) -> Contrast:
    if not pairs:
        raise FileError(f"{path} holds no pair")
    return Contrast(tuple(a for a, _ in pairs), tuple(b for _, b in pairs))


def _check_template(template: str, *names: str) -> None:
    missing = [name for name in names if f"{{{name}}}" not in template]
    if missing:
        raise BadArgument(f"the template has no {{{missing[0]}}}", expected=" and ".join(f"{{{n}}}" for n in names))
