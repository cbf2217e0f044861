"""Read token ids out of the blocks of a corpus's shards, by place.

A shard is an ArrayRecord file whose records are blocks of so many ids, so a stretch of
ids is a few records found by arithmetic. Nothing is read that is not asked for; a few
decoded blocks and opened shards are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmos_jax.data.corpus import Shard, num_blocks
from llmos_jax.data.stream import Spliced
from llmos_jax.errors import DataError

if TYPE_CHECKING:
    from grain.sources import ArrayRecordDataSource

_KEPT_BLOCKS = 64
"""A judgement: 1 MiB of uint16 blocks. Text in order (scoring, neighbours in a row)
finds its blocks here; shuffled rows seldom do."""
_OPEN_SHARDS = 256
"""A judgement: a quarter of the files that a process may have open by default."""


class _ShardIds:
    """The ids of one shard."""

    def __init__(self, blocks: _Blocks, number: int, num_tokens: int):
        self._blocks = blocks
        self._number = number
        self._num_tokens = num_tokens

    def __len__(self) -> int:
        return self._num_tokens

    def __getitem__(self, wanted: slice) -> np.ndarray:
        start, stop, _ = wanted.indices(self._num_tokens)
        size = self._blocks.block_tokens
        first, last = start // size, max(start, stop - 1) // size
        found = [self._blocks.read(self._number, n) for n in range(first, last + 1)]
        whole = found[0] if len(found) == 1 else np.concatenate(found)
        return whole[start - first * size : stop - first * size]


class _Blocks:
    """Decoded blocks of all shards, by (shard, block)."""

    def __init__(
        self,
        paths: Sequence[Path],
        shards: Sequence[Shard],
        block_tokens: int,
        dtype: str,
    ):
        self.block_tokens = block_tokens
        self._paths = paths
        self._shards = shards
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._source = lru_cache(_OPEN_SHARDS)(self._open)
        self.read = lru_cache(_KEPT_BLOCKS)(self._read)

    def _open(self, shard: int) -> ArrayRecordDataSource:
        from grain.sources import ArrayRecordDataSource

        count = num_blocks(self._shards[shard].num_tokens, self.block_tokens)
        return ArrayRecordDataSource(f"{self._paths[shard]}[0:{count}]")

    def _read(self, shard: int, block: int) -> np.ndarray:
        left = self._shards[shard].num_tokens - block * self.block_tokens
        wanted = min(left, self.block_tokens) * self._dtype.itemsize
        try:
            raw = self._source(shard)[block]
        except (OSError, RuntimeError, ValueError, IndexError) as problem:
            raise self._changed(shard, block, str(problem)) from None
        if len(raw) != wanted:
            raise self._changed(shard, block, f"{len(raw)} bytes, wanted {wanted}")
        return np.frombuffer(raw, self._dtype)

    def _changed(self, shard: int, block: int, what: str) -> DataError:
        return DataError(
            f"block {block} of {self._paths[shard]} cannot be read: {what}. The shard "
            "was whole when it was opened and has changed since; start again, and what "
            "is damaged will be named."
        )


def open_blocks(
    paths: Sequence[Path], shards: Sequence[Shard], *, block_tokens: int, dtype: str
) -> Spliced:
    """Return the ids of shards, end to end; reading raises DataError where a shard has
    changed since it was checked."""
    blocks = _Blocks(paths, shards, block_tokens, dtype)
    sizes = [shard.num_tokens for shard in shards]
    return Spliced(sizes, lambda number: _ShardIds(blocks, number, sizes[number]))
