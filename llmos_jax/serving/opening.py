"""From a model with parameters to an engine: sizes, memory, programs, threads.

Memory is counted, not guessed: what a device has, less the reserve of plans, the
weights, the pool, and the most that a program needs besides, as the compiler says. The
rest is pages.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from llmos_jax.config.schema import ServeSection
from llmos_jax.errors import ConfigError
from llmos_jax.ir import ModelSpec, Plan, Topology
from llmos_jax.kernels.target import Target, lowered_for
from llmos_jax.lowering import MeshSharder, activation_spec, named, replicated
from llmos_jax.models import annotated_by
from llmos_jax.planner import budget
from llmos_jax.scheduling import FULL, Room, Work
from llmos_jax.serving.dispatch import Runner, empty_state
from llmos_jax.serving.engine import Engine, Options
from llmos_jax.serving.followers import wait_for_all
from llmos_jax.serving.forward import Forward, Weights
from llmos_jax.serving.programs import Programs
from llmos_jax.serving.shapes import Shape, all_shapes, batch_sizes, chunk_sizes
from llmos_jax.serving.steps import State

CPU_SHARE = 0.1
"""Of a CPU's free memory that pages take, where nobody says: other programs live there,
too, and zeros are written before the doors open. A judgement."""


class Placement(NamedTuple):
    """Where a model is split over devices."""

    plan: Plan
    mesh: jax.sharding.Mesh


class Opened(NamedTuple):
    """A model that is ready to be served."""

    spec: ModelSpec
    model: Forward
    weights: Weights
    topology: Topology
    placement: Placement | None = None
    """None: on one device."""


class ReadyMade(NamedTuple):
    """Programs that somebody compiled before."""

    folder: Path
    pages: int
    """That they are for."""


class Ready(NamedTuple):
    """What an engine, or one who follows it, runs."""

    runner: Runner
    room: Room
    prepare: Callable[[Callable[[], bool]], None]


def make_ready(
    opened: Opened,
    asked: ServeSection,
    *,
    guesses: bool,
    embeds: bool = True,
    identity: str = "",
    folder: Path | None = None,
    ready_made: ReadyMade | None = None,
    on_progress: Callable[[str], None] = lambda text: None,
) -> Ready:
    """Find out sizes, and return what is still to be prepared: compiled or loaded.

    Args:
        opened: the model.
        asked: sizes.
        guesses: whether sequences may guess.
        embeds: whether there are programs for embeddings.
        identity: what compiled programs depend on beside their shapes.
        folder: where compiled programs are kept; None: nowhere.
        ready_made: programs that a Bundle brought.
        on_progress: told what takes long.

    Raises:
        ConfigError: sizes that do not go together, or not even one
            sequence has room beside the weights.
    """
    make = functools.partial(
        _programs,
        opened,
        identity=identity,
        folder=folder,
        ready_made=ready_made and ready_made.folder,
    )
    room = _room(opened, asked)
    if ready_made is not None and _fits(opened, room, ready_made.pages):
        room = replace(room, pages=ready_made.pages)
    else:
        room = _with_pages(opened, asked, room, make)
    programs = make(room)
    shapes = list(all_shapes(room, guesses=guesses, embeds=embeds))

    def prepare(is_wanted: Callable[[], bool]) -> None:
        def tell(done: int, count: int) -> bool:
            if programs.loaded < done and (done == count or done % 4 == 0):
                on_progress(f"compiled {done} of {count} programs")
            return is_wanted()

        programs.compile_all(shapes, tell)
        programs.is_sealed = True
        wait_for_all()

    return Ready(Runner(opened.model, opened.weights, programs, room), room, prepare)


def open_engine(opened: Opened, ready: Ready, options: Options) -> Engine:
    """Return an engine that prepares itself, and then serves."""
    bandwidth = opened.topology.chip.hbm_bytes_per_s * _devices(opened)
    bytes_of = _bytes_of(opened, ready.room)
    flops_per_s = opened.topology.peak_flops_per_s("float32") * _devices(opened)

    def predict_step_s(work: Work) -> float:
        """By the roofline of the plan's machine: memory, or 2 N FLOPs a token."""
        steps = work.steps if work.kind == "decode" else 1
        tokens = steps * sum(part.count for part in work.parts)
        flops = 2.0 * opened.spec.num_params * tokens
        return max(bytes_of(work) / bandwidth, flops / flops_per_s)

    return Engine(
        ready.runner,
        ready.room,
        options,
        prepare=ready.prepare,
        predict_step_s=predict_step_s,
        bytes_of=bytes_of,
        planned_bandwidth=bandwidth,
    )


def _room(opened: Opened, asked: ServeSection) -> Room:
    """Sizes, with a page for each seat: what programs are first asked about."""
    size = opened.model.page_size
    context = min(asked.context or opened.spec.max_seq_len, opened.spec.max_seq_len)
    for name, value, least in (
        ("seats", asked.seats, 1),
        ("context", context, 2),
        ("step_tokens", asked.step_tokens, asked.seats),
    ):
        if value < least:
            raise ConfigError(
                f"serve.{name} is {value}; it must be at least {least}"
                f"{', the seats' if name == 'step_tokens' else ''}."
            )
    if asked.step_tokens & (asked.step_tokens - 1):
        raise ConfigError(
            f"serve.step_tokens is {asked.step_tokens}; it must be a power of two."
        )
    return Room(
        seats=asked.seats,
        pages=asked.seats,
        page_size=size,
        context=-(-context // size) * size,
        step_tokens=asked.step_tokens,
        vocab_size=opened.spec.vocab_size,
        is_ragged=opened.model.is_ragged,
    )


def _with_pages(
    opened: Opened,
    asked: ServeSection,
    room: Room,
    make: Callable[[Room], Programs],
) -> Room:
    """The room with as many pages as there is memory for."""
    page_bytes = _page_bytes(opened, room)
    per_seat = room.context // room.page_size
    if asked.cache_gib is not None:
        left = asked.cache_gib * 2.0**30
    else:
        free = _free_bytes(opened, room, make)
        left = free * (CPU_SHARE if _platform(opened) == "cpu" else 1.0)
    pages = min(int(left // page_bytes), room.seats * per_seat)
    if pages < per_seat:
        raise ConfigError(_no_room(room, page_bytes, left))
    return replace(room, pages=_rounded(pages))


def _fits(opened: Opened, room: Room, pages: int) -> bool:
    """Whether there is memory for so many pages beside the weights."""
    free = budget(opened.topology) - _weight_bytes(opened) - _pool_bytes(room)
    return pages * _page_bytes(opened, room) <= free


def _no_room(room: Room, page_bytes: float, left: float) -> str:
    gib = 2.0**30
    fits = max(0, int(left // page_bytes)) * room.page_size
    return (
        f"keys and values of one sequence of {room.context} tokens need "
        f"{room.context / room.page_size * page_bytes / gib:.2f} GiB, and "
        f"{max(left, 0.0) / gib:.2f} GiB are left for them. Set serve.context to "
        f"{fits} at most, serve.kv_dtype=int8, or more memory by serve.cache_gib."
    )


def _free_bytes(opened: Opened, room: Room, make: Callable[[Room], Programs]) -> float:
    """Bytes of a device that weights, pool and programs leave."""
    programs = make(room)
    temporary = max(programs.temporary_bytes(shape) for shape in _largest(room))
    used = _weight_bytes(opened) + temporary + _pool_bytes(room)
    return budget(opened.topology) - used


def _weight_bytes(opened: Opened) -> float:
    """On one device."""
    return sum(map(_bytes_on_device, jax.tree.leaves(opened.weights)))


def _pool_bytes(room: Room) -> float:
    return 4.0 * room.seats * room.context


def _largest(room: Room) -> list[Shape]:
    """The programs that need most: all that can be asked for, at the full size."""
    if room.is_ragged:
        return [Shape("step", room.step_tokens, 1, room.seats, FULL)]
    rows = batch_sizes(room)[-1]
    return [
        Shape("step", 1, chunk_sizes(room)[-1], 1, FULL),
        Shape("step", rows, 1, rows, FULL),
    ]


def _rounded(pages: int) -> int:
    """Down to three binary digits: a little more or less memory is no other program."""
    step = 1 << max(0, pages.bit_length() - 3)
    return pages // step * step


def _programs(
    opened: Opened,
    room: Room,
    *,
    identity: str,
    folder: Path | None,
    ready_made: Path | None,
) -> Programs:
    state = jax.eval_shape(lambda: empty_state(opened.model, room))
    keep = functools.partial(
        Programs, room=room, identity=identity, folder=folder, ready_made=ready_made
    )
    if opened.placement is None:
        return keep(opened.model, opened.weights, state)
    plan, mesh = opened.placement
    return keep(
        OnMesh(opened.model, replicated(mesh)),
        opened.weights,
        placed(state, plan, mesh),
        sharding=replicated(mesh),
        traced=_traced(plan, mesh),
    )


class OnMesh:
    """A model whose logits lie whole on every device, so that each chooses alike."""

    def __init__(self, model: Forward, whole: NamedSharding):
        self._model, self._whole = model, whole
        self.is_ragged, self.page_size = model.is_ragged, model.page_size
        self.forward, self.normed = model.forward, model.normed
        self.empty_cache, self.empty_pages = model.empty_cache, model.empty_pages

    def logits(self, params: Weights, x_BTD: jax.Array) -> jax.Array:
        logits_BTV = self._model.logits(params, x_BTD)
        return jax.lax.with_sharding_constraint(logits_BTV, self._whole)


def placed(state: State, plan: Plan, mesh: jax.sharding.Mesh) -> State:
    """Shapes of the state with shardings: pages split over heads, all else whole."""
    cache = state.cache._replace(table=jnp.zeros((1, 1), jnp.int32))
    arrays = {}
    for name, axes in zip(("k", "v", "k_scale", "v_scale"), cache.axes):
        x = getattr(cache, name)
        spec = activation_spec(plan, axes, x.shape)
        arrays[name] = _struct(x, named(mesh, spec))
    pool: Any = _struct(state.pool, replicated(mesh))
    return State(cache._replace(table=None, **arrays), pool)


def _struct(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _traced(
    plan: Plan, mesh: jax.sharding.Mesh
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    target = Target(mesh.devices.flat[0].platform, mesh.size)

    def under(function: Callable[..., Any]) -> Callable[..., Any]:
        def traced(*values: Any) -> Any:
            with annotated_by(MeshSharder(plan, mesh)), lowered_for(target):
                return function(*values)

        return traced

    return under


def _bytes_of(opened: Opened, room: Room) -> Callable[[Work], float]:
    """Bytes of weights and cache that a work reads, on all devices."""
    weights = float(sum(x.nbytes for x in jax.tree.leaves(opened.weights)))
    token = _page_bytes(opened, room, all_devices=True) / room.page_size

    def read(work: Work) -> float:
        steps = work.steps if work.kind == "decode" else 1
        places = sum(part.start + part.count for part in work.parts)
        return steps * (weights + places * token)

    return read


def _page_bytes(opened: Opened, room: Room, *, all_devices: bool = False) -> float:
    """Of one page, on one device."""
    state = jax.eval_shape(lambda: empty_state(opened.model, room))
    if opened.placement is not None and not all_devices:
        state = placed(state, *opened.placement)
    total = sum(_bytes_on_device(x) for x in jax.tree.leaves(state.cache))
    return total / room.pages


def _bytes_on_device(x: Any) -> float:
    shape = x.shape
    if isinstance(getattr(x, "sharding", None), NamedSharding):
        shape = x.sharding.shard_shape(shape)
    return math.prod(shape) * jnp.dtype(x.dtype).itemsize


def _devices(opened: Opened) -> int:
    return 1 if opened.placement is None else opened.placement.mesh.size


def _platform(opened: Opened) -> str:
    if opened.placement is None:
        return jax.default_backend()
    return str(opened.placement.mesh.devices.flat[0].platform)


def identity_of(*parts: object) -> str:
    """What programs depend on, this package's own source among it, as one word."""
    return hashlib.sha256(repr((parts, _source())).encode()).hexdigest()[:32]


@functools.cache
def _source() -> str:
    """A digest of all that programs are traced from."""
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parents[1]
    for path in sorted(package.rglob("*")):
        if path.suffix in (".py", ".cc", ".h", ".toml"):
            digest.update(path.read_bytes())
    return digest.hexdigest()
