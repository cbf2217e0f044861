"""Seconds and FLOPs, against hand-worked cases."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_table import spec_of, table_of

from llmos_jax.hardware import parse_topology
from llmos_jax.ir import MeshShape, ParamRow, ParamTable, Pins, Workload
from llmos_jax.planner import plan
from llmos_jax.planner.collectives import gather_s, links_of, sum_s
from llmos_jax.planner.sizes import model_flops, sizes_of

PINS = Pins(mesh={"fsdp": 16}, remat="full", microbatches=1)
WORK = Workload(global_batch=32, seq_len=2048)


def predicted(topology, workload=WORK, pins=PINS):
    return plan(table_of("llama3_8b"), topology, workload, "llama", pins).predicted


def test_llama3_70b_parameters():
    # 80 (2 D^2 + 2 D K H + 3 D F + 2 D) + 2 V D + D, by hand.
    assert table_of("llama3_70b").num_params == 70_553_706_496
    assert spec_of("llama3_70b").num_params == 70_553_706_496


@pytest.mark.parametrize(
    ("model", "billions"),
    [("llama3_8b", 8.03), ("llama3_405b", 405.9), ("smollm2_135m", 0.1345)]
    + [("bench_29m", 0.0294)],
)
def test_parameters_are_what_the_name_says(model, billions):
    assert table_of(model).num_params == pytest.approx(billions * 1e9, rel=0.005)


def test_llama3_70b_training_flops():
    # N without the lookup table: 70.554e9 - 128256 * 8192 = 69.503e9. One token of a
    # 4096 sequence: 6 * 69.503e9 + 6 * 80 * 8192 * 4096 = 4.331e11.
    work = Workload(global_batch=1, seq_len=4096)
    flops = model_flops(sizes_of(table_of("llama3_70b")), work)
    assert flops / 4096 == pytest.approx(4.331e11, rel=1e-3)


def test_training_flops_agree_with_the_scaling_book():
    # 18 B T D F + 24 B T D N H + 12 B T^2 N H a layer with full attention and as many
    # key/value heads as heads (transformers.md); causal attention halves the last term.
    B, T, L, D, F, N, H = 2, 128, 2, 64, 128, 8, 16
    spec = replace(spec_of("tiny"), num_kv_heads=N, head_dim=H, tied_embeddings=False)
    table = table_of(spec)
    layers = L * (18 * B * T * D * F + 24 * B * T * D * N * H + 6 * B * T**2 * N * H)
    rest = 6 * B * T * (D * spec.vocab_size + D + L * 2 * D)  # head and norms
    flops = model_flops(sizes_of(table), Workload(global_batch=B, seq_len=T))
    assert flops == pytest.approx(layers + rest)


def test_tied_table_counts_as_the_head():
    tied = sizes_of(table_of("tiny")).matmul_params
    assert tied == table_of("tiny").num_params


def test_gather_over_a_closed_axis_takes_v_over_w():
    # v5p, one closed axis of 4: W = 2 * 9e10 * 0.77; 3/4 of 1 GB arrives at each
    # device.
    links = links_of(parse_topology("v5p:4x4x4"), MeshShape(data=4, fsdp=4, tensor=4))
    seconds = gather_s(links, ("fsdp",), 1e9, 1)
    assert seconds == pytest.approx(0.75e9 / (2 * 9e10 * 0.77))
    assert sum_s(links, ("fsdp",), 1e9, 1) == pytest.approx(2 * seconds)


def test_open_axis_halves_the_rate_and_more_axes_add_up():
    slow = links_of(parse_topology("v5e:4x4"), MeshShape(fsdp=16))["fsdp"]
    fast = links_of(parse_topology("v5e:16x16"), MeshShape(fsdp=256))["fsdp"]
    one = links_of(parse_topology("v5e:16x16"), MeshShape(data=16, fsdp=16))["fsdp"]
    assert fast.bytes_per_s == pytest.approx(2 * slow.bytes_per_s)
    assert fast.bytes_per_s == pytest.approx(2 * one.bytes_per_s)


def test_small_gather_is_bound_by_latency():
    links = links_of(parse_topology("v5p:4x4x4"), MeshShape(fsdp=64))
    assert gather_s(links, ("fsdp",), 64.0, 1) == pytest.approx(6e-6)


def test_part_of_an_axis_is_a_line():
    links = links_of(parse_topology("v5p:8x8x8"), MeshShape(fsdp=256, tensor=2))
    rate = 9e10 * 0.77
    assert links["tensor"].bytes_per_s == pytest.approx(rate)
    assert links["fsdp"].bytes_per_s == pytest.approx((2 + 2 + 1) * rate)


def test_compute_time_of_llama3_8b_by_hand():
    # Full remat adds a forward pass of the layers: 2 * (N - V D) plus attention.
    sizes = sizes_of(table_of("llama3_8b"))
    again = 2 * (sizes.matmul_params - 128256 * 4096) + 4 * 32 * 4096 * 1024
    flops = model_flops(sizes, WORK) + again * WORK.tokens
    seconds = predicted("v6e:4x4").seconds["compute"]
    assert seconds == pytest.approx(flops / 16 / (9.2e14 * 0.9))


def test_mfu_counts_model_flops_per_chip():
    found = predicted("v6e:4x4")
    flops = model_flops(sizes_of(table_of("llama3_8b")), WORK)
    assert found.tflops_per_s_per_chip == pytest.approx(flops / found.step_s / 16e12)
    assert found.mfu == pytest.approx(found.tflops_per_s_per_chip / 920)
    assert found.tokens_per_s == pytest.approx(32 * 2048 / found.step_s)


def test_mfu_of_a_two_device_chip_is_per_chip():
    pins = Pins(mesh={"fsdp": 32}, remat="full", microbatches=1)
    found = predicted("tpu7x:2x2x4", pins=pins)
    assert found.mfu == pytest.approx(found.tflops_per_s_per_chip / 2307)


def test_module_without_a_spec_is_planned_by_its_axes():
    rows = tuple(
        ParamRow(path=path, shape=shape, dtype="float32", axes=axes)
        for path, shape, axes in [
            ("down", (2, 256, 64), ("layers", "ffn", "embed")),
            ("up", (2, 64, 256), ("layers", "embed", "ffn")),
        ]
    )
    work = Workload(global_batch=8, seq_len=16)
    found = plan(ParamTable(name="mlp", rows=rows), "cpu:4", work, "llama")
    assert 0 < found.predicted.step_s < 1


@given(
    st.sampled_from(["hbm_bytes_per_s", "link_bytes_per_s", "dcn_bytes_per_s"]),
    st.floats(min_value=1.01, max_value=64),
    st.sampled_from(["2*v5e:4x4", "2*h100:8", "2*v6e:8x8", "2*v5p:2x2x4"]),
)
def test_more_bandwidth_never_costs_time(field, factor, name):
    slow = parse_topology(name)
    faster = replace(slow.chip, **{field: getattr(slow.chip, field) * factor})
    fast = replace(slow, chip=faster)
    pins = Pins(mesh={"data": 2, "tensor": 2}, remat="full")
    work = Workload(global_batch=256, seq_len=512)
    before, after = (predicted(machine, work, pins) for machine in (slow, fast))
    assert after.step_s <= before.step_s * 1.005  # ties are ranked to three digits
