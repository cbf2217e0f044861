"""Documents that are there twice, word for word or nearly, go; the first one stays."""

from __future__ import annotations

import numpy as np
import preparing
import pytest

from llmos_jax.corpus.signature import bands, signature, similarity
from llmos_jax.corpus.words import words_of


def changed(text, share, seed=0):
    """The text with so much of its words replaced, in one stretch."""
    words = text.split()
    count = round(len(words) * share)
    return " ".join(preparing.prose(1000 + seed, count).split() + words[count:])


def jaccard(one, other):
    runs = [set(words_of(text).runs(5).tolist()) for text in (one, other)]
    return len(runs[0] & runs[1]) / len(runs[0] | runs[1])


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.6])
def test_signatures_estimate_what_texts_share(share):
    texts = [preparing.prose(seed, 300) for seed in range(8)]
    others = [changed(text, share, seed) for seed, text in enumerate(texts)]
    wanted = np.mean([jaccard(*pair) for pair in zip(texts, others)])
    found = np.mean(
        [
            similarity(signature(words_of(one))[None], signature(words_of(other)))[0]
            for one, other in zip(texts, others)
        ]
    )
    assert abs(found - wanted) < 0.06  # 8 of them: 0.015, four times


def test_alike_texts_meet_in_a_band_and_others_do_not():
    texts = [preparing.prose(seed, 200) for seed in range(40)]
    others = [changed(text, 0.05, seed) for seed, text in enumerate(texts)]
    keys = [
        bands(np.stack([signature(words_of(text)) for text in side]))
        for side in (texts, others)
    ]
    assert (keys[0] == keys[1]).any(axis=0).all()
    assert not (keys[0] == np.roll(keys[1], 1, axis=1)).any()


def test_a_text_shorter_than_a_run_has_a_signature():
    assert (signature(words_of("a b c")) == signature(words_of("A b  c"))).all()
    assert (signature(words_of("a b c")) != signature(words_of("a b d"))).any()


def test_duplicates_go_across_files_and_formats(tmp_path, small_model):
    texts = [preparing.prose(seed, 100) for seed in range(30)]
    first = preparing.write_rows(tmp_path / "a.jsonl", texts)
    again = preparing.write_rows(
        tmp_path / "b.jsonl",
        [texts[0].upper(), changed(texts[1], 0.05), preparing.prose(99, 100)],
    )
    (tmp_path / "c.txt").write_text(texts[2].replace(" ", "  "))
    out = tmp_path / "out"
    report = preparing.prepare(
        out, small_model, first, again, tmp_path / "c.txt", prepare__workers=1
    )
    dropped = report["total"]["dropped"]
    assert dropped["exact_duplicate"]["documents"] == 2
    assert dropped["exact_duplicate"]["examples"] == [
        f"{again}:1", str(tmp_path / "c.txt")
    ]  # fmt: skip
    assert dropped["near_duplicate"]["examples"] == [f"{again}:2"]
    kept = preparing.all_texts(out)
    assert sorted(kept) == sorted([*texts, preparing.prose(99, 100)])


def test_duplicates_can_be_kept(tmp_path, small_model):
    texts = [preparing.prose(seed, 100) for seed in range(20)]
    path = preparing.write_rows(
        tmp_path / "a.jsonl", [*texts, texts[0], changed(texts[1], 0.05)]
    )
    out = tmp_path / "out"
    preparing.prepare(
        out, small_model, path, prepare__workers=1,
        prepare__exact_duplicates="false", prepare__near_duplicates=0,
    )  # fmt: skip
    assert len(preparing.all_texts(out)) == 22


def test_text_that_is_held_out_by_name_is_not_learned(tmp_path, small_model):
    texts = [preparing.prose(seed, 100) for seed in range(12)]
    train = preparing.write_rows(
        tmp_path / "train.jsonl", [changed(texts[0], 0.05), texts[1], *texts[4:]]
    )
    held = preparing.write_rows(tmp_path / "held.jsonl", texts[:3])
    test = preparing.write_rows(tmp_path / "test.jsonl", texts[1:4])
    out = tmp_path / "out"
    report = preparing.prepare(
        out, small_model, train, data__validation=held, data__test=test
    )
    assert preparing.texts(out, "train") == texts[4:]
    assert preparing.texts(out, "validation") == texts[:1]
    assert preparing.texts(out, "test") == texts[1:4]
    assert report["held_out_by"] == f"named: {held}"
