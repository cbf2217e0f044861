"""The grouped product: every implementation computes what the definition says."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax.kernels.grouped_matmul import IMPLEMENTATIONS, grouped_matmul, megablox
from llmos_jax.kernels.target import Target, lowered_for

ROWS, E, K, N = 256, 4, 128, 64
GROUPS = {
    "uneven": [100, 1, 28, 127],
    "some empty": [0, 130, 0, 126],
    "all in one": [0, 0, 256, 0],
    "last empty": [3, 250, 3, 0],
}
RELATIVE = {"float32": 1e-5, "bfloat16": 1e-2}
"""Of the largest entry: other orders of float32 sums; one rounding of bfloat16."""

FAST = [name for name in IMPLEMENTATIONS if name != "reference"]
Arrays = tuple[jax.Array, jax.Array, jax.Array]


def arrays(sizes: list[int], dtype: str) -> Arrays:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(ROWS, K)) / K**0.5
    w = generator.normal(size=(E, K, N))
    return jnp.asarray(x, dtype), jnp.asarray(w, dtype), jnp.asarray(sizes, jnp.int32)


def gradients(name: str) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Of a sum in which no two entries weigh the same, by rows and by weights."""

    def total(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        y = grouped_matmul(x, w, sizes, implementation=name).astype(jnp.float32)
        weights = jnp.sin(jnp.arange(y.size, dtype=jnp.float32))
        return jnp.sum(y * weights.reshape(y.shape))

    return jax.jit(jax.grad(total, argnums=(0, 1)))


def assert_close(found: jax.Array, wanted: jax.Array, dtype: str) -> None:
    assert found.dtype == wanted.dtype
    a, b = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    np.testing.assert_allclose(a, b, atol=RELATIVE[dtype] * np.abs(b).max(), rtol=0)


def test_the_reference_is_a_loop_over_rows() -> None:
    x, w, sizes = arrays(GROUPS["uneven"], "float32")
    found = grouped_matmul(x, w, sizes, implementation="reference")
    group = np.repeat(np.arange(E), GROUPS["uneven"])
    rows = [np.asarray(x[i]) @ np.asarray(w[group[i]]) for i in range(ROWS)]
    np.testing.assert_allclose(found, np.stack(rows), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [*((name, "float32") for name in GROUPS), ("uneven", "bfloat16")],
)
@pytest.mark.parametrize("name", FAST)
def test_product_is_the_reference(name: str, sizes: str, dtype: str) -> None:
    x, w, count = arrays(GROUPS[sizes], dtype)
    found = grouped_matmul(x, w, count, implementation=name)
    wanted = grouped_matmul(x, w, count, implementation="reference")
    assert_close(found, wanted, dtype)


@pytest.mark.parametrize("dtype", list(RELATIVE))
@pytest.mark.parametrize("name", FAST)
def test_gradients_are_the_reference_and_zero_where_a_group_has_no_rows(
    name: str, dtype: str
) -> None:
    given = arrays(GROUPS["some empty"], dtype)
    (dx, dw), wanted = gradients(name)(*given), gradients("reference")(*given)
    assert_close(dx, wanted[0], dtype)
    assert_close(dw, wanted[1], dtype)
    assert not np.any(dw[0]) and not np.any(dw[2])
    assert np.all(np.any(np.asarray(dw[1]), axis=1))


@pytest.mark.parametrize(
    ("rows", "K", "platform", "wanted"),
    [
        (512, 128, "tpu", True),
        (384, 128, "tpu", False),
        (576, 128, "tpu", False),
        (512, 96, "tpu", False),
        (512, 128, "cpu", False),
    ],
    ids=["full groups", "small groups", "odd rows", "odd width", "on a CPU"],
)
def test_the_tpu_kernel_is_picked_where_it_suits(
    rows: int, K: int, platform: str, wanted: bool
) -> None:
    x = jnp.zeros((rows, K), jnp.bfloat16)
    w, sizes = jnp.zeros((E, K, 128), jnp.bfloat16), jnp.zeros((E,), jnp.int32)
    with lowered_for(Target(platform, 1)):
        text = str(jax.make_jaxpr(lambda *args: grouped_matmul(*args))(x, w, sizes))
    assert ("pallas_call" in text) == wanted
    assert ("ragged_dot" in text) != wanted


@pytest.mark.parametrize(
    ("rows", "groups", "dtype", "wanted"),
    [
        (32768, 8, "bfloat16", (512, 1024, 1024)),  # Mixtral: 4096 rows a group
        (131072, 128, "bfloat16", (256, 1024, 768)),  # Qwen3: 1024 rows a group
        (32768, 8, "float32", (512, 512, 512)),
        (1152, 2, "bfloat16", (128, 1024, 1024)),  # 256 does not divide 1152
    ],
)
def test_tiles_follow_the_size_of_a_group(
    rows: int, groups: int, dtype: str, wanted: tuple[int, int, int]
) -> None:
    x = jax.ShapeDtypeStruct((rows, 2048), dtype)
    made = 768 if groups == 128 else 2048
    assert megablox.tiling(x, groups, 2048, made) == wanted
