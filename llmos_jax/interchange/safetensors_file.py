"""Read and write one .safetensors file without mapping it into memory.

A file is the length of a JSON header (8 bytes, little-endian), the header (name ->
dtype, shape, offsets into the data), and the data, row by row. Mapped pages would count
as this process's memory; reads into own buffers do not linger.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from llmos_jax.errors import CheckpointError
from llmos_jax.interchange.archive import TensorFacts

DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""What a foreign weight may be stored as; other kinds keep their own name."""
_ALL_DTYPES: dict[str, np.dtype[Any]] = DTYPES | {
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "U16": np.dtype(np.uint16),
    "I32": np.dtype(np.int32),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
"""And what ours may be."""
_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
}
_MAX_HEADER_BYTES = 100_000_000
"""As the safetensors package has it (safetensors/src/tensor.rs)."""
_READ_BYTES = 1 << 30
"""Linux reads at most 2 GiB - 4 KiB at a time (man 2 read)."""


class Stored(NamedTuple):
    """Where a tensor lies."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """Byte of the file."""
    stop: int

    @property
    def facts(self) -> TensorFacts:
        """As an archive gives them."""
        dtype = DTYPES.get(self.dtype)
        name = self.dtype if dtype is None else dtype.name
        return TensorFacts(self.shape, name, self.stop - self.start)


def read_header(path: Path) -> dict[str, Stored]:
    """Return what a file holds, after checking that it holds it.

    Raises:
        CheckpointError: no such file, no such header, or another size than it says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise _damaged(
                    path,
                    f"its header would be {length:,} bytes of {size:,}, so it is cut "
                    "short or no safetensors file",
                )
            text = file.read(length)
    except OSError as problem:
        raise CheckpointError(f"{path} cannot be read: {problem.strerror}.") from None
    try:
        header = json.loads(text)
        rows = dict(header)
    except (ValueError, TypeError, RecursionError):
        raise _damaged(path, "its header is not JSON") from None
    rows.pop("__metadata__", None)
    tensors = {name: _stored(path, name, row, 8 + length) for name, row in rows.items()}
    _check_extent(path, tensors, 8 + length, size)
    return tensors


def array_dtype(kind: str) -> np.dtype[Any]:
    """The dtype that a file's header means.

    Raises:
        CheckpointError: one that no model of ours has.
    """
    if kind not in _ALL_DTYPES:
        raise CheckpointError(f"a tensor is stored as {kind}, which no model here has.")
    return _ALL_DTYPES[kind]


def read_rows(path: Path, name: str, stored: Stored, rows: slice) -> np.ndarray:
    """Return some rows of a tensor in memory of its own.

    Raises:
        CheckpointError: the file ends before them.
    """
    dtype = DTYPES[stored.dtype]
    shape = stored.shape
    first, stop = 0, 1
    if shape:
        first, stop, _ = rows.indices(shape[0])
        shape = (max(stop - first, 0), *shape[1:])
    row_bytes = math.prod(stored.shape[1:]) * dtype.itemsize
    array = np.empty(shape, dtype)
    buffer = array.reshape(-1).view(np.uint8).data
    done, at = 0, stored.start + first * row_bytes
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            while done < len(buffer):
                part = buffer[done : done + _READ_BYTES]
                count = os.preadv(descriptor, [part], at + done)
                if count == 0:
                    raise _damaged(path, f"it ends within {name}")
                done += count
        finally:
            os.close(descriptor)
    except OSError as problem:
        raise CheckpointError(
            f"{path} cannot be read: {problem.strerror} (in {name})."
        ) from None
    return array


def header_bytes(
    tensors: Iterable[tuple[str, np.dtype[Any], tuple[int, ...]]],
) -> bytes:
    """Return what a file of these tensors, in this order, begins with."""
    kinds = {dtype: kind for kind, dtype in _ALL_DTYPES.items()}
    # Without a format, transformers refuses a file.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in tensors:
        stop = offset + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": kinds[dtype],
            "shape": list(shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begins at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text


def _stored(path: Path, name: str, row: Any, base: int) -> Stored:
    try:
        dtype, shape = row["dtype"], tuple(row["shape"])
        start, stop = row["data_offsets"]
        count = math.prod(shape)
        is_sane = all(type(x) is int and x >= 0 for x in (*shape, start, stop))
    except (TypeError, KeyError, ValueError):
        raise _damaged(path, f"its header does not describe {name}") from None
    if not is_sane or not isinstance(dtype, str):
        raise _damaged(path, f"its header does not describe {name}")
    if dtype in _BITS and (stop - start) * 8 != count * _BITS[dtype]:
        raise _damaged(
            path,
            f"{name} of shape {list(shape)} and {dtype} has {stop - start:,} bytes",
        )
    return Stored(dtype, shape, base + start, base + stop)


def _check_extent(path: Path, tensors: dict[str, Stored], base: int, size: int) -> None:
    """Tensors lie one after another, without gaps, to the end of the file."""
    at = base
    for name, stored in sorted(tensors.items(), key=lambda row: row[1][2:]):
        if stored.start != at:
            raise _damaged(path, f"{name} does not begin where another one ends")
        at = stored.stop
        if at > size:
            raise _damaged(
                path,
                f"it has {size:,} bytes and {name} ends at {at:,}, so it is cut short",
            )
    if at != size:
        raise _damaged(path, f"it has {size:,} bytes and its header speaks of {at:,}")


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {what}. Fetch it again.")
