"""Laws of attention, over every implementation."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax.errors import ConfigError, LowerError
from llmos_jax.kernels.attention import (
    IMPLEMENTATIONS,
    attention,
    cpu,
    reference,
    rotary_attention,
    rotate,
)

SHAPES = [(2, 16, 16, 4, 2, 8), (1, 1, 24, 8, 1, 16), (2, 7, 13, 3, 3, 4)]
"""B, T, S, N, K, H: training, decoding, a chunk in the middle."""

ODD_SHAPES = [
    (1, 150, 333, 6, 2, 20),
    (2, 65, 65, 4, 4, 33),
    (1, 97, 300, 5, 1, 72),
    (1, 1, 1, 1, 1, 1),
]
"""Several blocks and panels of cpu.cc, multiples of none; G = 3, 1, 5, 1."""

RELATIVE = 1e-5
"""Of the largest entry, in float32: sums of some hundred terms in another order, and a
polynomial for exp, differ by 2e-6 at most over these shapes."""

Attend = Callable[..., jax.Array]


@pytest.fixture(params=sorted(IMPLEMENTATIONS))
def implementation(request: pytest.FixtureRequest) -> str:
    """Each implementation; skipped, with the reason, where it cannot be had."""
    if request.param == "cpu" and (reason := cpu.unavailable()):
        pytest.skip(reason)
    return request.param


def inputs(shape: tuple[int, ...], key: jax.Array) -> tuple[jax.Array, ...]:
    """q, k, v and the cotangent of the output."""
    B, T, S, N, K, H = shape
    q, dout = jax.random.normal(key, (2, B, T, N, H))
    k, v = jax.random.normal(jax.random.fold_in(key, 1), (2, B, S, K, H))
    return q, k, v, dout


def last_positions(shape: tuple[int, ...]) -> jax.Array:
    """The T queries stand at the end of the S keys."""
    B, T, S, *_ = shape
    return jnp.broadcast_to(jnp.arange(S - T, S)[None, :], (B, T))


def angles(B: int, T: int, H: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cos and sin of any angles."""
    angle = jax.random.uniform(key, (B, T, H // 2), maxval=7.0)
    return jnp.cos(angle), jnp.sin(angle)


def results(attend: Attend, *arrays: jax.Array) -> list[jax.Array]:
    """The output, and the gradients of q, k and v."""
    *operands, dout = arrays
    out, pull = jax.vjp(attend, *operands)
    return [out, *pull(dout)]


def assert_close(got: list[jax.Array], expected: list[jax.Array]) -> None:
    for a, b in zip(got, expected, strict=True):
        scale = float(jnp.max(jnp.abs(b)))
        np.testing.assert_allclose(a, b, rtol=0, atol=RELATIVE * scale + 1e-30)


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_is_the_weighted_mean_of_visible_values(
    implementation: str, shape: tuple[int, ...], key: jax.Array
) -> None:
    B, T, _, N, K, H = shape
    q, k, v, _ = inputs(shape, key)
    position = last_positions(shape)
    got = attention(q, k, v, position, implementation=implementation)
    expected = np.zeros((B, T, N, H))
    for b, t, n in np.ndindex(B, T, N):
        seen = int(position[b, t]) + 1
        scores = np.asarray(k[b, :seen, n // (N // K)]) @ np.asarray(q[b, t, n])
        weights = np.exp(scores / np.sqrt(H))
        expected[b, t, n] = weights / weights.sum() @ v[b, :seen, n // (N // K)]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_masked_slots_may_hold_anything(implementation: str, key: jax.Array) -> None:
    q = jax.random.normal(key, (1, 2, 2, 4))
    k = v = jax.random.normal(key, (1, 6, 2, 4))
    position = jnp.array([[2, 3]])
    clean = attention(q, k, v, position, implementation=implementation)
    dirty_k, dirty_v = k.at[:, 4:].set(1e30), v.at[:, 4:].set(1e30)
    dirty = attention(q, dirty_k, dirty_v, position, implementation=implementation)
    np.testing.assert_array_equal(clean, dirty)


@pytest.mark.parametrize("where", ["last", "anywhere"])
@pytest.mark.parametrize("shape", SHAPES + ODD_SHAPES)
def test_output_and_gradients_equal_the_reference(
    implementation: str, shape: tuple[int, ...], where: str, key: jax.Array
) -> None:
    position = last_positions(shape)
    if where == "anywhere":
        position = jax.random.randint(key, shape[:2], 0, shape[2])
    arrays = inputs(shape, key)
    got = results(
        lambda q, k, v: attention(q, k, v, position, implementation=implementation),
        *arrays,
    )
    expected = results(lambda q, k, v: reference.attention(q, k, v, position), *arrays)
    assert_close(got, expected)


@pytest.mark.parametrize("shape", [(2, 16, 4, 2, 8), (1, 150, 6, 2, 20)])
def test_rotary_attention_is_rotation_then_attention(
    implementation: str, shape: tuple[int, ...], key: jax.Array
) -> None:
    B, T, N, K, H = shape
    arrays = inputs((B, T, T, N, K, H), key)
    position = last_positions((B, T, T))
    cos_sin = angles(B, T, H, key)
    got = results(
        lambda q, k, v: rotary_attention(
            q, k, v, position, cos_sin, implementation=implementation
        ),
        *arrays,
    )
    expected = results(
        lambda q, k, v: reference.attention(
            rotate(q, cos_sin), rotate(k, cos_sin), v, position
        ),
        *arrays,
    )
    assert_close(got, expected)


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_large_logits_do_not_overflow(
    implementation: str, size: float, key: jax.Array
) -> None:
    shape = (1, 70, 300, 2, 1, 16)
    q, k, v, dout = inputs(shape, key)
    position = last_positions(shape)
    got = results(
        lambda q, k, v: attention(q, k, v, position, implementation=implementation),
        *(size * q, k, v, dout),
    )
    for array in got:
        assert bool(jnp.all(jnp.isfinite(array)))
    assert float(jnp.max(jnp.abs(got[0]))) <= float(jnp.max(jnp.abs(v))) * (1 + 1e-6)


def _jit(attend: Attend) -> Attend:
    return jax.jit(attend)


def _checkpoint(attend: Attend) -> Attend:
    return jax.checkpoint(attend)


def _scan(attend: Attend) -> Attend:
    def looped(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        def body(carry: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            return carry, attend(carry, k, v)

        return jax.lax.scan(body, q, None, length=2)[1][1]

    return looped


@pytest.mark.parametrize("transform", [_jit, _checkpoint, _scan])
def test_transforms_change_nothing(
    implementation: str, transform: Callable[[Attend], Attend], key: jax.Array
) -> None:
    shape = (1, 70, 70, 4, 2, 16)
    arrays = inputs(shape, key)
    attend = functools.partial(attention, implementation=implementation)
    position = last_positions(shape)
    got = results(transform(lambda q, k, v: attend(q, k, v, position)), *arrays)
    expected = results(lambda q, k, v: attend(q, k, v, position), *arrays)
    assert_close(got, expected)


def test_two_runs_give_the_same_bits(implementation: str, key: jax.Array) -> None:
    shape = (2, 130, 130, 4, 2, 16)
    position = last_positions(shape)
    attend = functools.partial(attention, implementation=implementation)
    arrays = inputs(shape, key)
    once, again = (
        results(lambda q, k, v: attend(q, k, v, position), *arrays) for _ in range(2)
    )
    for a, b in zip(once, again, strict=True):
        np.testing.assert_array_equal(a, b)


_DIGEST = """
import hashlib, jax, jax.numpy as jnp
from llmos_jax.kernels.attention import attention
x = jax.random.normal(jax.random.key(0), (4, 2, 130, 4, 16))
position = jnp.broadcast_to(jnp.arange(130)[None, :], (2, 130))
out, pull = jax.vjp(
    lambda q, k, v: attention(q, k, v, position, implementation="cpu"),
    x[0], x[1][:, :, :2], x[2][:, :, :2],
)
print(hashlib.sha256(b"".join(bytes(a) for a in (out, *pull(x[3])))).hexdigest())
"""


def test_cpu_kernel_gives_the_same_bits_with_any_number_of_threads() -> None:
    if reason := cpu.unavailable():
        pytest.skip(reason)
    digests = set()
    for threads in ("1", "5"):
        # XLA takes the size of its pool from NPROC.
        done = subprocess.run(
            [sys.executable, "-c", _DIGEST],
            env={**os.environ, "NPROC": threads, "XLA_FLAGS": ""},
            capture_output=True,
            text=True,
            check=True,
        )
        digests.add(done.stdout.split()[-1])
    assert len(digests) == 1


@pytest.fixture
def fresh_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """As in a new process with an empty cache."""
    monkeypatch.setattr(
        cpu, "unavailable", functools.cache(cpu.unavailable.__wrapped__)
    )
    monkeypatch.setenv("LLMOS_CACHE", str(tmp_path))
    return monkeypatch


def test_cpu_kernel_can_be_turned_off(fresh_kernel: pytest.MonkeyPatch) -> None:
    fresh_kernel.setenv("LLMOS_CPU_KERNELS", "0")
    assert cpu.unavailable() == "LLMOS_CPU_KERNELS=0"


def test_a_malformed_switch_is_an_error(fresh_kernel: pytest.MonkeyPatch) -> None:
    fresh_kernel.setenv("LLMOS_CPU_KERNELS", "yes")
    with pytest.raises(ConfigError, match="LLMOS_CPU_KERNELS = 'yes'; 0 turns"):
        cpu.unavailable()


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("/nowhere/c++", "/nowhere/c++ cannot be run: No such file"),
        ("false", "false failed on the CPU kernel: no message"),
    ],
)
def test_without_a_compiler_the_reference_runs_and_says_so(
    compiler: str,
    reason: str,
    fresh_kernel: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    key: jax.Array,
) -> None:
    fresh_kernel.setenv("CXX", compiler)
    fresh_kernel.setattr(jax, "device_count", lambda: 1)
    q, k, v, _ = inputs(SHAPES[0], key)
    position = last_positions(SHAPES[0])
    got = attention(q, k, v, position)
    np.testing.assert_array_equal(got, reference.attention(q, k, v, position))
    assert reason in capsys.readouterr().err
    with pytest.raises(LowerError, match="the CPU attention kernel cannot be used"):
        attention(q, k, v, position, implementation="cpu")


def test_the_cpu_kernel_is_for_float32_on_one_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    single, half = jnp.zeros(1, jnp.float32), jnp.zeros(1, jnp.bfloat16)
    assert not cpu.suits(single, single, single)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert cpu.suits(single, single, single)
    assert not cpu.suits(single, half, single)
