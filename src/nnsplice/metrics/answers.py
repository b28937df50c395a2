"""Answers as token ids of the model's vocabulary, where they follow a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nnsplice.errors import BadArgument, BadType
from nnsplice.warn import warn_caller

#: One token, as text or as id, or a set of them that count as one.
Token = str | int | AbstractSet[str | int] | Sequence[str | int]
#: One token or set for all prompts, or a list of one for each. For a single prompt a list is a set.
Answer = str | int | AbstractSet[str | int] | Sequence[Token]
#: An answer of several tokens, for all prompts or for each.
TokenSequence = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
#: For each prompt its token, or the tokens of its set.
Ids = tuple[int | tuple[int, ...], ...]

#: The least probability of another spelling, and its least ratio to the given one, for a warning.
LIKELY, FAR = 0.05, 20.0
#: Characters besides letters and digits after which a word has a leading space.
_BEFORE_A_WORD = frozenset(",.;:!?)]}%\u201d\u2019")


def ids_of(metric: str, name: str, answer: Any, tokenizer: Any, prompts: int) -> Ids:
    """The token ids of an answer, for each prompt."""
    if not isinstance(answer, str | int | Sequence | AbstractSet):
        raise BadType(
            f"{metric} was given {answer!r} as {name}=", expected="a token's text or id, or one for each prompt"
        )
    each = per_prompt(answer, prompts)
    if len(each) != prompts:
        raise BadArgument(
            f"{metric} was given {len(each)} tokens as {name}=, and there are {prompts} prompts",
            expected="one token for all prompts, or one for each; a set, where several tokens are the answer of all",
            write=f"{name}={{{', '.join(map(repr, each[:3]))}}}"
            if all(isinstance(e, str | int) for e in each)
            else None,
        )
    return tuple(_ids_of_one(metric, name, one, tokenizer) for one in each)


def per_prompt(answer: Any, prompts: int) -> list[Any]:
    """The answer of each prompt; the caller checks that there are as many."""
    if isinstance(answer, str | int | AbstractSet):
        return [answer] * prompts
    if prompts == 1 and len(answer) > 1 and all(isinstance(one, str | int) for one in answer):
        return [list(answer)]
    return list(answer)


def _ids_of_one(metric: str, name: str, given: Any, tokenizer: Any) -> int | tuple[int, ...]:
    """The id of a token, or the ids of a set."""
    if isinstance(given, str) or not isinstance(given, Sequence | AbstractSet):
        return _id(metric, name, given, tokenizer)
    if not given:
        raise BadArgument(f"{metric} was given an empty set as {name}=", expected="at least one token")
    ids = sorted({_id(metric, name, token, tokenizer) for token in given})
    return ids[0] if len(ids) == 1 else tuple(ids)


def _id(metric: str, name: str, token: Any, tokenizer: Any) -> int:
    if isinstance(token, int) and not isinstance(token, bool):
        return token
    if not isinstance(token, str):
        raise BadType(f"{metric} was given {token!r} as {name}=", expected="a token's text or id")
    if tokenizer is None:
        raise BadArgument(
            f"{metric} was given {token!r} as {name}=, and there is no tokenizer to read it",
            expected="a token id, or a model with a tokenizer",
        )
    ids = _tokens(tokenizer, token)
    if len(ids) != 1:
        shown = ", ".join(repr(tokenizer.decode([i])) for i in ids) or "none"
        spaced = f" {token.strip()}"
        single = spaced != token and len(_tokens(tokenizer, spaced)) == 1
        first = tokenizer.decode(ids[:1])
        way = f"{name}={spaced!r}" if single else f"ns.sequence_log_probability({token!r})   (all of its tokens)"
        raise BadArgument(
            f"{token!r}, given to {metric} as {name}=, is {len(ids)} tokens: {shown}",
            expected="a text that is one token; in many vocabularies a word has its leading space",
            write=(way if not first.strip() else f"{way}, or {name}={first!r}") if ids else None,
        )
    if ids[0] == tokenizer.unk_token_id:
        spaced = _tokens(tokenizer, f" {token.strip()}")
        known = len(spaced) == 1 and spaced[0] != tokenizer.unk_token_id
        raise BadArgument(
            f"{token!r}, given to {metric} as {name}=, is not in this model's vocabulary",
            expected="a text that is one of its tokens, or a token's id",
            write=f"{name}={' ' + token.strip()!r}" if known else None,
        )
    return ids[0]


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _words(answer: Any, ids: Ids) -> Iterator[tuple[int, str, tuple[int, ...]]]:
    """(number of the prompt, answer as text, tokens of all answers of the prompt)."""
    for prompt, (given, known) in enumerate(zip(per_prompt(answer, len(ids)), ids, strict=True)):
        for word in [given] if isinstance(given, str | int) else given:
            if isinstance(word, str):
                yield prompt, word, (known,) if isinstance(known, int) else known


def spaced_tokens(answer: Any, ids: Ids, tokenizer: Any, texts: Sequence[str]) -> dict[tuple[int, str], int]:
    """The tokens of words without a leading space after a prompt and a space, by prompt and word.

    Only those that differ from the given tokens.
    """
    found: dict[tuple[int, str], int] = {}
    for prompt, word, known in _words(answer, ids):
        other = None if word[:1].isspace() else _with_space(tokenizer, texts[prompt], word)
        if other is not None and other not in known:
            found[prompt, word] = other
    return found


def warn_of_spaces(
    metric: str, name: str, spaced: Mapping[tuple[int, str], int], tokenizer: Any, texts: Sequence[str]
) -> None:
    """Warn once of each word that is another token with a leading space."""
    warned: set[str] = set()
    for (prompt, word), other in spaced.items():
        if word not in warned:
            warned.add(word)
            warn_caller(
                f"{word!r}, given to {metric} as {name}=, is not the token that follows {texts[prompt][-24:]!r} and a "
                f"space: that is {tokenizer.decode([other])!r}, another one; write {name}={' ' + word!r}, or the "
                f"token's id where {word!r} is meant as it stands"
            )


@dataclass(frozen=True, slots=True)
class Spelling:
    """An answer, and the token of its other spelling, with or without a leading space.

    Attributes:
        prompt: the number of the prompt.
        name: the argument of the metric.
        given: the text of the answer.
        token: its token.
        other: the other text.
        other_token: the token of that.
    """

    prompt: int
    name: str
    given: str
    token: int
    other: str
    other_token: int


def spellings_of(
    name: str, answer: Any, ids: Ids, tokenizer: Any, spaced: Mapping[tuple[int, str], int]
) -> tuple[Spelling, ...]:
    """The other spellings of an answer's texts that are one token, and not a given one.

    Args:
        spaced: the result of `spaced_tokens`, of which `warn_of_spaces` has already warned.
    """
    if tokenizer is None:
        return ()
    found: list[Spelling] = []
    for prompt, word, known in _words(answer, ids):
        if not word.strip() or (prompt, word) in spaced:
            continue
        other = word[1:] if word[0] == " " else f" {word}"
        (token,), spelled = _tokens(tokenizer, word), _tokens(tokenizer, other)
        if len(spelled) == 1 and spelled[0] not in known and spelled[0] != tokenizer.unk_token_id:
            found.append(Spelling(prompt, name, word, token, other, spelled[0]))
    return tuple(found)


def check_spellings(metric: str, spellings: Sequence[Spelling], logits: Tensor, prompts: Sequence[int]) -> None:
    """Warn of an answer whose other spelling is far likelier in an unedited run.

    Args:
        logits: `[row, vocab]`, of the unedited run.
        prompts: the number of each row's prompt.
    """
    rows = {prompt: row for row, prompt in enumerate(prompts)}
    in_rows = [one for one in spellings if one.prompt in rows]
    if not in_rows:
        return
    likely = logits.float().log_softmax(-1)
    warned: set[str] = set()
    for one in in_rows:
        mine, other = (float(likely[rows[one.prompt], token].exp()) for token in (one.token, one.other_token))
        if one.given not in warned and other >= LIKELY and other >= FAR * mine:
            warned.add(one.given)
            warn_caller(
                f"{one.given!r}, given to {metric} as {one.name}=, has probability {mine:.2g} in the unedited run of "
                f"prompt {one.prompt}, and {one.other!r} has {other:.2g}; write {one.name}={one.other!r}, or the "
                f"token's id where {one.given!r} is meant as it stands"
            )


def _with_space(tokenizer: Any, text: str, word: str) -> int | None:
    """The token of a word after a prompt and a space, if it is one token."""
    if not text or not (text[-1].isalnum() or text[-1] in _BEFORE_A_WORD):
        return None  # after a blank, an opening quote or a bracket a word has no leading space
    prompt_ids = _tokens(tokenizer, text)
    both = _tokens(tokenizer, f"{text} {word}")
    return both[-1] if len(both) == len(prompt_ids) + 1 and both[:-1] == prompt_ids else None


def continuation(metric: str, answer: Any, tokenizer: Any, ids: Sequence[Sequence[int]], texts: Any) -> list[list[int]]:
    """The token ids of an answer of several tokens behind each prompt."""
    flat = isinstance(answer, Sequence) and not isinstance(answer, str) and all(isinstance(t, int) for t in answer)
    each = [answer] * len(ids) if isinstance(answer, str) or flat else answer
    if not isinstance(each, Sequence) or len(each) != len(ids):
        raise BadArgument(
            f"{metric} was given {answer!r}, and there are {len(ids)} prompts",
            expected="one answer for all prompts, or one for each: texts, or lists of token ids",
        )
    found: list[list[int]] = []
    for row, one in enumerate(each):
        if isinstance(one, str):
            found.append(_behind(metric, one, tokenizer, list(ids[row]), None if texts is None else texts[row]))
        elif isinstance(one, Sequence) and all(isinstance(t, int) and not isinstance(t, bool) for t in one):
            found.append(list(one))
        else:
            raise BadType(f"{metric} was given {one!r} for prompt {row}", expected="a text, or a list of token ids")
        if not found[-1]:
            raise BadArgument(f"{metric} was given an empty answer for prompt {row}", expected="at least one token")
    return found


def _behind(metric: str, answer: str, tokenizer: Any, prompt: list[int], text: str | None) -> list[int]:
    if tokenizer is None:
        raise BadArgument(
            f"{metric} was given {answer!r}, and there is no tokenizer to read it", expected="a list of token ids"
        )
    if text is None:
        return _tokens(tokenizer, answer)
    both = list(tokenizer(text + answer)["input_ids"])
    if both[: len(prompt)] == prompt:
        return both[len(prompt) :]
    # A tokenizer that splits at blanks would join an answer without one to the last word of the prompt.
    spaced = list(tokenizer(f"{text} {answer}")["input_ids"])
    if (
        not answer[:1].isspace()
        and spaced[: len(prompt)] == prompt
        and spaced[len(prompt) :] == _tokens(tokenizer, answer)
    ):
        return spaced[len(prompt) :]
    raise BadArgument(
        f"{answer!r} behind {text[-24:]!r} changes the prompt's own tokens, so it does not follow it",
        expected="an answer that begins a token of its own, with its leading space",
        write=f"ns.{metric}({' ' + answer.strip()!r}), or its token ids",
    )
