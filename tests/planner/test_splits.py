"""Pipelines, split sequences, experts and lone replicas: formulas, done by hand."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_table import table_of
from one_way import by_hand, laid_out

from llmos_jax.errors import RuleError
from llmos_jax.hardware import parse_topology
from llmos_jax.ir import MeshShape, Way, Workload
from llmos_jax.ir.facts import bubble_of, schedule_text, ticks_of
from llmos_jax.planner.collectives import DCN_HOP_S, HOP_S
from llmos_jax.planner.sizes import sizes_of

# llama3_8b: layers, model, feed-forward, keys' and queries' width, vocabulary.
L, D, F, KH, NH, V = 32, 4096, 14336, 1024, 4096, 128256
WORK = Workload(global_batch=64, seq_len=2048)
STAGED = {"stage": 4, "fsdp": 16}


def rate_of(topology):
    chip = parse_topology(topology).chip
    return chip.peak_flops_per_s["bfloat16"] * chip.matmul_efficiency


def llama(topology="v5p:4x4x4", mesh=STAGED, work=WORK, **way):
    return by_hand("llama3_8b", topology, mesh, work, **{"remat": "full", **way})


def compute_s(**way):
    return llama(**way).predicted.seconds["compute"]


def head_s(work=WORK, devices=64):
    return 6 * D * V * work.tokens / devices / rate_of("v5p:4x4x4")


# Pipelines


@pytest.mark.parametrize(
    ("schedule", "rounds", "parts", "turns"),
    [
        ("gpipe", 1, 4, 7 / 4),
        ("gpipe", 1, 8, 11 / 8),
        ("circular", 2, 4, 11 / 8),
        ("circular", 4, 4, 19 / 16),
    ],
)
def test_a_pipeline_idles_at_both_ends(schedule, rounds, parts, turns):
    # (R M + P - 1) / R M of the layers' work with P = 4; each stage has a quarter of
    # the logits, which wait for nobody.
    work = replace(WORK, global_batch=128)
    flat = compute_s(mesh={"fsdp": 64}, work=work)
    deep = compute_s(schedule=schedule, rounds=rounds, microbatches=parts, work=work)
    layers = flat - head_s(work)
    assert deep == pytest.approx(turns * layers + head_s(work), rel=1e-6)


def test_1f1b_makes_each_forward_pass_twice():
    # A forward pass: 2 N a token in products, 4 N H a key in attention.
    params = sizes_of(table_of("llama3_8b")).matmul_params - D * V
    keys = (2048 + 1024) / 2
    forward = (2 * params + 4 * L * NH * keys) * WORK.tokens / 64
    more = compute_s(schedule="1f1b", microbatches=4) - compute_s(microbatches=4)
    assert more == pytest.approx(7 / 4 * forward / rate_of("v5p:4x4x4"), rel=1e-6)


@given(
    st.sampled_from([2, 3, 4, 8]), st.sampled_from([1, 2, 5]), st.sampled_from([1, 2])
)
def test_idle_turns_are_the_stages_less_one(stages, times, rounds):
    way = Way(mesh=MeshShape(stage=stages), microbatches=times * stages, rounds=rounds)
    useful = rounds * way.microbatches
    assert ticks_of(way) - useful == stages - 1
    assert bubble_of(way) == pytest.approx(1 - useful / ticks_of(way))


def test_a_schedule_is_said_with_its_bubble():
    way = Way(
        mesh=MeshShape(stage=4), microbatches=8, schedule="circular", rounds=2
    )  # 3 of 2 x 8 + 3 turns
    assert schedule_text(way) == "circular, 2 rounds, bubble 16%"


def test_stages_send_over_dcn_by_hand():
    # 4 slices, 4 stages; n = 4 x 2048 tokens of a device and microbatch.
    topology = "4*v5p:2x2x4"
    chip = parse_topology(topology).chip
    dcn = chip.dcn_bytes_per_s * 0.33
    block = 4 * 2048 / 4 * D * 2
    hops = 2 * (4 + 3) * (DCN_HOP_S + block / dcn)
    shared = 2 * (4 + 3) * block * 3 / 4 / dcn
    unstaged = (2 * V * D / 16 + D) * 4  # both tables over fsdp, and the last norm
    staged = 2 * unstaged * 3 / 4 / dcn
    found = llama(topology, microbatches=4).predicted.seconds
    assert found["dcn"] == pytest.approx(hops + shared + staged, rel=1e-6)


def test_stages_inside_a_slice_send_over_ici_only():
    assert llama(microbatches=4).predicted.seconds["dcn"] == 0


def test_a_circular_schedule_moves_its_layers():
    # Both schedules at one round: the same turns, and the layers moved.
    topology = "4*v5p:2x2x4"
    still = llama(topology, microbatches=4).predicted
    moved = llama(topology, microbatches=4, schedule="circular").predicted
    layers = sizes_of(table_of("llama3_8b")).matmul_params - D * V
    leaving = layers / 64 * 3 / 4 * (2 + 4)
    dcn = parse_topology(topology).chip.dcn_bytes_per_s * 0.33
    more_s = moved.seconds["dcn"] - still.seconds["dcn"]
    assert more_s == pytest.approx(leaving / dcn, rel=0.001)  # but for the norms
    more = moved.memory["moved weights"]
    assert more == pytest.approx(layers / 64 * (2 + 4), rel=0.001)


def test_all_turns_of_gpipe_wait_for_the_backward_pass():
    # n = 1 x 2048 tokens, 8 layers, M + P - 1 = 7 turns; full remat keeps the input.
    memory = llama(microbatches=4).predicted.memory
    assert memory["activations"] == 7 * 2048 * 8 * D * 2
    assert memory["features"] == 2 * 4 * 2048 / 4 * D * 2
    fewer = llama(microbatches=4, schedule="circular", rounds=4).predicted.memory
    assert fewer["activations"] == (4 + 3 / 4) * 2048 * 8 * D * 2


def test_1f1b_keeps_one_microbatch_and_the_inputs_of_few():
    work = replace(WORK, global_batch=256)  # 16 microbatches of 1 x 2048
    memory = llama(microbatches=16, schedule="1f1b", work=work).predicted.memory
    assert memory["activations"] == 2048 * 8 * D * 2
    assert memory["stage inputs"] == 7 * 2048 * D * 2
    assert "features" not in memory


def test_stages_share_the_layers_and_not_the_tables():
    flat, deep = (laid_out("llama3_8b", mesh, WORK) for mesh in ({"fsdp": 16}, STAGED))
    tables = 2 * V * D / 16 + D
    assert deep.unstaged == tables and flat.unstaged == 0
    assert deep.sharded - tables == pytest.approx((flat.sharded - tables) / 4)
    assert deep.gathered_layer == flat.gathered_layer


@pytest.mark.parametrize(("schedule", "parts"), [("gpipe", 4), ("1f1b", 1)])
def test_stages_share_the_logits(schedule, parts):
    # Of 4 microbatches of 4 x 8192 tokens: all at once, or one after another.
    way = {"remat": "full", "microbatches": 4, "schedule": schedule}
    work = Workload(global_batch=256, seq_len=8192)
    found = by_hand("llama3_8b", "v5p:4x4x4", STAGED, work, **way).predicted
    assert found.memory["logits"] == parts * 8192 * V * (4 + 2)


def test_stages_share_the_tokens_of_a_sequence():
    work = Workload(global_batch=64, seq_len=4 * 2 * 3)
    message = (
        "seq = 24 is not divisible by stage=4 x tensor=4; nearest: stage x tensor "
    )
    with pytest.raises(RuleError, match=message + "= 8 "):
        laid_out("llama3_8b", {"stage": 4, "tensor": 4}, work)


def test_1f1b_shares_only_what_ends_a_microbatch():
    # Beside its second forward passes, 4 and not 4 + 3 turns share n D over DCN.
    topology = "4*v5p:2x2x4"
    all_turns, ends = (
        llama(topology, microbatches=4, schedule=name).predicted.seconds["dcn"]
        for name in ("gpipe", "1f1b")
    )
    dcn = parse_topology(topology).chip.dcn_bytes_per_s * 0.33
    assert all_turns - ends == pytest.approx(2 * 3 * 2048 * D * 2 * 3 / 4 / dcn)


# Split sequences

LONG = Workload(global_batch=16, seq_len=131072)
CONTEXT = {"fsdp": 16, "context": 4}
TILED = {"loss_tiles": 64, "loss_over": "vocab"}  # a layer is the fullest moment then
n = 131072 // 4  # of one sequence


def split(topology="v5p:4x4x4", **way):
    return by_hand("llama3_8b", topology, CONTEXT, LONG, **way).predicted


def one_way_s(sent):
    """Seconds to a neighbour in all layers, over one link."""
    chip = parse_topology("v5p:4x4x4").chip
    return L * sent / (chip.link_bytes_per_s * chip.link_efficiency)


KEYS_S = one_way_s(n * 2 * KH * 2)
GRADIENTS_S = one_way_s(n * 2 * KH * 4)
WHOLE_S = 4 * KEYS_S * 3 / 4 / 2  # gathered over the ring of 4, both ways at once


def test_ring_and_gather_move_what_they_say():
    # Around the ring: 3 hops there; 3 back with gradients, which make one more home.
    # Gathered: once for either pass, and the gradients scattered, twice as many bytes.
    ring, gather = (
        split(remat="attention", context_exchange=name).seconds["ici"]
        for name in ("ring", "gather")
    )
    around = 3 * KEYS_S + 3 * (KEYS_S + GRADIENTS_S) + GRADIENTS_S
    assert ring - gather == pytest.approx(around - 4 * WHOLE_S)


def test_attention_that_is_made_again_asks_for_keys_again():
    kept, made = (split(remat=remat).seconds["ici"] for remat in ("attention", "dots"))
    assert made - kept == pytest.approx(3 * KEYS_S)


def test_the_ring_hides_behind_long_attention_but_for_its_latency():
    ring, gather = (
        split(remat="attention", context_exchange=name) for name in ("ring", "gather")
    )
    latency = 2 * L * 3 * HOP_S
    more_s = gather.step_s - ring.step_s
    assert more_s == pytest.approx(4 * WHOLE_S - latency - GRADIENTS_S)


def test_the_ring_is_waited_for_where_attention_is_short():
    # A quarter of the attention to 4096 tokens takes less than a hop.
    work = Workload(global_batch=16, seq_len=4096)
    found = by_hand("llama3_8b", "v5p:4x4x4", CONTEXT, work, remat="none").predicted
    hop = one_way_s(1024 * 2 * KH * 2)
    piece = 4 * L * NH * (4096 + 1024) / 2 * 1024 / 4 / rate_of("v5p:4x4x4")
    assert hop > piece
    waited = 3 * (hop - piece) + 3 * (3 * hop - 2.5 * piece) + 2 * hop
    around = 3 * hop + 3 * 3 * hop + 2 * hop
    busy = sum(found.seconds.values()) - around + L * 5e-5  # 50 us start a layer
    assert found.step_s - busy == pytest.approx(waited + 2 * L * 3 * HOP_S)


def test_gathered_keys_take_room_for_whole_sequences():
    ring, gather = (
        split(remat="attention", context_exchange=name, **TILED).memory["temporaries"]
        for name in ("ring", "gather")
    )
    assert gather - ring == (4 - 2) * n * 2 * KH * (2 + 4)


def test_each_part_of_a_sequence_is_two_pieces():
    work = Workload(global_batch=8, seq_len=4 * 1023)
    with pytest.raises(
        RuleError, match="seq = 4092 is not divisible by 2 x 4; nearest"
    ):
        laid_out("llama3_8b", {"context": 4}, work)


# Layers split over `tensor`


def test_tokens_between_blocks_are_split_over_tensor():
    flat, thin = (
        by_hand("llama3_8b", "v5p:4x4x4", mesh, WORK, remat="full").predicted
        for mesh in ({"fsdp": 64}, {"fsdp": 16, "tensor": 4})
    )
    assert flat.memory["activations"] == L * 2048 * D * 2
    assert thin.memory["activations"] == L * 4 * 2048 * D * 2 / 4


def test_what_goes_into_a_block_is_gathered_again_where_it_is_remade():
    # Of two gathers and two scatters a layer: the gathers, and attention's scatter.
    def moved(remat):
        return by_hand(
            "llama3_8b", "v5p:4x4x4", {"data": 16, "tensor": 4}, WORK, remat=remat
        ).predicted.seconds["ici"]

    chip = parse_topology("v5p:4x4x4").chip
    ring = 2 * chip.link_bytes_per_s * chip.link_efficiency
    once = L * 4 * 2048 * D * 2 * 3 / 4 / ring  # one gather in each layer
    features = 2 * once / L  # of the loss, with blocks in the formula
    assert moved("dots") - moved("none") == pytest.approx(2 * once + 0.5 * features)
    assert moved("full") - moved("dots") == pytest.approx(once + 0.25 * features)


# Experts

ROUTED = Workload(global_batch=64, seq_len=4096)
EXPERT = {"fsdp": 4, "expert": 8}


def mixtral(mesh=EXPERT, **way):
    way = {"remat": "full", **way}
    return by_hand("mixtral_8x7b", "v5p:2x4x4", mesh, ROUTED, **way).predicted


def test_rows_travel_to_their_experts_three_times_there_and_back():
    # k = 2 rows of D for each of 2 x 4096 tokens; forward, made again, and gradients.
    # `none` makes nothing again.
    again = mixtral().seconds["ici"] - mixtral(remat="none").seconds["ici"]
    chip = parse_topology("v5p:2x4x4").chip
    rate = chip.link_bytes_per_s * chip.link_efficiency
    rows = 2 * 2 * 4096 * D * 2
    exchange = rows * 4 / (4 * rate)  # expert=8 lies on lines of 4 x 2
    assert again == pytest.approx(L * 2 * exchange)


def test_experts_are_not_gathered_over_their_axis():
    flat = laid_out("mixtral_8x7b", {"fsdp": 32}, ROUTED)
    spread = laid_out("mixtral_8x7b", EXPERT, ROUTED)
    experts = 8 * (3 * D * F + D)  # and each one's column of the router
    assert flat.gathered_layer - spread.gathered_layer == pytest.approx(experts * 7 / 8)
    assert spread.gathers[("fsdp",)] < flat.gathers[("fsdp",)] / 4


def test_memory_has_room_for_the_worst_rows():
    # One device has one expert: at worst all of 8 devices' tokens come to it.
    rows = 8 * 2 * 4096
    assert mixtral().memory["temporaries"] > rows * (2 * D + 3 * F) * 2
    kept = [mixtral(remat=remat).memory["activations"] for remat in ("full", "ffn_up")]
    assert kept[1] - kept[0] == L * rows * F * 2


# Lone replicas


def test_local_steps_send_parameters_once_in_many():
    # 4 slices; a device of v5p:2x2x4 has 1 / 16 of the parameters, in float32.
    topology, mesh = "4*v5p:2x2x4", {"data": 4, "fsdp": 16}
    lone = replace(WORK, local_steps=10)
    each = llama(topology, mesh).predicted
    tenth = llama(topology, mesh, lone).predicted
    params = laid_out("llama3_8b", mesh, WORK).sharded
    dcn = parse_topology(topology).chip.dcn_bytes_per_s * 0.33
    assert each.seconds["dcn"] == pytest.approx(2 * params * 4 * 3 / 4 / dcn, rel=1e-3)
    assert tenth.seconds["dcn"] == pytest.approx(each.seconds["dcn"] / 10, rel=1e-3)
    assert tenth.memory["replicas"] == tenth.memory["velocity"] == params * 4
    assert "replicas" not in each.memory


def test_lone_replicas_still_sum_over_what_splits_their_sequences():
    work = replace(LONG, local_steps=10)
    mesh = {"data": 4, "fsdp": 4, "context": 4}
    assert set(laid_out("llama3_8b", mesh, LONG).sums) == {
        ("data", "context"),
        ("data", "fsdp", "context"),
    }
    assert set(laid_out("llama3_8b", mesh, work).sums) == {
        ("context",),
        ("fsdp", "context"),
    }


# One of each axis


@given(
    st.sampled_from(["gpipe", "1f1b", "circular"]),
    st.sampled_from(["ring", "gather"]),
    st.sampled_from(["full", "dots", "none"]),
)
def test_schedule_and_exchange_mean_nothing_without_their_axis(name, exchange, remat):
    plain = llama(mesh={"fsdp": 64}, remat=remat)
    named = llama(
        mesh={"fsdp": 64}, remat=remat, schedule=name, context_exchange=exchange
    )
    assert named.predicted == plain.predicted
