"""Laws of batches: order is a function of seed and step, whoever asks."""

from __future__ import annotations

import json
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_jax.config.schema import DataSection
from llmos_jax.data import (
    TokenFile,
    TrainBatches,
    evaluation_batches,
    num_evaluation_batches,
    prepare,
)
from llmos_jax.errors import DataError


def token_file(folder, num_tokens, fingerprint="f00d"):
    """Write the tokens 0, 1, 2, ...: a token is its own position."""
    path = folder / "train.bin"
    np.arange(num_tokens, dtype=np.uint16).tofile(path)
    return TokenFile(
        path=path,
        dtype="uint16",
        num_tokens=num_tokens,
        num_bytes=num_tokens,
        num_documents=1,
        fingerprint=fingerprint,
    )


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return token_file(tmp_path_factory.mktemp("tokens"), 1000)


def batches(tokens, count, **options):
    options = {"seq_len": 8, "global_batch": 6, "seed": 3, **options}
    source = TrainBatches(tokens, **options)
    taken = list(islice(source, count))
    source.close()
    return taken


def firsts(taken):
    """Name each row by its first token, one list a batch."""
    return [batch["inputs"][:, 0].tolist() for batch in taken]


def test_a_batch_is_inputs_and_the_next_tokens(tokens):
    (batch,) = batches(tokens, 1)
    assert {name: (a.dtype, a.shape) for name, a in batch.items()} == {
        "inputs": (np.int32, (6, 8)),
        "targets": (np.int32, (6, 8)),
    }
    np.testing.assert_array_equal(batch["inputs"] + 1, batch["targets"])
    assert (batch["inputs"][:, 0] % 8 == 0).all()


def test_an_epoch_has_every_row_once_and_the_next_another_order(tokens):
    rows = sum(firsts(batches(tokens, 124, global_batch=2)), [])
    one, other = rows[:124], rows[124:]
    assert sorted(one) == sorted(other) == list(range(0, 992, 8))
    assert one != other
    assert one != sorted(one)


def test_order_is_a_function_of_the_seed(tokens):
    assert firsts(batches(tokens, 9)) == firsts(batches(tokens, 9))
    assert firsts(batches(tokens, 9)) != firsts(batches(tokens, 9, seed=4))


@pytest.mark.parametrize("step", [0, 1, 20, 21, 150])
def test_start_step_is_where_iterating_comes_to(tokens, step):
    assert firsts(batches(tokens, 3, start_step=step)) == firsts(
        batches(tokens, step + 3)[step:]
    )


def test_prefetch_does_not_change_the_order(tokens):
    assert firsts(batches(tokens, 50)) == firsts(batches(tokens, 50, prefetch=False))


@pytest.mark.parametrize("parts", [[[0, 1, 2], [3, 4, 5]], [[5, 0], [3], [1, 4, 2]]])
def test_rows_of_processes_make_up_the_whole_batch(tokens, parts):
    whole = batches(tokens, 30)
    for rows in parts:
        for mine, all_rows in zip(batches(tokens, 30, rows=rows), whole):
            np.testing.assert_array_equal(mine["inputs"], all_rows["inputs"][rows])
            np.testing.assert_array_equal(mine["targets"], all_rows["targets"][rows])


def test_resume_goes_on_where_it_was(tokens):
    source = TrainBatches(tokens, seq_len=8, global_batch=6, seed=3)
    list(islice(source, 25))
    state = source.get_state()
    rest = firsts(islice(source, 10))
    other = TrainBatches(tokens, seq_len=8, global_batch=6, seed=3, rows=[1, 2])
    other.set_state(state)
    assert (state["step"], other.step) == (25, 25)
    assert firsts(islice(other, 10)) == [row[1:3] for row in rest]
    source.set_state(state)
    assert firsts(islice(source, 10)) == rest
    source.close()
    other.close()


def test_state_is_plain_data(tokens):
    source = TrainBatches(tokens, seq_len=8, global_batch=6, seed=3)
    assert source.get_state() == {
        "step": 0,
        "tokens": "f00d",
        "seq_len": 8,
        "global_batch": 6,
        "seed": 3,
        "weights": None,
        "packing": "concat",
    }
    source.close()


@pytest.mark.parametrize("name", ["tokens", "seq_len", "global_batch", "seed"])
def test_state_of_another_order_is_an_error(tokens, name):
    source = TrainBatches(tokens, seq_len=8, global_batch=6, seed=3)
    foreign = {**source.get_state(), name: 99}
    with pytest.raises(DataError, match=f"{name} was 99 when it\\s*was saved and is"):
        source.set_state(foreign)
    source.close()


def test_too_little_text_names_both_numbers(tmp_path):
    short = token_file(tmp_path, 8)
    with pytest.raises(DataError, match=r"train text has 8 tokens.*row needs 9"):
        TrainBatches(short, seq_len=8, global_batch=1, seed=0)
    assert firsts(batches(token_file(tmp_path, 9), 2, global_batch=2)) == [[0, 0]] * 2


def marked_file(folder, documents):
    """Documents of the token 1, each begun by the mark 7, as token_file.py writes."""
    ids = [token for size in documents for token in (7, *[1] * size)]
    path = folder / "train.bin"
    np.array(ids, np.uint16).tofile(path)
    return TokenFile(
        path=path,
        dtype="uint16",
        num_tokens=len(ids),
        num_bytes=len(ids),
        num_documents=len(documents),
        fingerprint="f00d",
        end_id=7,
    )


@pytest.mark.parametrize("source", [TrainBatches, evaluation_batches])
def test_a_mark_belongs_to_the_document_that_it_begins(tmp_path, source):
    file = marked_file(tmp_path, [3, 0, 2, 9])
    options = {"document_mask": True, "seq_len": 8}
    if source is TrainBatches:
        rows = batches(file, 1, global_batch=2, **options)[0]
    else:
        rows = next(evaluation_batches(file, batch=2, **options))
    found = {
        tuple(inputs.tolist()): segments.tolist()
        for inputs, segments in zip(rows["inputs"], rows["segments"])
    }
    assert rows["segments"].dtype == np.int32
    assert found == {
        (7, 1, 1, 1, 7, 7, 1, 1): [0, 0, 0, 0, 1, 2, 2, 2],
        (7, 1, 1, 1, 1, 1, 1, 1): [0] * 8,
    }


def test_segments_count_from_zero_where_a_row_begins_inside_a_document(tmp_path):
    file = marked_file(tmp_path, [5, 5])
    one, two = evaluation_batches(file, batch=1, seq_len=4, document_mask=True, limit=2)
    assert one["segments"].tolist() == [[0, 0, 0, 0]]
    assert two["inputs"].tolist() == [[1, 1, 7, 1]]
    assert two["segments"].tolist() == [[0, 0, 1, 1]]


def test_rows_of_processes_have_the_segments_of_the_whole_batch(tmp_path):
    file = marked_file(tmp_path, [3, 8, 1, 6, 2, 4, 7, 5] * 4)
    for step, whole in enumerate(batches(file, 5, document_mask=True)):
        (part,) = batches(file, 1, document_mask=True, rows=[4, 1], start_step=step)
        np.testing.assert_array_equal(part["segments"], whole["segments"][[4, 1]])
        assert whole["segments"].max() > 0


def test_prepared_text_has_a_segment_for_each_document(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "tick tock " * (n + 1)} for n in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = DataSection(train=(str(path),), validation_share=0.1, tokenizer="bytes")
    text = prepare(
        section,
        vocab_size=257,
        model_name="tiny",
        cache=tmp_path / "cache",
        on_progress=[].append,
    )
    size = text.train.num_tokens - 1
    (batch,) = batches(text.train, 1, seq_len=size, global_batch=1, document_mask=True)
    assert batch["segments"].max() + 1 == text.train.num_documents
    (batch,) = evaluation_batches(
        text.validation, seq_len=10_000, batch=1, document_mask=True
    )
    real = batch["segments"][batch["weights"] > 0]
    assert real.max() + 1 == text.validation.num_documents


def test_a_text_without_marks_cannot_be_masked(tokens):
    with pytest.raises(DataError, match="no end mark.*Leave data.document_mask out"):
        batches(tokens, 1, document_mask=True)
    with pytest.raises(DataError, match="no end mark"):
        next(evaluation_batches(tokens, seq_len=8, batch=1, document_mask=True))


@settings(max_examples=60, deadline=None)
@given(
    num_tokens=st.integers(2, 200), seq_len=st.integers(1, 9), batch=st.integers(1, 5)
)
def test_evaluation_predicts_every_token_but_the_first_once(
    tmp_path_factory, num_tokens, seq_len, batch
):
    file = token_file(tmp_path_factory.mktemp("t"), num_tokens)
    sizes = {"seq_len": seq_len, "batch": batch}
    taken = list(evaluation_batches(file, **sizes))
    assert len(taken) == num_evaluation_batches(file, **sizes)
    targets = np.concatenate([one["targets"][one["weights"] > 0] for one in taken])
    np.testing.assert_array_equal(targets, np.arange(1, num_tokens))
    for one in taken:
        assert {array.shape for array in one.values()} == {(batch, seq_len)}
        assert one["weights"].dtype == np.float32
        real = one["weights"] > 0
        np.testing.assert_array_equal(one["inputs"][real] + 1, one["targets"][real])


def test_evaluation_limit_spreads_over_the_text(tokens):
    sizes = {"seq_len": 10, "batch": 2}
    whole = firsts(evaluation_batches(tokens, **sizes))
    part = firsts(evaluation_batches(tokens, **sizes, limit=5))
    assert num_evaluation_batches(tokens, **sizes, limit=5) == len(part) == 5
    assert part == whole[::10]
    assert firsts(evaluation_batches(tokens, **sizes, limit=10**6)) == whole


def test_evaluation_rows_pick_from_each_batch(tokens):
    sizes = {"seq_len": 10, "batch": 4}
    whole = firsts(evaluation_batches(tokens, **sizes))
    part = firsts(evaluation_batches(tokens, **sizes, rows=[3, 1]))
    assert part == [[row[3], row[1]] for row in whole]


def test_evaluation_of_one_token_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no token to predict"):
        list(evaluation_batches(token_file(tmp_path, 1), seq_len=8, batch=1))
