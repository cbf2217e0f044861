"""Write documents into a file of tokens, and open it again.

Every document of text begins with a mark: its first token is predicted from that, and
no document is predicted from nothing. A conversation begins with what its template
writes there; beside it lie a weight for each token (1: the model is to say it) and the
number of tokens of each conversation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmos_jax.data.chat import ChatTurns, encode_chat
from llmos_jax.data.conversations import parse
from llmos_jax.data.pieces import cut_pieces, safe_cut
from llmos_jax.data.spool import Spool
from llmos_jax.data.tokenizer import Tokenizer
from llmos_jax.errors import DataError

_ROUND_CHARACTERS = 4 << 20  # encoded at once: bounds memory, feeds every thread


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenFile:
    """Token ids of documents in one flat file.

    `num_bytes` counts the UTF-8 bytes of the text, without marks; of conversations,
    those of the answers. `raw` is a file of just these bytes, kept for held-out text so
    that compressors can be run on it.
    """

    path: Path
    dtype: str
    num_tokens: int
    num_bytes: int
    num_documents: int
    fingerprint: str
    end_id: int | None = None
    """The mark that begins each document; None where they cannot be told apart."""
    stop_id: int | None = None
    """What a model is to say where a document ends, if not the next one's mark."""
    raw: Path | None = None
    weights: Path | None = None
    """uint8 [num_tokens], 1 for tokens to learn; None: all are (text)."""
    lengths: Path | None = None
    """uint32 [num_documents], tokens of each document; None for text that is not to be
    packed."""
    num_answer_tokens: int | None = None
    num_skipped: int = 0
    """Conversations left out because nothing in them is an answer."""

    @property
    def name(self) -> str:
        """The side that it is: train, validation or test."""
        return self.path.stem

    @property
    def is_chat(self) -> bool:
        """Whether these are conversations, of which only answers are learned."""
        return self.weights is not None

    def open(self) -> np.ndarray:
        """Map the file into memory: [num_tokens] of uint16 or uint32, read-only."""
        return np.memmap(self.path, dtype=self.dtype, mode="r", shape=self.num_tokens)

    def open_weights(self) -> np.ndarray:
        """Map the weights into memory: [num_tokens] of uint8; only of conversations."""
        assert self.weights is not None, "text has no weights"
        return np.memmap(self.weights, dtype=np.uint8, mode="r", shape=self.num_tokens)

    def open_lengths(self) -> np.ndarray:
        """Return the tokens of each document, int64 [num_documents]."""
        assert self.lengths is not None, "lengths.py makes them"
        return np.fromfile(self.lengths, np.uint32).astype(np.int64)

    def raw_bytes(self) -> bytes:
        """Return the text itself; only of validation and test files."""
        assert self.raw is not None, "training text is not kept"
        return self.raw.read_bytes()


def encode(spool: Spool, tokenizer: Tokenizer, path: Path) -> dict[str, Any]:
    """Write the ids of all documents, each begun by the mark; return the facts."""
    dtype = _dtype(tokenizer)
    num_tokens = 0
    with path.open("wb") as file:
        for pieces, begins in _rounds(spool, tokenizer):
            for ids, is_first in zip(tokenizer.encode_batch(pieces), begins):
                marked = np.insert(ids, 0, tokenizer.begin_id) if is_first else ids
                file.write(marked.astype(dtype).tobytes())
                num_tokens += marked.size
    says_other = tokenizer.begin_id != tokenizer.eos_id
    return {
        "dtype": dtype,
        "num_tokens": num_tokens,
        "num_bytes": spool.num_bytes,
        "num_documents": spool.num_documents,
        "fingerprint": _fingerprint(path),
        "end_id": tokenizer.begin_id,
        "stop_id": tokenizer.eos_id if says_other else None,
    }


def encode_conversations(
    spool: Spool, tokenizer: Tokenizer, path: Path, *, keep_answers: bool
) -> dict[str, Any]:
    """Write ids, weights and lengths of all conversations; return the facts.

    The spool's file goes; with `keep_answers` the answers' text takes its place.
    """
    dtype, lengths, num_bytes, num_answers, skipped = _dtype(tokenizer), [], 0, 0, 0
    room, answers_path = path.parent, path.with_suffix(".answers")
    weights_path = path.with_suffix(".weights")
    with (
        path.open("wb") as ids_file,
        weights_path.open("wb") as weights_file,
        answers_path.open("wb") as answers_file,
    ):
        for number, text in enumerate(spool, 1):
            turns = _turns(tokenizer, text, number)
            if not turns.is_answer[1:].any():
                skipped += 1
                continue
            ids_file.write(turns.ids.astype(dtype).tobytes())
            weights_file.write(turns.is_answer.astype(np.uint8).tobytes())
            answers = turns.answers.encode()
            answers_file.write(answers if keep_answers else b"")
            lengths.append(turns.ids.size)
            num_bytes += len(answers)
            num_answers += int(turns.is_answer[1:].sum())
    if not lengths:
        raise DataError(
            f"none of {skipped} conversations ({path.stem}) has an answer: wanted "
            "messages with the role `assistant`."
        )
    np.asarray(lengths, np.uint32).tofile(path.with_suffix(".lengths"))
    spool.path.unlink()
    if keep_answers:
        answers_path.rename(room / f"{path.stem}.txt")
    else:
        answers_path.unlink()
    return {
        "dtype": dtype,
        "num_tokens": sum(lengths),
        "num_bytes": num_bytes,
        "num_documents": len(lengths),
        "fingerprint": _fingerprint(path, weights_path, path.with_suffix(".lengths")),
        "num_answer_tokens": num_answers,
        "num_skipped": skipped,
    }


def open_token_file(folder: Path, name: str, facts: dict[str, Any]) -> TokenFile:
    """Return the file `name` of a prepared folder, as `facts` describe it."""
    beside: dict[str, Any] = {
        field: folder / f"{name}.{suffix}"
        for field, suffix in (
            ("raw", "txt"),
            ("weights", "weights"),
            ("lengths", "lengths"),
        )
        if (folder / f"{name}.{suffix}").exists()
    }
    return TokenFile(path=folder / f"{name}.bin", **beside, **facts[name])


def code_digest() -> str:
    """Digest this room's code: what other code prepared is made again."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _dtype(tokenizer: Tokenizer) -> str:
    return "uint16" if tokenizer.vocab_size < 1 << 16 else "uint32"


def _turns(tokenizer: Tokenizer, text: str, number: int) -> ChatTurns:
    messages, tools = parse(text)
    try:
        return encode_chat(tokenizer, messages, tools=tools)
    except DataError as problem:
        said = str(messages[0].get("content"))[:40]
        raise DataError(
            f"conversation {number}, which begins {said!r}: {problem}"
        ) from None


def _rounds(
    texts: Iterable[str], tokenizer: Tokenizer
) -> Iterator[tuple[list[str], list[bool]]]:
    """Yield lists of pieces to encode together, with which of them begin a document."""
    safe = safe_cut(tokenizer)
    pieces: list[str] = []
    begins: list[bool] = []
    size = 0
    for text in texts:
        for index, piece in enumerate(cut_pieces(text, safe)):
            pieces.append(piece)
            begins.append(index == 0)
            size += len(piece)
            if size >= _ROUND_CHARACTERS:
                yield pieces, begins
                pieces, begins, size = [], [], 0
    if pieces:
        yield pieces, begins


def _fingerprint(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
