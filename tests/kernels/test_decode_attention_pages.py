"""Laws of a cache in pages, over every implementation: it is the contiguous one, with
NaN past the last query and in pages that are not seen. Pallas kernels in their
interpreter, and compiled for TPUs that are not here."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from llmos_jax.hardware import parse_topology
from llmos_jax.kernels.attention import PLAIN, Score
from llmos_jax.kernels.decode_attention import (
    IMPLEMENTATIONS,
    WRITERS,
    cpu,
    decode_attention,
    pallas_tpu,
    write_tokens,
)
from llmos_jax.kernels.target import Target, lowered_for
from llmos_jax.lowering.topologies import compile_devices

SHAPES = [(3, 1, 3, 128, 4, 2, 16), (2, 4, 2, 128, 6, 2, 8), (2, 70, 5, 64, 6, 6, 20)]
"""B, T, M, C, N, K, H: a step, a few tokens, a chunk."""

SCORES = [PLAIN, Score(window=37, softcap=5.0, scale=0.3)]

RELATIVE = 2e-6
"""Of the largest entry, float32: other blocks, so another order of sums."""

BFLOAT16_RELATIVE = 2e-2
"""Weights and output are rounded to 8 bits."""

EXACT = ("xla", "reference")
"""They gather pages and go on as with a contiguous cache: the same bits."""

Arrays = list[np.ndarray]


class Case(NamedTuple):
    """One cache, contiguous and in pages."""

    q: jax.Array
    position: np.ndarray
    flat: Arrays
    """k, v and, of int8, their scales: [B, K, S, ...]."""
    paged: Arrays
    """[P, K, C, ...]"""
    table: np.ndarray

    def attend(self, name: str, score: Score) -> np.ndarray:
        return _attend(self.q, self.paged, self.position, self.table, score, name)

    def attend_flat(self, name: str, score: Score) -> np.ndarray:
        return _attend(self.q, self.flat, self.position, None, score, name)


def _attend(
    q: jax.Array, arrays: Arrays, position: Any, table: Any, score: Score, name: str
) -> np.ndarray:
    return np.asarray(_compiled(q, arrays, position, table, score, name))


@functools.partial(jax.jit, static_argnums=(4, 5))
def _compiled(
    q: jax.Array, arrays: Any, position: Any, table: Any, score: Score, name: str
) -> jax.Array:
    k, v, *scales = map(jnp.asarray, arrays)
    return decode_attention(
        *(q, k, v, position),
        **dict(zip(("k_scale_BKS", "v_scale_BKS"), scales)),
        table_BM=table,
        score=score,
        implementation=name,
    )


@functools.cache
def case(shape: tuple[int, ...], kind: str, window: int | None = None) -> Case:
    B, T, M, C, N, K, H = shape
    random = np.random.default_rng(0)
    q = jnp.asarray(random.normal(size=(B, T, N, H)), _float_of(kind))
    first = random.integers(0, M * C - T + 1, size=(B, 1))
    position = (first + np.arange(T)[None, :]).astype(np.int32)
    flat = filled(random, (2, B, K, M * C, H), kind)
    span = first, position[:, -1:]
    return Case(q, position, flat, *cut(random, flat, span, window, (M, C)))


def _float_of(kind: str) -> str:
    return "float32" if kind == "int8" else kind


def filled(random: Any, shape: tuple[int, ...], kind: str) -> Arrays:
    if kind != "int8":
        return [np.asarray(jnp.asarray(x, kind)) for x in random.normal(size=shape)]
    whole = random.integers(-127, 128, size=shape).astype(np.int8)
    scale = random.uniform(0.005, 0.02, size=shape[:-1]).astype(np.float32)
    return [*whole, *scale]


def cut(
    random: Any, flat: Arrays, span: Any, window: int | None, size: tuple[int, int]
) -> tuple[Arrays, np.ndarray]:
    """Pages in any order, with some of nobody; and their table, with no page, or
    anybody's, where nothing is seen."""
    (M, C), B = size, len(flat[0])
    begin = 0 * span[0] if window is None else (span[0] - window + 1) // C * C
    at = np.arange(M * C)[None, :]
    is_seen = (at >= begin) & (at <= span[1])
    P = B * M + 3
    table = random.permutation(P)[: B * M].reshape(B, M).astype(np.int32)
    paged = []
    for x in flat:
        nothing = np.nan if x.dtype != np.int8 else 99
        pages = np.full((P, x.shape[1], C, *x.shape[3:]), nothing, x.dtype)
        for b, m in np.ndindex(B, M):
            of_page = is_seen[b, m * C : (m + 1) * C]
            part = x[b, :, m * C : (m + 1) * C]
            pages[table[b, m]][:, of_page] = part[:, of_page]
        paged.append(pages)
    has_seen = is_seen.reshape(B, M, C).any(2)
    others = random.choice([-1, P, P + 9, table[-1, -1]], size=(B, M))
    return paged, np.where(has_seen, table, others).astype(np.int32)


@pytest.fixture(params=sorted(IMPLEMENTATIONS))
def implementation(request: pytest.FixtureRequest) -> str:
    """Each implementation; skipped, with the reason, where it cannot be had."""
    if request.param == "cpu" and (reason := cpu.unavailable()):
        pytest.skip(reason)
    return str(request.param)


def skip_unless_taken(implementation: str, shape: tuple[int, ...]) -> None:
    if implementation == "pallas_tpu" and (shape[1] > 8 or shape[3] % 128):
        pytest.skip("the TPU's kernel takes a few tokens, and pages of whole registers")


def assert_near(got: Any, expected: Any, relative: float = RELATIVE) -> None:
    got, expected = (np.asarray(x, np.float64) for x in (got, expected))
    most = np.max(np.abs(expected))
    np.testing.assert_allclose(got, expected, rtol=0, atol=relative * most)


# ------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("score", SCORES, ids=["plain", "all"])
@pytest.mark.parametrize("kind", ["float32", "int8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pages_are_the_contiguous_cache_as_far_as_it_is_seen(
    shape: tuple[int, ...], kind: str, score: Score, implementation: str
) -> None:
    skip_unless_taken(implementation, shape)
    given = case(shape, kind, score.window)
    got = given.attend(implementation, score)
    if implementation in EXACT:
        np.testing.assert_array_equal(got, given.attend_flat(implementation, score))
    assert_near(got, given.attend_flat("reference", score))


@pytest.mark.parametrize("name", ["pallas_tpu", "xla"])
def test_bfloat16_pages_are_near_float32(name: str) -> None:
    given = case(SHAPES[1], "bfloat16", 37)
    got = given.attend(name, SCORES[1])
    assert_near(got, given.attend_flat("reference", SCORES[1]), BFLOAT16_RELATIVE)


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_a_long_chunk_passes_in_blocks(kind: str) -> None:
    given = case((1, 520, 41, 16, 2, 1, 8), kind)
    got = given.attend("xla", PLAIN)
    np.testing.assert_array_equal(got, given.attend_flat("xla", PLAIN))


def test_pages_of_any_size_will_do_for_xla() -> None:
    given = case((2, 3, 7, 5, 4, 2, 6), "int8", 37)
    got = given.attend("xla", SCORES[1])
    np.testing.assert_array_equal(got, given.attend_flat("xla", SCORES[1]))


def test_sequences_may_share_pages(implementation: str) -> None:
    given = case(SHAPES[0], "float32")
    B, S = 3, given.flat[0].shape[2]
    position = np.array([[S - 1], [S - 1], [40]], np.int32)
    pages = [np.concatenate([*np.split(x, 3, axis=2)]) for x in given.flat]
    table = np.array([[0, 3, 6], [0, 3, 7], [3, -1, -1]], np.int32)
    got = _attend(given.q, pages, position, table, PLAIN, implementation)
    flat = [
        np.stack([np.concatenate(list(x[table[b]]), axis=1) for b in range(B)])
        for x in pages
    ]
    expected = _attend(given.q, flat, position, None, PLAIN, "reference")
    assert_near(got, expected)


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_a_broken_sequence_fails_alone(kind: str, implementation: str) -> None:
    given = case(SHAPES[0], kind)
    whole = given.attend(implementation, PLAIN)
    page, place = given.table[1, 0], 0
    assert np.all(given.position[1] >= place)
    for x in given.paged:
        if x.dtype == np.int8:
            continue
        broken = x.copy()
        broken[page, :, place] = np.nan
        arrays = [broken if y is x else y for y in given.paged]
        got = given._replace(paged=arrays).attend(implementation, PLAIN)
        assert np.isnan(got[1]).all()
        np.testing.assert_array_equal(got[::2], whole[::2])


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_padding_in_a_chunk_changes_nothing(kind: str, implementation: str) -> None:
    given = case(SHAPES[1], kind)
    M, C = SHAPES[1][2:4]
    position = given.position.copy()
    first = np.array([100, 40])
    position[:] = first[:, None] + np.arange(4)
    position[:, 2:] = [[M * C, M * C + 1], [C + 5, C + 6]]
    table = np.array([[0, 1], [2, -1]], np.int32)
    paged = []
    for x in given.flat:
        pages = np.stack([x[0, :, :C], x[0, :, C:], x[1, :, :C]])
        if pages.dtype != np.int8:
            pages[0, :, 102:] = pages[1] = pages[2, :, 42:] = np.nan
        paged.append(pages)
    got = _attend(given.q, paged, position, table, PLAIN, implementation)
    flat = [
        np.nan_to_num(x[[0, 2]]) if x.dtype != np.int8 else x[[0, 2]] for x in paged
    ]
    expected = _attend(given.q[:, :2], flat, position[:, :2], None, PLAIN, "reference")
    assert_near(got[:, :2], expected)


@pytest.mark.parametrize("position", [-1, 10**6])
def test_a_query_without_a_place_gives_numbers(
    position: int, implementation: str
) -> None:
    given = case(SHAPES[0], "int8")
    nothing = [np.full_like(x, np.nan) if x.ndim == 3 else x for x in given.paged]
    at = np.full((3, 1), position, np.int32)
    for table in (given.table, np.full_like(given.table, -1)):
        got = _attend(given.q, nothing, at, table, PLAIN, implementation)
        assert np.isfinite(got).all()


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_a_layer_of_many_is_read_in_its_place(kind: str, implementation: str) -> None:
    given = case(SHAPES[0], kind)
    k, v, *scales = (jnp.stack([x + x, x, -x]) for x in map(jnp.asarray, given.paged))
    got = decode_attention(
        *(given.q, k, v, jnp.asarray(given.position)),
        **dict(zip(("k_scale_BKS", "v_scale_BKS"), scales)),
        layer=jnp.int32(1),
        table_BM=jnp.asarray(given.table),
        implementation=implementation,
    )
    assert_near(got, given.attend(implementation, PLAIN))


# ------------------------------------------------------------------------------ writing

TABLES = {
    "all": [[5, 1], [0, 7], [2, 3], [8, 6]],
    "first-missing": [[-1, 9], [-5, 1], [2, 3], [0, 6]],
    "middle-missing": [[5, 1], [9, 9], [-1, -1], [8, 6]],
    "none": [[-1, 9], [9, -1], [-1, -1], [77, -9]],
}
"""Of four sequences, in a pool of nine pages."""


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize(
    ("writer", "T"),
    [*((name, T) for name in sorted(WRITERS) for T in (1, 5)), ("xla", 200)],
)
def test_tokens_are_written_to_their_pages_and_nowhere_else(
    writer: str, T: int, dtype: str, table: str
) -> None:
    L, B, P, K, C, H = 2, 4, 9, 2, 128, 8
    random = np.random.default_rng(0)
    old = [random.integers(-9, 9, (L, P, K, C, H)), random.normal(size=(L, P, K, C))]
    new = [random.integers(-9, 9, (B, T, K, H)), random.normal(size=(B, T, K))]
    rows, position = np.array(TABLES[table]), np.array([[126], [0], [-3], [253]])
    position = position + np.arange(T)
    expected = [x.copy() for x in old]
    for b, t in np.ndindex(B, T):
        place = position[b, t]
        if 0 <= place < 2 * C and 0 <= (page := rows[b, place // C]) < P:
            for x, tokens in zip(expected, new, strict=True):
                x[1, page, :, place % C] = tokens[b, t]
    kinds = (dtype, "float32")
    arrays = [
        tuple(jnp.asarray(x, kind) for x, kind in zip(some, kinds, strict=True))
        for some in (old, new, expected)
    ]
    got = write_tokens(
        *(arrays[0], arrays[1], jnp.asarray(position, jnp.int32), jnp.int32(1)),
        table_BM=jnp.asarray(rows, jnp.int32),
        implementation=writer,
    )
    for a, b in zip(got, arrays[2], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("table", TABLES)
def test_a_step_without_a_page_repeats_its_neighbour(table: str) -> None:
    rows = np.array(TABLES[table], np.int32)
    k = jax.ShapeDtypeStruct((1, 9, 1, 128, 8), jnp.float32)
    position = jnp.array([[126], [0], [3], [253]])
    page, slot, source = pallas_tpu._pages_written(position, jnp.asarray(rows), k)
    for b in range(1, 4):
        if source[b] != b:
            assert page[b] == page[b - 1] and slot[b] == slot[b - 1]
    has_page = [0 <= rows[b, int(position[b, 0]) // 128] < 9 for b in range(4)]
    own = [b for b in range(4) if source[b] == b and slot[b] >= 0]
    assert own == [b for b in range(4) if has_page[b]]


# ---------------------------------------------------------------- the compiler for TPUs

QUICK = [("v5e", 8, 8, 8, "int8", 1)]
"""Chip, B, K of a device, G, kind, T; H = 128: llama3_70b has K = 8, G = 8, or of 16
devices one key/value head (each kept twice) and four query heads."""

SLOW = [
    (chip, 32, *heads, kind, T)
    for chip in ("v5e", "v5p", "v6e")
    for heads in ((8, 8), (1, 4))
    for kind in ("int8", "bfloat16")
    for T in (1, 4, 256)
]

C, P, M = 128, 4097, 64
"""So many pages are too large for VMEM."""


@pytest.mark.parametrize(
    "which",
    [*QUICK, *(pytest.param(which, marks=pytest.mark.slow) for which in SLOW)],
    ids=str,
)
def test_a_step_compiles_for_tpus_and_copies_no_pages(which: tuple[Any, ...]) -> None:
    pytest.importorskip("libtpu")
    chip, B, K, G, kind, T = which
    B = 1 if T == 256 else B
    compiled = _step_for(chip, B, K, G, kind, T)
    kernels = compiled.as_text().count("tpu_custom_call")
    assert kernels == {1: 2, 4: 5, 256: 0}[T], "one for each token writes, one attends"
    memory = compiled.memory_analysis()
    number = 1 if kind == "int8" else 2
    assert memory.alias_size_in_bytes >= 2 * 2 * P * K * C * 128 * number
    assert memory.temp_size_in_bytes < _most_bytes(T, K, G)


def _most_bytes(T: int, K: int, G: int) -> int:
    """Of a chunk: scores, and a sequence's keys and values in float32. Far less than a
    copy of all keys takes."""
    if T < 256:
        return 4 * 2**20
    return 4 * (K * G * T * M * C + 2 * K * M * C * 128) + 2**24


def _step_for(chip: str, B: int, K: int, G: int, kind: str, T: int) -> Any:
    """Write tokens of each sequence into a layer of two, then attend."""
    shape = {"v5p": "2x2x1"}.get(chip, "2x2")
    devices = compile_devices(parse_topology(f"{chip}:{shape}"))
    where = SingleDeviceSharding(devices[0])

    def abstract(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    cache = [abstract(kind, 2, P, K, C, 128)] * 2
    new = [abstract(kind, B, T, K, 128)] * 2
    if kind == "int8":
        cache += [abstract("float32", 2, P, K, C)] * 2
        new += [abstract("float32", B, T, K)] * 2

    def step(
        q: Any, cache: Any, new: Any, position: Any, table: Any, layer: Any
    ) -> Any:
        cache = write_tokens(
            *(tuple(cache), tuple(new), position, layer), table_BM=table
        )
        k, v, *scales = cache
        names = dict(zip(("k_scale_BKS", "v_scale_BKS"), scales))
        out = decode_attention(q, k, v, position, **names, layer=layer, table_BM=table)
        return out, cache

    q = abstract("bfloat16", B, T, K * G, 128)
    at = (abstract("int32", B, T), abstract("int32", B, M), abstract("int32"))
    with lowered_for(Target("tpu", 1)):
        return jax.jit(step, donate_argnums=1).lower(q, cache, new, *at).compile()
