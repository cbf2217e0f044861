"""Conversations in rows: each whole, once, apart from the others; any step at once."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_jax.data import (
    TokenFile,
    TrainBatches,
    evaluation_batches,
    num_evaluation_batches,
    packing_stats,
)
from llmos_jax.data.lengths import with_lengths
from llmos_jax.data.packing import PackedRows
from llmos_jax.errors import ConfigError, DataError


def chat_file(folder, talks, fingerprint="f00d"):
    """`talks`: lists of weights. Tokens count up through the file from 1."""
    path = folder / "train.bin"
    weights = np.concatenate([np.asarray(talk, np.uint8) for talk in talks])
    np.arange(1, weights.size + 1, dtype=np.uint16).tofile(path)
    weights.tofile(path.with_suffix(".weights"))
    lengths = np.array([len(talk) for talk in talks], np.uint32)
    lengths.tofile(path.with_suffix(".lengths"))
    return TokenFile(
        path=path,
        dtype="uint16",
        num_tokens=weights.size,
        num_bytes=10,
        num_documents=len(talks),
        fingerprint=fingerprint,
        weights=path.with_suffix(".weights"),
        lengths=path.with_suffix(".lengths"),
    )


def talk(size, answer=None):
    """A conversation of `size` tokens whose answer is all from `answer` on."""
    answer = size // 2 if answer is None else answer
    return [0] * answer + [1] * (size - answer)


def conversations_of(row):
    """(inputs, targets, weights) of each segment of a row, the padding left out."""
    for segment in range(row["segments"].max() + 1):
        inside = row["segments"] == segment
        if row["targets"][inside].any():
            yield tuple(row[name][inside].tolist() for name in row if name[0] != "s")


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 30), min_size=1, max_size=40),
    seq_len=st.integers(16, 40),
)
def test_every_conversation_is_in_one_row_once(tmp_path_factory, sizes, seq_len):
    file = chat_file(tmp_path_factory.mktemp("t"), [talk(size) for size in sizes])
    rows = PackedRows(file, seq_len)
    found = [one for row in range(len(rows)) for one in conversations_of(rows[row])]
    starts = np.concatenate([[1], 1 + np.cumsum(sizes)])
    wanted = []
    for start, size in zip(starts, sizes):
        end = min(size - 1, seq_len)
        ids = list(range(start, start + end + 1))
        wanted.append((ids[:-1], ids[1:], [float(w) for w in talk(size)[1 : end + 1]]))
    assert sorted(found) == wanted
    assert packing_stats(file, seq_len)["cut"] == sum(n - 1 > seq_len for n in sizes)


def test_rows_are_padded_with_weight_zero_in_a_segment_of_its_own(tmp_path):
    file = chat_file(tmp_path, [talk(4, 2), talk(3, 1)])
    row = PackedRows(file, 8)[0]
    assert row["inputs"].tolist() == [1, 2, 3, 5, 6, 0, 0, 0]
    assert row["targets"].tolist() == [2, 3, 4, 6, 7, 0, 0, 0]
    assert row["weights"].tolist() == [0, 1, 1, 1, 1, 0, 0, 0]
    assert row["segments"].tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    dtypes = {name: str(array.dtype) for name, array in row.items()}
    assert dtypes == {
        "inputs": "int32",
        "targets": "int32",
        "weights": "float32",
        "segments": "int32",
    }


def test_what_fits_is_packed_tightly(tmp_path):
    sizes = np.random.default_rng(0).integers(20, 400, 2000)
    stats = packing_stats(chat_file(tmp_path, [talk(n) for n in sizes]), 512)
    assert stats["documents"] == 2000
    assert stats["fill"] > 0.98


def test_a_cut_that_leaves_no_answer_drops_the_conversation(tmp_path):
    talks = [talk(20, 4), talk(20, 15), talk(5)]
    stats = packing_stats(chat_file(tmp_path, talks), 8)
    assert (stats["documents"], stats["cut"], stats["dropped"]) == (2, 1, 1)
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(DataError, match=r"first 8 tokens. Raise batch\.seq_len"):
        PackedRows(chat_file(other, [talk(20, 15)]), 8)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    sizes = np.random.default_rng(1).integers(3, 30, 150)
    return chat_file(tmp_path_factory.mktemp("t"), [talk(size) for size in sizes])


def batches(file, count, **options):
    options = {"seq_len": 32, "global_batch": 6, "seed": 3, **options}
    source = TrainBatches(file, **options)
    taken = list(islice(source, count))
    source.close()
    return taken


def assert_equal(one, other):
    assert one.keys() == other.keys() >= {"inputs", "targets", "weights", "segments"}
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def test_an_epoch_has_every_row_once(file):
    count = len(PackedRows(file, 32))
    firsts = [batch["inputs"][0, 0] for batch in batches(file, count, global_batch=1)]
    assert len(set(firsts)) == count


@pytest.mark.parametrize("step", [1, 40])
def test_any_step_is_found_at_once_and_by_any_process(file, step):
    (whole,) = batches(file, step + 1)[step:]
    (again,) = batches(file, 1, start_step=step)
    assert_equal(whole, again)
    (part,) = batches(file, 1, start_step=step, rows=[4, 1])
    assert_equal({name: array[[4, 1]] for name, array in whole.items()}, part)
    (other,) = batches(file, 1, start_step=step, seed=4)
    assert (other["inputs"] != whole["inputs"]).any()


def test_resume_goes_on_where_it_was(file):
    source = TrainBatches(file, seq_len=32, global_batch=6, seed=3)
    list(islice(source, 7))
    state = source.get_state()
    wanted = next(source)
    source.set_state(state)
    assert_equal(next(source), wanted)
    source.close()


def test_evaluation_reads_every_row_in_order(file):
    rows = PackedRows(file, 32)
    taken = list(evaluation_batches(file, seq_len=32, batch=7))
    assert len(taken) == num_evaluation_batches(file, seq_len=32, batch=7)
    stacked = {n: np.concatenate([one[n] for one in taken]) for n in taken[0]}
    for number in range(len(rows)):
        assert_equal({n: a[number] for n, a in stacked.items()}, rows[number])
    assert stacked["weights"][len(rows) :].sum() == 0
    (part,) = evaluation_batches(file, seq_len=32, batch=7, limit=1, rows=[2])
    assert_equal(part, {n: a[2:3] for n, a in stacked.items()})


def test_a_stride_is_for_text(file):
    with pytest.raises(ConfigError, match="conversations are scored whole"):
        next(evaluation_batches(file, seq_len=32, batch=1, stride=4))


def text_file(folder, sizes, **marks):
    """Documents of `sizes` tokens, the mark 9 that begins them included."""
    ids = [token for size in sizes for token in (9, *range(10, 9 + size))]
    path = folder / "train.bin"
    np.array(ids, np.uint16).tofile(path)
    return TokenFile(
        path=path,
        dtype="uint16",
        num_tokens=len(ids),
        num_bytes=len(ids),
        num_documents=len(sizes),
        fingerprint=f"f00d{len(ids)}",
        **{"end_id": 9, **marks},
    )


def packed_text(folder, sizes, **marks):
    return with_lengths(text_file(folder, sizes, **marks), folder, [].append)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=40),
    seq_len=st.integers(4, 40),
)
def test_every_token_of_text_is_in_one_row_once(tmp_path_factory, sizes, seq_len):
    file = packed_text(tmp_path_factory.mktemp("t"), sizes)
    assert file.open_lengths().tolist() == sizes
    rows = PackedRows(file, seq_len)
    found = [one for row in range(len(rows)) for one in conversations_of(rows[row])]
    wanted = []
    for size in sizes:
        ids = [9, *range(10, 9 + size), 9]  # after the last token, the end
        for start in range(0, size, seq_len):
            end = min(start + seq_len, size)
            learned = [1.0] * (end - start)
            wanted.append((ids[start:end], ids[start + 1 : end + 1], learned))
    assert sorted(found) == sorted(wanted)


def test_a_document_that_fits_is_not_cut(tmp_path):
    file = packed_text(tmp_path, [5, 3, 7, 2, 9])
    rows = [PackedRows(file, 8)[row] for row in range(4)]
    assert rows[0]["inputs"].tolist() == [9, 10, 11, 12, 13, 14, 15, 16]
    assert rows[1]["inputs"].tolist() == [9, 10, 11, 12, 13, 14, 15, 17]
    assert packing_stats(file, 8) == {
        "rows": 4,
        "documents": 5,
        "cut": 1,
        "dropped": 0,
        "fill": 26 / 32,
    }


def test_a_packed_document_ends_with_what_the_model_says_there(tmp_path):
    file = packed_text(tmp_path, [3, 2], stop_id=8)
    row = PackedRows(file, 6)
    assert row[0]["inputs"].tolist() == [9, 10, 11, 9, 10, 0]
    assert row[0]["targets"].tolist() == [10, 11, 8, 10, 8, 0]
    assert row[0]["segments"].tolist() == [0, 0, 0, 1, 1, 2]
    assert row[0]["weights"].tolist() == [1, 1, 1, 1, 1, 0]


def test_packed_text_goes_on_at_any_step_and_only_as_packed(tmp_path):
    sizes = np.random.default_rng(1).integers(1, 90, 150)
    file = packed_text(tmp_path, sizes)
    (whole,) = batches(file, 21, packing="best_fit")[20:]
    source = TrainBatches(
        file, seq_len=32, global_batch=6, seed=3, packing="best_fit", rows=[4, 1]
    )
    source.set_state({**source.get_state(), "step": 20})
    part = next(source)
    assert_equal({name: array[[4, 1]] for name, array in whole.items()}, part)
    state = source.get_state()
    source.close()
    other = TrainBatches(file, seq_len=32, global_batch=6, seed=3)
    with pytest.raises(DataError, match="packing was best_fit when"):
        other.set_state(state)
    old = {
        k: v for k, v in other.get_state().items() if k not in ("packing", "weights")
    }
    other.set_state(old)
    other.close()


def test_documents_that_cannot_be_told_apart_are_not_packed(tmp_path):
    with pytest.raises(
        DataError, match="no end mark.*document_mask out, and data.pack"
    ):
        packed_text(tmp_path, [3, 4], end_id=None)
