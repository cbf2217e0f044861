"""Laws of tokenizers: nothing is lost, the same text gives the same ids."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models

from llmos_jax.data import (
    StreamDecoder,
    Tokenizer,
    bytes_tokenizer,
    check_vocabulary,
    load_tokenizer,
    train_bpe,
    trained,
)
from llmos_jax.data import pieces as pieces_room
from llmos_jax.data import tokenizer as room
from llmos_jax.errors import ConfigError, DataError

TEXTS = [room.__doc__, room.Tokenizer.__doc__, np.__doc__, np.einsum.__doc__] * 3
TRAINED = train_bpe(TEXTS, 600)
TOKENIZERS = {"trained": TRAINED, "bytes": bytes_tokenizer()}
every = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
unicode_text = st.text(st.characters(exclude_categories=["Cs"]))
code_like = st.text(st.sampled_from("ab1 \n\t.'é\r"), max_size=80)


@every
@given(text=unicode_text | code_like)
def test_decode_of_encode_is_the_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint32
    assert tokenizer.decode(ids) == text


@every
def test_end_mark_in_text_is_text(tokenizer):
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"


@every
def test_end_mark_says_nothing(tokenizer):
    ids = tokenizer.encode("a")
    assert tokenizer.decode([tokenizer.eos_id, *ids, tokenizer.eos_id]) == "a"


@every
def test_json_round_trip_keeps_everything(tokenizer):
    again = Tokenizer.from_json(tokenizer.to_json())
    assert again.fingerprint == tokenizer.fingerprint
    assert (again.eos_id, again.vocab_size) == (tokenizer.eos_id, tokenizer.vocab_size)
    assert (
        again.encode("Some text.").tolist() == tokenizer.encode("Some text.").tolist()
    )


def test_bytes_are_their_own_ids():
    tokenizer = bytes_tokenizer()
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)
    assert tokenizer.encode("é \n").tolist() == list("é \n".encode())


def test_training_fills_the_vocabulary_and_merges():
    assert TRAINED.vocab_size == 600
    text = TEXTS[3]
    assert len(TRAINED.encode(text)) < 0.6 * len(text)


def test_training_is_the_same_in_another_process():
    code = (
        "import numpy as np\n"
        "from llmos_jax.data import train_bpe, tokenizer as room\n"
        "texts = [room.__doc__, room.Tokenizer.__doc__]\n"
        "texts += [np.__doc__, np.einsum.__doc__]\n"
        "print(train_bpe(texts * 3, 600).fingerprint)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == TRAINED.fingerprint


def test_too_small_a_vocabulary_to_train_is_an_error():
    with pytest.raises(ConfigError, match=r"at least 257 tokens.*is 100"):
        train_bpe(["x"], 100)


def test_half_a_surrogate_is_an_error():
    with pytest.raises(DataError, match="surrogate"):
        TRAINED.encode("a\ud800")


@every
@given(text=unicode_text | code_like)
def test_stream_decodes_to_the_whole(tokenizer, text):
    ids = tokenizer.encode(text).tolist()
    stream = StreamDecoder(tokenizer)
    parts = [stream.push(one) for one in ids]
    assert "".join(parts) + stream.flush() == text


@every
@given(ids=st.lists(st.integers(0, 256), max_size=40))
def test_stream_decodes_any_ids_as_decode_does(tokenizer, ids):
    stream = StreamDecoder(tokenizer)
    parts = [stream.push(one) for one in ids]
    assert "".join(parts) + stream.flush() == tokenizer.decode(ids)


def test_stream_never_shows_half_a_character():
    stream = StreamDecoder(bytes_tokenizer())
    assert [stream.push(one) for one in "aé€".encode()] == ["a", "", "é", "", "", "€"]


GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@pytest.mark.parametrize("rules", [trained.SPLIT, GPT2_SPLIT], ids=["ours", "gpt2"])
@given(text=st.text(st.sampled_from("ab1 \n.'é"), max_size=120))
def test_pieces_are_encoded_as_the_whole(rules, text):
    size = pieces_room._PIECE_CHARACTERS
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(rules), "isolated")
    try:
        pieces_room._PIECE_CHARACTERS = 7
        pieces = pieces_room.cut_pieces(text)
    finally:
        pieces_room._PIECE_CHARACTERS = size
    assert "".join(pieces) == text
    words = [word for piece in pieces for word, _ in split.pre_tokenize_str(piece)]
    assert words == [word for word, _ in split.pre_tokenize_str(text)]


def test_long_text_is_cut():
    assert len(pieces_room.cut_pieces("word " * 100_000)) == 8


def foreign(*names):
    inner = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 7}, unk_token="a"))
    inner.add_special_tokens(list(names))
    return inner


@pytest.mark.parametrize("name", ["</s>", "<|end_of_text|>", "<|im_end|>", "<eos>"])
def test_foreign_end_marks_are_found(name):
    inner = foreign("<pad>", name)
    assert Tokenizer(inner).eos_id == inner.token_to_id(name)


def test_foreign_tokenizer_without_an_end_mark_is_an_error():
    with pytest.raises(ConfigError, match=r"no token that ends a document; .*</s>"):
        Tokenizer(foreign("<pad>"))


def test_vocabulary_counts_up_to_the_last_id():
    assert Tokenizer(foreign("</s>")).vocab_size >= 8


def test_load_reads_a_file_or_its_folder(tmp_path):
    (tmp_path / "tokenizer.json").write_text(TRAINED.to_json())
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert load_tokenizer(path).fingerprint == TRAINED.fingerprint


def test_load_says_what_is_wrong(tmp_path):
    with pytest.raises(ConfigError, match=r"no\.json cannot be read: No such file"):
        load_tokenizer(tmp_path / "no.json")
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"a\.json: not a tokenizer\.json"):
        load_tokenizer(tmp_path / "a.json")
    (tmp_path / "b.json").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"b\.json cannot be read: it is not text"):
        load_tokenizer(tmp_path / "b.json")


def test_tokenizer_larger_than_the_model_is_an_error():
    check_vocabulary(TRAINED, 600, "tiny")
    check_vocabulary(TRAINED, 1000, "tiny")
    with pytest.raises(ConfigError, match=r"has 600 tokens.*tiny has room for 599"):
        check_vocabulary(TRAINED, 599, "tiny")
