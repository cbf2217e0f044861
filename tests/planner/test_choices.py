"""What is planned where nobody pinned a pipeline, a split sequence or experts; and what
is said to pins that cannot be."""

import re

import pytest
from one_way import table_and_rules

from llmos_jax.errors import ConfigError, NoFeasiblePlan, PlanError
from llmos_jax.hardware import parse_topology
from llmos_jax.ir import Pins, Plan, Workload
from llmos_jax.ir.facts import facts_of
from llmos_jax.planner import plan
from llmos_jax.planner.candidates import enumerate_meshes, microbatch_counts
from llmos_jax.planner.domain import MARGIN


def planned(model, topology, batch, seq, pins=None, **work) -> Plan:
    table, rules = table_and_rules(model)
    workload = Workload(global_batch=batch, seq_len=seq, **work)
    return plan(table, topology, workload, rules, pins)


def mesh(**sizes):
    return Pins(mesh=sizes)


# The jobs that users bring: all of them have a plan, pinned and free.
JOBS = [
    ("llama3_70b", "v5p:4x4x8", 256, 4096, None),
    ("llama3_70b", "v5p:4x4x8", 256, 4096, mesh(fsdp=128)),
    ("llama3_70b", "v5p:4x4x8", 256, 4096, mesh(fsdp=32, tensor=4)),
    ("llama3_405b", "2*v6e:16x16", 256, 8192, None),
    ("llama3_405b", "2*v6e:16x16", 256, 8192, mesh(data=2, fsdp=64, tensor=4)),
    ("llama3_405b", "2*v6e:16x16", 512, 8192, None),
    ("mixtral_8x7b", "v5p:2x4x4", 128, 4096, None),
    ("mixtral_8x7b", "v5p:2x4x4", 128, 4096, mesh(expert=8, fsdp=4)),
    ("llama3_1_8b", "v5p:4x4x4", 8, 131072, None),
    ("llama3_1_8b", "v5p:4x4x4", 8, 131072, mesh(context=8, fsdp=8)),
    ("llama3_1_8b", "v5p:4x4x4", 1, 131072, None),
    ("llama3_70b", "4*v5e:16x16", 1024, 2048, None),
    ("llama3_70b", "4*v5e:16x16", 1024, 2048, mesh(data=1, stage=4)),
]


@pytest.mark.parametrize(("model", "topology", "batch", "seq", "pins"), JOBS)
def test_jobs_have_a_plan(model, topology, batch, seq, pins):
    found = planned(model, topology, batch, seq, pins)
    asked = pins.mesh if pins else {}
    assert {axis: found.mesh.sizes[axis] for axis in asked} == asked
    assert found.predicted.peak_hbm_bytes < 0.95 * found.topology.hbm_bytes_per_device
    assert found.search_s < 1
    stages = found.mesh.stage
    assert found.microbatches % stages == 0
    assert found.params.spec.num_layers % (stages * found.way.rounds) == 0


def test_a_pipeline_is_chosen_where_sums_over_dcn_do_not_fit():
    # 512 sequences of 405B: whole replicas in each slice are too large.
    with pytest.raises(NoFeasiblePlan):
        planned("llama3_405b", "2*v6e:16x16", 512, 8192, mesh(stage=1))
    found = planned("llama3_405b", "2*v6e:16x16", 512, 8192)
    assert (found.mesh.data, found.mesh.stage) == (1, 2)


def test_sequences_are_split_where_there_are_too_few():
    found = planned("llama3_1_8b", "v5p:4x4x4", 8, 131072)
    assert found.mesh.context > 1 and found.mesh.tensor == 1
    assert 131072 % (2 * found.mesh.context) == 0


def test_short_sequences_of_a_large_batch_are_not_split():
    tried = planned("llama3_8b", "v5p:4x4x4", 128, 4096)
    meshes = {item.mesh for item in tried.rejected} | {
        str(item.mesh) for item in tried.others
    }
    assert not any("context" in name or "stage" in name for name in meshes)


def test_what_splits_more_must_win_by_the_margin():
    found = planned("llama3_70b", "v5p:4x4x8", 256, 4096)
    best = min(found.others, key=lambda item: item.predicted.step_s)
    assert best.mesh.tensor > 1 and found.mesh.tensor == 1
    assert best.predicted.step_s > found.predicted.step_s / (1 + 1.1 * MARGIN)
    assert "but splits more: that must win by 3%" in found.explain()


def test_an_axis_that_was_asked_for_needs_no_margin():
    pins = mesh(tensor=4)
    assert planned("llama3_70b", "v5p:4x4x8", 256, 4096, pins).mesh.fsdp == 32


def test_unasked_axes_come_one_at_a_time():
    sparse = {"stage": (2, 4), "context": (2,), "expert": (2, 4)}
    meshes = enumerate_meshes(parse_topology("4*v5e:4x4"), Pins(), sparse)
    assert len(set(meshes)) == len(meshes)
    for one in meshes:
        split = [one.sizes[axis] > 1 for axis in sparse]
        assert one.num_devices == 64 and sum(split) <= 1
        if any(split):
            assert one.data * one.stage >= 4  # all slices, and no more replicas
            assert one.data == max(1, 4 // one.stage)


def test_a_pinned_axis_keeps_its_size_beside_the_others():
    sparse = {"stage": (2, 4), "context": (2,)}
    meshes = enumerate_meshes(parse_topology("v5e:4x4"), mesh(stage=2), sparse)
    assert {one.stage for one in meshes} == {2} and {1, 2} == {
        one.context for one in meshes
    }


@pytest.mark.parametrize(
    ("stages", "share", "counts"),
    [
        (1, 12, [1, 2, 4]),
        (4, 32, [4, 8, 16, 32]),
        (3, 12, [3, 6, 12]),
        (4, 6, []),
        (2, 128, [2, 4, 8, 16, 32]),
    ],
)
def test_a_pipeline_takes_multiples_of_its_stages(stages, share, counts):
    assert microbatch_counts(stages, share, Pins()) == counts


def test_pinned_schedules_are_kept():
    for schedule, rounds in (("gpipe", 1), ("1f1b", 1), ("circular", 5)):
        pins = Pins(mesh={"stage": 4, "data": 1}, schedule=schedule, rounds=rounds)
        found = planned("llama3_70b", "4*v5e:16x16", 1024, 2048, pins)
        assert (found.way.schedule, found.way.rounds) == (schedule, rounds)


def test_pinned_exchanges_are_kept():
    for exchange in ("ring", "gather"):
        pins = Pins(mesh={"context": 8}, context_exchange=exchange)
        found = planned("llama3_1_8b", "v5p:4x4x4", 8, 131072, pins)
        assert found.way.context_exchange == exchange


def test_lone_replicas_are_the_slices():
    found = planned("llama3_8b", "4*v6e:8x8", 512, 4096, local_steps=30)
    assert found.mesh.data == 4
    assert "replicas     agree on parameters once in 30 steps" in found.explain()
    with pytest.raises(NoFeasiblePlan, match="data=8 is not the number of slices .4."):
        planned("llama3_8b", "4*v6e:8x8", 512, 4096, mesh(data=8), local_steps=30)


def test_the_page_says_how_stages_take_turns():
    found = planned("llama3_70b", "4*v5e:16x16", 1024, 2048, JOBS[-1][-1])
    said = re.search(r"schedule +(\w+), .*bubble \d+%", found.explain())
    assert said and said[1] == found.way.schedule
    assert facts_of(found)["choice"]["schedule"] == found.way.schedule
    flat = planned("llama3_8b", "v6e:4x4", 64, 4096)
    assert "schedule" not in flat.explain() + str(facts_of(flat)["choice"])


def test_the_page_says_how_keys_travel():
    found = planned("llama3_1_8b", "v5p:4x4x4", 8, 131072)
    assert "keys         ring (passed on" in found.explain()


# What cannot be

TINY = ("tiny", "cpu:8", 8, 64)
REFUSED = [
    (
        Pins(schedule="1f1b"),
        PlanError,
        "plan.schedule = '1f1b' means nothing without plan.mesh.stage above 1",
    ),
    (
        Pins(context_exchange="gather"),
        PlanError,
        "plan.context_exchange = 'gather' means nothing without plan.mesh.context",
    ),
    (
        Pins(mesh={"stage": 2}, schedule="1fb1"),
        ConfigError,
        "plan.schedule = '1fb1'; it is one of gpipe, 1f1b, circular. Did you mean",
    ),
    (
        Pins(mesh={"context": 2}, context_exchange="rings"),
        ConfigError,
        "it is one of ring, gather. Did you mean 'ring'",
    ),
    (Pins(mesh={"stage": 2}, rounds=0), ConfigError, "plan.rounds = 0; it must"),
    (
        Pins(mesh={"stage": 2}, rounds=2),
        PlanError,
        "plan.rounds = 2 needs plan.schedule = 'circular'",
    ),
    (
        Pins(mesh={"stage": 2}, schedule="circular", rounds=3),
        PlanError,
        r"layers = 2 is not divisible by stage=2 x rounds=3; nearest: rounds=1\.",
    ),
    (
        Pins(mesh={"stage": 4}, microbatches=2),
        PlanError,
        r"plan.microbatches = 2 is not a multiple of stage=4; nearest: microbatches=4",
    ),
    (
        Pins(mesh={"stage": 8}),
        NoFeasiblePlan,
        r"rejected.\n  plan.mesh: layers = 2 is not divisible by stage=8; nearest: "
        "stage=2",
    ),
    (
        Pins(mesh={"tensor": 8}),
        NoFeasiblePlan,
        r"rejected.\n  plan.mesh: kv_heads = 4 is not divisible by tensor=8; nearest: "
        "tensor=4",
    ),
    (
        Pins(mesh={"stage": 3}),
        PlanError,
        "covers 3 devices, which does not divide the 8 of cpu:8; nearest: stage=2 or "
        "stage=4",
    ),
    (
        Pins(microbatches=3),
        PlanError,
        "does not divide batch.global = 8; nearest: microbatches=2 or microbatches=4",
    ),
]


@pytest.mark.parametrize(("pins", "error", "message"), REFUSED)
def test_pins_that_cannot_be_say_what_could(pins, error, message):
    with pytest.raises(error, match=message):
        planned(*TINY, pins=pins)


@pytest.mark.parametrize(
    ("topology", "seq", "pins", "message"),
    [
        ("cpu:8", 100, {"context": 8}, "seq = 100 is not divisible by context=8; "
         r"nearest: context=4 \("),
        ("cpu:8", 100, {"context": 4}, "seq = 100 is not divisible by 2 x 4; nearest: "
         "context=2 "),
        ("cpu:8", 60, {"context": 2, "tensor": 4}, "residual = 60 is not divisible by "
         "context=2 x tensor=4; nearest: context x tensor = 4 "),
    ],
)  # fmt: skip
def test_sequences_that_do_not_divide_say_what_would(topology, seq, pins, message):
    with pytest.raises(NoFeasiblePlan, match=r"rejected.\n  plan.mesh: " + message):
        planned("tiny", topology, 8, seq, Pins(mesh=pins))


def test_experts_that_do_not_divide_say_what_would():
    message = "experts = 8 is not divisible by expert=16; nearest: expert=8"
    with pytest.raises(NoFeasiblePlan, match=r"rejected.\n  plan.mesh: " + message):
        planned("mixtral_8x7b", "v5p:2x4x4", 128, 4096, mesh(expert=16))


def test_a_replica_with_too_few_sequences_for_its_stages_is_told():
    message = "3 sequences per replica do not fill stage=2; "
    with pytest.raises(NoFeasiblePlan, match=message + "nearest: stage=1"):
        planned("tiny", "cpu:4", 6, 64, mesh(stage=2, fsdp=2))


def test_wrong_pins_are_the_remedy():
    with pytest.raises(NoFeasiblePlan, match="make it fit: sizes that divide, as said"):
        planned(*TINY, pins=mesh(tensor=8))
