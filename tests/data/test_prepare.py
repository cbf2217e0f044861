"""Prepared text: right the first time, fast the second, and never a damaged cache."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from llmos_jax.config.schema import DataSection
from llmos_jax.data import prepare, train_bpe
from llmos_jax.errors import ConfigError, DataError

QUIET = [].append


@pytest.fixture
def section(tmp_path):
    rows = [
        {"text": f"Document {n} says: {'tick tock ' * (n % 7)}é."} for n in range(200)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSection(train=(str(path),), validation_share=0.1)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def prepared(section, cache, *, vocab_size=300, on_progress=QUIET):
    return prepare(
        section,
        vocab_size=vocab_size,
        model_name="tiny",
        cache=cache,
        on_progress=on_progress,
    )


def documents_of(tokenizer, file):
    """Cut a token file at its end marks and decode what is between."""
    ids = file.open()
    starts = np.flatnonzero(ids == tokenizer.eos_id)
    assert starts[0] == 0
    return [tokenizer.decode(part[1:]) for part in np.split(ids, starts[1:])]


def test_files_hold_every_document_begun_by_the_end_mark(section, cache):
    text = prepared(section, cache)
    train = documents_of(text.tokenizer, text.train)
    held_out = documents_of(text.tokenizer, text.validation)
    rows = Path(section.train[0]).read_text().splitlines()
    wanted = [json.loads(row)["text"] for row in rows]
    assert sorted(train + held_out) == sorted(wanted)
    assert [one for one in wanted if one in set(train)] == train
    assert (text.train.num_documents, text.validation.num_documents) == (
        len(train),
        len(held_out),
    )
    assert 5 < len(held_out) < 40


def test_raw_text_is_kept_for_compressors_and_counted_in_bytes(section, cache):
    text = prepared(section, cache)
    raw = "".join(documents_of(text.tokenizer, text.validation)).encode()
    assert text.validation.raw_bytes() == raw
    assert text.validation.num_bytes == len(raw)
    assert text.train.raw is None
    assert text.test is None


def test_ids_take_two_bytes_where_they_fit(section, cache):
    text = prepared(section, cache)
    assert text.train.open().dtype == np.uint16
    assert text.train.path.stat().st_size == 2 * text.train.num_tokens


def test_named_validation_and_test_are_taken_whole(section, cache, tmp_path):
    for name in ("val", "test"):
        (tmp_path / f"{name}.txt").write_text(f"the {name} text")
    named = DataSection(
        train=section.train,
        validation=(str(tmp_path / "val.txt"),),
        test=(str(tmp_path / "test.txt"),),
    )
    text = prepared(named, cache)
    assert text.train.num_documents == 200
    assert text.validation.raw_bytes() == b"the val text"
    assert text.test.raw_bytes() == b"the test text"
    assert text.held_out_by.startswith("named: ")
    assert set(text.stats) >= {"train", "validation", "test"}


def test_one_long_file_gives_its_end(cache, tmp_path):
    path = tmp_path / "long.txt"
    whole = "".join(f"line {number}\n" for number in range(5000))
    path.write_text(whole)
    text = prepared(DataSection(train=(str(path),), validation_share=0.05), cache)
    end = text.validation.raw_bytes().decode()
    assert whole.endswith(end)
    assert 0.04 < len(end) / len(whole) < 0.06
    assert "".join(documents_of(text.tokenizer, text.train)) + end == whole
    assert "too few documents" in text.held_out_by


def test_tokenizer_is_trained_without_held_out_text(section, cache):
    text = prepared(section, cache)
    train = documents_of(text.tokenizer, text.train)
    assert text.tokenizer.fingerprint == train_bpe(train, 300).fingerprint


def test_second_call_reads_the_cache(section, cache):
    first = prepared(section, cache)
    said = []
    second = prepared(section, cache, on_progress=said.append)
    assert (second.train, second.stats) == (first.train, first.stats)
    assert said == []


def test_caches_made_apart_are_equal(section, tmp_path):
    one, other = (prepared(section, tmp_path / name) for name in ("one", "other"))
    assert one.stats == other.stats


@pytest.mark.parametrize("change", ["share", "vocabulary", "file", "tokenizer"])
def test_another_setting_is_another_folder(section, cache, change):
    first = prepared(section, cache)
    vocab_size = 290 if change == "vocabulary" else 300
    if change == "share":
        section = DataSection(train=section.train, validation_share=0.2)
    if change == "tokenizer":
        section = DataSection(train=section.train, tokenizer="bytes")
    if change == "file":
        with open(section.train[0], "a") as file:
            file.write('{"text": "one more"}\n')
    assert prepared(section, cache, vocab_size=vocab_size).folder != first.folder


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize("damage", [flip, truncate, lambda path: path.unlink()])
@pytest.mark.parametrize(
    "name", ["train.bin", "validation.txt", "tokenizer.json", "manifest.json"]
)
def test_damaged_cache_is_made_again(section, cache, name, damage):
    first = prepared(section, cache)
    damage(first.folder / name)
    said = []
    second = prepared(section, cache, on_progress=said.append)
    assert said[0].startswith("cache ")
    assert "is damaged" in said[0]
    assert second.stats == first.stats
    assert prepared(section, cache, on_progress=pytest.fail).stats == first.stats


def test_leftovers_of_a_killed_builder_do_no_harm(section, cache):
    first = prepared(section, cache)
    shutil.rmtree(first.folder)
    room = first.folder.with_name(first.folder.name + ".tmp")
    room.mkdir()
    (room / "train.bin").write_bytes(b"half")
    assert prepared(section, cache).stats == first.stats
    assert not room.exists()


def test_two_processes_at_once_both_end_well(section, cache):
    code = (
        "import sys, pathlib\n"
        "from llmos_jax.config.schema import DataSection\n"
        "from llmos_jax.data import prepare\n"
        "section = DataSection(train=(sys.argv[1],), validation_share=0.1)\n"
        "text = prepare(section, vocab_size=300, model_name='tiny',\n"
        "  cache=pathlib.Path(sys.argv[2]), on_progress=lambda said: None)\n"
        "print(text.train.fingerprint, text.tokenizer.fingerprint)"
    )
    command = [sys.executable, "-c", code, section.train[0], str(cache)]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert said[0] == said[1]
    assert said[0].split()[0] == prepared(section, cache).train.fingerprint


@pytest.mark.slow
def test_python_docs_is_fast_the_second_time(cache):
    section = DataSection(validation_share=0.03)
    first = prepared(section, cache, vocab_size=512)
    start = time.perf_counter()
    second = prepared(section, cache, vocab_size=512, on_progress=pytest.fail)
    assert time.perf_counter() - start < 2  # 0.3 s alone; the machine may be shared
    assert second.stats == first.stats


def test_errors_say_what_to_do(section, cache, tmp_path):
    with pytest.raises(ConfigError, match=r"has 257 tokens.*tiny has room for 100"):
        prepared(
            DataSection(train=section.train, tokenizer="bytes"), cache, vocab_size=100
        )
    with pytest.raises(ConfigError, match=r"tokenizer .*no\.json cannot be read"):
        prepared(DataSection(train=section.train, tokenizer="no.json"), cache)
    with pytest.raises(DataError, match=r"data\.validation_share is 0; it must lie"):
        prepared(DataSection(train=section.train, validation_share=0), cache)
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(
        DataError, match="1 bytes of text in 1 documents are too little"
    ):
        prepared(DataSection(train=(str(tmp_path / "x.txt"),)), cache)


def test_unwritable_cache_is_an_error(section, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot be kept in .*\s.*Set LLMOS_CACHE"):
        prepared(section, tmp_path / "file" / "cache")


def test_failed_build_leaves_nothing_behind_that_is_used(section, cache):
    with open(section.train[0], "a") as file:
        file.write("broken\n")
    for _ in range(2):
        with pytest.raises(DataError, match=r"rows\.jsonl:201: not a JSON object"):
            prepared(section, cache)
