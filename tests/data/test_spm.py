"""SentencePiece models give the ids that SentencePiece gives."""

from __future__ import annotations

import random

import numpy as np
import pytest

from llmos_jax.data import load_tokenizer, pieces, tokenizer_of_folder, train_bpe
from llmos_jax.data.spm_file import read_spm
from llmos_jax.errors import ConfigError

spm = pytest.importorskip("sentencepiece")

LLAMA = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
}
KINDS = {
    "llama": LLAMA,
    "gemma": {
        **LLAMA,
        "add_dummy_prefix": False,
        "user_defined_symbols": ["<start>", "\n\n", "\u2581\u2581"],
    },
    "by hand": {**LLAMA, "user_defined_symbols": ["<start>", "<st"]},
    "unigram": {"model_type": "unigram"},
    "unigram bytes": {
        "model_type": "unigram",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    },
    "unigram by hand": {"model_type": "unigram", "user_defined_symbols": ["<start>"]},
    "normalised": {"model_type": "bpe", "character_coverage": 0.99},
}
LINES = [
    *("def f(x):", "    return  x + 1", "Grüße aus Köln", "你好世界", "tab\there"),
    *(line for line in (random.Random.__doc__ + str.format.__doc__).splitlines()),
    *(getattr(str, name).__doc__ or "" for name in dir(str)),
    *(getattr(list, name).__doc__ or "" for name in dir(list)),
    *(getattr(dict, name).__doc__ or "" for name in dir(dict)),
] * 3
ALPHABET = [*"ab e\n\t  .,<s>/|x1éß你\u2581", "</s>", "<s>", "<unk>", "<0x41>", " the"]
ALPHABET += ["<start>", "<st", "\u3000", "ﬁ", "🙂", "  "]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spm")
    texts = [part for line in LINES for part in line.split("\n") if part.strip()]
    for name, options in KINDS.items():
        spm.SentencePieceTrainer.Train(
            sentence_iterator=iter(texts),
            model_prefix=str(folder / name),
            vocab_size=500,
            minloglevel=2,
            num_threads=1,
            hard_vocab_limit=False,
            **options,
        )
    return folder


def texts():
    rng = random.Random(0)
    yield from ("", " ", "  ", "a", " a", "a ", "  a  b  ", "</s>", "<s>a</s>", "<unk>")
    yield from ("<start>", "a<start> b", " <start><start>", "\n\n\n a", "<0x41>", "🙂")
    yield "\n".join(LINES)
    yield from LINES[:100]
    for _ in range(600):
        yield "".join(rng.choices(ALPHABET, k=rng.randint(1, 30)))


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_text_are_those_of_sentencepiece(models, kind):
    peer = spm.SentencePieceProcessor(model_file=str(models / f"{kind}.model"))
    ours = load_tokenizer(models / f"{kind}.model")
    assert ours.vocab_size == peer.vocab_size()
    for text in texts():
        ids = ours.encode(text).tolist()
        assert ids == peer.encode(text), text
        if "bytes" in kind or "byte_fallback" in KINDS[kind]:
            assert ours.decode(ids) == peer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_cut_only_where_no_token_is(models, kind, monkeypatch):
    monkeypatch.setattr(pieces, "_PIECE_CHARACTERS", 40)
    ours = load_tokenizer(models / f"{kind}.model")
    safe = pieces.safe_cut(ours)
    assert (safe is not None) == (kind == "gemma"), "others begin each piece anew"
    for text in texts():
        parts = ours.encode_batch(pieces.cut_pieces(text, safe))
        assert np.concatenate(parts).tolist() == ours.encode(text).tolist()


def test_marks_are_those_of_the_model(models):
    peer = spm.SentencePieceProcessor(model_file=str(models / "llama.model"))
    ours = load_tokenizer(models / "llama.model")
    assert (ours.marks.bos_id, ours.eos_id) == (peer.bos_id(), peer.eos_id())
    assert ours.begin_id == peer.bos_id()
    assert ours.encode_prompt("a b").tolist() == [peer.bos_id(), *peer.encode("a b")]
    assert ours.encode_markup("<s></s>").tolist() == [peer.bos_id(), peer.eos_id()]


def test_a_folder_says_what_else_there_is(models, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((models / "llama.model").read_bytes())
    config = '{"add_bos_token": false, "eos_token": "<|end|>", "added_tokens_decoder": '
    config += '{"%d": {"content": "<|end|>", "special": true}}}'
    size = load_tokenizer(models / "llama.model").vocab_size
    (tmp_path / "tokenizer_config.json").write_text(config % size)
    ours = tokenizer_of_folder(tmp_path)
    assert (ours.eos_id, ours.marks.adds_bos) == (size, False)
    assert ours.encode_markup("<|end|>").tolist() == [size]
    (tmp_path / "tokenizer_config.json").write_text(config % (size + 9))
    with pytest.raises(ConfigError, match=f"to be token {size + 9}, but the next"):
        tokenizer_of_folder(tmp_path)


def test_exported_it_is_the_same_in_transformers(models, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    ours = load_tokenizer(models / "llama.model")
    for name, text in ours.files().items():
        (tmp_path / name).write_text(text)
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("a b", "  x\n\n y", "Grüße 你 🙂"):
        assert ours.encode_prompt(text).tolist() == peer(text).input_ids
    assert (
        tokenizer_of_folder(tmp_path).encode(" a").tolist()
        == peer(" a", add_special_tokens=False).input_ids
    )


def test_a_file_that_cannot_be_converted_is_named(models, tmp_path):
    whole = (models / "llama.model").read_bytes()
    path = tmp_path / "half.model"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"half\.model: not a SentencePiece.*trunc"):
        load_tokenizer(path)
    path.write_text(train_bpe(["a"], 300).to_json())
    with pytest.raises(ConfigError, match=r"half\.model: not a SentencePiece"):
        load_tokenizer(path)
    with pytest.raises(ConfigError, match=r"no\.model cannot be read: No such file"):
        load_tokenizer(tmp_path / "no.model")


def test_words_as_pieces_are_refused(tmp_path):
    spm.SentencePieceTrainer.Train(
        sentence_iterator=iter(["a b c d"] * 20),
        model_prefix=str(tmp_path / "word"),
        vocab_size=7,
        model_type="word",
        minloglevel=2,
        hard_vocab_limit=False,
    )
    with pytest.raises(ConfigError, match="whole words or single characters"):
        read_spm(tmp_path / "word.model")
