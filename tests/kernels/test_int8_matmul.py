"""Laws of rows times a matrix of few bits, over every implementation that runs here;
Pallas kernels for TPUs in its interpreter, and compiled by the TPU's own compiler."""

from __future__ import annotations

import functools
import itertools
import os
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    SingleDeviceSharding,
    use_abstract_mesh,
)

from llmos_jax.errors import LowerError
from llmos_jax.kernels.int8_matmul import (
    IMPLEMENTATIONS,
    Weight,
    blocks,
    cpu,
    int8_matmul,
    pallas_tpu,
    quantized,
    quantized_rows,
    whole,
)
from llmos_jax.kernels.int8_matmul.api import _fastest
from llmos_jax.kernels.int8_matmul.blocks import Blocks
from llmos_jax.kernels.target import Target, lowered_for

WEIGHTS = [
    ("int8", None, "none"),
    ("int8", None, "int8"),
    ("int8", 32, "none"),
    ("int8", 128, "int8"),
    ("int4", None, "none"),
    ("int4", 32, "none"),
    ("int4", 32, "int8"),
    ("int4", 128, "int8"),
    ("float8", None, "none"),
    ("float8", None, "float8"),
    ("float8", 128, "float8"),
]
"""Kind, group, activations."""

RELATIVE = {"cpu": 4e-4, "pallas_tpu": 8e-3, "xla": 2e-4}
"""Of the largest entry. cpu: rows have 13 bits at least; xla: 15 bits on a CPU;
pallas_tpu: scaled weights are bfloat16 where rows are. Integer products are held to
equality below."""

FAST = sorted(IMPLEMENTATIONS.keys() - {"reference", "pallas_gpu"})


@pytest.fixture(params=FAST)
def implementation(request: pytest.FixtureRequest) -> str:
    """Each implementation that runs on a CPU; skipped where it cannot."""
    return available(request.param)


def available(name: str) -> str:
    if name == "cpu" and (reason := cpu.unavailable()):
        pytest.skip(reason)
    return name


def arrays(
    m: int, K: int, N: int, kind: str = "int8", group: int | None = None
) -> tuple[jax.Array, Weight]:
    generator = np.random.default_rng(m + K + N)
    x_mK = jnp.asarray(generator.normal(size=(m, K)), jnp.float32)
    w_KN = jnp.asarray(generator.normal(size=(K, N)) / K**0.5, jnp.float32)
    return x_mK, quantized(w_KN, kind, group)


def whole_rows(m: int, K: int) -> jax.Array:
    """Rows that int8 holds exactly."""
    x_mK = np.random.default_rng(m).integers(-127, 128, (m, K))
    x_mK[:, 0] = 127
    return jnp.asarray(x_mK, jnp.float32)


def exact(x_mK: jax.Array, w: Weight) -> np.ndarray:
    """Sums of whole numbers, scaled in float32."""
    sum_mN = np.asarray(x_mK, np.int64) @ np.asarray(whole(w), np.int64)
    return sum_mN.astype(np.float32) * np.asarray(w.scale)


def assert_near(found: jax.Array, wanted: jax.Array, relative: float) -> None:
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    a, b = (np.asarray(x, np.float64) for x in (found, wanted))
    np.testing.assert_allclose(a, b, rtol=0, atol=relative * np.abs(b).max())


@pytest.mark.parametrize(("kind", "group", "activations"), WEIGHTS)
def test_the_reference_is_a_loop_over_rows_and_groups(
    kind: str, group: int | None, activations: str
) -> None:
    x, w = arrays(3, 256, 5, kind, group)
    found = int8_matmul(x, w, activations=activations, implementation="reference")
    numbers, g = np.asarray(whole(w), np.float64), group or 256
    scale = np.asarray(w.scale, np.float64).reshape(-1, 5)
    for row in range(3):
        x_K = np.asarray(x[row], np.float64)
        step = 1.0
        if activations != "none":
            step = np.abs(x_K).max() / {"int8": 127, "float8": 448}[activations]
            x_K = np.asarray(quantized_rows(x, activations)[0][row], np.float64)
        parts = [x_K[i : i + g] @ numbers[i : i + g] for i in range(0, 256, g)]
        wanted = step * sum(part * of for part, of in zip(parts, scale, strict=True))
        np.testing.assert_allclose(found[row], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activations", ["int8", "float8"])
def test_a_quantized_row_is_within_half_a_step(activations: str) -> None:
    x, _ = arrays(5, 300, 1)
    q, row = quantized_rows(x, activations)
    error = jnp.abs(q.astype(jnp.float32) * row - x)
    step = row / 2 if activations == "int8" else jnp.abs(x) / 16 + row / 1024
    assert bool(jnp.all(error <= step * 1.001))
    assert float(jnp.max(jnp.abs(q.astype(jnp.float32)))) in (127.0, 448.0)


@pytest.mark.parametrize(("kind", "group", "activations"), WEIGHTS)
def test_product_is_the_reference(
    implementation: str, kind: str, group: int | None, activations: str
) -> None:
    if implementation == "cpu" and kind == "float8":
        pytest.skip("CPUs have no float8 product")
    x, w = arrays(5, 384, 200, kind, group)
    ask = functools.partial(int8_matmul, x, w, activations=activations)
    relative = RELATIVE[implementation]
    if implementation == "cpu" and activations == "int8":
        relative = 4e-3  # A number between two steps may go to either.
    wanted = ask(implementation="reference")
    assert_near(ask(implementation=implementation), wanted, relative)


@pytest.mark.parametrize("kind", ["int8", "float8"])
@pytest.mark.parametrize("activations", ["none", "same"])
def test_a_table_is_a_matrix_turned(
    implementation: str, kind: str, activations: str
) -> None:
    if implementation == "cpu" and kind == "float8":
        pytest.skip("CPUs have no float8 product")
    activations = kind if activations == "same" else activations
    x, w = arrays(3, 256, 200, kind)
    ask = functools.partial(int8_matmul, x, activations=activations)
    table = Weight(w.values.T, w.scale)
    found = ask(table, transposed=True, implementation=implementation)
    wanted = ask(table, transposed=True, implementation="reference")
    np.testing.assert_array_equal(wanted, ask(w, implementation="reference"))
    assert_near(found, wanted, 4e-3 if activations == "int8" else 4e-4)


@pytest.mark.parametrize(("kind", "group", "activations"), WEIGHTS[::2])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_layer_of_a_stack_is_its_slice(
    implementation: str,
    kind: str,
    group: int | None,
    activations: str,
    transposed: bool,
) -> None:
    if implementation == "cpu" and kind == "float8":
        pytest.skip("CPUs have no float8 product")
    if transposed and (group or kind == "int4"):
        pytest.skip("a table has one scale for each output")
    x, w = arrays(5, 384, 200, kind, group)
    if transposed:
        w = Weight(w.values.T, w.scale)
    others = [jnp.zeros_like(w.values), jnp.ones_like(w.values)]
    stack = w._replace(values=jnp.stack([others[0], w.values, others[1]]))
    ask = functools.partial(
        int8_matmul,
        x,
        activations=activations,
        transposed=transposed,
        implementation=implementation,
    )
    np.testing.assert_array_equal(ask(stack, layer=jnp.int32(1)), ask(w))


def test_a_layer_is_chosen_while_the_program_runs() -> None:
    x, w = arrays(5, 1024, 300)
    stack = w._replace(values=jnp.stack([-w.values, w.values]))
    tile = Blocks(8, 128, 512)
    ask = jax.jit(functools.partial(pallas_tpu.int8_matmul, x, blocks=tile))
    first, second = (ask(stack, layer=jnp.int32(layer)) for layer in range(2))
    np.testing.assert_array_equal(second, ask(w))
    np.testing.assert_array_equal(first, -second)


@pytest.mark.parametrize(("m", "K", "N"), [(1, 64, 32), (3, 129, 7), (33, 1000, 260)])
def test_sums_of_whole_numbers_are_exact(
    implementation: str, m: int, K: int, N: int
) -> None:
    x, (_, w) = whole_rows(m, K), arrays(m, K, N)
    found = int8_matmul(x, w, activations="int8", implementation=implementation)
    np.testing.assert_array_equal(found, exact(x, w))


@pytest.mark.parametrize(
    "name", [*FAST, pytest.param("reference", id="reference")], ids=str
)
def test_a_row_alone_gives_the_same_bits(name: str) -> None:
    x, w = arrays(9, 384, 130)
    ask = functools.partial(
        int8_matmul, w=w, activations="int8", implementation=available(name)
    )
    together = ask(x)
    for row in (0, 8):
        np.testing.assert_array_equal(ask(x[row : row + 1])[0], together[row])


@pytest.mark.parametrize("name", ["cpu", "xla"])
def test_on_a_cpu_a_row_alone_gives_the_same_bits_weight_only(name: str) -> None:
    x, w = arrays(5, 384, 130)
    ask = functools.partial(int8_matmul, w=w, implementation=available(name))
    together = ask(x)
    for row in range(5):
        np.testing.assert_array_equal(ask(x[row : row + 1])[0], together[row])


@pytest.mark.parametrize("m", [1, 16])
@pytest.mark.parametrize("activations", ["none", "int8"])
def test_xla_compiled_is_xla_step_by_step(m: int, activations: str) -> None:
    # jaxlib 0.10.2 and 0.11 have products that are wrong only when fused (jax 39103).
    x, w = arrays(m, 576, 192)
    run = functools.partial(int8_matmul, activations=activations, implementation="xla")
    stepwise = np.asarray(run(x, w))
    # Compiled, a division by a constant becomes a product with its inverse.
    np.testing.assert_allclose(jax.jit(run)(x, w), stepwise, rtol=3e-7, atol=1e-6)


@pytest.mark.parametrize("activations", ["none", "int8"])
def test_rows_of_zeros_stay_zeros(implementation: str, activations: str) -> None:
    x, w = arrays(4, 256, 64)
    x = x.at[1].set(0).at[3].set(1e-20)
    y = int8_matmul(x, w, activations=activations, implementation=implementation)
    assert not np.any(y[1]) and np.all(np.abs(y[3]) < 1e-18)
    assert np.all(np.isfinite(y)) and np.all(np.any(np.asarray(y[jnp.array([0, 2])])))


@pytest.mark.parametrize("name", ["reference", "xla", "pallas_tpu", "cpu"])
def test_what_is_not_a_number_stays_in_its_row(name: str) -> None:
    x, w = arrays(4, 256, 64)
    ask = functools.partial(
        int8_matmul, w=w, activations="int8", implementation=available(name)
    )
    dirty = ask(x.at[2, 5].set(jnp.nan))
    assert np.all(np.isnan(dirty[2]))
    clean = jnp.array([0, 1, 3])
    np.testing.assert_array_equal(dirty[clean], ask(x)[clean])


def test_no_rows_give_no_rows() -> None:
    _, w = arrays(1, 64, 32)
    assert int8_matmul(jnp.zeros((0, 64), jnp.bfloat16), w).shape == (0, 32)


@pytest.mark.parametrize(("kind", "group", "activations"), WEIGHTS[5:8:2])
@pytest.mark.parametrize("name", ["pallas_tpu", "xla"])
def test_bfloat16_is_as_near_as_bfloat16_can_be(
    name: str, kind: str, group: int | None, activations: str
) -> None:
    x, w = arrays(6, 256, 136, kind, group)
    half = x.astype(jnp.bfloat16)
    ask = functools.partial(int8_matmul, w=w, activations=activations)
    found = ask(half, implementation=name)
    wanted = ask(half.astype(jnp.float32), implementation="reference")
    assert found.dtype == jnp.bfloat16
    assert_near(found.astype(jnp.float32), wanted, 8e-3)


# Tiles of the TPU kernel.


@pytest.mark.parametrize("tile", [(8, 128, 512), (24, 512, 1024)])
def test_sums_over_any_tiles_are_exact(tile: tuple[int, int, int]) -> None:
    x, (_, w) = whole_rows(19, 1024), arrays(19, 1024, 300)
    found = pallas_tpu.int8_matmul(x, w, activations="int8", blocks=Blocks(*tile))
    np.testing.assert_array_equal(found, exact(x, w))


@pytest.mark.parametrize(
    ("kind", "group", "activations"),
    [("int8", None, "none"), ("int4", 32, "int8")],
)
def test_tiles_change_no_more_than_the_order_of_sums(
    kind: str, group: int | None, activations: str
) -> None:
    x, w = arrays(19, 1024, 300, kind, group)
    ask = functools.partial(pallas_tpu.int8_matmul, x, w, activations=activations)
    small = ask(blocks=Blocks(8, 128, 256))
    assert_near(small, ask(), 1e-6)


SIZES = [(8192, 28672), (28672, 8192), (4096, 896), (1792, 8192), (4096, 128256)]


@pytest.mark.parametrize(("K", "N"), SIZES)
@pytest.mark.parametrize("m", [8, 128, 2048])
@pytest.mark.parametrize(("kind", "group", "activations"), WEIGHTS)
def test_the_rule_gives_tiles_that_fit(
    m: int, K: int, N: int, kind: str, group: int | None, activations: str
) -> None:
    stored = {"int8": "int8", "int4": "uint8", "float8": "float8_e4m3fn"}[kind]
    values = jax.ShapeDtypeStruct((K // (2 if kind == "int4" else 1), N), stored)
    shape, dtype = ((N,), "float32") if group is None else ((K // group, N), "bfloat16")
    w = Weight(values, jax.ShapeDtypeStruct(shape, dtype))
    x = jax.ShapeDtypeStruct((m, K), jnp.bfloat16)
    product = pallas_tpu._product_of(x, w, activations, False)
    tile = blocks.ruled(product)
    assert K % tile.inputs == 0
    assert tile.outputs % 128 == 0
    assert blocks.vmem_bytes(tile, product) <= blocks.VMEM_BYTES


def test_every_row_of_the_table_divides_its_inputs() -> None:
    for (chip, kind, rows, K, _), tile in blocks._table().items():
        assert chip in blocks._GENERATIONS.values()
        assert kind.split("-")[0] in ("int8", "int4", "float8")
        assert K % tile.inputs == 0 and tile.outputs % 128 == 0
        assert rows & (rows - 1) == 0 and tile.rows <= rows


def compiled(chip: str, m: int, K: int, N: int, *which: object) -> str:
    """The TPU compiler's text for `pallas_tpu`, compiled for one chip."""
    from jax.experimental import topologies

    shape = {"v5p": "2x2x1", "tpu7x": "2x2x1"}.get(chip, "2x2")
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{chip}:{shape}"
    )
    device = topology.devices[0]
    kind, group, activations, transposed = which
    here = AbstractDevice(device.device_kind, num_cores=1, platform="tpu")
    mesh = AbstractMesh((1,), ("one",), abstract_device=here)

    def abstract(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
        where = SingleDeviceSharding(device)
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=where)

    stored = {"int8": "int8", "int4": "uint8", "float8": "float8_e4m3fn"}[str(kind)]
    shape2 = (N, K) if transposed else (K // (2 if kind == "int4" else 1), N)
    of_scale = ((N,), "float32") if group is None else ((K // group, N), "bfloat16")
    w = Weight(abstract(shape2, stored), abstract(*of_scale))

    def run(x: jax.Array, w: Weight) -> jax.Array:
        return int8_matmul(x, w, activations=activations, transposed=bool(transposed))

    with lowered_for(Target("tpu", 1)), use_abstract_mesh(mesh):
        lowered = jax.jit(run).lower(abstract((m, K), "bfloat16"), w)
        return lowered.compile().as_text()


QUICK = [
    ("v5e", 16, 4096, 4096, "int8", None, "int8", False),
    ("v5p", 8, 4096, 8016, "int8", None, "none", True),
    ("v6e", 16, 1024, 1024, "int4", 32, "none", False),
    ("tpu7x", 16, 4096, 4096, "float8", None, "float8", False),
]
"""Chip, rows, inputs, outputs, kind, group, activations, transposed."""

PER_DEVICE = [
    (4096, 14336),
    (14336, 1024),
    (896, 4096),
    (8192, 28672),
    (28672, 512),
    (1792, 8192),
]
"""K, N of llama3_8b and llama3_70b, whole and split 4 to 16 ways."""

LONG = [
    pytest.param(chip, m, K, N, kind, group, activations, False, marks=pytest.mark.slow)
    for chip, m, (K, N), (kind, group, activations) in itertools.product(
        ["v5e", "v5p", "v6e", "tpu7x"],
        [8, 128, 2048],
        PER_DEVICE,
        [
            ("int8", None, "int8"),
            ("int8", None, "none"),
            ("int4", 128, "none"),
            ("float8", None, "float8"),
        ],
    )
    if (kind == "float8") == (chip == "tpu7x")
]


@pytest.mark.parametrize(
    ("chip", "m", "K", "N", "kind", "group", "activations", "transposed"),
    [*QUICK, *LONG],
)
def test_the_tpu_compiler_takes_the_kernel(
    chip: str,
    m: int,
    K: int,
    N: int,
    kind: str,
    group: int | None,
    activations: str,
    transposed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("libtpu")
    # Other processes may be asking the same compiler; no TPU is opened.
    monkeypatch.setitem(os.environ, "ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    text = compiled(chip, m, K, N, kind, group, activations, transposed)
    assert text.count('custom_call_target="tpu_custom_call"') == 1
    # No copy of the matrix in more bits, nor turned.
    assert f"bf16[{K},{N}]" not in text and f"f32[{K},{N}]" not in text
    assert text.count(" transpose(") == 0


# Who is picked.


@pytest.mark.parametrize(
    ("platform", "K", "N", "transposed", "wanted"),
    [
        ("tpu", 4096, 1024, False, "pallas_tpu"),
        ("tpu", 4096, 128256, True, "pallas_tpu"),
        ("tpu", 256, 1024, False, "xla"),
        ("tpu", 1000, 1024, False, "xla"),
        ("gpu", 4096, 1024, False, "xla"),
        ("gpu", 4096, 128256, True, "pallas_gpu"),
        ("gpu", 4096, 128250, True, "xla"),
        ("cpu", 4096, 1024, False, "xla"),
    ],
)
def test_the_target_decides(
    platform: str, K: int, N: int, transposed: bool, wanted: str
) -> None:
    values = jax.ShapeDtypeStruct((N, K) if transposed else (K, N), jnp.int8)
    w = Weight(values, jax.ShapeDtypeStruct((N,), jnp.float32))
    x = jax.ShapeDtypeStruct((8, K), jnp.bfloat16)
    with lowered_for(Target(platform, 1)):
        assert _fastest(x, w, "none", transposed) == wanted


def test_gpus_multiply_int8_to_int32() -> None:
    x, w = arrays(16, 256, 128)
    with lowered_for(Target("gpu", 1)):
        run = functools.partial(int8_matmul, activations="int8")
        exported = jax.export.export(jax.jit(run), platforms=["cuda"])(x, w)
    product = "(tensor<16x256xi8>, tensor<256x128xi8>) -> tensor<16x128xi32>"
    assert product in exported.mlir_module()


@pytest.mark.parametrize("m", [1, 700])
def test_a_hopper_gpu_gets_the_mixed_kernel_for_a_table(
    m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jax.experimental.pallas.ops.gpu import hopper_mixed_type_matmul_mgpu as library

    # The library asks how many cores the GPU has; none is here.
    h100 = SimpleNamespace(core_count=132)
    here = SimpleNamespace(get_default_device=lambda: h100)
    monkeypatch.setattr(library, "backend", here)
    device = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("one",), abstract_device=device)
    table = Weight(
        jax.ShapeDtypeStruct((4096, 1024), jnp.int8),
        jax.ShapeDtypeStruct((4096,), jnp.float32),
    )
    x = jax.ShapeDtypeStruct((m, 1024), jnp.bfloat16)
    checks = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    with lowered_for(Target("gpu", 1)), use_abstract_mesh(mesh):
        run = jax.jit(functools.partial(int8_matmul, transposed=True))
        exported = jax.export.export(run, platforms=["cuda"], disabled_checks=checks)
        text = exported(x, table).mlir_module()
    assert text.count("custom_call @mosaic_gpu_v2(") == 1
    assert "4096x1024xbf16" not in text, "the table is never converted whole"


# What is refused.


def test_activations_must_go_with_the_weights() -> None:
    x, w = arrays(1, 64, 32, "float8")
    with pytest.raises(LowerError, match='Use activations = "float8" or "none"'):
        int8_matmul(x, w, activations="int8")


def test_the_gpu_kernel_says_what_it_takes() -> None:
    x, w = arrays(1, 64, 32)
    with pytest.raises(LowerError, match=r'table \[N, K\].*implementation="xla"'):
        int8_matmul(x, w, implementation="pallas_gpu")


def test_a_tile_too_large_for_vmem_is_refused() -> None:
    x, w = arrays(1, 4096, 256)
    tile = Blocks(1024, 8192, 4096)
    with pytest.raises(LowerError, match=r"MiB of 48. Use implementation=\"xla\""):
        pallas_tpu.int8_matmul(x, w, blocks=tile)
