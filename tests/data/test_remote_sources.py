"""Text and corpora in an object store, read as if they lay here."""

from __future__ import annotations

import json

import pytest
from corpora import TEXTS, flat_ids, make_corpus

from llmos_jax import stores
from llmos_jax.config.schema import DataSection
from llmos_jax.data import prepare, read_documents
from llmos_jax.data.sources import fingerprint_sources
from llmos_jax.errors import DataError, StoreError
from llmos_jax.places import cache_folder

pytest_plugins = ["object_store"]


def quiet(message):
    """Nobody listens."""


def prepared(*entries, **more):
    return prepare(
        DataSection(train=tuple(entries), tokenizer="auto", **more),
        vocab_size=300,
        model_name="m",
        cache=cache_folder(),
        on_progress=quiet,
    )


def put(store, name, text):
    url = f"{store.url}/{name}"
    stores.write_bytes(url, text.encode())
    return url


def lines(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def texts_of(*patterns):
    return [document.text for document in read_documents(patterns, text_key="text")]


def test_objects_folders_and_globs_are_read(object_store):
    put(object_store, "d/a.txt", "one")
    put(object_store, "d/b.jsonl", lines(["two", "three"]))
    put(object_store, "d/c.bin", "no text")
    put(object_store, "d/.hidden/x.txt", "hidden")
    put(object_store, "e.txt", "four")
    url = object_store.url
    assert texts_of(f"{url}/d") == ["one", "two", "three"]
    assert texts_of(f"{url}/*.txt", f"{url}/d/a.txt") == ["four", "one"]
    with pytest.raises(StoreError, match="nothing is at .*/nowhere"):
        texts_of(f"{url}/nowhere")
    put(object_store, "f/c.bin", "no text")
    with pytest.raises(DataError, match=r"holds no text: wanted .*found only \.bin"):
        texts_of(f"{url}/f")


def test_a_changed_object_is_another_text(object_store):
    url = put(object_store, "a.txt", "one")
    before = fingerprint_sources([url])
    assert fingerprint_sources([url]) == before
    put(object_store, "a.txt", "two")
    assert fingerprint_sources([url]) != before


def test_a_fingerprint_fetches_nothing(object_store):
    url = put(object_store, "a.txt", "one")
    object_store.requests.clear()
    fingerprint_sources([url])
    assert not [one for one in object_store.requests if one.startswith("GET")]


def test_prepared_text_of_an_object_is_that_of_the_file(object_store, tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(TEXTS))
    url = put(object_store, "a.jsonl", lines(TEXTS))
    here, there = (
        prepared(name, validation_share=0.1)
        for name in (str(tmp_path / "a.jsonl"), url)
    )
    assert there.stats == here.stats


def test_a_corpus_in_a_store_is_the_corpus(object_store, tmp_path):
    folder = make_corpus(tmp_path / "corpus")
    url = f"{object_store.url}/corpora/one"
    stores.upload_folder(folder, url)
    here, there = prepared(str(folder)), prepared(url)
    assert there.stats == here.stats
    train = [text for n, text in enumerate(TEXTS) if n % 10]
    assert there.train.open()[:].tolist() == flat_ids(train)
    assert there.validation.raw_bytes() == here.validation.raw_bytes()
    object_store.requests.clear()
    assert prepared(url).train == there.train
    assert not [one for one in object_store.requests if "array_record" in one]


def test_a_shard_that_is_missing_or_another_is_named(object_store, tmp_path):
    folder = make_corpus(tmp_path / "corpus")
    url = f"{object_store.url}/one"
    stores.upload_folder(folder, url)
    raw = bytearray((folder / "train-00001.array_record").read_bytes())
    raw[50] ^= 1
    stores.write_bytes(f"{url}/train-00001.array_record", bytes(raw))
    with pytest.raises(DataError, match=r"one is damaged: train-00001\S+ was altered"):
        prepared(url)
    stores.delete(f"{url}/train-00001.array_record")
    with pytest.raises(DataError, match=r"one lacks train-00001\.array_record"):
        prepared(url)
    stores.delete(f"{url}/manifest.json")
    with pytest.raises(DataError, match="never finished"):
        prepared(url)
