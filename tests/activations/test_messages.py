"""Chat messages as prompts: the tokenizer's own template, tokens as transformers makes them, spans of each message."""

from __future__ import annotations

import pytest
import torch

import nnsplice as ns
from nnsplice.activations.encoding import encode
from nnsplice.activations.messages import templated
from nnsplice.errors import BadArgument, BadType, SpanError
from zoo import wrap

#: Each message is the mark of its role, what is said, and the end's mark, as in ChatML.
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ {'user': 'w50', 'assistant': 'w51', 'system': 'w52'}[m['role']] + ' ' + m['content'] | trim + ' w53 ' }}"
    "{% endfor %}{% if add_generation_prompt %}w51{% endif %}"
)
USER = {"role": "user", "content": "w3 w4 "}
ANSWER = {"role": "assistant", "content": "w5"}


@pytest.fixture(scope="module")
def model():
    wrapped = wrap("llama")
    wrapped.tokenizer.chat_template = TEMPLATE
    yield wrapped
    wrapped.tokenizer.chat_template = None


def _words(model, prompt) -> str:
    return model.tokenizer.decode(encode(model, prompt).ids[0])


def test_messages_become_what_transformers_makes_of_them(model) -> None:
    for messages in ([USER], [USER, ANSWER, USER], [{"role": "system", "content": "w9"}, USER]):
        expected = model.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert encode(model, messages).ids == (tuple(expected),)
    assert _words(model, [USER]) == "w50 w3 w4 w53 w51"


def test_the_assistants_last_message_is_gone_on_with(model) -> None:
    assert _words(model, [USER, ANSWER]) == "w50 w3 w4 w53 w51 w5"
    assert _words(model, ns.chat("w3 w4", assistant_prefill="w5")) == "w50 w3 w4 w53 w51 w5"
    assert _words(model, ns.chat("w3", system="w9")) == "w52 w9 w53 w50 w3 w53 w51"


def test_a_run_of_messages_is_the_run_of_their_tokens(model) -> None:
    chats = [[USER, ANSWER], [{"role": "user", "content": "w7 w8"}, {"role": "assistant", "content": "w6"}]]
    saved = ns.capture(model, chats, ['layers[1].output["user"]', 'layers[1].output["assistant"][-1]'])
    plain = ns.capture(model, ["w50 w3 w4 w53 w51 w5", "w50 w7 w8 w53 w51 w6"], "layers[1].output[:]")
    assert torch.equal(saved.get('layers[1].output["user"]'), plain.get("layers[1].output[1:3]"))
    assert torch.equal(saved['layers[1].output["assistant"][-1]'], plain["layers[1].output[5]"])
    metric = ns.logit_diff("w7", "w8")
    clean, corrupted = chats
    one = ns.sweep(model, clean, corrupted, 'layers[:].output["user"][0]', metric, progress=False)
    other = ns.sweep(
        model, "w50 w3 w4 w53 w51 w5", "w50 w7 w8 w53 w51 w6", "layers[:].output[1]", metric, progress=False
    )
    assert one.table.values.tolist() == other.table.values.tolist()


def test_a_message_that_says_the_templates_own_words_is_still_found(model) -> None:
    found = templated(model, [{"role": "user", "content": "w53 w50"}, {"role": "assistant", "content": "w51"}])
    assert found.spans == {"user": (1, 3), "assistant": (5, 6)}


def test_roles_that_speak_twice_are_numbered(model) -> None:
    found = templated(model, [USER, ANSWER, {"role": "user", "content": "w3"}])
    assert found.spans == {"user 1": (1, 3), "assistant": (5, 6), "user 2": (8, 9)}
    with pytest.raises(SpanError, match='spans given: "user 1", "assistant", "user 2"'):
        ns.capture(model, [USER, ANSWER, USER], 'layers[1].output["user"][-1]')


def test_a_template_whose_words_depend_on_what_is_said_gives_no_spans(model) -> None:
    model.tokenizer.chat_template = (
        "{% for m in messages %}{{ 'w50 ' if 'w3' in m['content'] else 'w51 ' }}{{ m['content'] }}{% endfor %}"
    )
    try:
        assert templated(model, [{"role": "user", "content": "w3"}]).spans == {}
    finally:
        model.tokenizer.chat_template = TEMPLATE


def test_spans_of_ones_own_stand_beside_those_of_the_messages(model) -> None:
    given = encode(model, [USER, ANSWER], {"subject": "w4", "assistant": (0, 1)})
    assert given.spans == {"user": ((1, 3),), "subject": ((2, 3),), "assistant": ((0, 1),)}


def test_a_tokenizer_that_begins_every_text_does_so_once(model) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = model.tokenizer
    backend, before = tokenizer.backend_tokenizer, (tokenizer.backend_tokenizer.post_processor, tokenizer.bos_token)
    backend.post_processor = TemplateProcessing(
        single="w49 $A", special_tokens=[("w49", tokenizer.convert_tokens_to_ids("w49"))]
    )
    tokenizer.chat_template = "w49 " + TEMPLATE
    try:
        tokenizer.bos_token = "w49"
        given = encode(model, [USER])
        assert _words(model, [USER]).split() == ["w49", "w50", "w3", "w4", "w53", "w51"]
        assert given.spans == {"user": ((2, 4),)}
        assert given.texts is not None and tuple(tokenizer(given.texts[0])["input_ids"]) == given.ids[0]
        assert encode(model, [USER], {"subject": "w4"}).spans == {"user": ((2, 4),), "subject": ((3, 4),)}
    finally:
        backend.post_processor, tokenizer.chat_template = before[0], TEMPLATE
        tokenizer.bos_token = before[1]


@pytest.mark.parametrize(
    ("prompts", "error", "text"),
    [
        ([[USER], "w3"], BadType, "prompt 1 is a str, and others are chat messages"),
        (USER, BadType, "'role', 'content' is no encoding"),
        ([{"role": "tool", "content": "w3"}], BadArgument, "refuses these messages \\(tool\\): no tools here"),
    ],
)
def test_what_is_no_chat_is_told(model, prompts, error, text) -> None:
    with pytest.raises(error, match=text):
        encode(model, prompts)


def test_a_model_without_a_template_takes_no_messages() -> None:
    with pytest.raises(BadArgument, match="no chat template"):
        encode(wrap("gpt2"), [USER])
    with pytest.raises(BadType, match="no list of messages"):
        ns.chat([{"content": "w3"}])
