"""Corpus: token shards on disk, and the page that says what they are.

A corpus is a folder that `tools/prepare` makes: `manifest.json`, `tokenizer.json`,
ArrayRecord shards `<side>-<number>.array_record`, and of held-out sides the plain text
(`<side>.txt`) that compressors are compared on. A record is `block_tokens` token ids in
little-endian `dtype` (the last record of a shard may be shorter), so the token at any
place of a side is found by arithmetic. Documents lie end to end in the order of the
manifest, each begun by the mark `end_id`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llmos_jax.ir import Artefact

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
BLOCK_TOKENS = 8192
"""Tokens of a record: 16 KiB of uint16. A judgement: a row of 4096 tokens touches one
or two records, and a shard's index stays a thousandth of it."""


def num_blocks(num_tokens: int, block_tokens: int) -> int:
    """Records of a shard."""
    return -(-num_tokens // block_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One file of token blocks."""

    name: str
    num_tokens: int
    num_bytes: int
    """Of the text, in UTF-8, without marks."""
    num_documents: int
    size: int
    """Bytes of the file."""
    sha256: str
    """Of the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """Training, validation or test text: its shards, in order."""

    shards: tuple[Shard, ...]

    @property
    def num_tokens(self) -> int:
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def num_documents(self) -> int:
        return sum(shard.num_documents for shard in self.shards)


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus(Artefact):
    """What manifest.json says: `sides` has train, validation and perhaps test."""

    block_tokens: int
    dtype: str
    """uint16 or uint32."""
    end_id: int
    """The mark that begins each document."""
    stop_id: int | None
    """What a model is to say where a document ends, if not the next one's mark."""
    tokenizer: str
    """Fingerprint of tokenizer.json."""
    vocab_size: int
    held_out_by: str
    """How held-out text was told apart, in words for a report."""
    sides: dict[str, Side]
    made_by: dict[str, Any] = field(default_factory=dict)
    """Versions, the settings, the sources."""
