"""Answers as token ids of the model's vocabulary, where they follow a prompt."""

from __future__ import annotations

from collections.abc import Sequence
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
#: Ends of a prompt, besides letters and digits, after which a word has a space before it.
_BEFORE_A_WORD = frozenset(",.;:!?)]}%\u201d\u2019")


def ids_of(
    metric: str, name: str, answer: Any, tokenizer: Any, prompts: int, texts: Sequence[str] | None = None
) -> Ids:
    """The token ids of an answer, for each prompt."""
    if not isinstance(answer, str | int | Sequence | AbstractSet):
        raise BadType(
            f"{metric} was given {answer!r} as {name}=", expected="a token's text or id, or one for each prompt"
        )
    if isinstance(answer, str | int | AbstractSet):
        each: list[Any] = [answer] * prompts
    elif prompts == 1 and len(answer) > 1 and all(isinstance(one, str | int) for one in answer):
        each = [list(answer)]
    else:
        each = list(answer)
    if len(each) != prompts:
        raise BadArgument(
            f"{metric} was given {len(each)} tokens as {name}=, and there are {prompts} prompts",
            expected="one token for all prompts, or one for each; a set, where several tokens are the answer of all",
            write=f"{name}={{{', '.join(map(repr, each[:3]))}}}"
            if all(isinstance(e, str | int) for e in each)
            else None,
        )
    found = tuple(_one(metric, name, one, tokenizer) for one in each)
    if texts is not None and tokenizer is not None:
        _check_spaces(metric, name, each, found, tokenizer, texts)
    return found


def _one(metric: str, name: str, given: Any, tokenizer: Any) -> int | tuple[int, ...]:
    """A token's id, or those of a set."""
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


def _check_spaces(
    metric: str, name: str, each: Sequence[Any], found: Ids, tokenizer: Any, texts: Sequence[str]
) -> None:
    """Warn of a word without a leading space, if the tokenizer has another token for it after the prompt."""
    warned: set[str] = set()
    for given, ids, text in zip(each, found, texts, strict=True):
        words = [given] if isinstance(given, str) else [] if isinstance(given, int) else list(given)
        known = (ids,) if isinstance(ids, int) else ids
        for word in words:
            if not isinstance(word, str) or word in warned:
                continue
            other = _follows_otherwise(tokenizer, text, word, known)
            if other is not None:
                warned.add(word)
                warn_caller(
                    f"{word!r}, given to {metric} as {name}=, is not the token that follows {text[-24:]!r} and a "
                    f"space: that is {tokenizer.decode([other])!r}, another one; write {name}={' ' + word!r}, or the "
                    f"token's id where {word!r} is meant as it stands"
                )


@dataclass(frozen=True, slots=True)
class Spelling:
    """An answer, and the token of its text with a space more or less before it.

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
    name: str, answer: Any, ids: Ids, tokenizer: Any, texts: Sequence[str] | None = None
) -> tuple[Spelling, ...]:
    """The other spellings of an answer's texts that are one token, and not among the given ones.

    Args:
        texts: the text of each prompt, where `ids_of` was given them and has warned of words that follow them.
    """
    if tokenizer is None:
        return ()
    each = [answer] * len(ids) if isinstance(answer, str | int | AbstractSet) else list(answer)
    if len(ids) == 1 and len(each) > 1:
        each = [each]
    found: list[Spelling] = []
    for prompt, (given, known) in enumerate(zip(each, ids, strict=True)):
        words = [given] if isinstance(given, str) else [] if isinstance(given, int) else list(given)
        asked = (known,) if isinstance(known, int) else known
        for word in words:
            if not isinstance(word, str) or not word.strip():
                continue
            if texts is not None and _follows_otherwise(tokenizer, texts[prompt], word, asked) is not None:
                continue
            other = word[1:] if word[0] == " " else f" {word}"
            (token,), spelled = _tokens(tokenizer, word), _tokens(tokenizer, other)
            if len(spelled) == 1 and spelled[0] not in asked and spelled[0] != tokenizer.unk_token_id:
                found.append(Spelling(prompt, name, word, token, other, spelled[0]))
    return tuple(found)


def check_spellings(metric: str, spellings: Sequence[Spelling], logits: Tensor, prompts: Sequence[int]) -> None:
    """Warn of an answer whose other spelling is far likelier in an unedited run.

    Args:
        logits: `[row, vocab]`, of the unedited run.
        prompts: the number of each row's prompt.
    """
    rows = {prompt: row for row, prompt in enumerate(prompts)}
    asked = [one for one in spellings if one.prompt in rows]
    if not asked:
        return
    likely = logits.float().log_softmax(-1)
    warned: set[str] = set()
    for one in asked:
        mine, other = (float(likely[rows[one.prompt], token].exp()) for token in (one.token, one.other_token))
        if one.given not in warned and other >= LIKELY and other >= FAR * mine:
            warned.add(one.given)
            warn_caller(
                f"{one.given!r}, given to {metric} as {one.name}=, has probability {mine:.2g} in the unedited run of "
                f"prompt {one.prompt}, and {one.other!r} has {other:.2g}; write {one.name}={one.other!r}, or the "
                f"token's id where {one.given!r} is meant as it stands"
            )


def _follows_otherwise(tokenizer: Any, text: str, word: str, known: Sequence[int]) -> int | None:
    """The token of a word behind a prompt and a space, where it was given without and is another one there."""
    other = None if word[:1].isspace() else _with_space(tokenizer, text, word)
    return None if other in known else other


def _with_space(tokenizer: Any, text: str, word: str) -> int | None:
    """The token of a word after a prompt and a space, if it is one token."""
    if not text or not (text[-1].isalnum() or text[-1] in _BEFORE_A_WORD):
        return None  # after a blank, an opening quote or a bracket a word has no space before it
    alone = _tokens(tokenizer, text)
    both = _tokens(tokenizer, f"{text} {word}")
    return both[-1] if len(both) == len(alone) + 1 and both[:-1] == alone else None


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
