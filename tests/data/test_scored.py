"""The text a finished model is scored on, cut with the model's own tokenizer."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from llmos_jax.config.schema import DataSection
from llmos_jax.data import bytes_tokenizer, prepare, prepare_scored, train_bpe
from llmos_jax.errors import DataError

BYTES = bytes_tokenizer()


def quiet(message):
    """Nobody listens."""


@pytest.fixture
def section(tmp_path):
    folder = tmp_path / "documents"
    folder.mkdir()
    for n in range(60):
        (folder / f"{n:02}.txt").write_text(f"Document {n}: {'tick tock ' * n}é")
    return DataSection(train=(str(folder),), validation_share=0.2, tokenizer="bytes")


def scored(section, cache, tokenizer=BYTES, on_progress=quiet):
    return prepare_scored(section, tokenizer, cache=cache, on_progress=on_progress)


def prepared(section, cache):
    return prepare(
        section, vocab_size=300, model_name="m", cache=cache, on_progress=quiet
    )


def test_without_named_text_it_is_the_part_that_the_run_held_out(section, tmp_path):
    found = scored(section, tmp_path / "cache")
    wanted = prepared(section, tmp_path / "cache").validation
    assert found.raw_bytes() == wanted.raw_bytes() and found.num_bytes > 500
    assert found.fingerprint == wanted.fingerprint
    assert found.num_documents == wanted.num_documents


def test_the_end_of_one_long_file_is_held_out_as_the_run_did(section, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("".join(f"line {n}\n" for n in range(1000)))
    one = replace(section, train=(str(path),))
    found = scored(one, tmp_path / "cache")
    assert found.fingerprint == prepared(one, tmp_path / "cache").validation.fingerprint


def test_test_text_comes_before_validation_text(section, tmp_path):
    for name in ("test", "validation"):
        (tmp_path / f"{name}.txt").write_text(f"This is {name} text.")
    both = replace(
        section,
        test=(str(tmp_path / "test.txt"),),
        validation=(str(tmp_path / "validation.txt"),),
    )
    cache = tmp_path / "cache"
    assert scored(both, cache).raw_bytes() == b"This is test text."
    found = scored(replace(both, test=()), cache)
    assert found.raw_bytes() == b"This is validation text."
    assert found.num_tokens == found.num_bytes + 1, "a mark begins the document"


def test_the_tokenizer_is_the_one_that_was_given(section, tmp_path):
    bpe = train_bpe(["tick tock " * 50], 280)
    cache = tmp_path / "cache"
    plain, short = scored(section, cache), scored(section, cache, bpe)
    assert (
        short.num_bytes == plain.num_bytes and short.num_tokens < plain.num_tokens / 2
    )
    ids = short.open()
    assert bpe.decode(ids).encode() == short.raw_bytes()


def test_the_second_time_it_comes_from_the_cache(section, tmp_path):
    said = []
    for _ in range(2):
        scored(section, tmp_path / "cache", on_progress=said.append)
    assert len(said) == 1 and said[0].startswith("encoding")
    held = {path.name for path in (tmp_path / "cache" / "scored").rglob("*.*")}
    assert "train.bin" not in held and "train.txt" not in held


def test_text_that_changed_is_read_again(section, tmp_path):
    before = scored(section, tmp_path / "cache").fingerprint
    shutil.copy(tmp_path / "documents" / "59.txt", tmp_path / "documents" / "60.txt")
    for n in range(70, 90):
        (tmp_path / "documents" / f"{n}.txt").write_text(f"More {n} " * 9)
    assert scored(section, tmp_path / "cache").fingerprint != before


def test_missing_text_is_one_clear_error(section, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        scored(replace(section, test=("/nowhere.txt",)), tmp_path / "cache")
