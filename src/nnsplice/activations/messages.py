"""Chat messages as prompts: the tokenizer's template applied, and the span of each message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from nnsplice import engine
from nnsplice.activations.offsets import covered
from nnsplice.errors import BadArgument, BadType, named

#: One message: `{"role": "user", "content": "..."}`.
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Chat:
    """The messages of one prompt and the options of their template; `ns.chat` makes it."""

    messages: tuple[Message, ...]
    #: Options of the template: `enable_thinking=False`, `tools=[...]`, ...
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Templated:
    """One prompt after the template is applied."""

    ids: tuple[int, ...]
    #: The text with these tokens; None if the tokenizer makes other tokens of every text.
    text: str | None
    #: Role -> (start, stop) in tokens, for messages that are found in the text.
    spans: Mapping[str, tuple[int, int]]


def chat(
    messages: str | Sequence[Message],
    *,
    system: str | None = None,
    assistant_prefill: str | None = None,
    **template: Any,
) -> Chat:
    """Make a prompt of chat messages, with a system message, a prefill or template options.

    A plain list of messages is a prompt as well. The model continues with the assistant's answer, or with the last
    message where that is the assistant's. Positions count the tokens after the template is applied, and `["user"]` or
    `["assistant"][-1]` are spans of the messages (`["user 2"]` for a role's second message).

    >>> chat = ns.chat("Where is the Eiffel Tower?", assistant_prefill="It is in")
    >>> [message["role"] for message in chat.messages]
    ['user', 'assistant']

    Args:
        messages: the user's text, or messages as `{"role": ..., "content": ...}`.
        system: a system message, put first.
        assistant_prefill: the beginning of the assistant's answer.
        **template: arguments of the tokenizer's chat template, such as `enable_thinking=False`.

    Returns:
        The prompt, for every function that takes prompts.

    Raises:
        BadType: something other than a text or a list of messages.
    """
    given = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    conversation: list[Message] = list(given)
    if system is not None:
        conversation.insert(0, {"role": "system", "content": system})
    if assistant_prefill is not None:
        conversation.append({"role": "assistant", "content": assistant_prefill})
    if not is_chat(conversation):
        raise BadType(
            f"{named(messages)} is no list of messages", expected='{"role": "user", "content": "..."} for each message'
        )
    return Chat(tuple(conversation), dict(template))


def is_chat(prompt: Any) -> bool:
    """Whether this is one prompt of messages."""
    if isinstance(prompt, Chat):
        return True
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str)
        and bool(prompt)
        and all(isinstance(message, Mapping) and "role" in message for message in prompt)
    )


def template_of(model: engine.Model) -> str:
    """The tokenizer's chat template, or an error."""
    template = getattr(engine.tokenizer_of(model), "chat_template", None)
    if not template:
        raise BadArgument(
            "this model's tokenizer has no chat template, so prompts cannot be messages",
            expected="texts, or a tokenizer with a template",
        )
    return str(template)


def templated(model: engine.Model, prompt: Chat | Sequence[Message]) -> Templated:
    """One prompt of messages as tokens."""
    given = prompt if isinstance(prompt, Chat) else Chat(tuple(prompt))
    template_of(model)
    tokenizer = engine.tokenizer_of(model)
    rendered = _rendered(tokenizer, given.messages, given.options)
    # The template writes special tokens itself, so the tokenizer must not add them once more.
    is_fast = getattr(tokenizer, "is_fast", False)
    encoded = tokenizer(rendered, add_special_tokens=False, **({"return_offsets_mapping": True} if is_fast else {}))
    ids = tuple(encoded["input_ids"])
    spans: dict[str, tuple[int, int]] = {}
    if is_fast:
        offsets = encoded["offset_mapping"]
        for name, (first, last) in _places(tokenizer, given, rendered).items():
            if (found := covered(offsets, first, last)) is not None:
                spans[name] = found
    bos = getattr(tokenizer, "bos_token", None) or ""
    texts = (rendered, rendered.removeprefix(bos))
    text = next((text for text in texts if tuple(tokenizer(text)["input_ids"]) == ids), None)
    return Templated(ids, text, spans)


def _rendered(tokenizer: Any, messages: Sequence[Message], options: Mapping[str, Any]) -> str:
    from jinja2 import TemplateError

    goes_on = messages[-1]["role"] == "assistant"
    arguments = {"add_generation_prompt": not goes_on, "continue_final_message": goes_on, **options}
    try:
        return str(tokenizer.apply_chat_template([dict(one) for one in messages], tokenize=False, **arguments))
    except (TemplateError, KeyError, TypeError, ValueError) as error:
        roles = ", ".join(str(message["role"]) for message in messages)
        raise BadArgument(
            f"the chat template refuses these messages ({roles}): {error}",
            expected='messages that this model was trained on, each {"role": "user", "content": "..."}',
        ) from error


def _places(tokenizer: Any, given: Chat, rendered: str) -> dict[str, tuple[int, int]]:
    """The character range of each message in the rendered text; empty if they cannot be found.

    The messages are rendered again with a unique mark in place of each text, as messages may repeat its words.
    """
    texts = [message.get("content") for message in given.messages]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        return {}
    marks = [f"<message-{n}-of-{len(texts)}>" for n in range(len(texts))]
    if any(mark in rendered for mark in marks):
        return {}
    marked = [{**message, "content": mark} for message, mark in zip(given.messages, marks, strict=True)]
    try:
        rest = _rendered(tokenizer, marked, given.options)
    except BadArgument:
        return {}
    between = _split(rest, marks)
    if between is None:
        return {}
    roles = [str(message["role"]) for message in given.messages]
    names = [role if roles.count(role) == 1 else f"{role} {roles[: n + 1].count(role)}" for n, role in enumerate(roles)]
    for contents in ([str(text) for text in texts], [str(text).strip() for text in texts]):  # many templates strip
        if rendered == "".join(a + b for a, b in zip(between, [*contents, ""], strict=True)):
            ends = list(accumulate(len(a) + len(b) for a, b in zip(between, contents, strict=False)))
            return {name: (end - len(text), end) for name, end, text in zip(names, ends, contents, strict=True)}
    return {}  # the template depends on the contents


def _split(text: str, marks: Sequence[str]) -> list[str] | None:
    """The texts before, between and after the marks."""
    found: list[str] = []
    for mark in marks:
        before, found_mark, text = text.partition(mark)
        if not found_mark:
            return None
        found.append(before)
    return [*found, text]
