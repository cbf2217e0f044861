"""Encode texts in parallel and write their tokens into shards, in order.

Work is cut by bytes of text into jobs; processes turn jobs into ids, and this one puts
them together in the order of the jobs. So a shard's bytes depend on the texts, the
tokenizer and the sizes asked for, not on who encoded what. A finished shard is
committed and written down with the number of jobs before it: there a killed run goes
on.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from llmos_jax.corpus.jobs import (
    JOB_BYTES,
    Job,
    Text,
    begin,
    cut_jobs,
    dtype_of,
    encode,
)
from llmos_jax.corpus.journal import Journal, aside_of, commit, committed, locked
from llmos_jax.corpus.workers import in_order
from llmos_jax.data.corpus import BLOCK_TOKENS, Shard, Side
from llmos_jax.data.tokenizer import Tokenizer
from llmos_jax.errors import DataError

OPTIONS = "group_size:1,uncompressed"
"""A record by itself, and as it is: zstd saves 30 % of the disk and makes reading a
record three to five times slower (llmos_jax/corpus/README.md)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What the shards hold, and of each source (documents, bytes, tokens)."""

    sides: dict[str, Side]
    sources: dict[str, list[int]]
    resumed: int
    """Shards that were there already."""


def write_shards(
    out: Path,
    jobs: Iterable[Job],
    tokenizer: Tokenizer,
    journal: Journal,
    *,
    workers: int,
    shard_tokens: int,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Written:
    """Encode jobs and write the shards that are not written yet.

    Args:
        out: the folder for `<side>-<number>.array_record`.
        jobs: in the order of the corpus, those of one side together.
        tokenizer: of the ids; each document begins with its `begin_id`.
        journal: what is done.
        workers: processes.
        shard_tokens: a shard ends with the job that reaches so many.
        on_progress: told how many bytes of text are through.
    """
    shards: dict[str, list[Shard]] = {}
    sources: dict[str, list[int]] = {}
    through = _resume(journal, shards, sources)
    resumed = sum(map(len, shards.values()))
    num_bytes = 0
    remaining = iter(jobs)
    for job in itertools.islice(remaining, through):
        num_bytes += job.num_bytes
    on_progress(num_bytes)
    shard: _OpenShard | None = None

    def finish(shard: _OpenShard) -> None:
        done = shard.close()
        shards.setdefault(shard.side, []).append(done)
        facts = [msgspec.to_builtins(done), through, shard.sources]
        journal.add("shard", shard.side, shard.number, facts=facts)
        _sum(sources, shard.sources)

    arguments = (tokenizer.to_json(), dtype_of(tokenizer))
    for job, ids in in_order(encode, remaining, workers, begin, *arguments):
        if shard is not None and shard.side != job.side:
            finish(shard)
            shard = None
        if shard is None:
            shard = _OpenShard(out, job.side, len(shards.get(job.side, ())))
        shard.add(job, ids)
        through += 1
        num_bytes += job.num_bytes
        on_progress(num_bytes)
        if shard.num_tokens >= shard_tokens:
            finish(shard)
            shard = None
    if shard is not None:
        finish(shard)
    sides = {side: Side(shards=tuple(found)) for side, found in shards.items()}
    return Written(sides=sides, sources=sources, resumed=resumed)


def encode_texts(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    workers: int,
    shard_tokens: int = 1 << 24,
) -> Side:
    """Encode texts into the shards of one side in a new folder: this stage alone."""
    folder = Path(out)
    with locked(folder):
        journal = Journal(folder, {})
        path = journal.work / "texts"
        sizes = []
        with committed(path) as file:
            for text in texts:
                sizes.append(file.write(text.encode()))
        offsets = itertools.accumulate(sizes, initial=0)
        placed = (
            ("train", "", Text(str(path), offset, size))
            for offset, size in zip(offsets, sizes)
        )
        jobs = cut_jobs(placed, tokenizer, min(JOB_BYTES, shard_tokens))
        written = write_shards(
            *(folder, jobs, tokenizer, journal),
            workers=workers,
            shard_tokens=shard_tokens,
        )
        journal.close()
    return written.sides["train"]


def _resume(
    journal: Journal, shards: dict[str, list[Shard]], sources: dict[str, list[int]]
) -> int:
    """Take up the shards that are done; return how many jobs are."""
    through = 0
    for side in ("validation", "test", "train"):
        for number in itertools.count():
            facts = journal.get("shard", side, number)
            if facts is None:
                break
            shards.setdefault(side, []).append(msgspec.convert(facts[0], Shard))
            through = max(through, facts[1])
            _sum(sources, facts[2])
    return through


def _sum(totals: dict[str, list[int]], more: dict[str, list[int]]) -> None:
    for source, counts in more.items():
        totals[source] = [
            one + other for one, other in zip(totals.get(source, [0, 0, 0]), counts)
        ]


class _OpenShard:
    """A shard that is being written, beside its name until it is whole."""

    def __init__(self, out: Path, side: str, number: int):
        self.side, self.number = side, number
        self.num_tokens = 0
        self.sources: dict[str, list[int]] = {}
        self._path = out / f"{side}-{number:05d}.array_record"
        self._writer = ArrayRecordWriter(str(aside_of(self._path)), OPTIONS)
        self._rest: list[np.ndarray] = []
        self._rest_size = 0

    def add(self, job: Job, ids: np.ndarray) -> None:
        """Append the ids of a job."""
        key = f"{job.side}:{job.source}"
        _sum(self.sources, {key: [job.num_documents, job.num_bytes, ids.size]})
        self.num_tokens += ids.size
        self._rest.append(ids)
        self._rest_size += ids.size
        if self._rest_size >= BLOCK_TOKENS:
            self._write(self._rest_size // BLOCK_TOKENS * BLOCK_TOKENS)

    def close(self) -> Shard:
        """Write what is left, commit the file and say what it is."""
        self._write(self._rest_size)
        aside = aside_of(self._path)
        try:
            self._writer.close()
        except Exception as problem:  # the library raises bare ones
            raise _unwritten(self._path, problem) from None
        with aside.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = aside.stat().st_size
        commit(self._path)
        documents, num_bytes, _ = (sum(x) for x in zip(*self.sources.values()))
        return Shard(
            name=self._path.name,
            num_tokens=self.num_tokens,
            num_bytes=num_bytes,
            num_documents=documents,
            size=size,
            sha256=digest,
        )

    def _write(self, count: int) -> None:
        ids = np.concatenate(self._rest)
        try:
            for start in range(0, count, BLOCK_TOKENS):
                self._writer.write(
                    ids[start : min(start + BLOCK_TOKENS, count)].tobytes()
                )
        except Exception as problem:  # the library raises bare ones
            raise _unwritten(self._path, problem) from None
        self._rest = [ids[count:]]
        self._rest_size = ids.size - count


def _unwritten(path: Path, problem: Exception) -> Exception:
    if os.strerror(errno.ENOSPC) in str(problem):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    return DataError(
        f"{path} could not be written: {problem}. What is done stays done: start again "
        "when there is room."
    )
