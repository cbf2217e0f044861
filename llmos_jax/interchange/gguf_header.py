"""Read what a GGUF file says before its weights: metadata, and where tensors lie.

The format is ggml's docs/gguf.md, versions 2 and 3, little-endian. The `gguf` package's
own reader takes 10 s for a vocabulary of 262144 tokens; this one under a second, and it
takes no length on trust: each is held against what is left of the file.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from llmos_jax.errors import CheckpointError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_MAX_DIMS = 4  # GGML_MAX_DIMS
_STRING, _ARRAY = 8, 9
_NUMBERS = {  # gguf_metadata_value_type to numpy's letter
    0: "u1",
    1: "i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}


class StoredTensor(NamedTuple):
    """Where a tensor lies and how it is packed."""

    name: str
    shape: tuple[int, ...]
    """As numpy counts: the dimension that is contiguous in the file comes last."""
    kind: GGMLQuantizationType
    offset: int
    """From the start of the file."""
    stored_bytes: int

    @property
    def row_bytes(self) -> int:
        """Of one index of all dimensions but the last."""
        block, packed = GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // block * packed


class GgufHeader(NamedTuple):
    """All that precedes the weights."""

    fields: dict[str, Any]
    """Metadata: numbers, booleans, strings, and lists of them."""
    tensors: dict[str, StoredTensor]


def read_header(path: Path) -> GgufHeader:
    """Return the header of a file.

    Raises:
        CheckpointError: it is not such a file, it is of a kind that is not read here,
            or it ends before what its header describes.
    """
    try:
        with path.open("rb") as file:
            return _Header(path, file).read()
    except OSError as problem:
        raise CheckpointError(
            f"{path} cannot be read: {problem.strerror or problem}."
        ) from None


class _Header:
    """A cursor over the header that knows how much of the file is left."""

    def __init__(self, path: Path, file: BinaryIO):
        self._path = path
        self._file = file
        self._size = path.stat().st_size
        self._at = 0

    def read(self) -> GgufHeader:
        self._check_start()
        num_tensors, num_fields = self._number("<u8"), self._number("<u8")
        fields: dict[str, Any] = {}
        for _ in range(num_fields):
            key = self._string("the name of a metadata field")
            fields[key] = self._value(self._number("<u4"), key)
        self._check_whole(fields)
        found = [self._tensor() for _ in range(num_tensors)]
        alignment = self._alignment(fields)
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, StoredTensor] = {}
        for one in found:
            if one.name in tensors:
                raise self._broken(f"it has two tensors named {one.name}")
            if one.offset % alignment:
                raise self._broken(
                    f"tensor {one.name} lies at {one.offset}, no multiple of the "
                    f"alignment of {alignment} bytes"
                )
            tensors[one.name] = placed = one._replace(offset=start + one.offset)
            end = placed.offset + placed.stored_bytes
            if end > self._size:
                raise self._broken(
                    f"tensor {one.name} ends at byte {end}, and the file at "
                    f"{self._size}: it was cut short. Fetch it again"
                )
        return GgufHeader(fields, tensors)

    def _check_start(self) -> None:
        magic = self._take(4, "the four letters that GGUF files begin with")
        if magic != _MAGIC:
            raise self._broken(f"it begins with {magic!r}, a GGUF file with {_MAGIC!r}")
        version = self._number("<u4")
        if version & 0xFFFF == 0:
            raise CheckpointError(
                f"{self._path} is a big-endian GGUF file; only little-endian ones are "
                "read. Turn it round with `gguf-convert-endian FILE little`."
            )
        if version not in _VERSIONS:
            raise CheckpointError(
                f"{self._path} is a GGUF file of version {version}; versions 2 and 3 "
                "are read."
            )

    def _check_whole(self, fields: dict[str, Any]) -> None:
        if fields.get("split.count", 0) not in (0, 1):
            raise CheckpointError(
                f"{self._path} is one of {fields['split.count']} parts of a model. "
                "Join them first: `llama-gguf-split --merge FIRST_PART WHOLE`."
            )

    def _alignment(self, fields: dict[str, Any]) -> int:
        alignment = fields.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise self._broken(f"general.alignment is {alignment}")
        return alignment

    def _tensor(self) -> StoredTensor:
        name = self._string("the name of a tensor")
        num_dims = self._number("<u4")
        if not 1 <= num_dims <= _MAX_DIMS:
            raise self._broken(f"tensor {name} has {num_dims} dimensions")
        sizes = [self._number("<u8") for _ in range(num_dims)]
        code, offset = self._number("<u4"), self._number("<u8")
        if 0 in sizes:
            raise self._broken(f"tensor {name} has the sizes {sizes}")
        try:
            kind = GGMLQuantizationType(code)
            block, packed = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise CheckpointError(
                f"{self._path}: tensor {name} is of a type (number {code}) that the "
                "installed `gguf` package does not know."
            ) from None
        if sizes[0] % block:
            raise self._broken(
                f"tensor {name} has rows of {sizes[0]}, and {kind.name} packs {block} "
                "together"
            )
        stored = math.prod(sizes) // block * packed
        return StoredTensor(name, tuple(reversed(sizes)), kind, offset, stored)

    def _value(self, kind: int, key: str) -> Any:
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind == _STRING:
            return self._string(key)
        if kind != _ARRAY:
            raise self._broken(f"metadata field {key} is of an unknown type, {kind}")
        item, count = self._number("<u4"), self._number("<u8")
        if item in _NUMBERS:
            letter = np.dtype(_NUMBERS[item])
            data = self._take(count * letter.itemsize, key)
            return np.frombuffer(data, letter).tolist()
        if item != _STRING or count > self._size:
            raise self._broken(
                f"metadata field {key} claims {count} items of type {item}"
            )
        return [self._string(key) for _ in range(count)]

    def _number(self, letter: str) -> Any:
        kind = np.dtype(letter)
        data = self._take(kind.itemsize, "a number")
        return np.frombuffer(data, kind)[0].item()

    def _string(self, what: str) -> str:
        (length,) = struct.unpack("<Q", self._take(8, what))
        try:
            return self._take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            raise self._broken(f"{what} is not UTF-8") from None

    def _take(self, count: int, what: str) -> bytes:
        data = self._file.read(count) if self._at + count <= self._size else b""
        if len(data) != count:
            raise self._broken(
                f"{what} would end at byte {self._at + count}, and the file ends at "
                f"{self._size}"
            )
        self._at += count
        return data

    def _broken(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self._path} is damaged, or no GGUF file: {why}.")
