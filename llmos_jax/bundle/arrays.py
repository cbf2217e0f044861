"""Arrays by name in safetensors files, written one after another, read in part."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llmos_jax.errors import BundleError
from llmos_jax.interchange import Stored, array_dtype, header_bytes, read_header

FILE_BYTES = 4 << 30
"""Most of one file, or one array: small enough to be copied again, a judgement."""


def write_arrays(
    folder: Path, stem: str, arrays: Mapping[str, jax.Array | np.ndarray]
) -> list[str]:
    """Write arrays into `<stem>-<number>.safetensors`; return the files' names.

    Host memory: one array.

    Args:
        folder: is there.
        stem: of the names.
        arrays: whole on this process.
    """
    names = []
    for number, part in enumerate(_parts(arrays), 1):
        name = f"{stem}-{number:05d}.safetensors"
        facts = [(key, np.dtype(arrays[key].dtype), arrays[key].shape) for key in part]
        with (folder / name).open("wb") as file:
            file.write(header_bytes(facts))
            for key in part:
                x = np.ascontiguousarray(np.asarray(arrays[key]))
                file.write(x.reshape(-1).view(np.uint8).data)
        names.append(name)
    return names


def _parts(arrays: Mapping[str, Any]) -> Iterator[list[str]]:
    part: list[str] = []
    size = 0
    for name, x in arrays.items():
        nbytes = math.prod(x.shape) * np.dtype(x.dtype).itemsize
        if part and size + nbytes > FILE_BYTES:
            yield part
            part, size = [], 0
        part.append(name)
        size += nbytes
    yield part


class StoredArrays:
    """The arrays of some files; nothing is read but what is asked for."""

    def __init__(self, folder: Path, files: Iterable[str]):
        """Read the headers.

        Raises:
            CheckpointError: a file that is damaged.
        """
        self._places: dict[str, tuple[Path, Stored]] = {}
        for name in files:
            path = folder / name
            for key, stored in read_header(path).items():
                self._places[key] = (path, stored)

    def names(self) -> list[str]:
        """Of all arrays."""
        return list(self._places)

    def like(self, name: str) -> jax.ShapeDtypeStruct:
        """Shape and dtype of an array.

        Raises:
            BundleError: there is none of this name.
        """
        _, stored = self._place(name)
        return jax.ShapeDtypeStruct(stored.shape, array_dtype(stored.dtype))

    def read(self, name: str) -> np.ndarray:
        """An array in memory of its own."""
        path, stored = self._place(name)
        dtype = array_dtype(stored.dtype)
        flat = np.fromfile(
            path, dtype, count=math.prod(stored.shape), offset=stored.start
        )
        return flat.reshape(stored.shape)

    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Part of an array, which alone is read."""
        path, stored = self._place(name)
        if not stored.shape or not math.prod(stored.shape):
            return self.read(name)[index]
        mapped = np.memmap(
            path, array_dtype(stored.dtype), "r", stored.start, stored.shape
        )
        return np.array(mapped[index])

    def placed(self, name: str, sharding: Any, dtype: str | None = None) -> jax.Array:
        """An array on devices, each of which gets its part; cast to `dtype`."""
        like = self.like(name)
        wanted = like.dtype if dtype is None else np.dtype(dtype)

        def part(index: Any) -> np.ndarray:
            return self.part(name, index).astype(wanted, copy=False)

        return jax.make_array_from_callback(like.shape, sharding, part)

    def _place(self, name: str) -> tuple[Path, Stored]:
        found = self._places.get(name)
        if found is None:
            raise BundleError(f"this Bundle has no array {name}; export it anew.")
        return found
