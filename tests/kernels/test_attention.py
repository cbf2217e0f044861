"""Laws of attention, over every implementation; Pallas kernels in its interpreter."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from laws import (
    Attend,
    angles,
    assert_close,
    available,
    definition,
    documents,
    inputs,
    last_positions,
    results,
    square,
)

from llmos_jax.errors import ConfigError, LowerError
from llmos_jax.kernels.attention import (
    CONTEXT,
    IMPLEMENTATIONS,
    attention,
    blocked,
    cpu,
    reference,
    rotary_attention,
    rotate,
    splash,
)
from llmos_jax.kernels.attention.api import _fastest
from llmos_jax.kernels.target import Target, lowered_for

SHAPES = [(2, 16, 16, 4, 2, 8), (1, 1, 24, 8, 1, 16), (2, 7, 13, 3, 3, 4)]
"""B, T, S, N, K, H: training, decoding, a chunk in the middle."""

ODD_SHAPES = [
    (1, 150, 333, 6, 2, 20),
    (2, 65, 65, 4, 4, 33),
    (1, 97, 300, 5, 1, 72),
    (1, 1, 1, 1, 1, 1),
]
"""Several blocks and panels of cpu.cc, multiples of none; G = 3, 1, 5, 1."""

WHOLE = [(2, 16, 4, 2, 8), (1, 150, 6, 2, 20), (2, 65, 4, 4, 32), (1, 1100, 2, 1, 16)]
"""B, T, N, K, H of whole sequences; the last is three blocks of `blocked`."""

SOME_WHOLE = [
    *WHOLE[:2],
    *(pytest.param(shape, marks=pytest.mark.slow) for shape in WHOLE[2:]),
]
"""The larger ones take seconds each where a kernel is interpreted."""

BFLOAT16_RELATIVE = 2e-2
"""Of the largest entry: weights and output are rounded to 8 bits, two to four times."""


@pytest.fixture(params=sorted(IMPLEMENTATIONS))
def implementation(request: pytest.FixtureRequest) -> str:
    """Each implementation; skipped, with the reason, where it cannot be had."""
    return available(request.param)


@pytest.fixture(params=sorted(IMPLEMENTATIONS.keys() - {"cpu"}))
def segmented(request: pytest.FixtureRequest) -> str:
    """Each implementation that takes segments."""
    return str(request.param)


@pytest.fixture(params=sorted(IMPLEMENTATIONS.keys() - {"splash", "pallas_gpu"}))
def positioned(request: pytest.FixtureRequest) -> str:
    """Each implementation that takes positions."""
    return available(request.param)


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_is_the_weighted_mean_of_visible_values(
    positioned: str, shape: tuple[int, ...], key: jax.Array
) -> None:
    q, k, v, _ = inputs(shape, key)
    position = last_positions(shape)
    got = attention(q, k, v, position, implementation=positioned)
    expected = definition(q, k, v, position)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SOME_WHOLE[:3])
def test_without_positions_query_t_stands_at_t(
    implementation: str, shape: tuple[int, ...], key: jax.Array
) -> None:
    q, k, v, _ = inputs(square(shape), key)
    got = attention(q, k, v, None, implementation=implementation)
    expected = definition(q, k, v, last_positions(square(shape)))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_masked_slots_may_hold_anything(positioned: str, key: jax.Array) -> None:
    q = jax.random.normal(key, (1, 2, 2, 4))
    k = v = jax.random.normal(key, (1, 6, 2, 4))
    position = jnp.array([[2, 3]])
    clean = attention(q, k, v, position, implementation=positioned)
    dirty_k, dirty_v = k.at[:, 4:].set(1e30), v.at[:, 4:].set(1e30)
    dirty = attention(q, dirty_k, dirty_v, position, implementation=positioned)
    np.testing.assert_array_equal(clean, dirty)


def test_no_output_depends_on_later_tokens(implementation: str, key: jax.Array) -> None:
    q, k, v, _ = inputs((1, 300, 300, 4, 2, 16), key)
    attend = functools.partial(attention, implementation=implementation)
    clean = attend(q, k, v, None)
    dirty = attend(q, k.at[:, 140:].set(1e30), v.at[:, 140:].set(1e30), None)
    np.testing.assert_array_equal(clean[:, :140], dirty[:, :140])


def test_sequences_do_not_see_one_another(implementation: str, key: jax.Array) -> None:
    arrays = inputs((3, 130, 130, 4, 2, 16), key)
    attend = functools.partial(attention, implementation=implementation)
    together = results(lambda q, k, v: attend(q, k, v, None), *arrays)
    alone = results(lambda q, k, v: attend(q, k, v, None), *(x[1:2] for x in arrays))
    assert_close([x[1:2] for x in together], alone)


@pytest.mark.parametrize("shape", SOME_WHOLE[:3])
def test_a_query_sees_the_keys_of_its_document(
    segmented: str, shape: tuple[int, ...], key: jax.Array
) -> None:
    q, k, v, _ = inputs(square(shape), key)
    segment = documents(shape)
    got = attention(q, k, v, None, jnp.asarray(segment), implementation=segmented)
    expected = definition(q, k, v, last_positions(square(shape)), segment)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_documents_attend_as_if_alone(segmented: str, key: jax.Array) -> None:
    arrays = inputs((1, 300, 300, 4, 2, 16), key)
    segment = jnp.asarray(np.repeat([[4, 9]], [130, 170], axis=1), jnp.int32)
    attend = functools.partial(attention, implementation=segmented)
    packed = results(lambda q, k, v: attend(q, k, v, None, segment), *arrays)
    for document in (slice(0, 130), slice(130, 300)):
        cut = [x[:, document] for x in arrays]
        alone = results(lambda q, k, v: attend(q, k, v, None), *cut)
        assert_close([x[:, document] for x in packed], alone)


@pytest.mark.parametrize("shape", SOME_WHOLE)
def test_output_and_gradients_of_documents_equal_the_reference(
    segmented: str, shape: tuple[int, ...], key: jax.Array
) -> None:
    arrays, segment = inputs(square(shape), key), jnp.asarray(documents(shape))
    cos_sin = angles(*shape[:2], shape[-1], key)
    got = results(
        lambda q, k, v: rotary_attention(
            q, k, v, None, cos_sin, segment, implementation=segmented
        ),
        *arrays,
    )
    expected = results(
        lambda q, k, v: reference.attention(
            rotate(q, cos_sin), rotate(k, cos_sin), v, None, segment
        ),
        *arrays,
    )
    assert_close(got, expected)


@pytest.mark.parametrize("name", ["blocked", "reference"])
def test_positions_and_documents_hide_keys_together(name: str, key: jax.Array) -> None:
    shape = WHOLE[1]
    q, k, v, _ = inputs(square(shape), key)
    segment = documents(shape)
    # Later than in its own place, in a document that goes on.
    position = last_positions(square(shape)) + 2
    got = attention(q, k, v, position, jnp.asarray(segment), implementation=name)
    position = np.minimum(position, shape[1] - 1)
    expected = definition(q, k, v, position, segment)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", ["last", "anywhere"])
@pytest.mark.parametrize("shape", [*SHAPES, *ODD_SHAPES, (1, 600, 1100, 2, 1, 8)])
def test_output_and_gradients_equal_the_reference(
    positioned: str, shape: tuple[int, ...], where: str, key: jax.Array
) -> None:
    position = last_positions(shape)
    if where == "anywhere":
        position = jax.random.randint(key, shape[:2], 0, shape[2])
    arrays = inputs(shape, key)
    got = results(
        lambda q, k, v: attention(q, k, v, position, implementation=positioned),
        *arrays,
    )
    expected = results(lambda q, k, v: reference.attention(q, k, v, position), *arrays)
    assert_close(got, expected)


@pytest.mark.parametrize("shape", SOME_WHOLE)
def test_rotary_attention_is_rotation_then_attention(
    implementation: str, shape: tuple[int, ...], key: jax.Array
) -> None:
    B, T, N, K, H = shape
    arrays = inputs(square(shape), key)
    cos_sin = angles(B, T, H, key)
    got = results(
        lambda q, k, v: rotary_attention(
            q, k, v, None, cos_sin, implementation=implementation
        ),
        *arrays,
    )
    expected = results(
        lambda q, k, v: reference.attention(
            rotate(q, cos_sin), rotate(k, cos_sin), v, last_positions(square(shape))
        ),
        *arrays,
    )
    assert_close(got, expected)


@pytest.mark.parametrize(
    "name",
    [
        "reference",
        "splash",
        pytest.param("blocked", marks=pytest.mark.slow),
        pytest.param("pallas_gpu", marks=pytest.mark.slow),
    ],
)
def test_bfloat16_is_as_near_as_bfloat16_can_be(name: str, key: jax.Array) -> None:
    shape = (1, 260, 260, 4, 2, 64)
    half = [x.astype(jnp.bfloat16) for x in inputs(shape, key)]
    single = [x.astype(jnp.float32) for x in half]
    got = results(lambda q, k, v: attention(q, k, v, None, implementation=name), *half)
    expected = results(lambda q, k, v: reference.attention(q, k, v, None), *single)
    assert all(x.dtype == jnp.bfloat16 for x in got)
    assert_close(got, expected, BFLOAT16_RELATIVE)


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_large_logits_do_not_overflow(
    implementation: str, size: float, key: jax.Array
) -> None:
    q, k, v, dout = inputs((1, 300, 300, 2, 1, 16), key)
    got = results(
        lambda q, k, v: attention(q, k, v, None, implementation=implementation),
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
    got = results(transform(lambda q, k, v: attend(q, k, v, None)), *arrays)
    expected = results(lambda q, k, v: attend(q, k, v, None), *arrays)
    assert_close(got, expected)


def test_two_runs_give_the_same_bits(implementation: str, key: jax.Array) -> None:
    attend = functools.partial(attention, implementation=implementation)
    arrays = inputs((2, 130, 130, 4, 2, 16), key)
    once, again = (
        results(lambda q, k, v: attend(q, k, v, None), *arrays) for _ in range(2)
    )
    for a, b in zip(once, again, strict=True):
        np.testing.assert_array_equal(a, b)


def count_of(primitive: str, jaxpr: jax.extend.core.Jaxpr) -> int:
    """How often a primitive stands in a jaxpr; in a loop once."""
    count = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == primitive:
            count += 1
            continue
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            count += count_of(primitive, inner)
    return count


@pytest.mark.parametrize(
    ("name", "primitive", "forward", "backward"),
    [
        ("blocked", "dot_general", 2, 6),
        ("cpu", "ffi_call", 1, 1),
        ("pallas_gpu", "pallas_call", 1, 2),
    ],
)
def test_a_saved_context_spares_the_forward_pass(
    name: str, primitive: str, forward: int, backward: int
) -> None:
    attend = functools.partial(attention, implementation=available(name))
    x = jnp.zeros((1, 256, 2, 32))

    def count(policy: Callable[..., bool]) -> int:
        body = jax.checkpoint(lambda x: attend(2 * x, x, x, None), policy=policy)
        gradient = jax.grad(lambda x: jnp.sum(jnp.sin(body(x))))
        return count_of(primitive, jax.make_jaxpr(gradient)(x).jaxpr)

    save = jax.checkpoint_policies.save_only_these_names(CONTEXT)
    assert count(save) == forward + backward
    assert count(jax.checkpoint_policies.nothing_saveable) == 2 * forward + backward


@pytest.mark.parametrize(
    ("target", "T", "whole", "expected"),
    [
        (Target("tpu", 256), 8192, True, "splash"),
        (Target("tpu", 1), 8192, True, "splash"),
        (Target("tpu", 256), 8192, False, "blocked"),
        (Target("tpu", 256), 128, True, "reference"),
        (Target("tpu", 256), 1, False, "reference"),
        (Target("gpu", 8), 8192, True, "pallas_gpu"),
        (Target("gpu", 8), 8192, False, "blocked"),
        (Target("gpu", 8), 128, True, "reference"),
        (Target("cpu", 8), 8192, True, "blocked"),
        (Target("cpu", 8), 512, True, "reference"),
        (Target("cpu", 1), 8192, True, "cpu"),
    ],
)
def test_the_target_decides(target: Target, T: int, whole: bool, expected: str) -> None:
    available(expected)
    x = jax.ShapeDtypeStruct((1, T, 8, 64), jnp.float32)
    position = None if whole else jax.ShapeDtypeStruct((1, T), jnp.int32)
    with lowered_for(target):
        assert _fastest(x, x, x, position) == expected


@pytest.mark.parametrize(
    ("H", "dtype", "expected"),
    [
        (128, "bfloat16", "pallas_gpu"),
        (128, "float32", "blocked"),
        (256, "bfloat16", "blocked"),
        (8, "float32", "blocked"),
    ],
)
def test_a_gpu_kernel_must_fit_shared_memory(H: int, dtype: str, expected: str) -> None:
    x = jax.ShapeDtypeStruct((1, 1024, 8, H), jnp.dtype(dtype))
    with lowered_for(Target("gpu", 1)):
        assert _fastest(x, x, x, None) == expected


@pytest.mark.parametrize("name", ["splash", "pallas_gpu"])
def test_kernels_for_whole_sequences_refuse_positions_and_a_cache(
    name: str, key: jax.Array
) -> None:
    q, k, v, _ = inputs((1, 16, 24, 2, 1, 16), key)
    with pytest.raises(LowerError, match="16 queries, 24 keys and no positions"):
        attention(q, k, v, None, implementation=name)


def test_the_cpu_kernel_leaves_documents_to_others(key: jax.Array) -> None:
    x = jax.ShapeDtypeStruct((1, 600, 2, 16), jnp.float32)
    segment = jax.ShapeDtypeStruct((1, 600), jnp.int32)
    with lowered_for(Target("cpu", 1)):
        assert _fastest(x, x, x, None, segment) == "blocked"
    q, k, v, _ = inputs((1, 16, 16, 2, 1, 16), key)
    with pytest.raises(LowerError, match="knows no documents"):
        attention(q, k, v, None, jnp.zeros((1, 16), jnp.int32), implementation="cpu")


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
def test_a_gpu_gets_three_kernels() -> None:
    checks = [jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, segment: jax.Array):
        return jnp.sum(attention(q, k, v, None, segment).astype(jnp.float32))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    q = jax.ShapeDtypeStruct((2, 1000, 8, 128), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((2, 1000, 2, 128), jnp.bfloat16)
    segment = jax.ShapeDtypeStruct((2, 1000), jnp.int32)
    # Some versions of JAX ask which GPU it is; none is here.
    h100 = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("one",), abstract_device=h100)
    with lowered_for(Target("gpu", 1)), use_abstract_mesh(mesh):
        exported = jax.export.export(
            gradient, platforms=["cuda"], disabled_checks=checks
        )(q, k, k, segment)
    text = exported.mlir_module()
    # Forward; the output times its cotangent; backward.
    assert text.count("custom_call @__gpu$xla.gpu.triton(") == 3
    assert "1024x1024x" not in text, "no whole scores"


@pytest.mark.parametrize(
    ("T", "row_bytes", "block"),
    [(8192, 256, 1024), (8192, 1024, 512), (1500, 256, 512), (1040, 256, 128)],
)
def test_splash_picks_blocks(T: int, row_bytes: int, block: int) -> None:
    assert splash._block(T, row_bytes) == block


def test_splash_masks_equal_those_the_library_makes() -> None:
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    sizes = library.splash_attention_kernel.BlockSizes(*[128] * 8)
    made = library.make_splash_mha(
        library.MultiHeadMask([library.CausalMask((512, 512))] * 2),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=sizes,
    )
    ours = splash._kernel(512, 128)
    assert ours.kwargs["block_sizes"] == sizes
    for name in ("fwd_mask_info", "dq_mask_info", "dkv_mask_info"):
        jax.tree.map(
            np.testing.assert_array_equal, getattr(ours, name), getattr(made, name)
        )


def test_blocked_splits_evenly() -> None:
    assert [blocked._block(T, 8) for T in (1, 512, 513, 1100)] == [8, 512, 264, 368]


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
