"""Cut texts into jobs, and turn a job into ids in a process of its own.

A job is about a MiB of text: whole documents, or pieces of a long one, cut where no
token is. It depends on the texts and the tokenizer alone.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmos_jax.data.pieces import cut_pieces, safe_cut
from llmos_jax.data.tokenizer import Tokenizer

JOB_BYTES = 1 << 20
"""Text that one process encodes at a time: a quarter of a second, a few MiB."""


KNOWN_WORDS = 1 << 16
"""Words whose ids a process keeps: 15 % faster than the library's 10,000 on English of
30,000 words, and no slower than 2^20."""


@dataclass(frozen=True, slots=True)
class Text:
    """A document, or a piece of one, on disk."""

    path: str
    offset: int
    size: int
    """Bytes."""
    begins: bool = True
    """Whether a document begins here."""


@dataclass(frozen=True, slots=True)
class Job:
    """Texts that are encoded together."""

    side: str
    source: str
    texts: tuple[Text, ...]

    @property
    def num_documents(self) -> int:
        return sum(text.begins for text in self.texts)

    @property
    def num_bytes(self) -> int:
        return sum(text.size for text in self.texts)


def cut_jobs(
    texts: Iterable[tuple[str, str, Text]], tokenizer: Tokenizer, job_bytes: int
) -> Iterator[Job]:
    """Yield jobs of (side, source, document), in order; long documents are cut."""
    safe = safe_cut(tokenizer)
    for (side, source), group in itertools.groupby(texts, key=lambda one: one[:2]):
        taken: list[Text] = []
        size = 0
        for _, _, document in group:
            for piece in _pieces(document, safe, job_bytes):
                taken.append(piece)
                size += piece.size
                if size >= job_bytes:
                    yield Job(side, source, tuple(taken))
                    taken, size = [], 0
        if taken:
            yield Job(side, source, tuple(taken))


def _pieces(
    document: Text, safe: re.Pattern[str] | None, job_bytes: int
) -> Iterator[Text]:
    """Yield a document, or where it is long its pieces, cut where no token is."""
    if document.size <= job_bytes or safe is None:
        yield document
        return
    offset = document.offset
    for number, piece in enumerate(cut_pieces(_read(document), safe)):
        size = len(piece.encode())
        yield Text(document.path, offset, size, number == 0)
        offset += size


def _read(text: Text) -> str:
    with open(text.path, "rb") as file:
        file.seek(text.offset)
        return file.read(text.size).decode()


def dtype_of(tokenizer: Tokenizer) -> str:
    """The smallest that holds every id, little-endian."""
    return "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"


_here: dict[str, Any] = {}
"""The tokenizer of a worker process."""


def begin(tokenizer: str, dtype: str) -> None:
    """Take the tokenizer, as JSON, that `encode` uses in this process."""
    _here["tokenizer"] = Tokenizer.from_json(tokenizer)
    _here["tokenizer"].remember(KNOWN_WORDS)
    _here["safe"] = safe_cut(_here["tokenizer"])
    _here["dtype"] = dtype


def encode(job: Job) -> np.ndarray:
    """Return the ids of a job's texts, each document begun by the mark."""
    tokenizer: Tokenizer = _here["tokenizer"]
    pieces: list[str] = []
    begins: list[bool] = []
    for text, read in zip(job.texts, _read_all(job.texts)):
        cut = cut_pieces(read, _here["safe"])
        pieces += cut
        begins += [text.begins, *[False] * (len(cut) - 1)]
    mark = np.array([tokenizer.begin_id], np.uint32)
    ids: list[np.ndarray] = []
    for coded, is_first in zip(tokenizer.encode_batch(pieces), begins):
        ids += [mark, coded] if is_first else [coded]
    return np.concatenate(ids).astype(_here["dtype"])


def _read_all(texts: Sequence[Text]) -> Iterator[str]:
    """Read texts, opening each file once."""
    for path, of_file in itertools.groupby(texts, key=lambda text: text.path):
        with open(path, "rb") as file:
            for text in of_file:
                file.seek(text.offset)
                yield file.read(text.size).decode()
