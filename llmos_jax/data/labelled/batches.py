"""Turn labelled rows into batches of few lengths, in shuffled order.

Rows of like length are batched together and padded to a common length: 16, 32, 64 and
so on up to T, so that a model is compiled for few shapes and little is padded. An
epoch has every row once. It is shuffled, then dealt into the buckets; the rows that do
not fill a batch of their bucket go on to the next longer one, so only the last batch of
an epoch may be short: what fills it has weight 0. The batches then come in shuffled
order. Their number is the same in every epoch, so the batch of any step is a function
of (seed, step); to seek costs the dealing of one epoch. Legend: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from llmos_jax.data.batches import check_same_order
from llmos_jax.data.labelled.sides import LabelledSide
from llmos_jax.data.rows import Batch

SHORTEST = 16
"""The first bucket's length, a judgement: padding costs little below it."""

_Dealt = list[tuple[int, np.ndarray]]
"""(length, rows) of each batch."""


def bucket_lengths(side: LabelledSide, seq_len: int) -> tuple[int, ...]:
    """Return the lengths to which rows are padded, ascending, without those that no row
    needs."""
    lengths = [SHORTEST]
    while lengths[-1] < seq_len:
        lengths.append(2 * lengths[-1])
    every = np.minimum(lengths, seq_len)
    needed = np.searchsorted(every, _sizes(side, seq_len))
    return tuple(int(every[bucket]) for bucket in np.unique(needed))


def padding_share(side: LabelledSide, seq_len: int, batch: int = 1) -> float:
    """Return the share of all positions of an epoch that are padding, in batches of so
    many rows."""
    order = np.arange(len(side))
    dealt = _deal(_sizes(side, seq_len), order, bucket_lengths(side, seq_len), batch)
    places = sum(length * batch for length, _ in dealt)
    return 1 - int(_sizes(side, seq_len).sum()) / places


class LabelledBatches:
    """An endless iterator of training batches that can be asked for any step.

    Each batch is {"inputs" int32 [b, T], "lengths" int32 [b, 1], "labels" int32 [b, 1],
    "weights" float32 [b, 1]} of the b rows that this process reads. Inputs are padded
    with 0 on the right; a row that fills a batch has length 1, label 0 and weight 0. T
    differs from batch to batch, but not between processes.
    """

    def __init__(
        self,
        side: LabelledSide,
        *,
        seq_len: int,
        global_batch: int,
        seed: int,
        rows: Sequence[int] | None = None,
        start_step: int = 0,
    ):
        """Begin at `start_step`.

        Args:
            side: what to read.
            seq_len: T of the longest batches.
            global_batch: rows of one step over all processes.
            seed: of the order, 0 to 2**32 - 1.
            rows: the rows of the global batch that this process wants, in the order it
                wants them; None for all.
            start_step: the step of the first batch.
        """
        self._wanted = list(range(global_batch) if rows is None else rows)
        assert all(0 <= row < global_batch for row in self._wanted), (
            "rows of the global batch"
        )
        self._side = side
        self._batch = global_batch
        self._seed = seed
        self._seq_len = seq_len
        self.lengths = bucket_lengths(side, seq_len)
        self.steps_per_epoch = -(-len(side) // global_batch)
        self._identity = {
            "rows": side.fingerprint,
            "seq_len": seq_len,
            "global_batch": global_batch,
            "seed": seed,
        }
        self._epoch: int | None = None
        self._dealt: _Dealt = []
        self._step = start_step

    def __iter__(self) -> LabelledBatches:
        return self

    def __next__(self) -> Batch:
        epoch, number = divmod(self._step, self.steps_per_epoch)
        if epoch != self._epoch:
            seeds = [self._seed, epoch]
            self._dealt = _order(self._side, self._seq_len, self._batch, seeds)
            self._epoch = epoch
        length, rows = self._dealt[number]
        batch = _batch(self._side, _filled(rows, self._batch)[self._wanted], length)
        batch.pop("index")
        np.maximum(batch["labels"], 0, out=batch["labels"])
        self._step += 1
        return batch

    @property
    def step(self) -> int:
        """The step that the next batch belongs to."""
        return self._step

    def get_state(self) -> dict[str, Any]:
        """Return plain data for `set_state`: the same on all processes."""
        return {"step": self._step, **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on as if the batches before `state["step"]` had been taken.

        Raises:
            DataError: the state is of other rows, seed or batch shape, in which the
                same step is another batch.
        """
        check_same_order(state, self._identity, "rows")
        self._step = int(state["step"])

    def close(self) -> None:
        """Nothing is read ahead, so there is nothing to stop."""


def evaluation_rows(
    side: LabelledSide,
    *,
    seq_len: int,
    batch: int,
    rows: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Yield every row once, in batches of `batch` rows.

    Batches are as those of `LabelledBatches` and have "index", int64 [b, 1], too: the
    number of each row in its side, -1 for what fills a batch. A row without a label has
    label -1 and weight 0, as what fills has. Their order is drawn, always alike: the
    first few stand for all, not for the short texts alone.

    Args:
        side: what to read.
        seq_len: T of the longest batches.
        batch: rows of one batch over all processes.
        rows: which rows of each batch are wanted; None for all.
    """
    wanted = list(range(batch) if rows is None else rows)
    for length, some in _order(side, seq_len, batch, [0]):
        yield _batch(side, _filled(some, batch)[wanted], length)


def _sizes(side: LabelledSide, seq_len: int) -> np.ndarray:
    """Tokens that are read of each row, at least one, int64 [rows]."""
    return np.clip(side.lengths, 1, seq_len)


def _order(
    side: LabelledSide, seq_len: int, batch: int, seeds: Sequence[int]
) -> _Dealt:
    """Deal all rows in an order that seeds draw, and draw the order of the batches. Raw
    bits are what numpy promises never to change (NEP 19); their order is the
    permutation."""
    bits = np.random.PCG64([*seeds])
    order = np.argsort(bits.random_raw(len(side)), kind="stable")
    lengths = bucket_lengths(side, seq_len)
    dealt = _deal(_sizes(side, seq_len), order, lengths, batch)
    shuffled = np.argsort(bits.random_raw(len(dealt)), kind="stable")
    return [dealt[number] for number in shuffled]


def _deal(
    sizes: np.ndarray, order: np.ndarray, lengths: Sequence[int], batch: int
) -> _Dealt:
    """Deal rows, in this order, into batches by length; what is over goes on to the
    next longer bucket, and only the last batch may be short."""
    bucket = np.searchsorted(lengths, sizes[order])
    dealt: _Dealt = []
    over = order[:0]
    for number, length in enumerate(lengths):
        rows = np.concatenate([over, order[bucket == number]])
        whole = len(rows) // batch * batch
        dealt += [(length, rows[at : at + batch]) for at in range(0, whole, batch)]
        over = rows[whole:]
    if over.size:
        dealt.append((lengths[-1], over))
    return dealt


def _filled(rows: np.ndarray, batch: int) -> np.ndarray:
    """Row numbers of a whole batch, -1 for what fills it."""
    return np.concatenate([rows, np.full(batch - len(rows), -1, rows.dtype)])


def _batch(side: LabelledSide, rows: np.ndarray, length: int) -> Batch:
    """The batch of some rows of a side; -1 is padding."""
    inputs_BT = np.zeros((len(rows), length), np.int32)
    lengths_B = np.ones(len(rows), np.int32)
    for place, row in enumerate(rows):
        ids = side.tokens(row)[:length] if row >= 0 else side.ids[:0]
        inputs_BT[place, : len(ids)] = ids
        lengths_B[place] = max(1, len(ids))
    label_B = np.where(rows >= 0, side.label[rows], -1)
    return {
        "inputs": inputs_BT,
        "lengths": lengths_B[:, None],
        "labels": label_B.astype(np.int32)[:, None],
        "weights": (label_B >= 0).astype(np.float32)[:, None],
        "index": rows.astype(np.int64)[:, None],
    }
