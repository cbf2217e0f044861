"""Strided windows, against a definition that counts tokens one by one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_jax.data import (
    TokenFile,
    TrainBatches,
    evaluation_batches,
    num_evaluation_batches,
)
from llmos_jax.errors import ConfigError


def token_file(folder, ids):
    path = folder / "test.bin"
    np.asarray(ids, np.uint16).tofile(path)
    return TokenFile(
        path=path,
        dtype="uint16",
        num_tokens=len(ids),
        num_bytes=len(ids),
        num_documents=1,
        fingerprint="f00d",
    )


def oracle(num_tokens, seq_len, stride):
    """[(inputs, scored targets)] of each window, by going through the text."""
    windows, scored_to, start = [], 0, 0
    while scored_to < num_tokens - 1:
        end = min(start + seq_len, num_tokens - 1)
        inputs = list(range(start, end))
        windows.append((inputs, list(range(scored_to + 1, end + 1))))
        scored_to, start = end, start + stride
    return windows


@settings(max_examples=80, deadline=None)
@given(
    num_tokens=st.integers(2, 120),
    seq_len=st.integers(1, 12),
    share=st.floats(0, 1),
    batch=st.integers(1, 4),
)
def test_windows_are_those_of_the_definition(
    tmp_path_factory, num_tokens, seq_len, share, batch
):
    stride = 1 + round(share * (seq_len - 1))
    file = token_file(tmp_path_factory.mktemp("t"), range(num_tokens))
    sizes = {"seq_len": seq_len, "batch": batch, "stride": stride}
    taken = list(evaluation_batches(file, **sizes))
    assert len(taken) == num_evaluation_batches(file, **sizes)
    rows = [
        {name: array[row] for name, array in one.items()}
        for one in taken
        for row in range(batch)
    ]
    wanted = oracle(num_tokens, seq_len, stride)
    assert len(rows) - len(wanted) < batch
    for row, (inputs, targets) in zip(rows, wanted):
        assert row["inputs"][: len(inputs)].tolist() == inputs
        assert row["targets"][row["weights"] > 0].tolist() == targets
    assert sum(row["weights"].sum() for row in rows) == num_tokens - 1


def test_no_stride_is_a_stride_of_the_window(tmp_path):
    file = token_file(tmp_path, range(50))
    plain, strided = (
        list(evaluation_batches(file, seq_len=8, batch=3, stride=stride))
        for stride in (None, 8)
    )
    for one, other in zip(plain, strided, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_every_window_but_the_first_begins_with_the_mark(tmp_path):
    file = token_file(tmp_path, range(100, 140))
    (batch,) = evaluation_batches(file, seq_len=10, batch=9, stride=4, begin_id=7)
    real = batch["weights"].any(axis=1)
    assert batch["inputs"][real, 0].tolist() == [100] + [7] * (real.sum() - 1)
    assert batch["inputs"][1, 1:].tolist() == list(range(105, 114))
    assert batch["targets"][1].tolist() == list(range(105, 115))


def test_rows_and_limits_pick_from_strided_windows(tmp_path):
    file = token_file(tmp_path, range(200))
    sizes = {"seq_len": 10, "batch": 4, "stride": 5}
    whole = list(evaluation_batches(file, **sizes))
    part = list(evaluation_batches(file, **sizes, rows=[3, 1], limit=2))
    assert num_evaluation_batches(file, **sizes, limit=2) == len(part) == 2
    np.testing.assert_array_equal(
        part[1]["inputs"], whole[len(whole) // 2]["inputs"][[3, 1]]
    )


@pytest.mark.parametrize("stride", [0, -1, 9])
def test_a_stride_that_skips_tokens_is_an_error(tmp_path, stride):
    file = token_file(tmp_path, range(50))
    with pytest.raises(ConfigError, match=f"stride of {stride} with windows of 8"):
        next(evaluation_batches(file, seq_len=8, batch=1, stride=stride))


def test_a_model_that_begins_with_bos_learns_to_end_with_eos(tmp_path):
    ids = [7, 1, 2, 7, 3, 4, 7, 5, 6]  # 7 begins, 9 ends
    file = replace(token_file(tmp_path, ids), end_id=7, stop_id=9)
    (batch,) = evaluation_batches(file, seq_len=8, batch=1, document_mask=True)
    assert batch["inputs"].tolist() == [ids[:8]]
    assert batch["targets"].tolist() == [[1, 2, 9, 3, 4, 9, 5, 6]]
    assert batch["segments"].tolist() == [[0, 0, 0, 1, 1, 1, 2, 2]]
    source = TrainBatches(file, seq_len=8, global_batch=1, seed=0, prefetch=False)
    np.testing.assert_array_equal(next(source)["targets"], batch["targets"])
    source.close()
