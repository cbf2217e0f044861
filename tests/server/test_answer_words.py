"""Tokens to text: stop strings that span tokens, characters that span tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos_jax.data import bytes_tokenizer
from llmos_jax.server.words import TokenNames, Words

TOKENIZER = bytes_tokenizer()


def pieces(text: str, *stops: str) -> tuple[list[str], list[int], Words]:
    """What is sent after each byte, the tokens sent, and the words."""
    words, sent, said = Words(TOKENIZER, stops), [], []
    for byte in text.encode():
        more, tokens = words.push(byte)
        sent.append(more)
        said += [one.token for one in tokens]
    more, tokens = words.flush()
    return [*sent, more], said + [one.token for one in tokens], words


def test_text_without_stops_is_sent_as_it_comes():
    sent, said, words = pieces("ab")
    assert sent == ["a", "b", ""] and said == [97, 98] and not words.stopped


def test_a_stop_that_spans_tokens_ends_the_answer_before_it():
    sent, said, words = pieces("one END two", " END")
    assert "".join(sent) == "one" and words.stopped
    assert bytes(said) == b"one"


def test_what_could_begin_a_stop_waits_until_it_cannot():
    sent, _, words = pieces("a<|b<|e", "<|e")
    assert sent[:4] == ["a", "", "", "<|b"]
    assert "".join(sent) == "a<|b" and words.stopped


def test_what_waited_is_sent_at_the_end():
    sent, said, words = pieces("a<|", "<|e")
    assert sent == ["a", "", "", "<|"] and bytes(said) == b"a<|" and not words.stopped


def test_half_a_character_waits_and_its_tokens_are_told_once():
    sent, said, _ = pieces("\N{SNOWMAN}!")
    assert sent == ["", "", "\N{SNOWMAN}", "!", ""]
    assert bytes(said) == "\N{SNOWMAN}!".encode()


def test_the_earliest_of_several_stops_counts():
    sent, _, _ = pieces("abcd", "d", "bc", "c")
    assert "".join(sent) == "a"


@given(
    st.text("ab\N{SNOWMAN}", max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=4),
)
def test_streamed_text_is_the_text_before_the_first_stop(text, stops):
    sent, _, words = pieces(text, *stops)
    # A stop is found with its last character; of those, the one that begins first.
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    wanted = text
    if ends:
        seen = text[: min(ends)]
        wanted = seen[: min(seen.find(stop) for stop in stops if stop in seen)]
    assert "".join(sent) == wanted
    assert words.stopped == bool(ends)


@given(st.text(max_size=20))
def test_every_token_is_told_once_and_in_order(text):
    sent, said, _ = pieces(text, "zz9")
    if "zz9" not in text:
        assert bytes(said) == text.encode() and "".join(sent) == text


@pytest.mark.parametrize(("token", "name"), [(97, "a"), (32, " "), (256, "")])
def test_names_of_tokens(token, name):
    names = TokenNames(TOKENIZER)
    assert names[token] == name and names.bytes(token) == list(name.encode())


def test_a_part_of_a_character_has_no_bytes_to_tell():
    assert TokenNames(TOKENIZER).bytes(0xE2) is None
