"""A prepared corpus is read where it lies: by place, checked, by its own tokenizer."""

from __future__ import annotations

import json
import shutil
from itertools import islice

import numpy as np
import pytest
from chatting import CHATML, chat_tokenizer
from corpora import TEXTS, flat_ids, make_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_jax.config.schema import DataSection
from llmos_jax.data import (
    TokenFile,
    TrainBatches,
    bytes_tokenizer,
    compare,
    evaluation_batches,
    prepare,
    prepare_scored,
    train_bpe,
)
from llmos_jax.data.corpora import is_corpus, open_corpus
from llmos_jax.errors import ConfigError, DataError

TRAIN = [text for n, text in enumerate(TEXTS) if n % 10]
VALIDATION = TEXTS[::10]


def quiet(message):
    """Nobody listens."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A corpus. Do not write to it."""
    return make_corpus(tmp_path_factory.mktemp("corpora") / "whole")


@pytest.fixture
def corpus(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "corpus")


def prepared(*entries, cache, vocab_size=300, on_progress=quiet, own=None, **more):
    section = DataSection(train=tuple(map(str, entries)), **more)
    return prepare(
        section,
        vocab_size=vocab_size,
        model_name="tiny",
        cache=cache,
        on_progress=on_progress,
        own=own,
    )


def test_sides_are_those_of_the_corpus(whole, tmp_path):
    text = prepared(whole, cache=tmp_path)
    assert text.tokenizer.fingerprint == bytes_tokenizer().fingerprint
    for side, wanted in ((text.train, TRAIN), (text.validation, VALIDATION)):
        assert side.open()[:].tolist() == flat_ids(wanted)
        assert side.num_tokens == len(flat_ids(wanted))
        assert side.num_bytes == len("".join(wanted).encode())
        assert side.num_documents == len(wanted)
        assert not side.is_chat
    assert (text.train.end_id, text.train.stop_id) == (256, None)
    assert text.validation.raw_bytes() == "".join(VALIDATION).encode()
    assert compare(text.validation.raw_bytes())["gzip_bits_per_byte"] > 0
    assert text.test is None and text.weights == ()
    assert text.stats["train"]["tokens"] == text.train.num_tokens
    assert text.held_out_by == "every tenth, by hand"


def test_a_test_side_is_what_a_finished_model_is_scored_on(tmp_path):
    corpus = make_corpus(tmp_path / "corpus", test=True)
    assert prepared(corpus, cache=tmp_path).test.raw_bytes() == (
        "".join(TEXTS[1::10]).encode()
    )
    section = DataSection(train=(str(corpus),))
    for named, side in ((), "test"), ((str(corpus),), "validation"):
        found = prepare_scored(
            DataSection(train=section.train, validation=named),
            bytes_tokenizer(),
            cache=tmp_path,
            on_progress=quiet,
        )
        assert found.name == side


@settings(max_examples=60, deadline=None)
@given(start=st.integers(0, 12_000), size=st.integers(0, 700))
def test_any_stretch_of_ids_is_that_of_the_flat_stream(whole, start, size):
    side = open_corpus(str(whole), cache=whole.parent, on_progress=quiet).sides["train"]
    assert len(side.paths) == 3
    ids, flat = side.open(), flat_ids(TRAIN)
    assert ids[start : start + size].tolist() == flat[start : start + size]


def test_nothing_is_read_that_is_not_asked_for(corpus, tmp_path):
    ids = prepared(corpus, cache=tmp_path).train.open()
    for path in sorted(corpus.glob("train-*"))[1:]:
        path.unlink()
    assert ids[:100].tolist() == flat_ids(TRAIN)[:100]


@pytest.mark.parametrize("mask", [False, True])
def test_batches_are_those_of_the_same_tokens_in_a_file(whole, tmp_path, mask):
    side = prepared(whole, cache=tmp_path).train
    np.array(flat_ids(TRAIN), np.uint16).tofile(tmp_path / "train.bin")
    flat = TokenFile(
        path=tmp_path / "train.bin",
        dtype="uint16",
        num_tokens=side.num_tokens,
        num_bytes=side.num_bytes,
        num_documents=side.num_documents,
        fingerprint=side.fingerprint,
        end_id=256,
    )
    shape = {"seq_len": 50, "global_batch": 6, "seed": 3, "document_mask": mask}
    scored = {"seq_len": 50, "batch": 6, "stride": 20, "document_mask": mask}
    for one, other in (
        *zip(islice(TrainBatches(side, **shape), 60), TrainBatches(flat, **shape)),
        *zip(evaluation_batches(side, **scored), evaluation_batches(flat, **scored)),
    ):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
            assert one[name].dtype == other[name].dtype


def test_the_fingerprint_is_of_the_content_not_the_place(whole, corpus, tmp_path):
    one, other = (prepared(path, cache=tmp_path).train for path in (whole, corpus))
    assert one.fingerprint == other.fingerprint
    more = make_corpus(tmp_path / "more", [*TEXTS, "one more", "and one"])
    assert prepared(more, cache=tmp_path).train.fingerprint != one.fingerprint


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("train-00001.array_record", flip, "altered"),
        ("validation-00000.array_record", flip, "altered"),
        ("train-00002.array_record", lambda p: p.unlink(), "missing"),
        ("train-00000.array_record", lambda p: p.write_bytes(b"x"), "has 1 bytes"),
        ("validation.txt", lambda p: p.unlink(), "missing"),
        ("validation.txt", lambda p: p.write_bytes(b"x"), "has 1 bytes"),
        ("validation.txt", flip, "altered"),
    ],
)
def test_damage_is_named_with_the_remedy(corpus, tmp_path, name, damage, said):
    damage(corpus / name)
    with pytest.raises(DataError) as caught:
        prepared(corpus, cache=tmp_path)
    message = str(caught.value)
    assert f"corpus {corpus} is damaged: {name}" in message
    assert said in message
    assert f"run tools/prepare again with prepare.out = {corpus}" in message


def test_all_damage_is_named_at_once(corpus, tmp_path):
    flip(corpus / "train-00000.array_record")
    flip(corpus / "train-00002.array_record")
    with pytest.raises(DataError, match=r"train-00000\S* was altered.*; train-00002"):
        prepared(corpus, cache=tmp_path)


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json"])
def test_a_damaged_page_is_an_error(corpus, tmp_path, name):
    (corpus / name).write_bytes((corpus / name).read_bytes()[:-30])
    with pytest.raises(DataError, match=r"cannot be read: .*run tools/prepare again"):
        prepared(corpus, cache=tmp_path)


def test_a_tokenizer_of_another_corpus_is_an_error(corpus, tmp_path):
    (corpus / "tokenizer.json").write_text(train_bpe(TEXTS, 300).to_json())
    with pytest.raises(DataError, match="not the one that its tokens were made"):
        prepared(corpus, cache=tmp_path)


def test_shards_without_a_manifest_are_an_unfinished_corpus(corpus, tmp_path):
    (corpus / "manifest.json").unlink()
    with pytest.raises(DataError, match="never finished. Run tools/prepare again"):
        prepared(corpus, cache=tmp_path)


def test_a_folder_of_text_is_no_corpus(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    assert not is_corpus(str(tmp_path)) and not is_corpus("python-docs")
    assert not is_corpus(str(tmp_path / "nowhere"))


def test_shards_are_hashed_once_until_they_change(corpus, tmp_path):
    said = []
    for _ in range(2):
        prepared(corpus, cache=tmp_path / "cache", on_progress=said.append)
    assert [line.split(" of ")[0] for line in said] == ["checking 5 files"]
    path = corpus / "train-00001.array_record"
    facts = path.stat()
    flip(path)  # the size stays
    assert path.stat().st_mtime_ns != facts.st_mtime_ns
    with pytest.raises(DataError, match="train-00001.array_record was altered"):
        prepared(corpus, cache=tmp_path / "cache")


def test_an_illegible_memory_of_what_was_whole_is_made_again(corpus, tmp_path):
    prepared(corpus, cache=tmp_path)
    (memory,) = (tmp_path / "corpora").glob("*.json")
    kept = memory.read_bytes()
    memory.write_bytes(kept[:-9])
    prepared(corpus, cache=tmp_path)
    assert memory.read_bytes() == kept


def test_a_shard_that_changes_under_a_run_is_named(corpus, tmp_path):
    ids = prepared(corpus, cache=tmp_path).train.open()
    path = corpus / "train-00000.array_record"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(DataError, match=f"block 0 of {path} cannot be read"):
        ids[:10]


def test_the_models_tokenizer_must_be_the_corpus_own(whole, tmp_path):
    other = train_bpe(TEXTS, 300)
    with pytest.raises(ConfigError, match=r"another tokenizer.*the model's tokenizer"):
        prepared(whole, cache=tmp_path, own=other)
    with pytest.raises(ConfigError, match=r"another tokenizer"):
        prepare_scored(
            DataSection(train=(str(whole),)), other, cache=tmp_path, on_progress=quiet
        )
    (tmp_path / "tokenizer.json").write_text(other.to_json())
    with pytest.raises(ConfigError, match=r"another tokenizer .*tokenizer\.json"):
        prepared(whole, cache=tmp_path, tokenizer=str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="cut into tokens already"):
        prepared(whole, cache=tmp_path, tokenizer="train")
    with pytest.raises(ConfigError, match="of 257 tokens.*tiny has room for 200"):
        prepared(whole, cache=tmp_path, vocab_size=200)
    assert prepared(whole, cache=tmp_path, tokenizer="bytes").train.num_tokens


def test_the_same_vocabulary_with_a_template_is_the_same_tokenizer(tmp_path):
    plain = chat_tokenizer(None)
    corpus = make_corpus(tmp_path / "corpus", tokenizer=plain)
    own = chat_tokenizer(CHATML)
    assert own.fingerprint != plain.fingerprint
    text = prepared(corpus, cache=tmp_path, own=own)
    assert text.tokenizer.marks.chat_template == CHATML


def test_named_validation_takes_the_place_of_the_corpus_own(whole, tmp_path):
    (tmp_path / "held.txt").write_text("held out by name")
    text = prepared(whole, cache=tmp_path, validation=(str(tmp_path / "held.txt"),))
    assert text.validation.raw_bytes() == b"held out by name"
    assert text.train.num_documents == len(TRAIN)
    assert text.held_out_by.startswith("named: ")


def test_a_corpus_can_be_the_validation_text_of_another_source(whole, tmp_path):
    (tmp_path / "a.txt").write_text("learn this " * 40)
    text = prepared(tmp_path / "a.txt", cache=tmp_path, validation=(str(whole),))
    assert text.validation.raw_bytes() == "".join(VALIDATION).encode()
    assert text.train.open()[1:].tolist() == list(b"learn this " * 40)
    with pytest.raises(DataError, match="has no test side; it has train, validation"):
        prepared(whole, cache=tmp_path, test=(str(whole),))


def test_corpora_and_text_without_weights_are_one_text(whole, tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"line {n}"}) + "\n" for n in range(90))
    )
    text = prepared(tmp_path / "a.jsonl", whole, cache=tmp_path, validation_share=0.1)
    assert text.weights == ()
    assert text.train.num_documents + text.validation.num_documents == 90 + len(TEXTS)
    corpus = flat_ids(TRAIN)
    assert text.train.open()[-len(corpus) - 1 :].tolist()[1:] == corpus
    ids = text.train.open()
    assert ids[:].size == text.train.num_tokens == len(ids)
