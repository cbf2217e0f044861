"""The engine's programs, each compiled once: a closed set, and whoever strays is told.

Compiled programs are kept in a folder from one start to the next, by what they were
made of: the model, the sizes, the versions, this very CPU. One that cannot be read is
compiled anew.
"""

from __future__ import annotations

import hashlib
import pickle
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding

from llmos_jax.errors import ServeError
from llmos_jax.scheduling import Room
from llmos_jax.serving.choose import rows_of_choices
from llmos_jax.serving.forward import Forward, Weights
from llmos_jax.serving.packing import packed
from llmos_jax.serving.shapes import Shape
from llmos_jax.serving.steps import (
    DecodeRows,
    State,
    StepRows,
    decode_program,
    embed_program,
    step_program,
)

_WORKERS = 2
"""Threads that compile: a judgement; each compilation uses several itself."""


class Programs:
    """Compiled programs by shape."""

    def __init__(
        self,
        model: Forward,
        params: Weights,
        state: State,
        room: Room,
        *,
        sharding: NamedSharding | None = None,
        traced: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda f: f,
        identity: str = "",
        folder: Path | None = None,
        ready_made: Path | None = None,
    ):
        """Compile nothing yet.

        Args:
            model: what the programs trace.
            params: or ShapeDtypeStructs of them.
            state: or ShapeDtypeStructs of it.
            room: sizes of steps.
            sharding: of the state's pool and of what comes back; None: one device.
            traced: puts a program under a plan before it is jitted.
            identity: what else a kept program depends on: the model, the versions.
            folder: where compiled programs are kept; None: nowhere.
            ready_made: where others lie, which are only read.
        """
        self._model, self._room = model, room
        self._abstract = jax.tree.map(_abstract, (params, state))
        self.sharding, self._folder = sharding, folder
        self._ready_made = ready_made
        self._identity, self._traced = identity, traced
        self._made: dict[Shape, Any] = {}
        self._lock = threading.Lock()
        self.is_sealed = False
        self.unplanned = 0
        """Programs that were wanted, and not compiled before the doors opened."""
        self.loaded = 0
        """Programs that were found in the folder."""

    @property
    def state_shardings(self) -> Any:
        """A sharding for each part of the state; None: one device."""
        if self.sharding is None:
            return None
        return jax.tree.map(lambda leaf: leaf.sharding, self._abstract[1])

    def __len__(self) -> int:
        return len(self._made)

    def __getitem__(self, shape: Shape) -> Any:
        """The compiled program; made now if need be, which must not be once sealed.

        Raises:
            ServeError: it was not planned.
        """
        found = self._made.get(shape)
        if found is not None:
            return found
        if self.is_sealed:
            self.unplanned += 1
            raise ServeError(
                f"a step needs the program {shape}, which was not planned: compiling "
                "it now would hold up everybody. This is a fault of the engine."
            )
        return self._get(shape)

    def compile_all(
        self, shapes: Iterable[Shape], on_progress: Callable[[int, int], bool]
    ) -> None:
        """Have them all; tells how many of how many there are, and is told to go on."""
        wanted = [shape for shape in shapes if shape not in self._made]
        with ThreadPoolExecutor(_WORKERS) as pool:
            for done, _ in enumerate(pool.map(self._get, wanted), 1):
                if not on_progress(done, len(wanted)):
                    pool.shutdown(wait=True, cancel_futures=True)
                    return

    def temporary_bytes(self, shape: Shape) -> int:
        """What a program needs on a device beside its arguments and results."""
        return int(self[shape].memory_analysis().temp_size_in_bytes)

    def _get(self, shape: Shape) -> Any:
        kept = self._read(shape)
        if kept is None:
            with _compiled_here():
                kept = self.lower(shape).compile()
            self._write(shape, kept)
        with self._lock:
            self._made[shape] = kept
        return kept

    def lower(self, shape: Shape) -> Any:
        """The program before it is compiled."""
        params, state = self._abstract
        like = self.like(shape)
        words = jax.ShapeDtypeStruct(
            packed(like).shape, jnp.int32, sharding=self.sharding
        )
        if shape.kind == "step":
            program: Any = step_program(self._model, shape.variant, like)
        elif shape.kind == "decode":
            program = decode_program(self._model, shape.variant, like)
        else:
            program = embed_program(self._model, like)
        kept = self.state_shardings
        out = None if kept is None else (kept, self.sharding)
        jitted = jax.jit(self._traced(program), donate_argnums=1, out_shardings=out)
        return jitted.lower(params, state, words)

    def like(self, shape: Shape) -> Any:
        """Zeros as they are packed for this program."""
        room = self._room
        table = np.zeros((room.seats, room.context // room.page_size), np.int32)
        draw = rows_of_choices([], shape.variant, shape.draws, room)
        B, T = shape.rows, shape.tokens
        row_B = np.zeros((B,), np.int32)
        if shape.kind == "decode":
            rows = DecodeRows(seat_B=row_B, position_B=row_B, draw=draw)
            return table, rows, np.zeros((1,), np.int32)
        steps = StepRows(np.zeros((B, T), np.int32), row_B, row_B, row_B)
        return (table, steps) if shape.kind == "embed" else (table, steps, draw)

    def _name(self, shape: Shape) -> str:
        sizes = jax.tree.map(lambda x: (x.shape, str(x.dtype)), self._abstract)
        parts = (self._identity, shape, self._room, str(sizes))
        return f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}.program"

    def _read(self, shape: Shape) -> Any:
        name = self._name(shape)
        folders = (x for x in (self._ready_made, self._folder) if x is not None)
        path = next((x / name for x in folders if (x / name).is_file()), None)
        if path is None:
            return None
        try:
            digest, _, body = path.read_bytes().partition(b"\n")
            if hashlib.sha256(body).hexdigest().encode() != digest:
                raise ValueError("its checksum is another")
            code, given, made = pickle.loads(body)
            found = serialize_executable.deserialize_and_load(
                code, given, made, execution_devices=self._devices()
            )
        except Exception as problem:  # whatever a damaged file makes of itself
            from llmos_jax.telemetry import log

            log(f"{path.name} cannot be used ({problem}): compiling {shape} anew")
            return None
        self.loaded += 1
        return found

    def _devices(self) -> list[jax.Device]:
        if self.sharding is None:
            return jax.local_devices()[:1]
        return list(self.sharding.mesh.devices.flat)

    def _write(self, shape: Shape, program: Any) -> None:
        if self._folder is None:
            return
        path = self._folder / self._name(shape)
        body = pickle.dumps(serialize_executable.serialize(program))
        digest = hashlib.sha256(body).hexdigest().encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{threading.get_ident()}")
        beside.write_bytes(digest + b"\n" + body)
        beside.replace(path)


_compiling = 0
_cached_else = True
"""Whether JAX's cache is in use otherwise."""
_compiling_lock = threading.Lock()


@contextmanager
def _compiled_here() -> Iterator[None]:
    """Compile without JAX's persistent cache.

    XLA:CPU serializes what came out of that cache without its code: it loads again, and
    its first run says `Function ... not found` (jax 0.10.2).
    """
    _count_compiling(1)
    try:
        yield
    finally:
        _count_compiling(-1)


def _count_compiling(more: int) -> None:
    global _compiling, _cached_else
    with _compiling_lock:
        _compiling += more
        if _compiling == max(more, 0):  # the first one in, or the last one out
            if _compiling:
                _cached_else = bool(jax.config.values["jax_enable_compilation_cache"])
            jax.config.update(
                "jax_enable_compilation_cache", _cached_else and not _compiling
            )
            compilation_cache.reset_cache()  # JAX looks at it once


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        sharding = None
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
