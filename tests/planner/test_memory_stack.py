"""Memory, against hand-worked cases and programs that XLA compiled for TPUs."""

import pytest
from llama_table import table_of

from llmos_jax.hardware import parse_topology
from llmos_jax.ir import MeshShape, Way, Workload
from llmos_jax.planner.layout import lay_out
from llmos_jax.planner.memory import budget, memory_of
from llmos_jax.planner.sizes import sizes_of
from llmos_jax.rules import load_rules


def stack(model, work, way=None, topology="v5p:2x2x2", **axes):
    table, mesh = table_of(model), MeshShape(**axes)
    rules = load_rules("llama", work.phase)
    layout = lay_out(table, rules, sizes_of(table), work, mesh)
    machine = parse_topology(topology)
    return memory_of(layout, way or Way(remat="full"), sizes_of(table), machine, work)


# The compiler's total (libtpu 0.0.42.1, jax 0.10.2) of our own train step:
# tools/bench/planner_memory.py. Model, topology, global batch, sequence, way, mesh.
COMPILED = [
    (
        *("llama3_70b", "v5p:4x4x4", 128, 4096),
        Way(remat="full", loss_tiles=8, loss_over="vocab"),
        {"fsdp": 64},
        32.81e9,
    ),
    (
        *("llama3_8b", "v6e:2x4", 24, 8192),
        Way(remat="full", loss_tiles=32, loss_over="vocab"),
        {"fsdp": 8},
        27.36e9,
    ),
    (
        *("llama3_8b", "v5p:2x2x2", 16, 4096),
        Way(remat="attention", loss_tiles=8, loss_over="vocab"),
        {"fsdp": 8},
        25.14e9,
    ),
    (
        *("llama3_8b", "v6e:4x4", 16, 4096),
        Way(remat="dots", loss_tiles=8, loss_over="tokens"),
        {"fsdp": 8, "tensor": 2},
        20.87e9,
    ),
    (
        *("qwen3_0_6b", "v6e:2x2", 16, 2048),
        Way(remat="full", loss_tiles=16, loss_over="tokens"),
        {"fsdp": 4},
        3.89e9,
    ),
    (
        *("llama3_2_3b", "v5p:2x2x1", 8, 4096),
        Way(remat="none", loss_tiles=8, loss_over="vocab"),
        {"fsdp": 4},
        49.84e9,
    ),
]


@pytest.mark.parametrize(
    ("model", "topology", "batch", "seq", "way", "axes", "compiled"), COMPILED
)
def test_peak_agrees_with_the_compiler(
    model, topology, batch, seq, way, axes, compiled
):
    found = stack(
        model, Workload(global_batch=batch, seq_len=seq), way, topology, **axes
    )
    assert sum(found.values()) == pytest.approx(compiled, rel=0.1)


def test_parameters_and_moments_take_twelve_bytes_each():
    found = stack("llama3_70b", Workload(global_batch=128, seq_len=4096), fsdp=64)
    held = found["params"] + found["optimizer"]
    # 13.245e9 is what XLA reports as arguments of MaxText's program on v5p:4x4x4.
    assert held == pytest.approx(13.245e9, rel=0.002)


def test_moments_in_half_precision_take_half():
    work = Workload(global_batch=128, seq_len=4096)
    whole = stack("llama3_70b", work, fsdp=64)
    half = stack("llama3_70b", work, Way(remat="full", state_dtype="bfloat16"), fsdp=64)
    assert half["optimizer"] == whole["optimizer"] / 2


def test_full_remat_keeps_one_input_a_layer():
    way = Way(remat="full", loss_tiles=64, loss_over="vocab")
    found = stack("llama3_70b", Workload(global_batch=128, seq_len=2048), way, fsdp=128)
    assert found["activations"] == 80 * 2048 * 8192 * 2


def test_offloaded_tensors_leave_two_layers_behind():
    work = Workload(global_batch=128, seq_len=8192)
    way = Way(remat="full", offload=("layer_input",), loss_tiles=64, loss_over="vocab")
    found = stack("llama3_70b", work, way, fsdp=128)
    assert found["activations"] == 2 * 8192 * 8192 * 2


def test_saved_names_add_their_widths():
    work = Workload(global_batch=8, seq_len=16384)
    ways = [
        Way(remat=remat, loss_tiles=64, loss_over="vocab")
        for remat in ("full", "query", "query,key")
    ]
    full, query, both = (
        stack("llama3_8b", work, way, fsdp=8)["activations"] for way in ways
    )
    assert query - full == 32 * 16384 * 4096 * 2
    assert both - query == 32 * 16384 * 1024 * 2


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"data": 8}, {"fsdp": 4, "tensor": 2}])
def test_saving_more_takes_more(axes):
    work = Workload(global_batch=64, seq_len=2048)
    peaks = [
        sum(stack("llama3_8b", work, Way(remat=remat), **axes).values())
        for remat in ("full", "attention", "dots", "none")
    ]
    assert peaks == sorted(peaks) and peaks[0] < peaks[3]


def test_microbatches_cut_activations():
    work = Workload(global_batch=64, seq_len=8192)
    whole = stack("llama3_8b", work, Way(remat="full", loss_tiles=64), fsdp=8)
    parts = stack(
        "llama3_8b", work, Way(remat="full", microbatches=8, loss_tiles=64), fsdp=8
    )
    assert parts["activations"] == pytest.approx(whole["activations"] / 8)
    assert parts["params"] == whole["params"]


def test_tiles_of_the_vocabulary_keep_no_whole_head():
    work = Workload(global_batch=64, seq_len=4096)
    tokens, vocab = (
        stack(
            "llama3_70b", work, Way(remat="full", loss_tiles=8, loss_over=over), fsdp=64
        )
        for over in ("tokens", "vocab")
    )
    assert sum(vocab.values()) < sum(tokens.values())


def test_replicas_hold_whole_weights():
    work = Workload(global_batch=64, seq_len=128)
    split, whole = stack("tiny", work, fsdp=8), stack("tiny", work, data=8)
    assert whole["params"] == table_of("tiny").num_params * 4
    assert split["params"] < whole["params"] / 7


def test_key_value_cache_by_hand():
    # 2 L K H S B bytes 2: 2 * 32 * 8 * 128 * 2048 * 16 * 2 = 4.29e9 over 16 devices.
    work = Workload(phase="decode", global_batch=16, seq_len=2048)
    found = stack("llama3_8b", work, data=2, tensor=8)
    assert found["KV cache"] == 2 * 32 * 8 * 128 * 2048 * 16 * 2 / 16


def test_int8_cache_takes_half_and_a_scale_for_each_head():
    bytes_of = {
        dtype: stack(
            "llama3_8b",
            Workload(phase="decode", global_batch=16, seq_len=2048, kv_dtype=dtype),
            tensor=8,
        )["KV cache"]
        for dtype in ("bfloat16", "int8")
    }
    # 128 numbers and a float32 scale, where 128 numbers had two bytes each.
    assert bytes_of["int8"] == bytes_of["bfloat16"] * (128 + 4) / 256


def test_reserve_is_left_free():
    assert budget(parse_topology("v5e:4x4")) == pytest.approx(14.9625 * 2**30)
