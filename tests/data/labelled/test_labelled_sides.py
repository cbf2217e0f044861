"""Sides of labelled data: what is held out, cut, left out and refused."""

from __future__ import annotations

import time

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_jax.config.schema import DataSection
from llmos_jax.data import Marks, bytes_tokenizer
from llmos_jax.data.labelled import labels_of, prepare_labelled, read_to_predict
from llmos_jax.data.labelled.read import Row
from llmos_jax.data.labelled.sides import CHARACTERS_A_TOKEN, hold_out
from llmos_jax.data.tokenizer import Tokenizer
from llmos_jax.errors import ConfigError, DataError
from llmos_jax.places import cache_folder

LINES = [f"{number % 3} text number {number} of {number % 3}" for number in range(90)]


def write(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def prepare(train, own=None, said=None, labels=(), seq_len=16, vocab_size=300, **more):
    section = DataSection(train=(train,), **{"validation_share": 0.2, **more})
    return prepare_labelled(
        section,
        labels=labels,
        own=own,
        vocab_size=vocab_size,
        model_name="m",
        seq_len=seq_len,
        cache=cache_folder(),
        on_progress=[].append if said is None else said.append,
    )


def rows_of(side):
    return {(row.label, row.text) for row in side.rows}


def test_all_rows_are_on_one_side_with_every_class_on_both(tmp_path):
    data = prepare(write(tmp_path / "a.all", LINES))
    assert data.labels == ("0", "1", "2")
    assert data.train.counts == (24, 24, 24)
    assert data.validation.counts == (6, 6, 6)
    assert data.test is None
    assert not rows_of(data.train) & rows_of(data.validation)
    assert data.held_out_by == "0.2 of the rows of each class, by content hash"
    row = int(np.flatnonzero(data.train.label == 2)[0])
    text = data.train.text(row)
    assert data.tokenizer.decode(data.train.tokens(row)) == text[: len(text)]
    assert data.train.place(row).startswith(f"{tmp_path}/a.all:")


def test_named_sides_are_taken_whole_and_shared_texts_counted(tmp_path):
    data = prepare(
        write(tmp_path / "a", LINES),
        validation=(write(tmp_path / "b", LINES[:3]),),
        test=(write(tmp_path / "c", ["1 new"]),),
    )
    assert [len(data.train), len(data.validation), len(data.test)] == [90, 3, 1]
    assert data.notes == ("3 of 3 validation texts are in the training data, too",)


def test_the_order_of_labels_is_that_of_numbers(tmp_path):
    path = write(tmp_path / "a", [f"{number % 12} x {number}" for number in range(60)])
    labels = labels_of(DataSection(train=(path,)))
    assert labels == tuple(map(str, range(12)))
    named = write(tmp_path / "b", ["b x", "a y", "10 z"])
    assert labels_of(DataSection(train=(named,))) == ("10", "a", "b")


def test_labels_that_were_given_keep_their_order(tmp_path):
    data = prepare(write(tmp_path / "a", LINES), labels=("2", "x", "1", "0"))
    assert data.labels == ("2", "x", "1", "0")
    assert data.train.counts == (24, 0, 24, 24)
    assert "no training row is 'x'" in data.notes


def test_small_text_gives_a_small_vocabulary_once(tmp_path):
    said = []
    data = prepare(write(tmp_path / "a", LINES), vocab_size=5000, said=said)
    assert 257 < data.tokenizer.vocab_size < 5000
    assert "training a tokenizer of 5000 tokens" in said
    again = []
    assert prepare(write(tmp_path / "a", LINES), vocab_size=5000, said=again)
    assert "training a tokenizer of 5000 tokens" not in again


def test_the_tokenizer_never_sees_held_out_text(tmp_path):
    lines = [
        f"{n % 2} {'common words' if n else 'zyxw zyxw zyxw'} {n}" for n in range(9)
    ]
    data = prepare(
        write(tmp_path / "a", lines[1:]),
        validation=(write(tmp_path / "b", lines[:1] * 9),),
    )
    names = " ".join(data.tokenizer.vocabulary())
    assert "common" in names
    assert "zyx" not in names


def test_a_model_that_wants_a_mark_before_texts_gets_it(tmp_path):
    plain = bytes_tokenizer()
    marks = Marks(bos_id=256, eos_id=256, stop_ids=frozenset({256}), adds_bos=True)
    own = Tokenizer(tokenizers.Tokenizer.from_str(plain._inner.to_str()), marks)
    data = prepare(write(tmp_path / "a", LINES), own=own)
    firsts = data.train.ids[data.train.starts[:-1]]
    assert set(firsts.tolist()) == {256}
    assert data.train.lengths.max() == 16


def test_long_texts_are_cut_and_counted_quickly(tmp_path):
    long = "0 " + "word " * 2_000_000
    path = write(tmp_path / "a", [*LINES, long])
    start = time.perf_counter()
    data = prepare(path, own=bytes_tokenizer(), vocab_size=257, seq_len=64)
    assert time.perf_counter() - start < 5
    assert data.train.lengths.max() == 64
    assert data.train.num_cut + data.validation.num_cut == 1
    assert any("longer than 64 tokens (batch.seq_len)" in note for note in data.notes)
    cut = next(
        row
        for side in (data.train, data.validation)
        for row in side.rows
        if len(row.text) > 64 * CHARACTERS_A_TOKEN
    )
    assert cut.text == long[2:]


def test_training_rows_without_text_are_left_out_and_scored_ones_kept(tmp_path):
    data = prepare(
        write(tmp_path / "a", [*LINES, "0", "1  "]),
        test=(write(tmp_path / "b", ["0 x", "1", "2   "]),),
    )
    assert len(data.train) + len(data.validation) == 90
    assert "2 of 92 training rows have no text and are left out" in data.notes
    assert data.test.lengths.tolist()[1] == 0
    assert len(data.test) == 3


@pytest.mark.parametrize(
    "lines, said",
    [
        (["0", "1 "], "none of the 2 rows in .* has a text"),
        (["0 x", "0 y"], "2 rows of data.train are all of one class, '0'"),
        (
            [f"w{number} x" for number in range(40)],
            "40 rows of data.train have 40 different labels, such as 'w0', 'w1', 'w10'",
        ),
        (["0 x", "1 y"], "2 rows of 2 classes are too few to hold any out"),
    ],
)
def test_data_that_teach_nothing_are_refused(lines, said, tmp_path):
    with pytest.raises(DataError, match=said):
        prepare(write(tmp_path / "a", lines))


@pytest.mark.parametrize("side", ["validation", "test"])
def test_labels_that_training_lacks_are_named(side, tmp_path):
    train = write(tmp_path / "a", LINES)
    strange = write(tmp_path / "b", ["0 x", *(f"n{i} y" for i in range(7)), "n0 z"])
    with pytest.raises(DataError) as caught:
        prepare(train, **{side: (strange,)})
    text = str(caught.value)
    assert f"7 of the labels of {side} rows are not among the 3 that" in text
    assert "'n0', 'n1', 'n2', 'n3', 'n4' and 2 more, in 8 rows" in text
    assert f"{strange}:2. Add such rows to data.train" in text


@pytest.mark.parametrize(
    "more, said",
    [
        ({"weights": (1.0,)}, "data.weights"),
        ({"validation_share": 0.0}, "data.validation_share is 0"),
        ({"vocab_size": 200}, "at least 257 tokens"),
    ],
)
def test_settings_without_sense_are_refused(more, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        prepare(write(tmp_path / "a", LINES), **more)


ROWS = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 30)), min_size=8, max_size=60
)


@settings(deadline=None)
@given(drawn=ROWS, share=st.floats(0.01, 0.9))
def test_equal_texts_stay_together_and_no_class_is_lost(drawn, share):
    rows = [
        Row(text=f"Text  {number}", label=label, place=f"{place}")
        for place, (label, number) in enumerate(drawn)
    ]
    try:
        train, held = hold_out(rows, share, [])
    except DataError:
        return  # nothing could be held out
    assert sorted([*train, *held], key=lambda row: int(row.place)) == rows
    assert not {row.text for row in train} & {row.text for row in held}
    assert {row.label for row in train} == {row.label for row in rows}


def test_a_share_below_a_row_holds_one_out_and_says_so():
    rows = [
        Row(text=f"{label} {number}", label=label, place="")
        for label, count in (("big", 200), ("small", 3), ("lone", 1))
        for number in range(count)
    ]
    notes = []
    _, held = hold_out(rows, 0.1, notes)
    assert [row.label for row in held].count("big") == 20
    assert [row.label for row in held].count("small") == 1
    assert [row.label for row in held].count("lone") == 0
    assert notes == [
        "0.1 of the rows of 'lone', 'small' is less than one: of each one is held out "
        "where it has two that differ"
    ]


def test_rows_added_elsewhere_move_nothing():
    rows = [Row(text=f"{n}", label=str(n % 2), place="") for n in range(100)]
    more = [Row(text=f"new {n}", label="2", place="") for n in range(50)]
    _, held = hold_out(rows, 0.1, [])
    _, then = hold_out([*more, *reversed(rows)], 0.1, [])
    assert {row.text for row in held} <= {row.text for row in then}


def predicted(tmp_path, tokenizer, train=LINES, **more):
    section = DataSection(
        train=(write(tmp_path / "train", train),), validation_share=0.2, **more
    )
    options = {"seq_len": 16, "labels": ("0", "1", "2")}
    return read_to_predict(section, tokenizer, **options), section, options


def test_what_is_predicted_is_test_else_validation_else_held_out(tmp_path):
    tokenizer = bytes_tokenizer()
    test, validation = (
        (write(tmp_path / name, [f"1 {name}"]),) for name in ("test", "validation")
    )
    (side, _), *_ = predicted(tmp_path, tokenizer, test=test, validation=validation)
    assert (side.name, side.text(0)) == ("test", "test")
    (side, _), *_ = predicted(tmp_path, tokenizer, validation=validation)
    assert (side.name, side.text(0)) == ("validation", "validation")
    (side, _), *_ = predicted(tmp_path, tokenizer)
    trained = prepare(str(tmp_path / "train"), own=tokenizer)
    assert side.fingerprint == trained.validation.fingerprint


def test_unknown_labels_are_predicted_but_not_scored(tmp_path):
    test = tmp_path / "t.csv"
    test.write_text("text,label\nx,1\ny,7\nz,\n")
    (side, notes), section, options = predicted(
        tmp_path, bytes_tokenizer(), test=(str(test),)
    )
    assert side.label.tolist() == [1, -1, -1]
    assert side.counts == (0, 1, 0)
    assert notes == ("2 of 3 test rows have no known label",)
    with pytest.raises(DataError, match=":4: no label"):
        read_to_predict(section, bytes_tokenizer(), needs_labels=True, **options)
    test.write_text("text,label\nx,1\ny,7\n")
    with pytest.raises(DataError, match="1 of the labels of test rows are not among"):
        read_to_predict(section, bytes_tokenizer(), needs_labels=True, **options)


def test_half_a_character_is_refused_with_its_place(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = ['{"text": "x", "label": 0}', '{"text": "\\ud800", "label": 1}']
    path.write_text("\n".join(rows))
    with pytest.raises(DataError, match=f"{path}:2"):
        prepare(write(tmp_path / "b", LINES), test=(str(path),))
