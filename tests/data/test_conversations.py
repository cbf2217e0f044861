"""Chat files become tokens with weights; every fault of a row is one clear error."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from chatting import CHATML, chat_tokenizer

from llmos_jax.config.schema import DataSection
from llmos_jax.data import bytes_tokenizer, compare, prepare, prepare_scored
from llmos_jax.data.conversations import parse, read_conversations
from llmos_jax.errors import ConfigError, DataError

QUIET = [].append
OWN = chat_tokenizer(CHATML)


def talk(question, *answers):
    messages = []
    for answer in answers:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def section(tmp_path):
    rows = [talk(f"What is {n} + 1?", f"It is {n + 1}, é.") for n in range(200)]
    path = write(tmp_path / "chat.jsonl", rows)
    return DataSection(train=(path,), validation_share=0.1)


def prepared(section, tmp_path, own=OWN, **options):
    return prepare(
        section,
        vocab_size=300,
        model_name="tiny",
        cache=tmp_path / "cache",
        on_progress=QUIET,
        own=own,
        **options,
    )


def answers_of(tokenizer, file):
    """The text of weight 1 of each conversation."""
    ends = np.cumsum(file.open_lengths())[:-1]
    ids, weights = (np.split(a, ends) for a in (file.open(), file.open_weights()))
    return [tokenizer.decode(one[w > 0]) for one, w in zip(ids, weights)]


def test_files_hold_every_conversation_with_its_answers_marked(section, tmp_path):
    text = prepared(section, tmp_path)
    found = [answers_of(text.tokenizer, one) for one in (text.train, text.validation)]
    assert sorted(sum(found, [])) == sorted(f"It is {n + 1}, é." for n in range(200))
    assert 5 < text.validation.num_documents < 40
    assert "content hash" in text.held_out_by
    assert text.tokenizer.marks.chat_template == CHATML


def test_held_out_answers_are_kept_for_compressors(section, tmp_path):
    text = prepared(section, tmp_path)
    answers = "".join(answers_of(text.tokenizer, text.validation)).encode()
    assert text.validation.raw_bytes() == answers
    assert text.validation.num_bytes == len(answers)
    assert compare(text.validation.raw_bytes())["gzip_bits_per_byte"] > 0
    assert text.train.raw is None
    counts = text.stats["train"]
    assert counts["documents"] == text.train.num_documents
    assert counts["answer_tokens"] == text.train.open_weights().sum()


def test_scored_text_is_what_the_run_held_out(section, tmp_path):
    found = prepare_scored(section, OWN, cache=tmp_path / "cache", on_progress=QUIET)
    wanted = prepared(section, tmp_path).validation
    assert found.fingerprint == wanted.fingerprint
    assert found.raw_bytes() == wanted.raw_bytes()


def test_conversations_without_an_answer_are_skipped_and_counted(section, tmp_path):
    dumb = {"messages": [{"role": "user", "content": "?"}]}
    named = write(tmp_path / "v.jsonl", [talk("a", "b"), dumb, dumb])
    text = prepared(replace(section, validation=(named,)), tmp_path)
    assert text.validation.num_documents == 1
    assert text.stats["validation"]["skipped"] == 2
    named = write(tmp_path / "w.jsonl", [dumb, dumb])
    with pytest.raises(DataError, match="none of 2 conversations .* has an answer"):
        prepared(replace(section, validation=(named,)), tmp_path)


def test_a_few_conversations_are_held_out_whole(tmp_path):
    rows = [talk("a", "one"), talk("b", "two"), talk("c", "three")]
    path = write(tmp_path / "c.jsonl", rows)
    share = 1e-9  # of three, a hash takes none
    text = prepared(DataSection(train=(path,), validation_share=share), tmp_path)
    assert text.validation.raw_bytes() == b"three"
    assert text.train.num_documents == 2
    assert "too few to choose" in text.held_out_by


def test_text_is_text_although_it_is_json(tmp_path):
    rows = [{"text": f"number {n} " * 5} for n in range(50)]
    path = write(tmp_path / "t.jsonl", rows)
    text = prepared(DataSection(train=(path,), validation_share=0.2), tmp_path)
    assert text.train.weights is None
    assert text.train.end_id == OWN.eos_id
    chat = write(tmp_path / "m.jsonl", [talk("a", "b")] * 2)
    with pytest.raises(DataError, match="no field 'text'"):
        prepared(DataSection(train=(chat,), format="text"), tmp_path)


def test_another_key_holds_the_messages(tmp_path):
    rows = [{"turns": talk("a", f"answer {n}")["messages"]} for n in range(20)]
    section = DataSection(
        train=(write(tmp_path / "c.jsonl", rows),),
        messages_key="turns",
        validation_share=0.2,
    )
    assert prepared(section, tmp_path).train.weights is not None
    with pytest.raises(DataError, match=r"no field 'messages'.*data\.messages_key"):
        prepared(replace(section, messages_key="messages", format="chat"), tmp_path)


def test_a_template_file_makes_a_base_model_converse(section, tmp_path):
    base = chat_tokenizer(None)
    with pytest.raises(ConfigError, match=r"no chat template.*data\.chat_template"):
        prepared(section, tmp_path, own=base)
    with pytest.raises(ConfigError, match="a tokenizer trained here has no chat"):
        prepared(replace(section, tokenizer="train"), tmp_path)
    path = tmp_path / "t.jinja"
    with pytest.raises(ConfigError, match=r"data\.chat_template .*cannot be read"):
        prepared(replace(section, chat_template=str(path)), tmp_path, own=base)
    path.write_text(CHATML)
    text = prepared(replace(section, chat_template=str(path)), tmp_path, own=base)
    assert text.train.fingerprint == prepared(section, tmp_path).train.fingerprint
    assert text.tokenizer.marks.chat_template == CHATML


def test_auto_takes_the_models_own_tokenizer_or_trains_one(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("tick tock " * 500)
    section = DataSection(train=(str(path),), validation_share=0.1)
    assert prepared(section, tmp_path).tokenizer.fingerprint == OWN.fingerprint
    trained = prepared(section, tmp_path, own=None).tokenizer
    assert trained.vocab_size < 300
    told = prepared(replace(section, tokenizer="train"), tmp_path).tokenizer
    assert told.fingerprint == trained.fingerprint
    given = prepared(replace(section, tokenizer="bytes"), tmp_path).tokenizer
    assert given.fingerprint == bytes_tokenizer().fingerprint


def test_an_error_in_a_template_names_the_conversation(section, tmp_path):
    strict = CHATML + "{{ raise_exception('too polite') if 'It is 7' in "
    strict += "messages[-1].content }}"
    with pytest.raises(DataError, match=r"conversation \d+, which .*: too polite"):
        prepared(section, tmp_path, own=chat_tokenizer(strict))


def row_of(messages):
    return {"messages": messages}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, r"no field 'messages'; the fields are 'text'"),
        ({"message": []}, "Did you mean 'message'"),
        (row_of([]), "is an empty list"),
        (row_of("x"), "is a text, not a list of messages"),
        (row_of(["x"]), "message 1: wanted a JSON object with `role`"),
        (row_of([{"role": "asistant", "content": ""}]), "Did you mean 'assistant'"),
        (row_of([{"content": ""}]), "role is None"),
        (row_of([{"role": "user", "content": 3}]), "content is a number, not text"),
        (row_of([{"role": "user"}]), "content is a null, not text"),
        (
            row_of([{"role": "user", "content": [{"type": "image_url"}]}]),
            "a part of type 'image_url'; only text",
        ),
    ],
)
def test_a_row_that_is_no_conversation_is_an_error(tmp_path, row, message):
    path = write(tmp_path / "c.jsonl", [talk("a", "b"), row])
    with pytest.raises(DataError, match=rf"c\.jsonl:2.*{message}"):
        list(read_conversations([path], messages_key="messages"))


def test_other_files_are_no_conversations(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"a\.txt: conversations are read from \.jsonl"):
        list(read_conversations([str(tmp_path / "a.txt")], messages_key="messages"))


def test_text_parts_are_joined_and_tools_are_kept(tmp_path):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    row = {**row_of([{"role": "user", "content": parts}]), "tools": [{"name": "f"}]}
    path = write(tmp_path / "c.jsonl", [row])
    (document,) = read_conversations([path], messages_key="messages")
    assert parse(document.text) == (
        [{"role": "user", "content": "ab"}],
        [{"name": "f"}],
    )
