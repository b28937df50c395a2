"""The titles of figures and pages: metric with answers, prompts, and their differing tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from nnsplice.results.table import Table

#: How many receivers are named.
RECEIVERS = 4


def metric_words(table: Table, metric: str, prompt: int | None) -> str:
    """The metric with its answers, `" Paris" - " Berlin" (logit_diff)`, if all shown prompts have the same.

    Args:
        metric: the metric's name.
        prompt: the prompt that is shown; None for all of them.
    """
    identity = table.asked.get("metric")
    ids = identity.get("ids") if isinstance(identity, Mapping) else None
    if not isinstance(ids, Mapping) or not ids:
        return metric
    words = [_answer(table, rows, prompt) for rows in ids.values()]
    if any(word is None for word in words):
        return metric
    if list(ids) == ["answer", "wrong"]:
        return f"{words[0]} - {words[1]} ({metric})"
    return f"{metric} of {', '.join(map(str, words))}"


def _answer(table: Table, rows: Sequence[Any], prompt: int | None) -> str | None:
    """An answer's text; None if prompts have different answers, or the texts of the tokens are not known."""
    samples = table.asked.get("samples", 1)  # a trace has a row for each sample
    each = list(rows)[::samples] if isinstance(samples, int) else list(rows)
    if prompt is not None:
        each = each[prompt : prompt + 1]
    if not each or any(one != each[0] for one in each):
        return None
    words = table.labels.get("words", {})
    ids = each[0] if isinstance(each[0], list | tuple) else [each[0]]
    if any(str(one) not in words for one in ids):
        return None
    if table.asked["metric"].get("name") == "sequence_log_probability":  # the tokens of one sequence
        return quoted("".join(words[str(one)] for one in ids))
    return " or ".join(quoted(words[str(one)]) for one in ids)


def receivers(asked: Mapping[str, Any]) -> str:
    """The receivers of a path patch; empty for other results, and if each sender has receivers of its own.

    >>> from nnsplice.results.wording import receivers
    >>> receivers({"receivers": ["layers[2].heads[1].q"]}), receivers({})
    ('layers[2].heads[1].q', '')
    """
    given = asked.get("receivers") or ()
    if "method" in asked or not all(isinstance(one, str) for one in given):
        return ""
    return ", ".join(given[:RECEIVERS]) + (f", ... ({len(given)} in all)" if len(given) > RECEIVERS else "")


def prompt_lines(table: Table, prompt: int | None) -> list[tuple[str, str]]:
    """The prompts of the shown pair, as (name, text); empty if several pairs are shown."""
    only = 0 if len(table.clean) == 1 else prompt
    if only is None or not table.tokens:
        return []
    edited = sentence(table.tokens[only])
    clean = clean_tokens(table, only)
    if clean is None:
        return [("prompt", edited)]
    return [("clean", sentence(clean)), ("corrupted", edited)]


def clean_tokens(table: Table, prompt: int) -> tuple[str, ...] | None:
    """The tokens of a prompt's clean partner; None without a partner."""
    rows = table.labels.get("clean") or ()
    return tuple(rows[prompt]) if prompt < len(rows) else None


def token_label(table: Table, prompt: int, position: int, text: str) -> str:
    """The label of a token's column: `Eiffel -> Brandenburg` where the two prompts of a pair differ."""
    clean = clean_tokens(table, prompt)
    if clean is None or len(clean) != len(table.tokens[prompt]) or not -len(clean) <= position < len(clean):
        return visible(text)
    other = clean[position]
    return visible(text) if other == text else f"{visible(other.strip() or other)} -> {visible(text.strip() or text)}"


def sentence(tokens: Sequence[str]) -> str:
    """A prompt from its tokens; joined with blanks if no token has one.

    >>> from nnsplice.results.wording import sentence
    >>> sentence(["The", " cat"]), sentence(["The", "cat"])
    ('The cat', 'The cat')
    """
    return ("" if any(any(c.isspace() for c in token) for token in tokens) else " ").join(tokens).strip()


def brief(prompt: str) -> str:
    """A prompt for a title; a long one loses its middle."""
    return prompt if len(prompt) <= 150 else f"{prompt[:72]} ... {prompt[-73:]}"


def visible(text: str) -> str:
    """A token for a label, with blanks made visible."""
    return str(text) if text.strip(" ") else "␣" * len(text)


def quoted(text: str) -> str:
    """A token in quotes, so that a leading space is visible."""
    return f'"{text}"'


def model_name(asked: Mapping[str, Any]) -> str:
    """The model's name; of a folder, its last part.

    >>> from nnsplice.results.wording import model_name
    >>> model_name({"model": "/home/me/models/toy"}), model_name({"model": "openai/gpt2"})
    ('toy', 'openai/gpt2')
    """
    name = asked.get("model")
    if not isinstance(name, str):
        return ""
    windows = PureWindowsPath(name)
    if windows.drive or "\\" in name:
        return windows.name
    return PurePosixPath(name).name if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 else name
