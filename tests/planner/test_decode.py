"""Decode steps against published speeds, and the layout they lead to."""

import pytest
from llama_table import table_of

from llmos_jax.errors import RuleError
from llmos_jax.hardware import parse_topology
from llmos_jax.ir import MeshShape, Way, Workload
from llmos_jax.planner.collectives import links_of
from llmos_jax.planner.cost import estimate
from llmos_jax.planner.layout import lay_out
from llmos_jax.planner.sizes import sizes_of
from llmos_jax.rules import load_rules

V5E16 = parse_topology("v5e:4x4")


def decoded(batch, context, **mesh):
    """Llama-3.1-70B, int8 weights and cache."""
    table, shape = table_of("llama3_70b"), MeshShape(**mesh)
    work = Workload(
        phase="decode",
        global_batch=batch,
        seq_len=context,
        param_dtype="int8",
        kv_dtype="int8",
    )
    sizes, links = sizes_of(table), links_of(V5E16, shape)
    layout = lay_out(table, load_rules("llama", "decode"), sizes, work, shape)
    found = estimate(layout, Way(mesh=shape), {}, links, sizes, V5E16, work)
    return layout, found.predicted


# jax-llm-examples llama3/README.md, jax 0.6.0: tokens/s of one sequence. All 24 rows:
# tools/bench/planner_decode.py.
@pytest.mark.parametrize(
    ("tensor", "batch", "context", "speed"),
    [
        (16, 8, 2048, 159),
        (16, 8, 8192, 146),
        (16, 32, 8192, 93.8),
        (16, 64, 4096, 62.7),
        (16, 128, 2048, 39.3),
        (8, 8, 2048, 84.4),
        (8, 32, 8192, 71.3),
        (8, 128, 2048, 50.2),
    ],
)
def test_published_decode_speeds_within_20_percent(tensor, batch, context, speed):
    found = decoded(batch, context, data=16 // tensor, tensor=tensor)[1]
    assert found.step_s * speed == pytest.approx(1, abs=0.2)
    assert found.error is not None and "v5e decode rows" in found.domain


@pytest.mark.parametrize(
    ("batch", "best"), [(8, 16), (16, 16), (32, 16), (64, 16), (128, 8)]
)
def test_tensor_16_wins_to_64_sequences_and_two_replicas_of_8_at_128(batch, best):
    times = {
        tensor: decoded(batch, 2048, data=16 // tensor, tensor=tensor)[1].step_s
        for tensor in (16, 8, 4)
    }
    assert min(times, key=times.get) == best


def test_eight_kv_heads_over_sixteen_devices_are_kept_twice():
    wide = decoded(8, 2048, tensor=16)[0]
    assert wide.width_ways["kv_heads"] == 8 and wide.width_ways["heads"] == 16
    whole = table_of("llama3_70b")
    narrow = sum(row.size for row in whole.rows if "kv_heads" in row.axes)
    norms = sum(row.size for row in whole.rows if "norm" in row.axes)
    rest = whole.num_params - narrow - norms
    assert wide.sharded == pytest.approx(rest / 16 + narrow / 8 + norms)


def test_training_does_not_repeat_heads():
    table = table_of("llama3_70b")
    work = Workload(global_batch=16, seq_len=2048)
    with pytest.raises(RuleError, match="kv_heads = 8 is not divisible"):
        lay_out(table, load_rules("llama"), sizes_of(table), work, MeshShape(tensor=16))


def test_a_small_batch_streams_weights_and_a_large_one_sums():
    small, large = (decoded(batch, 2048, tensor=16)[1] for batch in (8, 128))
    assert small.bound_by == "hbm"
    # 70.6 GB of int8 over 16 chips at 819 GB/s, less the embedding table.
    assert small.seconds["hbm"] == pytest.approx(69.5e9 / 16 / 8.2e11, rel=0.1)
    assert large.seconds["ici"] > 10 * small.seconds["ici"]
