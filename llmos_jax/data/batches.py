"""Turn a file of tokens into batches: shuffled for training, in order for evaluation.

Documents lie end to end and are cut into rows of T tokens, so row i is found by
arithmetic and nothing is padded; only a tail shorter than a row is lost to training.
Grain shuffles the rows anew each epoch by a keyed permutation, so the row at any
position of the run is a function of (seed, position): a run resumes at any step in
O(1), on any number of processes, each reading the rows of the global batch that its
devices hold. Legend: T query tokens (the row), B sequences.

With a document mask a batch says which document of its row each token belongs to. A
document begins with its end mark (token_file.py), so its first token is predicted from
that mark alone, the next mark from the document it ends, and no target has another
document in its context: all of them count in the loss.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from llmos_jax.data.token_file import TokenFile
from llmos_jax.errors import DataError

Batch = dict[str, np.ndarray]


class RowSource:
    """Rows of T + 1 tokens, the last of one being the first of the next."""

    def __init__(self, tokens: TokenFile, seq_len: int):
        self._ids = tokens.open()
        self._seq_len = seq_len
        self._num_rows = (tokens.num_tokens - 1) // seq_len
        if self._num_rows < 1:
            raise DataError(
                f"{tokens.path.stem} text has {tokens.num_tokens} tokens, but one row "
                f"needs {seq_len + 1} (batch.seq_len + 1). Give more text, or lower "
                "batch.seq_len."
            )

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, row: int) -> np.ndarray:
        start = row * self._seq_len
        return self._ids[start : start + self._seq_len + 1].astype(np.int32)


class _StepSource:
    """Batches by step: the chosen rows of the global batch that the step trains on."""

    def __init__(
        self,
        rows: grain.MapDataset,
        positions: list[int],
        num_rows: int,
        mark: int | None,
    ):
        self._rows = rows
        self._positions = positions
        self._global_batch = num_rows
        self._mark = mark

    def __len__(self) -> int:
        return sys.maxsize // self._global_batch

    def __getitem__(self, step: int) -> Batch:
        start = step * self._global_batch
        block = np.stack([self._rows[start + position] for position in self._positions])
        batch = {
            "inputs": np.ascontiguousarray(block[:, :-1]),
            "targets": np.ascontiguousarray(block[:, 1:]),
        }
        return batch | _segments(batch["inputs"], self._mark)


class TrainBatches:
    """An endless iterator of training batches that can be asked for any step.

    Each batch is {"inputs", "targets"}, int32 [len(rows), T], and "segments" with a
    document mask: the number of each input's document within its row, from 0.
    """

    def __init__(
        self,
        tokens: TokenFile,
        *,
        seq_len: int,
        global_batch: int,
        seed: int,
        rows: Sequence[int] | None = None,
        start_step: int = 0,
        prefetch: bool = True,
        document_mask: bool = False,
    ):
        """Begin at `start_step`.

        Args:
            tokens: what to read.
            seq_len: T.
            global_batch: rows of one step over all processes.
            seed: of the order, 0 to 2**32 - 1.
            rows: the rows of the global batch that this process wants, in the order it
                wants them; None for all.
            start_step: the step of the first batch.
            prefetch: read ahead in a thread; the order is the same without.
            document_mask: add "segments".
        """
        wanted = list(range(global_batch) if rows is None else rows)
        assert all(0 <= row < global_batch for row in wanted), (
            "rows of the global batch"
        )
        order = (
            grain.MapDataset.source(RowSource(tokens, seq_len))
            .seed(seed)
            .shuffle()
            .repeat()
        )
        mark = _mark(tokens, document_mask)
        self._steps = grain.MapDataset.source(
            _StepSource(order, wanted, global_batch, mark)
        )
        self._identity = {
            "tokens": tokens.fingerprint,
            "seq_len": seq_len,
            "global_batch": global_batch,
            "seed": seed,
        }
        self._prefetch = prefetch
        self._iterator: Any = None
        self._seek(start_step)

    def __iter__(self) -> TrainBatches:
        return self

    def __next__(self) -> Batch:
        batch: Batch = next(self._iterator)
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
            DataError: the state is of another text, seed or batch shape, in which the
                same step is another row.
        """
        for name, ours in self._identity.items():
            if state.get(name) != ours:
                raise DataError(
                    f"the data order cannot go on: {name} was {state.get(name)} when "
                    f"it was saved and is {ours} now. Restore the setting or the "
                    "text, or start anew in another run.dir."
                )
        self._seek(int(state["step"]))

    def close(self) -> None:
        """Stop reading ahead."""
        self._iterator.close()

    def _seek(self, step: int) -> None:
        if self._iterator is not None:
            self._iterator.close()
        ahead = grain.ReadOptions(
            num_threads=1 if self._prefetch else 0,
            prefetch_buffer_size=2 if self._prefetch else 0,
        )
        self._step = step
        self._iterator = iter(self._steps[step:].to_iter_dataset(ahead))


def num_evaluation_batches(
    tokens: TokenFile, *, seq_len: int, batch: int, limit: int | None = None
) -> int:
    """Return how many batches `evaluation_batches` yields."""
    whole = math.ceil(math.ceil((tokens.num_tokens - 1) / seq_len) / batch)
    return whole if limit is None else min(whole, limit)


def evaluation_batches(
    tokens: TokenFile,
    *,
    seq_len: int,
    batch: int,
    limit: int | None = None,
    rows: Sequence[int] | None = None,
    document_mask: bool = False,
) -> Iterator[Batch]:
    """Yield {"inputs", "targets" int32, "weights" float32}, [batch, T], in order.

    Every token but the first is a target of weight 1 exactly once; what fills the last
    rows has weight 0. With a `limit`, that many batches spread evenly over the text, so
    that a part still stands for the whole. `rows` picks rows of each batch.
    `document_mask` adds "segments", as in training.
    """
    if tokens.num_tokens < 2:
        raise DataError(f"{tokens.path.stem} text has no token to predict.")
    ids = tokens.open()
    whole = num_evaluation_batches(tokens, seq_len=seq_len, batch=batch)
    count = num_evaluation_batches(tokens, seq_len=seq_len, batch=batch, limit=limit)
    chosen = slice(None) if rows is None else list(rows)
    mark = _mark(tokens, document_mask)
    for index in range(count):
        block = _evaluation_batch(ids, index * whole // count, seq_len, batch)
        block |= _segments(block["inputs"], mark)
        yield {name: value[chosen] for name, value in block.items()}


def _evaluation_batch(ids: np.ndarray, index: int, seq_len: int, batch: int) -> Batch:
    size = batch * seq_len
    window = ids[index * size : (index + 1) * size + 1].astype(np.int32)
    num_targets = window.size - 1
    inputs, targets = np.zeros((2, size), np.int32)
    inputs[:num_targets], targets[:num_targets] = window[:-1], window[1:]
    weights = (np.arange(size) < num_targets).astype(np.float32)
    return {
        name: value.reshape(batch, seq_len)
        for name, value in (
            ("inputs", inputs),
            ("targets", targets),
            ("weights", weights),
        )
    }


def _mark(tokens: TokenFile, document_mask: bool) -> int | None:
    """The token that begins a new segment; None where there are no segments."""
    if not document_mask:
        return None
    if tokens.end_id is None:
        raise DataError(
            f"{tokens.path.stem} text has no end mark that tells its documents apart. "
            "Leave data.document_mask out."
        )
    return tokens.end_id


def _segments(inputs_BT: np.ndarray, mark: int | None) -> Batch:
    if mark is None:
        return {}
    begins_BT = inputs_BT == mark
    begins_BT[:, 0] = False
    return {"segments": np.cumsum(begins_BT, axis=1, dtype=np.int32)}
