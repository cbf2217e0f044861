"""A corpus from sources to shards: what is in it, what is said of it, that it is the
same however it was made."""

from __future__ import annotations

import json

import numpy as np
import preparing
import pytest

from llmos_jax.corpus import encode_texts, report_text
from llmos_jax.data import bytes_tokenizer, train_bpe
from llmos_jax.data.document import Document, is_held_out

TEXTS = [preparing.prose(seed) for seed in range(200)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    preparing.write_rows(folder / "a.jsonl", TEXTS[:120])
    preparing.write_rows(folder / "b.jsonl", [*TEXTS[120:], "too short", "a\x00 " * 9])
    return [folder / "a.jsonl", folder / "b.jsonl"]


@pytest.fixture(scope="module")
def made(sources, small_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("corpora") / "out"
    report = preparing.prepare(
        out, small_model, *sources, prepare__test_share=0.1, prepare__shard_tokens=9000
    )
    return out, report


def test_every_document_is_on_the_side_of_its_hash_in_order(made):
    out, _ = made
    held = [is_held_out(Document(name="", text=text), 0.1) for text in TEXTS]
    below = [is_held_out(Document(name="", text=text), 0.2) for text in TEXTS]
    sides = {
        "validation": [text for text, is_in in zip(TEXTS, held) if is_in],
        "test": [text for text, one, two in zip(TEXTS, held, below) if two and not one],
        "train": [text for text, is_in in zip(TEXTS, below) if not is_in],
    }
    assert all(len(side) > 5 for side in sides.values())
    assert {side: preparing.texts(out, side) for side in sides} == sides
    for side in ("validation", "test"):
        assert (out / f"{side}.txt").read_text() == "".join(sides[side])
    assert not (out / "train.txt").exists()


def test_the_manifest_says_what_the_files_are(made):
    import hashlib

    out, report = made
    corpus = preparing.manifest(out)
    assert len(corpus.sides["train"].shards) > 1
    named = {"manifest.json", "report.json", "tokenizer.json"}
    named |= {"validation.txt", "test.txt"}
    for name, side in corpus.sides.items():
        assert side.num_documents == len(preparing.texts(out, name))
        assert side.num_bytes == sum(
            len(text.encode()) for text in preparing.texts(out, name)
        )
        for shard in side.shards:
            named.add(shard.name)
            raw = (out / shard.name).read_bytes()
            assert (shard.size, shard.sha256) == (
                len(raw), hashlib.sha256(raw).hexdigest()
            )  # fmt: skip
    assert {path.name for path in out.iterdir()} == named
    assert (corpus.end_id, corpus.dtype) == (preparing.END, "uint16")
    assert report["corpus"] == corpus.fingerprint


def test_the_report_accounts_for_every_document(made):
    out, report = made
    total = report["total"]
    assert total["read"]["documents"] == 202
    assert total["kept"]["documents"] == 200
    reasons = {
        reason: counts["documents"] for reason, counts in total["dropped"].items()
    }
    assert reasons == {"too_short": 1, "repeated_runs": 1} or sum(reasons.values()) == 2
    assert total["dropped"]["too_short"]["examples"][0].endswith("b.jsonl:81")
    for row in report["sources"]:
        kept = sum(counts["documents"] for counts in row["kept"].values())
        dropped = sum(counts["documents"] for counts in row["dropped"].values())
        assert row["read"]["documents"] == kept + dropped
    tokens = sum(side["tokens"] for side in report["sides"].values())
    assert total["kept"]["tokens"] == tokens == total["kept"]["bytes"] + 200
    assert json.loads((out / "report.json").read_text()) == report
    text = report_text(report)
    assert "too short" in text and f"{report['sides']['train']['tokens']:,}" in text


def test_one_worker_writes_the_bytes_of_two(made, sources, small_model, tmp_path):
    out, _ = made
    again = tmp_path / "again"
    preparing.prepare(
        again, small_model, *sources, prepare__test_share=0.1,
        prepare__shard_tokens=9000, prepare__workers=1,
    )  # fmt: skip
    for path in out.iterdir():
        if path.name != "report.json":
            assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_a_finished_corpus_is_left_as_it_is(made, sources, small_model):
    out, report = made
    before = {path: path.stat() for path in out.iterdir()}
    again = preparing.prepare(
        out, small_model, *sources, prepare__test_share=0.1, prepare__shard_tokens=9000
    )
    assert again == report
    assert {path: path.stat() for path in out.iterdir()} == before


def test_few_long_documents_lose_their_ends(tmp_path, small_model):
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text(preparing.prose(number, 3000))
    out = tmp_path / "out"
    report = preparing.prepare(
        out, small_model, tmp_path / "?.txt", prepare__test_share=0.05
    )
    assert "the last 0.1 of each document" in report["held_out_by"]
    sides = [preparing.texts(out, side) for side in ("train", "validation", "test")]
    for number, parts in enumerate(zip(*sides)):
        assert "".join(parts) == preparing.prose(number, 3000)
    assert 0.08 < len(sides[1][0]) / len(preparing.prose(0, 3000)) < 0.12


def test_long_documents_are_cut_where_no_token_is(tmp_path):
    """A document of many jobs, over several shards, has the ids it has whole."""
    text = " ".join(preparing.prose(seed, 500) for seed in range(120))
    tokenizer = train_bpe([text[:50_000]], 400)
    side = encode_texts(
        [text, "end"], tokenizer, tmp_path / "out", workers=2, shard_tokens=50_000
    )
    assert len(side.shards) > 2
    found = []
    for shard in side.shards:
        from array_record.python.array_record_module import ArrayRecordReader

        for record in ArrayRecordReader(str(tmp_path / "out" / shard.name)).read_all():
            found.append(np.frombuffer(record, np.uint16))
    mark = [tokenizer.begin_id]
    whole = [mark, tokenizer.encode(text), mark, tokenizer.encode("end")]
    np.testing.assert_array_equal(np.concatenate(found), np.concatenate(whole))
    assert sum(shard.num_documents for shard in side.shards) == 2


def test_a_tokenizer_is_trained_on_training_text_alone(tmp_path, small_model):
    texts = [preparing.prose(seed) for seed in range(60)]
    source = preparing.write_rows(tmp_path / "a.jsonl", texts)
    out = tmp_path / "out"
    preparing.prepare(out, small_model, source, data__tokenizer="train")
    from llmos_jax.data import Tokenizer

    made = Tokenizer.from_json((out / "tokenizer.json").read_text())
    train = [
        text for text in texts if not is_held_out(Document(name="", text=text), 0.1)
    ]
    assert made.fingerprint == train_bpe(train, 512).fingerprint
    assert preparing.manifest(out).tokenizer == made.fingerprint


def test_bytes_are_what_the_plain_tokenizer_gives():
    assert bytes_tokenizer().begin_id == preparing.END
