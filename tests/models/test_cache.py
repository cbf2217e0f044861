"""The KV cache: every sequence in its own place, rounded or not, on one device or
many."""

from __future__ import annotations

import functools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from llmos_jax.errors import ConfigError
from llmos_jax.ir import MESH_AXES, MeshShape, ModelSpec, Rules
from llmos_jax.lowering import MeshSharder
from llmos_jax.models import annotated_by, empty_cache, empty_pages, skeleton
from llmos_jax.models.attention import Attention, Sight
from llmos_jax.models.cache import KVCache, RotatedKVCache, quantized, rotated, written

RELATIVE = 1e-4
"""Of the largest logit: float32 sums in another order, through two layers."""

INT8_RELATIVE = 3e-2
"""Of the largest logit: keys and values of 8 bits, through two layers."""

S = 32


def near(got: Any, expected: Any, relative: float = RELATIVE) -> None:
    most = float(jnp.max(jnp.abs(expected)))
    np.testing.assert_allclose(got, expected, rtol=0, atol=relative * most)


class Compiled:
    """A model in two functions, jitted."""

    def __init__(self, spec: ModelSpec):
        found = skeleton(spec)
        params = jax.jit(found.init)(jax.random.key(0))
        self._whole = jax.jit(lambda params, tokens: found.bind(params)(tokens))
        self._step = jax.jit(functools.partial(self._made, found))
        self._params = params

    @staticmethod
    def _made(found: Any, params: Any, *given: Any) -> tuple[jax.Array, KVCache]:
        model = found.bind(params)
        x_BTD, cache = model.features(*given)
        return model.logits(x_BTD), cache

    def whole(self, tokens_BT: jax.Array) -> jax.Array:
        return self._whole(self._params, tokens_BT)

    def step(self, *given: Any) -> tuple[jax.Array, KVCache]:
        """Tokens, positions and a cache to logits and the cache."""
        return self._step(self._params, *given)


@pytest.fixture(scope="module")
def model(tiny: ModelSpec) -> Compiled:
    return Compiled(tiny)


@pytest.fixture(scope="module")
def tokens_BT(tiny: ModelSpec) -> jax.Array:
    return jax.random.randint(jax.random.key(1), (2, 20), 0, tiny.vocab_size)


def through(
    model: Compiled, tokens_BT: jax.Array, cache: KVCache, pieces: list[int]
) -> tuple[jax.Array, KVCache]:
    """Logits of tokens that come in pieces."""
    found, first = [], 0
    for T in pieces:
        position = jnp.arange(first, first + T)
        position_BT = jnp.broadcast_to(position[None], (len(tokens_BT), T))
        logits, cache = model.step(tokens_BT[:, first : first + T], position_BT, cache)
        found.append(logits)
        first += T
    return jnp.concatenate(found, axis=1), cache


# ------------------------------------------------------------------------------ numbers


def test_int8_rows_have_a_scale_each_and_zeros_have_one() -> None:
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 8)).at[0, 1, 2].set(0)
    whole, scale = quantized(x)
    assert whole.dtype == jnp.int8 and scale.shape == (2, 3, 4)
    assert scale[0, 1, 2] == 1
    back = whole.astype(jnp.float32) * scale[..., None]
    assert np.all(np.abs(whole).max(-1)[scale != 1] == 127)
    assert np.all(np.abs(back - x) <= 0.5001 * scale[..., None])


def test_rotation_is_orthonormal() -> None:
    eye = jnp.eye(16)[None, :, None, :]
    matrix = rotated(eye)[0, :, 0]
    near(matrix @ matrix.T, jnp.eye(16), 1e-6)
    np.testing.assert_allclose(jnp.abs(matrix), 0.25, rtol=1e-6)


def test_heads_that_cannot_be_rotated_are_one_line(tiny: ModelSpec) -> None:
    odd = replace(tiny, head_dim=24)
    with pytest.raises(ConfigError, match="has heads of 24. Keep them as they are"):
        empty_cache(odd, 1, 8, "int8", rotate_keys=True)


def test_a_cache_stays_rotated_wherever_it_goes(tiny: ModelSpec) -> None:
    cache = empty_cache(tiny, 1, 8, "int8", rotate_keys=True)
    out = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf, x))(cache)
    assert isinstance(out, RotatedKVCache) and out.rotate_keys
    assert not empty_cache(tiny, 1, 8, "int8").rotate_keys


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_an_empty_cache_has_layers_sequences_heads_slots(
    tiny: ModelSpec, dtype: str
) -> None:
    cache = empty_cache(tiny, 3, 8, dtype)
    shape = (tiny.num_layers, 3, tiny.num_kv_heads, 8, tiny.head_dim)
    shapes = [shape, shape] + [shape[:-1]] * (2 if dtype == "int8" else 0)
    assert [x.shape for x in cache.arrays] == shapes
    assert cache.k.dtype == dtype


def test_each_sequence_is_written_at_its_own_place() -> None:
    zeros = jnp.zeros((3, 2, 8, 4))
    new = jax.random.normal(jax.random.key(0), (3, 2, 2, 4))
    position = jnp.array([[0, 1], [5, 6], [7, 8]])
    cache = written(KVCache(zeros, zeros), new, -new, position)
    expected = np.zeros(zeros.shape, np.float32)
    for b, first in enumerate((0, 5, 7)):
        count = min(2, 8 - first)
        expected[b, :, first : first + count] = new[b, :count].swapaxes(0, 1)
    np.testing.assert_array_equal(cache.k, expected)
    np.testing.assert_array_equal(cache.v, -expected)


# ------------------------------------------------------------------------------- models


def test_sequences_of_other_lengths_decode_side_by_side(
    tiny: ModelSpec, model: Compiled, tokens_BT: jax.Array
) -> None:
    expected_BTV = model.whole(tokens_BT)
    cache = empty_cache(tiny, 2, S, jnp.float32)
    _, cache = through(model, tokens_BT, cache, [9])
    # The second goes back to its sixth token; what it wrote after that is not seen.
    for step in range(4):
        position_B1 = jnp.array([[9], [5]]) + step
        token_B1 = jnp.take_along_axis(tokens_BT, position_B1, axis=1)
        logits, cache = model.step(token_B1, position_B1, cache)
        near(
            logits[:, 0],
            jnp.stack([expected_BTV[0, 9 + step], expected_BTV[1, 5 + step]]),
        )


@pytest.mark.parametrize("rotate_keys", [False, True])
def test_an_int8_cache_costs_little(
    tiny: ModelSpec, model: Compiled, tokens_BT: jax.Array, rotate_keys: bool
) -> None:
    cache = empty_cache(tiny, 2, S, "int8", rotate_keys=rotate_keys)
    got, _ = through(model, tokens_BT, cache, [12, 8])
    expected = model.whole(tokens_BT)
    near(got, expected, INT8_RELATIVE)
    assert np.any(np.asarray(got) != np.asarray(expected))


def test_rotated_keys_give_the_same_products(
    tiny: ModelSpec, model: Compiled, tokens_BT: jax.Array
) -> None:
    plain = empty_cache(tiny, 2, S, jnp.float32)
    turned = empty_cache(tiny, 2, S, jnp.float32, rotate_keys=True)
    expected, kept = through(model, tokens_BT, plain, [12, 8])
    got, other = through(model, tokens_BT, turned, [12, 8])
    near(got, expected)
    assert np.abs(kept.k - other.k).max() > 0.1


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_a_prompt_gives_the_same_whole_and_in_pieces(
    tiny: ModelSpec, model: Compiled, tokens_BT: jax.Array, dtype: str
) -> None:
    cache = empty_cache(tiny, 2, S, dtype)
    expected, whole_cache = model.step(tokens_BT, None, cache)
    got, pieces_cache = through(model, tokens_BT, cache, [12, 8])
    near(got, expected)
    # The first layer's; later ones may round to another neighbour.
    np.testing.assert_array_equal(whole_cache.k[0], pieces_cache.k[0])


def test_a_whole_prompt_fills_a_cache_that_it_need_not_read(
    tiny: ModelSpec, model: Compiled, tokens_BT: jax.Array
) -> None:
    cache = empty_cache(tiny, 2, S, jnp.float32)
    got, filled = model.step(tokens_BT, None, cache)
    near(got, model.whole(tokens_BT), 1e-6)
    _, expected = through(model, tokens_BT, cache, [20])
    near(filled.k, expected.k)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_model_finds_its_tokens_in_pages(
    tiny: ModelSpec, model: Compiled, tokens_BT: jax.Array, dtype: str
) -> None:
    plain = empty_cache(tiny, 2, S, dtype)
    expected, kept = through(model, tokens_BT, plain, [12, 7, 1])
    pages = empty_pages(tiny, 6, 8, dtype)._replace(table=TABLE)
    got, cache = through(model, tokens_BT, pages, [12, 7, 1])
    near(got, expected, 1e-6)
    assert cache.table is not None
    np.testing.assert_array_equal(cache.table, TABLE)
    for x, y in zip(flat(cache).arrays, kept.arrays, strict=True):
        near(x[:, :, :, :20].astype(jnp.float32), y[:, :, :, :20], 1e-6)


TABLE = jnp.array([[4, 1, 0, -1], [2, 5, 3, 9]], jnp.int32)
"""Of two sequences of at most 32 tokens in 6 pages of 8."""


def flat(cache: KVCache) -> KVCache:
    """The contiguous cache of the same sequences; where no page is, any."""
    table = cache.table
    assert table is not None

    def of_sequences(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x[:, jnp.clip(table, 0, x.shape[1] - 1)], 3, 2)
        return x.reshape(*x.shape[:3], -1, *x.shape[5:])

    made = dict(zip(KVCache._fields, map(of_sequences, cache.arrays)))
    return cache._replace(**made, table=None)


# ------------------------------------------------------------------------------- layers

RULES = Rules(
    family="test",
    weights={},
    activations={
        "batch": ("fsdp",),
        "seq": (),
        "heads": ("tensor",),
        "kv_heads": ("tensor",),
        "head_dim": (),
    },
    uneven="replicate",
)


def layer_of(spec: ModelSpec) -> tuple[Any, Any]:
    """Attention with weights from numpy: drawing them takes a second to compile."""
    with nnx.use_eager_sharding(False):
        made = nnx.eval_shape(lambda: Attention(spec, rngs=nnx.Rngs(0)))
    graph, shapes = nnx.split(made)
    random = np.random.default_rng(0)
    return graph, jax.tree.map(
        lambda x: jnp.asarray(0.2 * random.normal(size=x.shape), x.dtype), shapes
    )


def attended(
    spec: ModelSpec, cache: KVCache, T: int, sharder: MeshSharder | None = None
) -> tuple[jax.Array, KVCache]:
    """One layer's attention of `T` tokens of four sequences, with others before."""
    x_BTD = jax.random.normal(jax.random.key(2), (4, T, spec.embed_dim))
    position_BT = jnp.array([[3], [0], [7], [9]]) + jnp.arange(T)[None, :]
    angle = jnp.ones((4, T, spec.head_dim // 2))

    graph, state = layer_of(spec)

    def run(x_BTD: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        layer = nnx.merge(graph, state)
        sight = Sight(position_BT, (jnp.cos(angle), jnp.sin(angle)))
        return layer(x_BTD, sight, cache)

    if sharder is None:
        return jax.jit(run)(x_BTD, cache)
    with annotated_by(sharder):
        return jax.jit(run)(x_BTD, cache)


def filled(spec: ModelSpec, dtype: str, *, rotate_keys: bool = False) -> KVCache:
    """A cache of four sequences in which something stands."""
    cache = empty_cache(spec, 4, 16, dtype, rotate_keys=rotate_keys)
    keys = jax.random.split(jax.random.key(3), 2)
    noise = [jax.random.normal(key, x.shape) for key, x in zip(keys, cache.arrays)]
    if dtype != "int8":
        return cache._replace(k=noise[0], v=noise[1])
    (k, k_scale), (v, v_scale) = (quantized(x) for x in noise)
    return cache._replace(k=k, v=v, k_scale=k_scale, v_scale=v_scale)


def share(cache: KVCache, layer: int) -> KVCache:
    return jax.tree.map(lambda x: x[layer], cache)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_layer_writes_and_reads_its_part_of_the_whole(
    tiny: ModelSpec, dtype: str
) -> None:
    cache = filled(tiny, dtype, rotate_keys=True)
    out, part = attended(tiny, share(cache, 1), 2)
    got, whole = attended(tiny, cache._replace(layer=jnp.int32(1)), 2)
    np.testing.assert_array_equal(got, out)
    whole = whole._replace(layer=None)
    jax.tree.map(np.testing.assert_array_equal, share(whole, 1), part)
    jax.tree.map(np.testing.assert_array_equal, share(whole, 0), share(cache, 0))


def mesh_of(sizes: dict[str, int]) -> MeshSharder:
    shape = MeshShape(**sizes)
    devices = np.array(jax.devices()[: shape.num_devices])
    mesh = Mesh(devices.reshape([shape.sizes[axis] for axis in MESH_AXES]), MESH_AXES)
    return MeshSharder(SimpleNamespace(rules=RULES, mesh=shape), mesh)


def in_pages(cache: KVCache) -> KVCache:
    """The same cache of four sequences of 16 tokens in pages of 4, the last first."""
    table = jnp.arange(16, dtype=jnp.int32)[::-1].reshape(4, 4)

    def cut(x: jax.Array) -> jax.Array:
        L, B, K, S = x.shape[:4]
        pages = jnp.moveaxis(x.reshape(L, B, K, 4, S // 4, *x.shape[4:]), 3, 2)
        return pages.reshape(L, 16, K, S // 4, *x.shape[4:])[:, ::-1]

    made = dict(zip(KVCache._fields, map(cut, cache.arrays)))
    return cache._replace(**made, table=table)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_layer_sees_the_same_in_pages(tiny: ModelSpec, dtype: str) -> None:
    cache = filled(tiny, dtype, rotate_keys=True)._replace(layer=jnp.int32(1))
    out, kept = attended(tiny, cache, 2)
    got, paged = attended(tiny, in_pages(cache), 2)
    np.testing.assert_array_equal(got, out)
    assert isinstance(paged, RotatedKVCache)
    for a, b in zip(flat(paged).arrays, kept.arrays, strict=True):
        np.testing.assert_array_equal(a, b)


LAYOUTS = {
    "alike": (8, 4, {"fsdp": 2, "tensor": 4}),
    "few-kv-heads": (8, 2, {"fsdp": 2, "tensor": 4}),
    "uneven-kv-heads": (12, 6, {"tensor": 4}),
}
"""Query heads, key/value heads, mesh."""

QUICK = [("alike", "int8", 1), ("few-kv-heads", "int8", 3)]
QUICK += [("uneven-kv-heads", "float32", 1)]
SLOW = [
    (name, kind, T) for name in LAYOUTS for kind in ("float32", "int8") for T in (1, 3)
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "dtype", "T"),
    [
        *QUICK,
        *(pytest.param(*x, marks=pytest.mark.slow) for x in SLOW if x not in QUICK),
    ],
)
@pytest.mark.parametrize("paged", [False, True], ids=["slots", "pages"])
def test_devices_write_and_read_their_own_part(
    tiny: ModelSpec, layout: str, dtype: str, T: int, paged: bool
) -> None:
    heads, kv_heads, sizes = LAYOUTS[layout]
    spec = replace(tiny, num_heads=heads, num_kv_heads=kv_heads)
    cache = filled(spec, dtype)._replace(layer=jnp.int32(1))
    if paged:
        cache = in_pages(cache)
    expected, kept = attended(spec, cache, T)
    got, other = attended(spec, cache, T, mesh_of(sizes))
    near(got, expected)
    for a, b in zip(other.arrays, kept.arrays, strict=True):
        near(a.astype(jnp.float32), b.astype(jnp.float32), 1e-2)
