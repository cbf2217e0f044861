"""Turn a file of tokens into batches for training, in shuffled order.

Documents lie end to end and are cut into rows of T tokens, so row i is found by
arithmetic and nothing is padded; only a tail shorter than a row is lost to training.
Grain shuffles the rows anew each epoch by a keyed permutation, so the row at any
position of the run is a function of (seed, position): a run resumes at any step in
O(1), on any number of processes, each reading the rows of the global batch that its
devices hold. A mixture keeps this: which source a position belongs to, and which of its
rows, is arithmetic again (grain's `mix`, whose shares are right to a hundredth of the
smallest). Legend: T query tokens (the row), B sequences.

With a document mask a batch says which document of its row each token belongs to. A
document begins with its end mark (token_file.py), so its first token is predicted from
that mark alone, the next mark from the document it ends, and no target has another
document in its context: all of them count in the loss. Conversations are packed into
rows instead (packing.py), and only their answers count.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llmos_jax.data.joined import Joined
from llmos_jax.data.packing import PackedRows
from llmos_jax.data.rows import Batch, RowSource
from llmos_jax.data.stream import TokenStream
from llmos_jax.errors import DataError

if TYPE_CHECKING:
    import grain  # it brings Orbax: a second that who only serves need not wait for

_SINCE = {"weights": None, "packing": "concat"}
"""What a state says that was saved before it was asked."""


class _StepSource:
    """Batches by step: the chosen rows of the global batch that the step trains on."""

    def __init__(self, rows: grain.MapDataset, positions: list[int], num_rows: int):
        self._rows = rows
        self._positions = positions
        self._global_batch = num_rows

    def __len__(self) -> int:
        return sys.maxsize // self._global_batch

    def __getitem__(self, step: int) -> Batch:
        start = step * self._global_batch
        taken = [self._rows[start + position] for position in self._positions]
        return {name: np.stack([row[name] for row in taken]) for name in taken[0]}


class TrainBatches:
    """An endless iterator of training batches that can be asked for any step.

    Each batch is {"inputs", "targets"}, int32 [len(rows), T], and "segments" with a
    document mask: the number of each input's document within its row, from 0.

    Of conversations, a batch has "segments" always and "weights" too, float32
    [len(rows), T]: 1 where the target is a token of an answer, else 0. Rows then hold
    whole conversations (packing.py); what fills a row has weight 0.
    """

    def __init__(
        self,
        tokens: TokenStream,
        *,
        seq_len: int,
        global_batch: int,
        seed: int,
        rows: Sequence[int] | None = None,
        start_step: int = 0,
        prefetch: bool = True,
        document_mask: bool = False,
        weights: Sequence[float] = (),
        packing: Literal["concat", "best_fit"] = "concat",
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
            document_mask: add "segments"; conversations have them anyway.
            weights: how much of the rows comes of each part of `tokens`; (): it is read
                as one.
            packing: of text, `best_fit` puts whole documents into rows, and its batches
                have "segments" and "weights"; conversations are packed anyway.
        """
        import grain

        wanted = list(range(global_batch) if rows is None else rows)
        assert all(0 <= row < global_batch for row in wanted), (
            "rows of the global batch"
        )

        def rows_of(part: TokenStream) -> RowSource | PackedRows:
            if part.is_chat or packing == "best_fit":
                return PackedRows(part, seq_len)
            return RowSource(part, seq_len, document_mask=document_mask)

        if weights:
            order = _mixture(tokens, weights, rows_of, seed)
        else:
            order = _endless(rows_of(tokens), seed)
        self._steps = grain.MapDataset.source(_StepSource(order, wanted, global_batch))
        self._identity = {
            "tokens": tokens.fingerprint,
            "seq_len": seq_len,
            "global_batch": global_batch,
            "seed": seed,
            "weights": list(map(float, weights)) or None,
            "packing": packing,
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
        check_same_order({**_SINCE, **state}, self._identity, "text")
        self._seek(int(state["step"]))

    def close(self) -> None:
        """Stop reading ahead."""
        self._iterator.close()

    def _seek(self, step: int) -> None:
        import grain

        if self._iterator is not None:
            self._iterator.close()
        ahead = grain.ReadOptions(
            num_threads=1 if self._prefetch else 0,
            prefetch_buffer_size=2 if self._prefetch else 0,
        )
        self._step = step
        self._iterator = iter(self._steps[step:].to_iter_dataset(ahead))


def check_same_order(
    state: dict[str, Any], identity: dict[str, Any], what: str
) -> None:
    """Refuse to go on from a state in which the same step is another batch.

    Args:
        state: as it was saved.
        identity: what the order follows from.
        what: is read.

    Raises:
        DataError: naming what differs.
    """
    for name, ours in identity.items():
        if state.get(name) != ours:
            raise DataError(
                f"the data order cannot go on: {name} was {state.get(name)} when it "
                f"was saved and is {ours} now. Restore the setting or the {what}, or "
                "start anew in another run.dir."
            )


def _endless(rows: RowSource | PackedRows, seed: int) -> grain.MapDataset:
    import grain

    return grain.MapDataset.source(rows).seed(seed).shuffle().repeat()


def _mixture(
    tokens: TokenStream,
    weights: Sequence[float],
    rows_of: Callable[[TokenStream], RowSource | PackedRows],
    seed: int,
) -> grain.MapDataset:
    """Rows of each part by weight, in each part's own epochs and its own orders."""
    import grain

    assert isinstance(tokens, Joined) and len(tokens.parts) == len(weights)
    seeds = np.random.SeedSequence(seed).generate_state(len(weights))
    parts = []
    for number, (part, key) in enumerate(zip(tokens.parts, seeds)):
        try:
            parts.append(_endless(rows_of(part), int(key)))
        except DataError as problem:
            raise DataError(f"source {number + 1} of the mixture: {problem}") from None
    return grain.MapDataset.mix(parts, weights)
