"""Write documents into a file of tokens, and open it again.

Every document begins with the end mark: its first token is predicted from that, and no
document is predicted from nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmos_jax.data.spool import Spool
from llmos_jax.data.tokenizer import Tokenizer, cut_pieces

_ROUND_CHARACTERS = 4 << 20  # encoded at once: bounds memory, feeds every thread


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenFile:
    """Token ids of documents, each begun by the end mark, in one flat file.

    `num_bytes` counts the UTF-8 bytes of the text, without marks; `raw` is a file of
    just these bytes, kept for held-out text so that compressors can be run on it.
    """

    path: Path
    dtype: str
    num_tokens: int
    num_bytes: int
    num_documents: int
    fingerprint: str
    end_id: int | None = None
    """The end mark; None where documents cannot be told apart."""
    raw: Path | None = None

    def open(self) -> np.ndarray:
        """Map the file into memory: [num_tokens] of uint16 or uint32, read-only."""
        return np.memmap(self.path, dtype=self.dtype, mode="r", shape=self.num_tokens)

    def raw_bytes(self) -> bytes:
        """Return the text itself; only of validation and test files."""
        assert self.raw is not None, "training text is not kept"
        return self.raw.read_bytes()


def encode(spool: Spool, tokenizer: Tokenizer, path: Path) -> dict[str, Any]:
    """Write the ids of all documents, each begun by the end mark; return the counts."""
    dtype = "uint16" if tokenizer.vocab_size < 1 << 16 else "uint32"
    num_tokens = 0
    with path.open("wb") as file:
        for pieces, begins in _rounds(spool):
            for ids, is_first in zip(tokenizer.encode_batch(pieces), begins):
                marked = np.insert(ids, 0, tokenizer.eos_id) if is_first else ids
                file.write(marked.astype(dtype).tobytes())
                num_tokens += marked.size
    return {
        "dtype": dtype,
        "num_tokens": num_tokens,
        "num_bytes": spool.num_bytes,
        "num_documents": spool.num_documents,
        "fingerprint": _fingerprint(path),
        "end_id": tokenizer.eos_id,
    }


def open_token_file(folder: Path, name: str, facts: dict[str, Any]) -> TokenFile:
    """Return the file `name` of a prepared folder, as `facts` describe it."""
    raw = folder / f"{name}.txt"
    return TokenFile(
        path=folder / f"{name}.bin", raw=raw if raw.exists() else None, **facts[name]
    )


def code_digest() -> str:
    """Digest this room's code: what other code prepared is made again."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _rounds(texts: Iterable[str]) -> Iterator[tuple[list[str], list[bool]]]:
    """Yield lists of pieces to encode together, with which of them begin a document."""
    pieces: list[str] = []
    begins: list[bool] = []
    size = 0
    for text in texts:
        for index, piece in enumerate(cut_pieces(text)):
            pieces.append(piece)
            begins.append(index == 0)
            size += len(piece)
            if size >= _ROUND_CHARACTERS:
                yield pieces, begins
                pieces, begins, size = [], [], 0
    if pieces:
        yield pieces, begins


def _fingerprint(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
