"""A GGUF file, seen as the Hugging Face folder of the same model.

Packed weights come out as float32, a few rows at a time, so reading needs little more
memory than what is returned. The file is read, not mapped: mapped pages would count as
the process's memory.

Letters: N num_heads, K num_kv_heads, H head_dim.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as Kind

from llmos_jax.data import Tokenizer
from llmos_jax.data.gguf_tokenizer import tokenizer_of_gguf
from llmos_jax.errors import CheckpointError, ConfigError
from llmos_jax.interchange.archive import TensorFacts
from llmos_jax.interchange.gguf_config import config_of_gguf
from llmos_jax.interchange.gguf_header import StoredTensor, read_header
from llmos_jax.interchange.gguf_names import (
    ROPE_FACTORS,
    foreign_names,
    has_one_added,
    rotated_heads,
    to_halves,
)

_AS_STORED = {
    Kind.F32: np.dtype(np.float32),
    Kind.F16: np.dtype(np.float16),
    Kind.BF16: np.dtype(ml_dtypes.bfloat16),
}
_PACKED = (
    *(Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0),
    *(Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K),
    *(Kind.IQ4_NL, Kind.IQ4_XS),
)
_BLOCK_BYTES = 4 << 20
"""Of float32 that are unpacked at once."""


class _View(NamedTuple):
    """A Hugging Face tensor inside a stored one."""

    stored: StoredTensor
    expert: int | None
    heads: int
    """Over which its rows are permuted; 0: they are not."""
    one_added: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape[self.expert is not None :]

    @property
    def dtype(self) -> np.dtype:
        if self.one_added:
            return np.dtype(np.float32)
        return _AS_STORED.get(self.stored.kind, np.dtype(np.float32))

    @property
    def stored_bytes(self) -> int:
        parts = 1 if self.expert is None else self.stored.shape[0]
        return self.stored.stored_bytes // parts


class GgufFile:
    """An Archive over one GGUF file; see `archive.py`.

    Raises:
        CheckpointError: the file cannot be read, is damaged or cut short, or holds a
            model of an architecture or a packing that is not known here.
    """

    def __init__(self, path: str | Path):
        self._path = Path(path).expanduser()
        self._header = read_header(self._path)
        for tensor in self._header.tensors.values():
            self._check_kind(tensor)
        self._fd = os.open(self._path, os.O_RDONLY)
        self._finalizer = weakref.finalize(self, os.close, self._fd)
        self._config = config_of_gguf(self._path, self._header, self._divisors)
        self._views = self._find_views()

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    @property
    def config(self) -> dict[str, Any]:
        """As in `config.json`; a copy."""
        return dict(self._config)

    @property
    def fields(self) -> Mapping[str, Any]:
        """The file's own metadata."""
        return MappingProxyType(self._header.fields)

    @cached_property
    def tensors(self) -> Mapping[str, TensorFacts]:
        """By Hugging Face's name; one that has none there keeps its own."""
        return MappingProxyType(
            {
                name: TensorFacts(view.shape, view.dtype.name, view.stored_bytes)
                for name, view in self._views.items()
            }
        )

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Return a tensor, or some of its first dimension; see `Archive.read`."""
        if name not in self._views:
            raise CheckpointError(f"{self._path} has no tensor {name}.")
        view = self._views[name]
        start, stop, step = rows.indices(view.shape[0])
        assert step == 1, "rows are read in order"
        stop = max(start, stop)
        if view.heads:
            # A head's rows are shuffled among themselves: read whole heads.
            H = view.shape[0] // view.heads
            first, last = start // H, -(-stop // H)
            whole = self._rows(view, first * H, last * H)
            halves = to_halves(whole, last - first) if whole.size else whole
            cut = halves[start - first * H : stop - first * H]
            return np.array(cut) if len(cut) < len(halves) else cut
        found = self._rows(view, start, stop)
        return found - np.float32(1) if view.one_added else found

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer that the metadata holds."""
        try:
            return tokenizer_of_gguf(self._header.fields)
        except ConfigError as problem:
            raise CheckpointError(f"{self._path}: {problem}") from None

    def _find_views(self) -> dict[str, _View]:
        arch = self._header.fields["general.architecture"]
        config = self._config
        heads = (config["num_attention_heads"], config["num_key_value_heads"])
        experts = config.get("num_local_experts", config.get("num_experts", 0))
        views: dict[str, _View] = {}
        for name, stored in self._header.tensors.items():
            if name == ROPE_FACTORS:
                continue
            stacked = "_exps." in name
            if stacked and stored.shape[0] != experts:
                raise CheckpointError(
                    f"{self._path}: tensor {name} has the shape {stored.shape}, and "
                    f"the metadata speaks of {experts} experts."
                )
            names = foreign_names(name, arch, experts)
            rotated = rotated_heads(name, arch, heads)
            if rotated and stored.shape[0] % (2 * rotated):
                raise CheckpointError(
                    f"{self._path}: tensor {name} has the shape {stored.shape}, which "
                    f"{rotated} heads cannot share."
                )
            for index, foreign in enumerate(names):
                expert = index if stacked else None
                added = has_one_added(name, arch)
                views[foreign] = _View(stored, expert, rotated, added)
        return views

    def _divisors(self) -> np.ndarray:
        stored = self._header.tensors[ROPE_FACTORS]
        return self._rows(_View(stored, None, 0, True), 0, stored.shape[0])

    def _rows(self, view: _View, start: int, stop: int) -> np.ndarray:
        """Return rows [start, stop) as they lie in the file, unpacked, of its dtype."""
        stored = view.stored
        one_row = view.stored_bytes // view.shape[0]
        offset = stored.offset + (view.expert or 0) * view.stored_bytes
        offset += start * one_row
        shape = (stop - start, *view.shape[1:])
        if stored.kind in _AS_STORED:
            found = np.empty(shape, _AS_STORED[stored.kind])
            self._fill(found.view(np.uint8).reshape(-1).data, offset, stored)
            return found.astype(view.dtype, copy=False)
        found = np.empty(shape, np.float32)
        at_once = max(1, _BLOCK_BYTES // max(1, found[:1].nbytes))
        for row in range(0, shape[0], at_once):
            some = found[row : row + at_once]
            packed = np.empty((len(some), one_row), np.uint8)
            self._fill(packed.reshape(-1).data, offset + row * one_row, stored)
            some[...] = gguf.dequantize(packed, stored.kind).reshape(some.shape)
        return found

    def _fill(self, buffer: memoryview, offset: int, stored: StoredTensor) -> None:
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._fd, [buffer[done:]], offset + done)
            except OSError as problem:
                raise CheckpointError(
                    f"{self._path}: tensor {stored.name} cannot be read: "
                    f"{problem.strerror}."
                ) from None
            if not count:
                raise CheckpointError(
                    f"{self._path} ends inside tensor {stored.name}: it was cut short "
                    "after it was opened."
                )
            done += count

    def _check_kind(self, tensor: StoredTensor) -> None:
        if tensor.kind in _AS_STORED:
            return
        if tensor.kind not in _PACKED:
            known = ", ".join(kind.name for kind in (*_AS_STORED, *_PACKED))
            raise CheckpointError(
                f"{self._path}: tensor {tensor.name} is packed as {tensor.kind.name}; "
                f"what can be read is {known}."
            )
        if len(tensor.shape) < 2:
            raise CheckpointError(
                f"{self._path}: tensor {tensor.name} has one dimension and is packed "
                f"as {tensor.kind.name}; vectors are stored as numbers."
            )
