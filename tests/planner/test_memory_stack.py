"""Memory, against hand-worked cases and programs that XLA compiled for TPUs."""

import pytest
from llama_table import table_of

from llmos_jax.hardware import parse_topology
from llmos_jax.ir import MeshShape, Workload
from llmos_jax.planner import memory
from llmos_jax.planner.candidates import Way
from llmos_jax.planner.layout import lay_out
from llmos_jax.planner.memory import budget, memory_of
from llmos_jax.planner.sizes import sizes_of
from llmos_jax.rules import load_rules
from llmos_jax.units import GIB


def stack(model, work, remat="full", microbatches=1, **axes):
    table, mesh = table_of(model), MeshShape(**axes)
    layout = lay_out(table, load_rules("llama"), sizes_of(table), work, mesh)
    way = Way(mesh=mesh, remat=remat, microbatches=microbatches)
    return memory_of(layout, way, sizes_of(table), work)


def test_parameters_and_moments_take_twelve_bytes_each():
    found = stack("llama3_70b", Workload(global_batch=128, seq_len=4096), fsdp=64)
    held = found["params"] + found["optimizer"]
    # 13.245e9 is what XLA reports as arguments of MaxText's program on v5p:4x4x4.
    assert held == pytest.approx(13.245e9, rel=0.002)


def test_full_remat_keeps_one_input_a_layer():
    found = stack("llama3_70b", Workload(global_batch=128, seq_len=2048), fsdp=128)
    assert found["activations"] == (80 + 1) * 2048 * 8192 * 2


def test_peak_agrees_with_a_compiled_llama3_70b():
    # A plain train step (scan, full remat, plain attention), fsdp=128, 1 x 2048 per
    # chip, compiled for v5p:4x4x8: 15.9 GB peak.
    found = stack("llama3_70b", Workload(global_batch=128, seq_len=2048), fsdp=128)
    assert sum(found.values()) == pytest.approx(15.9e9, rel=0.12)


@pytest.mark.parametrize(
    ("model", "batch", "seq", "fsdp", "compiled"),
    [
        ("llama3_70b", 128, 4096, 64, 13.245e9 + 23.272e9),  # v5p:4x4x4
        ("llama3_8b", 24, 8192, 8, 31.62 * GIB),  # v6e:2x4: does not fit, by 0.38 GiB
    ],
)
def test_peak_agrees_with_maxtext(monkeypatch, model, batch, seq, fsdp, compiled):
    # MaxText 0.2.5 train_compile, full remat; its attention works block by block.
    monkeypatch.setattr(memory, "QUERY_BLOCK", 512)
    found = stack(model, Workload(global_batch=batch, seq_len=seq), fsdp=fsdp)
    assert sum(found.values()) == pytest.approx(compiled, rel=0.15)


def test_what_does_not_fit_a_v6e_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "QUERY_BLOCK", 512)
    found = stack("llama3_8b", Workload(global_batch=24, seq_len=8192), fsdp=8)
    assert sum(found.values()) > budget(parse_topology("v6e:2x4"))


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"data": 8}, {"fsdp": 4, "tensor": 2}])
def test_saving_more_takes_more(axes):
    work = Workload(global_batch=64, seq_len=2048)
    peaks = [
        sum(stack("llama3_8b", work, remat, **axes).values())
        for remat in ("full", "dots", "none")
    ]
    assert peaks == sorted(peaks) and peaks[0] < peaks[2]


def test_microbatches_cut_activations():
    work = Workload(global_batch=64, seq_len=2048)
    whole = stack("llama3_8b", work, fsdp=8)
    parts = stack("llama3_8b", work, microbatches=8, fsdp=8)
    assert parts["activations"] == pytest.approx(whole["activations"] / 8)
    assert parts["params"] == whole["params"]


def test_replicas_hold_whole_weights():
    work = Workload(global_batch=64, seq_len=128)
    split, whole = stack("tiny", work, fsdp=8), stack("tiny", work, data=8)
    assert whole["params"] == table_of("tiny").num_params * 4
    assert split["params"] < whole["params"] / 7


def test_key_value_cache_by_hand():
    # 2 L K H S B bytes 2: 2 * 32 * 8 * 128 * 2048 * 16 * 2 = 4.29e9 over 16 devices.
    work = Workload(phase="decode", global_batch=16, seq_len=2048)
    found = stack("llama3_8b", work, remat="none", data=2, tensor=8)
    assert found["KV cache"] == 2 * 32 * 8 * 128 * 2048 * 16 * 2 / 16


def test_reserve_is_left_free():
    assert budget(parse_topology("v5e:4x4")) == pytest.approx(14.9625 * GIB)
