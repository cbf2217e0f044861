"""Laws of labelled batches: every row once an epoch, by seed and step alone."""

from __future__ import annotations

import json
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_jax.data.labelled import (
    LabelledBatches,
    LabelledSide,
    bucket_lengths,
    evaluation_rows,
    padding_share,
)
from llmos_jax.data.labelled.read import Row
from llmos_jax.errors import DataError


def side_of(sizes, labels=None, fingerprint="f00d"):
    """Row i holds the token i + 1, `sizes[i]` times; its label is i % 3."""
    sizes = list(sizes)
    label = np.arange(len(sizes)) % 3 if labels is None else np.asarray(labels)
    return LabelledSide(
        name="train",
        ids=np.repeat(np.arange(len(sizes)) + 1, sizes).astype(np.int32),
        starts=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        label=label.astype(np.int32),
        rows=tuple(Row(text="", label=None, place="") for _ in sizes),
        num_bytes=0,
        counts=(0, 0, 0),
        num_cut=0,
        fingerprint=fingerprint,
    )


SIDE = side_of([1 + (7 * row) % 90 for row in range(103)])


def taken(side, count, **options):
    options = {"seq_len": 64, "global_batch": 8, "seed": 3, **options}
    return list(islice(LabelledBatches(side, **options), count))


def rows_in(batches):
    """The rows of batches by number, in order; what fills is left out."""
    return [
        int(row) - 1
        for batch in batches
        for row, weight in zip(batch["inputs"][:, 0], batch["weights"][:, 0])
        if weight
    ]


def same(ours, theirs):
    return all(
        np.array_equal(one[name], other[name])
        for one, other in zip(ours, theirs, strict=True)
        for name in one
    )


def test_a_batch_holds_padded_tokens_lengths_labels_and_weights():
    batch = taken(SIDE, 1)[0]
    length = batch["inputs"].shape[1]
    assert {name: (a.dtype, a.shape) for name, a in batch.items()} == {
        "inputs": (np.int32, (8, length)),
        "lengths": (np.int32, (8, 1)),
        "labels": (np.int32, (8, 1)),
        "weights": (np.float32, (8, 1)),
    }
    for inputs, (size,), (label,) in zip(
        batch["inputs"], batch["lengths"], batch["labels"]
    ):
        row = inputs[0] - 1
        assert size == min(SIDE.lengths[row], 64)
        assert (inputs[:size] == row + 1).all()
        assert not inputs[size:].any()
        assert label == row % 3


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 80), min_size=1, max_size=60),
    batch=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
)
def test_an_epoch_has_every_row_once_in_few_lengths(sizes, batch, seed):
    side = side_of([max(1, size) for size in sizes])
    options = {"seq_len": 50, "global_batch": batch, "seed": seed}
    steps = LabelledBatches(side, **options).steps_per_epoch
    epochs = taken(side, 2 * steps, **options)
    for epoch in (epochs[:steps], epochs[steps:]):
        assert sorted(rows_in(epoch)) == list(range(len(sizes)))
        shapes = {one["inputs"].shape[1] for one in epoch}
        assert shapes <= set(bucket_lengths(side, 50)) <= {16, 32, 50}
        assert sum((one["weights"] == 0).any() for one in epoch) <= 1


def test_epochs_differ_and_batches_of_a_length_are_not_together():
    epochs = taken(SIDE, 26)
    assert rows_in(epochs[:13]) != rows_in(epochs[13:])
    lengths = [batch["inputs"].shape[1] for batch in epochs[:13]]
    assert lengths != sorted(lengths)
    assert rows_in(taken(SIDE, 13, seed=4)) != rows_in(epochs[:13])
    assert same(taken(SIDE, 26), epochs)


@pytest.mark.parametrize("step", [0, 1, 12, 13, 30])
def test_start_step_and_state_are_where_iterating_comes_to(step):
    options = {"seq_len": 64, "global_batch": 8, "seed": 3}
    whole = taken(SIDE, step + 3)
    assert same(taken(SIDE, 3, start_step=step), whole[step:])
    source = LabelledBatches(SIDE, **options)
    for _ in range(step):
        next(source)
    state = json.loads(json.dumps(source.get_state()))
    source.close()
    other = LabelledBatches(SIDE, **options)
    other.set_state(state)
    assert other.step == step
    assert same(islice(other, 3), whole[step:])


@pytest.mark.parametrize(
    "name, change",
    [
        ("seed", {"seed": 4}),
        ("global_batch", {"global_batch": 9}),
        ("seq_len", {"seq_len": 32}),
    ],
)
def test_the_state_of_another_order_is_refused(name, change):
    options = {"seq_len": 64, "global_batch": 8, "seed": 3}
    state = LabelledBatches(SIDE, **options).get_state()
    with pytest.raises(DataError, match=f"cannot go on: {name} was"):
        LabelledBatches(SIDE, **{**options, **change}).set_state(state)
    with pytest.raises(DataError, match="cannot go on: rows was f00d"):
        other = side_of(SIDE.lengths, fingerprint="beef")
        LabelledBatches(other, **options).set_state(state)


@pytest.mark.parametrize("parts", [[[0, 1, 2, 3], [4, 5, 6, 7]], [[5, 0], [1]]])
def test_processes_read_parts_of_one_batch(parts):
    whole = taken(SIDE, 14)
    for rows in parts:
        mine = taken(SIDE, 14, rows=rows)
        assert same(mine, [{name: a[rows] for name, a in one.items()} for one in whole])


def test_lengths_double_up_to_the_longest_that_is_needed():
    assert bucket_lengths(side_of([1, 16]), 128) == (16,)
    assert bucket_lengths(side_of([1, 17, 500]), 128) == (16, 32, 128)
    assert bucket_lengths(side_of([1, 90]), 100) == (16, 100)
    assert bucket_lengths(side_of([0, 3]), 8) == (8,)


def test_padding_is_what_is_not_text():
    assert padding_share(side_of([16, 32, 32]), 64) == 0
    assert padding_share(side_of([8, 16]), 64) == 0.25
    assert padding_share(side_of([16, 16, 16]), 64, batch=2) == 0.25
    assert padding_share(side_of([128]), 64) == 0
    epoch = taken(SIDE, 13)
    places = sum(batch["inputs"].size for batch in epoch)
    text = sum((batch["lengths"] * batch["weights"]).sum() for batch in epoch)
    assert padding_share(SIDE, 64, batch=8) == pytest.approx(1 - text / places)


def test_scoring_has_every_row_once_and_tells_what_fills():
    side = side_of([3, 40, 0, 20, 5], labels=[0, 1, 2, -1, 1])
    batches = list(evaluation_rows(side, seq_len=64, batch=2))
    assert len(batches) == 3
    index = np.concatenate([batch["index"][:, 0] for batch in batches])
    assert sorted(index.tolist()) == [-1, 0, 1, 2, 3, 4]
    for batch in batches:
        for row, label, weight, size, inputs in zip(
            *(batch[name][:, 0] for name in ("index", "labels", "weights", "lengths")),
            batch["inputs"],
        ):
            expected = -1 if row < 0 else side.label[row]
            assert (label, weight) == (expected, float(expected >= 0))
            assert size == (1 if row < 0 else max(1, side.lengths[row]))
            if row == 2:
                assert not inputs.any()


def test_processes_score_parts_of_one_batch():
    whole = list(evaluation_rows(SIDE, seq_len=64, batch=8))
    part = list(evaluation_rows(SIDE, seq_len=64, batch=8, rows=[6, 2]))
    wanted = [{name: a[[6, 2]] for name, a in one.items()} for one in whole]
    assert same(part, wanted)
