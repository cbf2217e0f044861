"""Which tokens of a conversation the model is to learn to say."""

from __future__ import annotations

import pytest
from chatting import CHATML, chat_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_jax.data import bytes_tokenizer, chat_prompt_ids, encode_chat, prompt_ids
from llmos_jax.errors import ConfigError, DataError

MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}"
    "{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}"
)
TALK = [
    {"role": "user", "content": "one é"},
    {"role": "assistant", "content": "Two 🙂."},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "Four\n"},
]


def said(tokenizer, turns):
    """The answers' tokens by name, one string per run of them."""
    runs, last = [], False
    for token, is_answer in zip(turns.ids, turns.is_answer):
        if is_answer:
            runs = [*runs[:-1], [*runs[-1], token]] if last else [*runs, [token]]
        last = is_answer
    names = tokenizer.special_ids()
    return [
        "".join(
            f"<{tokenizer._inner.id_to_token(int(one))}>" if one in names else chr(one)
            for one in run
        )
        .encode("latin-1")
        .decode()
        for run in runs
    ]


@pytest.mark.parametrize("template", [CHATML, GENERATION], ids=["chatml", "blocks"])
def test_answers_and_their_end_marks_are_learned(template):
    tokenizer = chat_tokenizer(template)
    turns = encode_chat(tokenizer, TALK)
    assert said(tokenizer, turns) == ["Two 🙂.<<|im_end|>>", "Four\n<<|im_end|>>"]
    assert turns.answers == "Two 🙂.Four\n"
    assert turns.ids.dtype == "int32" and turns.ids.shape == turns.is_answer.shape


def test_a_header_less_template_gives_the_answer_with_its_space():
    tokenizer = chat_tokenizer(MISTRAL)
    turns = encode_chat(tokenizer, TALK)
    assert said(tokenizer, turns)[0] == " Two 🙂.<<|im_end|>>"
    assert turns.ids[0] == tokenizer.marks.bos_id


def test_tokens_are_those_of_the_whole_text():
    tokenizer = chat_tokenizer(CHATML)
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in TALK)
    turns = encode_chat(tokenizer, TALK)
    assert turns.ids.tolist() == tokenizer.encode_markup(text).tolist()


@settings(max_examples=40, deadline=None)
@given(
    contents=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
        min_size=1,
        max_size=5,
    )
)
def test_every_character_of_every_answer_is_learned(contents):
    tokenizer = chat_tokenizer(CHATML)
    roles = ("user", "assistant")
    talk = [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]
    turns = encode_chat(tokenizer, talk)
    wanted = "".join(contents[1::2])
    assert turns.answers == wanted
    assert tokenizer.decode(turns.ids[turns.is_answer]) == wanted
    marks = turns.ids[turns.is_answer] == tokenizer.eos_id
    assert marks.sum() == len(contents) // 2


def test_a_prompt_is_what_stands_before_the_answer():
    tokenizer = chat_tokenizer(CHATML)
    turns = encode_chat(tokenizer, TALK[:2])
    ids = chat_prompt_ids(tokenizer, TALK[:1])
    assert ids.tolist() == turns.ids[: turns.is_answer.argmax()].tolist()


def test_an_empty_prompt_begins_a_document():
    tokenizer = chat_tokenizer(CHATML)
    assert prompt_ids(tokenizer, "").tolist() == [tokenizer.begin_id]
    assert prompt_ids(tokenizer, "a").tolist() == [97]


def test_a_template_that_rewrites_earlier_turns_is_refused():
    last_only = CHATML.replace(
        "m.content", "(m.content if loop.last else m.content|upper)"
    )
    with pytest.raises(DataError, match="message 2 of 4 in\\s*one way while it is"):
        encode_chat(chat_tokenizer(last_only), TALK)
    other_header = CHATML.replace("assistant\n", "model\n")
    with pytest.raises(DataError, match="blocks around answers"):
        encode_chat(chat_tokenizer(other_header), TALK)


def test_without_a_template_there_is_a_remedy():
    with pytest.raises(ConfigError, match=r"no chat template.*instruction-tuned"):
        encode_chat(bytes_tokenizer(), TALK)
