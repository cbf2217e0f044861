"""Laws of attention over a cache, over every implementation; Pallas kernels in its
interpreter, and compiled for TPUs that are not here."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from laws import definition

from llmos_jax.errors import LowerError
from llmos_jax.hardware import parse_topology
from llmos_jax.kernels.attention import PLAIN, Score, rotate
from llmos_jax.kernels.decode_attention import (
    IMPLEMENTATIONS,
    WRITERS,
    cpu,
    decode_attention,
    pallas_tpu,
    write_tokens,
)
from llmos_jax.kernels.decode_attention.api import _fastest
from llmos_jax.kernels.target import Target, lowered_for
from llmos_jax.lowering.topologies import compile_devices

SHAPES = [(2, 1, 128, 4, 2, 16), (3, 4, 256, 6, 2, 8), (2, 70, 300, 6, 6, 20)]
"""B, T, S, N, K, H: a step, a few tokens, a chunk with odd sizes."""

SCORES = [PLAIN, Score(window=37, softcap=5.0, scale=0.3)]

RELATIVE = 2e-6
"""Of the largest entry, float32: other orders of sums, a polynomial for exp."""

BFLOAT16_RELATIVE = 2e-2
"""Weights and output are rounded to 8 bits."""


class Case(NamedTuple):
    """Queries at the end of random stretches of a cache."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    position: jax.Array
    scales: dict[str, jax.Array]

    def attend(self, implementation: str, score: Score = PLAIN) -> jax.Array:
        arrays = (self.q, self.k, self.v, self.position)
        return _attend(*arrays, self.scales, score, implementation)


@functools.partial(jax.jit, static_argnums=(5, 6))
def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    position: jax.Array,
    scales: dict[str, jax.Array],
    score: Score,
    name: str,
) -> jax.Array:
    return decode_attention(
        q, k, v, position, **scales, score=score, implementation=name
    )


@functools.cache
def case(shape: tuple[int, ...], kind: str) -> Case:
    B, T, S, N, K, H = shape
    random = np.random.default_rng(0)
    q = random.normal(size=(B, T, N, H))
    k, v = random.normal(size=(2, B, K, S, H))
    first = random.integers(0, S - T + 1, size=(B, 1))
    position = jnp.asarray(first + np.arange(T)[None, :], jnp.int32)
    if kind != "int8":
        q, k, v = (jnp.asarray(x, kind) for x in (q, k, v))
        return Case(q, k, v, position, {})
    whole = random.integers(-127, 128, size=(2, B, K, S, H)).astype(np.int8)
    scale = jnp.asarray(random.uniform(0.005, 0.02, size=(2, B, K, S)), jnp.float32)
    scales = {"k_scale_BKS": scale[0], "v_scale_BKS": scale[1]}
    return Case(jnp.asarray(q, jnp.float32), *jnp.asarray(whole), position, scales)


def assert_near(got: Any, expected: Any, relative: float = RELATIVE) -> None:
    got, expected = (np.asarray(x, np.float64) for x in (got, expected))
    most = np.max(np.abs(expected))
    np.testing.assert_allclose(got, expected, rtol=0, atol=relative * most)


@pytest.fixture(params=sorted(IMPLEMENTATIONS))
def implementation(request: pytest.FixtureRequest) -> str:
    """Each implementation; skipped, with the reason, where it cannot be had."""
    if request.param == "cpu" and (reason := cpu.unavailable()):
        pytest.skip(reason)
    return str(request.param)


def skip_unless_taken(implementation: str, shape: tuple[int, ...]) -> None:
    if implementation == "pallas_tpu" and (shape[1] > 8 or shape[2] % 128):
        pytest.skip("the TPU's kernel takes a few tokens, and whole blocks")


@pytest.mark.parametrize("score", SCORES, ids=["plain", "all"])
@pytest.mark.parametrize("kind", ["float32", "int8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_attention_to_what_the_cache_holds(
    shape: tuple[int, ...], kind: str, score: Score, implementation: str
) -> None:
    skip_unless_taken(implementation, shape)
    given = case(shape, kind)
    k, v = (np.asarray(x, np.float64) for x in (given.k, given.v))
    if given.scales:
        k = k * np.asarray(given.scales["k_scale_BKS"])[..., None]
        v = v * np.asarray(given.scales["v_scale_BKS"])[..., None]
    got = given.attend(implementation, score)
    keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)
    expected = definition(given.q, keys, values, given.position, score=score)
    assert got.dtype == given.q.dtype
    assert_near(got, expected)


@pytest.mark.parametrize("name", ["pallas_tpu", "xla"])
def test_bfloat16_is_near_float32(name: str) -> None:
    half = case(SHAPES[1], "bfloat16")
    got = half.attend(name)
    assert got.dtype == jnp.bfloat16
    assert_near(got, half.attend("reference"), BFLOAT16_RELATIVE)


def test_many_queries_pass_in_blocks() -> None:
    given = case((1, 520, 640, 2, 1, 8), "int8")
    assert_near(given.attend("xla"), given.attend("reference"))


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_a_layer_of_many_is_read_in_its_place(kind: str, implementation: str) -> None:
    given = case(SHAPES[0], kind)
    others = jax.tree.map(lambda x: jnp.stack([x + x, x, -x]), given)
    got = decode_attention(
        *(given.q, others.k, others.v, given.position),
        **others.scales,
        layer=jnp.int32(1),
        implementation=implementation,
    )
    assert_near(got, given.attend(implementation))


def test_garbage_past_the_position_is_not_seen(implementation: str) -> None:
    given = case(SHAPES[0], "float32")
    B, _, S, _, _, _ = SHAPES[0]
    past = np.arange(S)[None, :] > np.asarray(given.position)
    wild = jnp.where(past[:, None, :, None], 1e30, given.k)
    np.testing.assert_array_equal(
        given._replace(k=wild).attend(implementation), given.attend(implementation)
    )


def test_a_query_without_a_place_gives_numbers(implementation: str) -> None:
    given = case(SHAPES[0], "int8")
    got = given._replace(position=jnp.array([[-1], [500]])).attend(implementation)
    assert np.isfinite(np.asarray(got)).all()


def test_the_tpu_gets_its_kernel_for_a_few_tokens() -> None:
    def chosen(T: int, S: int, H: int) -> str:
        q, k = jnp.zeros((1, T, 2, H)), jnp.zeros((1, 1, S, H))
        with lowered_for(Target("tpu", 1)):
            return _fastest(q, k)

    assert chosen(1, 256, 128) == chosen(8, 256, 128) == "pallas_tpu"
    assert chosen(9, 256, 128) == chosen(1, 200, 128) == chosen(1, 256, 64) == "xla"
    assert _fastest(jnp.zeros((1, 1, 2, 128)), jnp.zeros((1, 1, 256, 128))) == "xla"


@pytest.mark.parametrize(
    ("S", "slot_bytes", "slots"),
    [(8192, 1024, 1024), (8192, 2048, 512), (384, 1024, 384), (2048, 2**20, 128)],
)
def test_a_block_divides_the_slots_and_fits(
    S: int, slot_bytes: int, slots: int
) -> None:
    assert pallas_tpu.block_slots(S, slot_bytes) == slots


# ------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
@pytest.mark.parametrize(
    ("writer", "T"), [(name, T) for name in sorted(WRITERS) for T in (1, 5)]
)
def test_tokens_are_written_where_they_stand_and_padding_nowhere(
    writer: str, T: int, dtype: Any
) -> None:
    L, B, K, S, H = 2, 5, 2, 256, 8
    random = np.random.default_rng(0)
    old = [random.integers(-9, 9, (L, B, K, S, H)), random.normal(size=(L, B, K, S))]
    new = [random.integers(-9, 9, (B, T, K, H)), random.normal(size=(B, T, K))]
    position = np.array([0, 254, -9, 300, 77])[:, None] + np.arange(T)
    expected = [x.copy() for x in old]
    for b, t in np.ndindex(B, T):
        if 0 <= position[b, t] < S:
            for x, tokens in zip(expected, new):
                x[1, b, :, position[b, t]] = tokens[b, t]
    given = [
        tuple(jnp.asarray(x, kind) for x, kind in zip(arrays, (dtype, jnp.float32)))
        for arrays in (old, new, expected)
    ]
    at = (jnp.asarray(position, jnp.int32), jnp.int32(1))
    got = write_tokens(given[0], given[1], *at, implementation=writer)
    for a, b in zip(got, given[2], strict=True):
        np.testing.assert_array_equal(a, b)


# ------------------------------------------------------------------ whole rows on a CPU

N, K, H = 6, 2, 16
C = (N + 2 * K) * H
Cache = tuple[jax.Array, ...]


@pytest.fixture
def built() -> None:
    if reason := cpu.unavailable():
        pytest.skip(reason)


def rows(count: int, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Projected rows, and the cos and sin of angles."""
    random = np.random.default_rng(seed)
    qkv = jnp.asarray(random.normal(size=(count, C)), jnp.float32)
    angle = random.uniform(0, 7, size=(count, H // 2))
    return qkv, *(jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin))


def blank(slots: int, S: int, kind: str) -> Cache:
    shape = (2, slots, K, S, H)
    arrays = (jnp.zeros(shape, kind), jnp.zeros(shape, kind))
    if kind != "int8":
        return arrays
    return *arrays, jnp.ones(shape[:-1]), jnp.ones(shape[:-1])


def run(
    given: tuple[jax.Array, ...],
    slots: Any,
    positions: Any,
    cache: Cache,
    norms: tuple[Any, Any] = (None, None),
    **options: Any,
) -> tuple[jax.Array, Cache]:
    return cpu.attend_rows(
        *(*given, *norms),
        *(jnp.asarray(x, jnp.int32) for x in (slots, positions)),
        *(cache, jnp.int32(1)),
        num_heads=N,
        num_kv_heads=K,
        **options,
    )


def hadamard(x: np.ndarray) -> np.ndarray:
    signs = np.ones((1, 1))
    while len(signs) < x.shape[-1]:
        signs = np.kron(np.array([[1, 1], [1, -1]]), signs)
    return x @ signs / np.sqrt(len(signs))


HEADS = Score(softcap=9.0, scale=0.4, window=9)
EPSILON = 1e-3
NORM = np.linspace(0.5, 2, H, dtype=np.float32)
"""Of queries; that of keys is its negative."""


def prepared(given: tuple[jax.Array, ...], rotate_keys: bool) -> list[np.ndarray]:
    """Normed and rotated q, k, and v: [1, m, heads, H]."""
    heads = given[0].reshape(1, -1, N + 2 * K, H)
    q, k, v = heads[:, :, :N], heads[:, :, N:-K], heads[:, :, -K:]
    turned = []
    for x, norm in ((q, NORM), (k, -NORM)):
        mean = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        normed = x * jax.lax.rsqrt(mean + EPSILON) * norm.reshape(1, 1, 1, H)
        x = np.asarray(rotate(normed, tuple(x[None] for x in given[1:])))
        turned.append(hadamard(x) if rotate_keys else x)
    return [*turned, np.asarray(v)]


def all_at_work(kind: str, rotate_keys: bool) -> tuple[Any, jax.Array, list[Any]]:
    """What should be attended, the output, and slot 2 of the cache, token by token."""
    m = 21
    given = rows(m)
    out, cache = run(
        *(given, [2] * m, range(m), blank(3, 40, kind), (NORM, -NORM)),
        norm_eps=EPSILON,
        rotate_keys=rotate_keys,
        score=HEADS._replace(window=None),
        window=jnp.int32(HEADS.window or 0),
    )
    slot = [np.asarray(x[1, 2, :, :m], np.float64).swapaxes(0, 1) for x in cache]
    return prepared(given, rotate_keys), out.reshape(1, m, N, H), slot


@pytest.mark.parametrize("rotate_keys", [False, True])
@pytest.mark.usefixtures("built")
def test_rows_are_normed_rotated_written_and_attended(rotate_keys: bool) -> None:
    (q, k, v), out, slot = all_at_work("float32", rotate_keys)
    for got, expected in zip(slot, (k, v), strict=True):
        assert_near(got, expected[0])
    assert_near(out, definition(q, k, v, np.arange(21)[None], score=HEADS))


@pytest.mark.parametrize("rotate_keys", [False, True])
@pytest.mark.usefixtures("built")
def test_int8_rows_are_rounded_and_then_attended(rotate_keys: bool) -> None:
    (q, k, v), out, slot = all_at_work("int8", rotate_keys)
    held = [x * scale[..., None] for x, scale in zip(slot[:2], slot[2:], strict=True)]
    for x, scale, back in zip((k, v), slot[2:], held, strict=True):
        assert_near(scale, np.abs(x[0]).max(-1) / 127)
        assert np.all(np.abs(back - x[0]) <= 0.5001 * scale[..., None])
    keys, values = (x[None] for x in held)
    expected = definition(q, keys, values, np.arange(21)[None], score=HEADS)
    assert_near(out, expected)


@pytest.mark.usefixtures("built")
def test_other_layers_and_slots_stay_as_they_are() -> None:
    _, cache = run(rows(5), [1] * 5, range(5), blank(3, 40, "int8"))
    for got, old in zip(cache, blank(3, 40, "int8"), strict=True):
        np.testing.assert_array_equal(got[0], old[0])
        np.testing.assert_array_equal(got[1, ::2], old[1, ::2])
        np.testing.assert_array_equal(got[1, 1, :, 5:], old[1, 1, :, 5:])
        assert np.any(got[1, 1, :, :5] != old[1, 1, :, :5])


@pytest.mark.parametrize(
    ("slot", "position"), [(-1, 3), (3, 3), (1, -1), (1, 40)], ids=str
)
@pytest.mark.usefixtures("built")
def test_a_padding_row_never_writes(slot: int, position: int) -> None:
    given = rows(3)
    slots, positions = [0, slot, 2], [0, position, 0]
    out, cache = run(given, slots, positions, blank(3, 40, "int8"))
    np.testing.assert_array_equal(out[1], 0)
    both = tuple(x[::2] for x in given)
    alone, others = run(both, slots[::2], [0, 0], blank(3, 40, "int8"))
    np.testing.assert_array_equal(out[::2], alone)
    jax.tree.map(np.testing.assert_array_equal, cache, others)


LONG = 700
"""Tokens of the longest sequence: three spans, the last of a few panels."""

WINDOWS = [None, 100]


def decoded(kind: str, window: int | None, chunks: list[int], slots: int) -> Any:
    """Outputs of one sequence in slot 0 as chunks come, each beside one token of every
    other sequence; and its part of the cache."""
    cache, outs, first = blank(slots, LONG + 4, kind), [], 0
    given, others = rows(LONG), rows(slots - 1, seed=1)
    sees = None if window is None else jnp.int32(window)
    for count in chunks:
        both = (
            jnp.concatenate([x[first : first + count], y])
            for x, y in zip(given, others, strict=True)
        )
        slot = [0] * count + list(range(1, slots))
        at = [*range(first, first + count), *[min(7 * first, LONG)] * (slots - 1)]
        out, cache = _jitted(tuple(both), *map(np.array, (slot, at)), cache, sees)
        outs.append(out[:count])
        first += count
    return jnp.concatenate(outs), [x[:, 0] for x in cache]


@functools.partial(jax.jit, donate_argnums=3)
def _jitted(given: Any, slot: Any, at: Any, cache: Any, window: Any) -> Any:
    return run(given, slot, at, cache, window=window)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kind", ["float32", "int8"])
@pytest.mark.usefixtures("built")
def test_a_row_gives_the_same_bits_in_any_chunk_and_batch(
    kind: str, window: int | None
) -> None:
    whole, cache = decoded(kind, window, [LONG], 1)
    for chunks, slots in (
        ([1] * 40 + [LONG - 40], 1),
        ([3, 250, 7, 200, 240], 9),
        ([511, *[1] * (LONG - 511)], 2),
        ([511, *[1] * 9, LONG - 520], 17),
    ):
        got, part = decoded(kind, window, chunks, slots)
        np.testing.assert_array_equal(got, whole)
        jax.tree.map(np.testing.assert_array_equal, part, cache)


_DIGEST = """
import hashlib, sys
sys.path[:0] = {path!r}
from test_decode_attention import LONG, decoded
chunks = [500, 1, LONG - 502, 1]
found = [decoded(kind, None, chunks, 3) for kind in ("float32", "int8")]
print(hashlib.sha256(b"".join(bytes(out) for out, _ in found)).hexdigest())
"""


@pytest.mark.usefixtures("built")
def test_any_number_of_threads_gives_the_same_bits() -> None:
    digests = set()
    folder = os.path.dirname(__file__)
    for threads in ("1", "5"):
        # XLA takes the size of its pool from NPROC.
        done = subprocess.run(
            [sys.executable, "-c", _DIGEST.format(path=[folder])],
            env={**os.environ, "NPROC": threads, "XLA_FLAGS": ""},
            capture_output=True,
            text=True,
            check=True,
        )
        digests.add(done.stdout.split()[-1])
    assert len(digests) == 1


@pytest.mark.usefixtures("built")
def test_the_cache_is_updated_in_place() -> None:
    def step(given: Any, cache: Cache) -> tuple[jax.Array, Cache]:
        def layer(i: jax.Array, carry: Any) -> Any:
            out, cache = run(
                (given[0] + carry[0][0, 0], *given[1:]), [0], [3], carry[1]
            )
            return out, cache

        return jax.lax.fori_loop(0, 2, layer, (jnp.zeros((1, N * H)), cache))

    cache = blank(2, 640, "int8")
    compiled = jax.jit(step, donate_argnums=1).lower(rows(1), cache).compile()
    size = sum(x.nbytes for x in cache)
    assert compiled.memory_analysis().alias_size_in_bytes == size
    copied = [line for line in compiled.as_text().splitlines() if " copy(s8" in line]
    assert not copied


@pytest.mark.usefixtures("built")
def test_a_bfloat16_cache_is_refused() -> None:
    with pytest.raises(LowerError, match="float32 and int8 caches, not bfloat16"):
        run(rows(1), [0], [0], blank(1, 8, "bfloat16"))


# ---------------------------------------------------------------- the compiler for TPUs


QUICK = [("v5e", 8, 8, 4, 2048, "int8"), ("tpu7x", 8, 1, 8, 2048, "bfloat16")]
"""Chip, B, K of a device, G, S, kind; H = 128, as in llama3_8b and llama3_70b."""

SLOW = [
    (chip, B, K, G, S, kind)
    for chip in ("v5e", "v5p", "v6e", "tpu7x")
    for kind in ("int8", "bfloat16")
    for B, K, G, S in ((8, 8, 8, 2048), (64, 2, 8, 4096), (32, 1, 8, 8192))
]


@pytest.mark.parametrize(
    "which",
    [*QUICK, *(pytest.param(which, marks=pytest.mark.slow) for which in SLOW)],
    ids=str,
)
def test_a_step_compiles_for_tpus_and_copies_no_cache(which: tuple[Any, ...]) -> None:
    pytest.importorskip("libtpu")
    chip, B, K, G, S, kind = which
    compiled = _step_for(chip, B, K, G, S, kind)
    text = compiled.as_text()
    assert text.count("tpu_custom_call") == 2, "one kernel writes, one attends"
    memory = compiled.memory_analysis()
    number = 1 if kind == "int8" else 2
    assert memory.alias_size_in_bytes >= 2 * 2 * B * K * S * 128 * number
    assert memory.temp_size_in_bytes < 4 * 2**20


def _step_for(chip: str, B: int, K: int, G: int, S: int, kind: str) -> Any:
    """Write one token of each sequence into a layer of two, then attend."""
    shape = {"v5p": "2x2x1", "tpu7x": "2x2x1"}.get(chip, "2x2")
    devices = compile_devices(parse_topology(f"{chip}:{shape}"))
    where = SingleDeviceSharding(devices[0])

    def abstract(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    cache = [abstract(kind, 2, B, K, S, 128)] * 2
    new = [abstract(kind, B, 1, K, 128)] * 2
    if kind == "int8":
        cache += [abstract("float32", 2, B, K, S)] * 2
        new += [abstract("float32", B, 1, K)] * 2

    def step(q: Any, cache: Any, new: Any, position: Any, layer: Any) -> Any:
        cache = write_tokens(tuple(cache), tuple(new), position, layer)
        k, v, *scales = cache
        names = dict(zip(("k_scale_BKS", "v_scale_BKS"), scales))
        return decode_attention(q, k, v, position, **names, layer=layer), cache

    q = abstract("bfloat16", B, 1, K * G, 128)
    at = (abstract("int32", B, 1), abstract("int32"))
    with lowered_for(Target("tpu", 1)):
        return jax.jit(step, donate_argnums=1).lower(q, cache, new, *at).compile()
