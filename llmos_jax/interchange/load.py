"""Stream foreign tensors into our parameters, each shard straight to its device.

A shard is one buffer in the layout that it keeps; blocks of rows of the foreign tensors
are read by several threads and turned into their place in it. On a CPU the buffer
becomes the array, without a copy. So nothing exists twice but the blocks under way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from llmos_jax.interchange.archive import Archive
from llmos_jax.interchange.check import checked_map, tensors_of
from llmos_jax.interchange.layout import turn
from llmos_jax.interchange.weights import Entry, sizes_of
from llmos_jax.ir import ModelSpec
from llmos_jax.models import Params, Skeleton

_THREADS = 8
_BLOCK_BYTES = 4 << 20
"""Of a foreign tensor, read at once: with all threads a small part of any model worth
measuring, and large enough for a disk."""
_ALIGNMENT = 64
"""Bytes; what a CPU device of JAX 0.10 takes over without a copy."""

Bounds = tuple[tuple[int, int], ...]
"""First and last + 1 of each dimension of a shard."""
Progress = Callable[[int, int], None]
"""Takes bytes done and bytes in all, from the caller's thread."""


@dataclass(frozen=True, slots=True)
class _Block:
    """Some rows of one foreign tensor, and where they go."""

    entry: Entry
    place: tuple[int, ...]
    """Layer and expert."""
    first: int
    """Along the slowest letter of the foreign axes."""
    stop: int
    bounds: Bounds
    """Of the shard."""


def load_params(
    archive: Archive,
    skeleton: Skeleton,
    shardings: dict[str, Sharding] | None = None,
    *,
    dtype: str | None = None,
    on_progress: Progress | None = None,
) -> Params:
    """Read the parameters of a foreign model, LoRA's factors apart.

    Host memory: the shards of this process on CPU devices; on others one parameter's
    shards at a time. Besides, a few blocks of 4 MiB.

    Args:
        archive: holds the weights.
        skeleton: of the archive's model.
        shardings: by path, of the parameters that are wanted; None: all, on the first
            device of this process.
        dtype: to cast to; None keeps what is stored (the widest where layers differ).
        on_progress: is told the bytes of foreign tensors read so far, and of all.

    Raises:
        CheckpointError: tensors missing, extra, damaged, or of another shape or dtype.
    """
    spec = skeleton.spec
    entries = checked_map(archive, spec)
    shapes = {row.path: row.shape for row in skeleton.table.rows}
    for entry in entries:
        assert shapes.get(entry.path) == entry.shape(spec), (entry, shapes)
    assert spec.lora is not None or len(shapes) == len(entries), shapes.keys()
    here = SingleDeviceSharding(jax.local_devices()[0])
    stored = _dtypes(archive, spec, entries)
    wanted = {
        entry.path: _Wanted(
            entry=entry,
            shape=entry.shape(spec),
            dtype=jnp.dtype(dtype or stored[entry.path]),
            read_bytes=jnp.dtype(stored[entry.path]).itemsize,
            sharding=here if shardings is None else shardings[entry.path],
        )
        for entry in entries
        if shardings is None or entry.path in shardings
    }
    total = sum(one.elements * one.read_bytes for one in wanted.values())
    count = _Count(total, on_progress)
    with ThreadPoolExecutor(_THREADS, "llmos-read") as pool:
        return {
            path: one.read(functools.partial(_fill, archive, spec), spec, pool, count)
            for path, one in wanted.items()
        }


def stored_dtypes(archive: Archive, spec: ModelSpec) -> dict[str, str]:
    """Return the dtype that `load_params` gives each parameter by default.

    Raises:
        CheckpointError: tensors missing, extra, or of another shape or dtype.
    """
    return _dtypes(archive, spec, checked_map(archive, spec))


class _Count:
    """Bytes read so far."""

    def __init__(self, total: int, told: Progress | None):
        self._done, self._total, self._told = 0, total, told

    def add(self, count: int) -> None:
        self._done += count
        if self._told is not None:
            self._told(self._done, self._total)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """A parameter to be read."""

    entry: Entry
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    sharding: Sharding
    read_bytes: int
    """Of a foreign element."""

    def devices(self) -> dict[Bounds, list[jax.Device]]:
        """The different shards of this process, and who holds each."""
        shards: dict[Bounds, list[jax.Device]] = {}
        for device, index in self.sharding.addressable_devices_indices_map(
            self.shape
        ).items():
            index = (slice(None),) * len(self.shape) if index is None else index
            bounds = tuple(
                part.indices(size)[:2]
                for part, size in zip(index, self.shape, strict=True)
            )
            shards.setdefault(bounds, []).append(device)
        return shards

    @property
    def elements(self) -> int:
        """Of all different shards of this process."""
        return sum(prod(_extent(bounds)) for bounds in self.devices())

    def read(
        self,
        fill: Callable[[_Block, np.ndarray], int],
        spec: ModelSpec,
        pool: ThreadPoolExecutor,
        count: _Count,
    ) -> jax.Array:
        """Read all shards in parallel and hand each to its devices."""
        shards = self.devices()
        buffers = {bounds: _aligned(_extent(bounds), self.dtype) for bounds in shards}
        waiting = [
            pool.submit(fill, block, buffers[bounds])
            for bounds in shards
            for block in _blocks(self.entry, spec, bounds)
        ]
        try:
            for done in as_completed(waiting):
                count.add(done.result() * self.read_bytes)
        finally:
            for one in waiting:
                one.cancel()
        parts = [
            jax.device_put(buffers[bounds], device)
            for bounds, devices in shards.items()
            for device in devices
        ]
        # The buffers of an accelerator's shards are free only after this.
        jax.block_until_ready(parts)
        return jax.make_array_from_single_device_arrays(
            self.shape, self.sharding, parts
        )


def _blocks(entry: Entry, spec: ModelSpec, bounds: Bounds) -> Iterator[_Block]:
    """Cut what a shard needs into blocks of about `_BLOCK_BYTES`."""
    depth = len(entry.stack(spec))
    sizes = sizes_of(spec)
    slowest = entry.theirs[0][0]
    first, stop = bounds[depth + entry.ours.index(slowest)]
    unit = 4 * prod(sizes[letter] for letter in "".join(entry.theirs)[1:])
    step = max(1, _BLOCK_BYTES // unit)
    for place in product(*(range(*span) for span in bounds[:depth])):
        for start in range(first, stop, step):
            yield _Block(entry, place, start, min(start + step, stop), bounds)


def _fill(archive: Archive, spec: ModelSpec, block: _Block, buffer: np.ndarray) -> int:
    """Read a block into its place in a shard's buffer; return the elements used."""
    entry, bounds = block.entry, block.bounds
    depth = len(block.place)
    sizes = sizes_of(spec)
    letters = "".join(entry.theirs)
    inner = dict(zip(entry.ours, bounds[depth:], strict=True))
    unit = prod(sizes[letter] for letter in entry.theirs[0][1:])
    rows = slice(block.first * unit, block.stop * unit)
    read = archive.read(entry.name_of(*block.place), rows)
    read = read.reshape(-1, *(sizes[letter] for letter in letters[1:]))
    read = read[:, *(slice(*inner[letter]) for letter in letters[1:])]
    place = tuple(at - low for at, (low, _) in zip(block.place, bounds))
    target = buffer[place].transpose([entry.ours.index(letter) for letter in letters])
    start = block.first - inner[letters[0]][0]
    turn(read, target[start : start + len(read)])
    return int(read.size)


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """An uninitialised array that begins at a multiple of `_ALIGNMENT`."""
    size = prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _extent(bounds: Bounds) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in bounds)


def _dtypes(
    archive: Archive, spec: ModelSpec, entries: Iterable[Entry]
) -> dict[str, str]:
    found = {
        entry.path: {archive.tensors[name].dtype for name, _ in tensors_of(entry, spec)}
        for entry in entries
    }
    # Of any two kinds, float32 alone holds both (float16's precision, bfloat16's
    # range).
    return {
        path: kinds.pop() if len(kinds) == 1 else "float32"
        for path, kinds in found.items()
    }
