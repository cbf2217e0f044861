"""What cannot be prepared is refused in a line that names it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import preparing
import pytest
import small
from small_disk import small_disk

from llmos_jax.corpus import units
from llmos_jax.corpus.journal import locked
from llmos_jax.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [preparing.prose(seed) for seed in range(40)]


@pytest.fixture
def source(tmp_path):
    (tmp_path / "sources").mkdir()
    return preparing.write_rows(tmp_path / "sources" / "a.jsonl", TEXTS)


def refused(out, model, *patterns, **more):
    with pytest.raises(ConfigError) as caught:
        preparing.prepare(out, model, *patterns, **more)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_broken_line_is_named(source, small_model, tmp_path):
    with source.open("a") as file:
        file.write('{"text": "not closed\n')
    text = refused(tmp_path / "out", small_model, source)
    assert text.startswith(f"{source}:41: not a JSON object on one line")


def test_a_broken_line_of_a_large_file_is_named(
    source, small_model, tmp_path, monkeypatch
):
    monkeypatch.setattr(units, "UNIT_BYTES", 4000)
    lines = source.read_bytes().splitlines(keepends=True)
    source.write_bytes(b"".join([*lines[:30], b"[1]\n", *lines[30:]]))
    assert len(units.cut_units("train", [str(source)])) > 3
    text = refused(tmp_path / "out", small_model, source)
    assert text == (
        f"{source}:31: wanted a JSON object with a 'text' field, got a list."
    )


def test_a_folder_in_use_is_refused(source, small_model, tmp_path):
    out = tmp_path / "out"
    with locked(out):
        assert "in use" in refused(out, small_model, source)
    preparing.prepare(out, small_model, source)


@pytest.mark.parametrize(
    "more, said",
    [
        ({"prepare__min_words": 6}, "prepare.min_words was 5 and is 6"),
        ({"data__validation_share": 0.2}, "data.validation_share was 0.1 and is 0.2"),
        ({"data__tokenizer": "train"}, "data.tokenizer was"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(
    more, said, source, small_model, tmp_path
):
    out = tmp_path / "out"
    preparing.prepare(out, small_model, source)
    assert said in refused(out, small_model, source, **more)


def test_other_settings_for_an_unfinished_folder_are_refused(
    source, small_model, tmp_path
):
    out, broken = tmp_path / "out", tmp_path / "b.jsonl"
    broken.write_text("{")
    refused(out, small_model, source, broken)
    text = refused(out, small_model, source, broken, prepare__repetition="false")
    assert "prepare.repetition was true and is false" in text


def test_changed_sources_are_refused(source, small_model, tmp_path):
    out = tmp_path / "out"
    preparing.prepare(out, small_model, source)
    preparing.write_rows(source, TEXTS[:-1])
    assert "the sources changed since" in refused(out, small_model, source)


def test_a_folder_with_something_else_is_left_alone(source, small_model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years")
    assert "something else (thesis.txt)" in refused(out, small_model, source)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_a_folder_within_the_sources_is_refused(source, small_model):
    text = refused(source.parent / "out", small_model, source.parent)
    assert "which is to be read" in text


def test_a_corpus_is_not_a_source(source, small_model, tmp_path):
    preparing.prepare(tmp_path / "one", small_model, source)
    text = refused(tmp_path / "two", small_model, tmp_path / "one")
    assert "is a corpus already" in text


def test_conversations_are_refused(small_model, tmp_path):
    row = {"messages": [{"role": "user", "content": "hello"}]}
    (tmp_path / "chat.jsonl").write_text(json.dumps(row) + "\n")
    text = refused(tmp_path / "out", small_model, tmp_path / "chat.jsonl")
    assert "conversations" in text


def test_no_text_left_is_told(small_model, tmp_path):
    path = preparing.write_rows(tmp_path / "a.jsonl", ["two words"] * 9)
    text = refused(tmp_path / "out", small_model, path)
    assert text.startswith("no train text is left")


@pytest.mark.parametrize(
    "more, said",
    [
        ({"prepare__workers": 0}, "prepare.workers is 0"),
        ({"prepare__shard_tokens": 0}, "prepare.shard_tokens is 0"),
        ({"prepare__near_duplicates": 1.5}, "prepare.near_duplicates is 1.5"),
        ({"prepare__test_share": 0.95}, "must stay below 1"),
        ({"prepare__test_share": 0.1, "data__test": "x.txt"}, "prepare.test_share"),
    ],
)
def test_settings_that_cannot_be_are_refused(more, said, source, small_model, tmp_path):
    assert said in refused(tmp_path / "out", small_model, source, **more)


def run_tool(*words):
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "prepare", *map(str, words)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_the_tool_prints_one_json_object(source, small_model, tmp_path):
    out = tmp_path / "out"
    words = preparing.settings(out, small_model, source)
    done = run_tool("quickstart", *small.flags(words), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["total"]["kept"]["documents"] == 40
    again = run_tool("quickstart", *small.flags(words))
    assert "nothing to do" in again.stderr
    assert f"--set data.train={out}" in again.stdout
    shard = out / "train-00000.array_record"
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    damaged = run_tool("quickstart", *small.flags(words))
    assert damaged.returncode == 2
    assert f"{shard.name} is missing or was altered" in damaged.stderr
    assert "Delete the folder" in damaged.stderr


def test_the_tool_refuses_in_one_line(source, small_model, tmp_path):
    words = preparing.settings("", small_model, source)
    done = run_tool("quickstart", *small.flags(words))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: where is the corpus to lie?")
    assert "Traceback" not in done.stderr


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", 4) as folder:
        yield folder


@pytest.mark.parametrize("left", [50_000, 900_000])
def test_a_full_disk_is_told_and_gone_on_from(left, disk, small_model, tmp_path):
    """Room for nothing; and for the texts (440 kB) but not all of their tokens."""
    texts = [preparing.prose(seed, 400) for seed in range(180)]
    source = preparing.write_rows(tmp_path / "a.jsonl", texts)
    out = disk / "out"
    filler = disk / "filler"
    filler.write_bytes(bytes(4 * 2**20 - left))
    text = refused(out, small_model, source, prepare__shard_tokens=100_000)
    assert "no space left on the disk" in text and str(out) in text
    filler.unlink()
    preparing.prepare(out, small_model, source, prepare__shard_tokens=100_000)
    assert len(preparing.all_texts(out)) == 180
