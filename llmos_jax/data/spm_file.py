"""Read a SentencePiece model file: its pieces and the settings that shape them.

The file is a protocol buffer (sentencepiece_model.proto of the SentencePiece project).
Only what the conversion needs is read, which spares a dependency on two packages; what
is not known here is passed over, as the format wants it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmos_jax.errors import ConfigError

UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # Piece.Type

_Field = tuple[int, int | bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One token: its text, its log probability or rank, and its kind."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SpmModel:
    """A SentencePiece model; an id is the position of its piece."""

    pieces: tuple[Piece, ...]
    algorithm: int
    byte_fallback: bool
    unk_id: int
    bos_id: int | None
    eos_id: int | None
    charsmap: bytes
    """How characters are normalised, compiled; empty: not at all."""
    dummy_prefix: bool
    """A space is put in front of the text."""
    one_space: bool
    """Spaces at the ends go, and runs of them become one."""


def read_spm(path: Path) -> SpmModel:
    """Read PATH; ConfigError naming it if it is not a model that can be converted."""
    try:
        raw = path.read_bytes()
    except OSError as problem:
        raise ConfigError(
            f"tokenizer {path} cannot be read: {problem.strerror or problem}."
        ) from None
    try:
        model = _model(raw)
    except (ValueError, struct.error, IndexError) as problem:
        raise ConfigError(
            f"tokenizer {path}: not a SentencePiece model, or a truncated one "
            f"({problem}). Fetch the file again."
        ) from None
    if isinstance(model, str):
        raise ConfigError(
            f"tokenizer {path}: {model}, which cannot be converted. Give the folder a "
            "tokenizer.json."
        )
    return model


def _model(raw: bytes) -> SpmModel | str:
    """Return the model, or the words for what is in it that has no counterpart."""
    pieces, trainer, normalizer = [], _TRAINER.copy(), _NORMALIZER.copy()
    for number, value in _fields(raw):
        if number == 1 and isinstance(value, bytes):
            pieces.append(_piece(value))
        elif number == 2 and isinstance(value, bytes):
            trainer.update(_fields(value))
        elif number == 3 and isinstance(value, bytes):
            normalizer.update(_fields(value))
    if not pieces:
        raise ValueError("it has no pieces")
    algorithm = int(trainer[3])
    if algorithm not in (UNIGRAM, BPE):
        return "its pieces are whole words or single characters"
    if trainer[24] or not normalizer[5]:
        return "it writes spaces in an uncommon way"
    if any(piece.kind == UNUSED for piece in pieces):
        return "it has unused pieces"
    return SpmModel(
        pieces=tuple(pieces),
        algorithm=algorithm,
        byte_fallback=bool(trainer[35]),
        unk_id=_signed(trainer[40]) or 0,
        bos_id=_signed(trainer[41]),
        eos_id=_signed(trainer[42]),
        charsmap=bytes(normalizer[2]),
        dummy_prefix=bool(normalizer[3]),
        one_space=bool(normalizer[4]),
    )


# Field numbers with the values they have where the file leaves them out.
_TRAINER: dict[int, Any] = {3: UNIGRAM, 24: 0, 35: 0, 40: 0, 41: 1, 42: 2}
_NORMALIZER: dict[int, Any] = {2: b"", 3: 1, 4: 1, 5: 1}


def _piece(raw: bytes) -> Piece:
    found: dict[int, Any] = {1: b"", 2: b"\0\0\0\0", 3: NORMAL}
    found.update(_fields(raw))
    return Piece(
        text=found[1].decode("utf-8"),
        score=struct.unpack("<f", found[2])[0],
        kind=int(found[3]),
    )


def _signed(value: Any) -> int | None:
    """A token's id; negative ones, which mean none, are written as 64-bit numbers."""
    return None if value >= 1 << 63 else int(value)


def _fields(raw: bytes) -> Iterator[_Field]:
    """Yield (field number, number or bytes) of one message of the wire format."""
    at = 0
    while at < len(raw):
        key, at = _varint(raw, at)
        kind = key & 7
        if kind == 0:
            value: int | bytes
            value, at = _varint(raw, at)
        else:
            if kind == 2:
                size, at = _varint(raw, at)
            elif kind in (1, 5):
                size = 8 if kind == 1 else 4
            else:
                raise ValueError(f"byte {at} begins no field")
            value = raw[at : at + size]
            at += size
            if at > len(raw):
                raise ValueError(
                    f"it ends at byte {len(raw)}, in the middle of a field"
                )
        yield key >> 3, value


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError(f"byte {at} belongs to no number")
