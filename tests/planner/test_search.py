"""The planner chooses, explains itself, and refuses with numbers."""

import math
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_table import table_of

from llmos_jax.errors import ConfigError, NoFeasiblePlan, PlanError, RuleError
from llmos_jax.hardware import parse_topology
from llmos_jax.ir import Pins, Plan, Workload
from llmos_jax.planner import plan
from llmos_jax.planner.candidates import enumerate_meshes
from llmos_jax.rules import load_rules


def planned(model="tiny", topology="cpu:8", batch=8, seq=64, pins=None, **work):
    workload = Workload(global_batch=batch, seq_len=seq, **work)
    return plan(table_of(model), topology, workload, "llama", pins)


def test_hand_tuned_choice_is_found_llama3_70b_on_v5p():
    # MaxText's and tpu-recipes' dense configurations are pure FSDP.
    found = planned("llama3_70b", "v5p:4x4x8", 256, 2048)
    assert found.mesh.fsdp == 128 and found.mesh.tensor == 1


def test_405b_on_1024_chips_is_planned_within_a_second():
    started = time.perf_counter()
    found = planned("llama3_405b", "v5p:8x8x16", 1024, 8192)
    assert time.perf_counter() - started < 1
    assert found.mesh.num_devices == 1024
    assert 0.3 < found.predicted.mfu < 0.9


def test_plan_covers_every_parameter_and_the_contract():
    found = planned()
    assert set(found.specs) == {row.path for row in found.params.rows}
    summary = found.summary()
    assert summary["mesh"] == found.mesh.sizes
    assert set(summary["predicted"]["seconds"]) == {
        "compute",
        "hbm",
        "ici",
        "dcn",
        "host",
    }
    assert sum(summary["predicted"]["memory"].values()) == pytest.approx(
        summary["predicted"]["peak_hbm_bytes"]
    )


def test_plan_survives_json():
    found = planned()
    assert Plan.from_json(found.to_json()).fingerprint == found.fingerprint


def test_candidates_are_either_rejected_or_costed():
    found = planned("llama3_8b", "2*v6e:16x16", 1024, 8192)
    assert 0 < len(found.rejected) < found.candidates
    assert all(": " in item.reason for item in found.rejected)


def test_rejections_have_numbers():
    found = planned("llama3_8b", "2*v6e:16x16", 1024, 8192)
    reasons = "\n".join(item.reason for item in found.rejected)
    assert "memory: needs" in reasons and "> 29.7 GiB" in reasons
    assert "kv_heads = 8 is not divisible by tensor=16" in reasons
    assert "dcn: data=1 does not cover whole slices (2)" in reasons


def test_only_data_crosses_slices():
    found = planned("llama3_8b", "4*v6e:8x8", 512, 4096)
    assert found.mesh.data % 4 == 0
    assert found.predicted.seconds["dcn"] > 0


def test_pins_are_kept_and_the_rest_is_planned():
    pins = Pins(mesh={"fsdp": 2, "tensor": 2}, remat="dots", microbatches=2)
    found = planned(pins=pins)
    assert (found.mesh.data, found.mesh.fsdp, found.mesh.tensor) == (2, 2, 2)
    assert (found.remat, found.microbatches) == ("dots", 2)


@pytest.mark.parametrize(
    ("pins", "error", "message"),
    [
        (
            Pins(mesh={"fspd": 2}),
            ConfigError,
            "no mesh axis 'fspd'. Did you mean",
        ),
        (
            Pins(mesh={"fsdp": 0}),
            ConfigError,
            "plan.mesh.fsdp = 0; it must",
        ),
        (Pins(mesh={"fsdp": 3}), PlanError, "covers 3 devices.*the 8 of cpu:8"),
        (Pins(mesh={"fsdp": 4, "tensor": 4}), PlanError, "fsdp=4 x tensor=4 covers 16"),
        (
            Pins(remat="ful"),
            ConfigError,
            "'ful' is no policy and no tensor of a layer. Did you mean 'full'",
        ),
        (Pins(microbatches=0), ConfigError, "plan.microbatches = 0"),
        (Pins(microbatches=3), PlanError, "does not divide batch.global = 8"),
        (Pins(mesh={"tensor": 8}), NoFeasiblePlan, "kv_heads = 4 is not divisible by"),
        (
            Pins(mesh={"data": 8}, microbatches=2),
            NoFeasiblePlan,
            "1 sequences per replica are not divisible by 2 microbatches",
        ),
    ],
)
def test_pins_that_cannot_be_are_refused(pins, error, message):
    with pytest.raises(error, match=message):
        planned(pins=pins)


def test_no_plan_counts_reasons_and_names_the_nearest_miss():
    with pytest.raises(NoFeasiblePlan) as caught:
        planned("llama3_70b", "v5e:4x4", 16, 2048)
    text = str(caught.value)
    assert "no plan for llama3_70b on v5e:4x4" in text and "all rejected" in text
    assert "> 15.0 GiB" in text
    assert "Nearest: fsdp=4 tensor=4, remat=full, offload=layer_input" in text
    assert "chips of this kind (now 16)" in text
    assert len(caught.value.rejected) == int(text.split(": ")[1].split()[0])


def test_batch_that_no_mesh_divides_says_so():
    with pytest.raises(NoFeasiblePlan, match="multiple of 8 .now 3."):
        planned(batch=3, pins=Pins(mesh={"data": 8}))


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_serving_phases_are_planned(phase):
    found = planned("llama3_8b", "v5e:4x4", 16, 2048, phase=phase)
    assert found.remat == "none" and found.microbatches == 1
    assert (
        "KV cache" in found.predicted.memory
        and "optimizer" not in found.predicted.memory
    )
    assert math.isfinite(found.predicted.step_s) and found.predicted.step_s > 0


def test_decode_is_bound_by_reading_the_weights():
    found = planned("llama3_8b", "v5e:4x4", 16, 2048, phase="decode")
    assert found.predicted.bound_by == "hbm"


def test_rules_and_topology_may_be_given_as_artefacts():
    workload = Workload(global_batch=8, seq_len=64)
    by_noun = plan(
        table_of("tiny"), parse_topology("cpu:8"), workload, load_rules("llama")
    )
    assert by_noun.fingerprint == planned().fingerprint


def test_rules_must_cover_the_model():
    table = table_of("tiny")
    rows = tuple(row for row in table.rows if "ffn" not in row.axes)
    with pytest.raises(RuleError, match="has no logical axis 'ffn'"):
        plan(
            replace(table, rows=rows),
            "cpu:8",
            Workload(global_batch=8, seq_len=64),
            "llama",
        )


def test_one_device_needs_no_split():
    found = planned(topology="cpu:1", batch=1)
    assert str(found.mesh) == "one device"
    assert all(set(spec) <= {None} for spec in found.specs.values())


@pytest.mark.parametrize(
    ("model", "topology", "batch", "seq"),
    [
        ("tiny", "cpu:8", 8, 64),
        ("llama3_8b", "2*v6e:16x16", 1024, 8192),
        ("llama3_405b", "v5p:8x8x16", 1024, 8192),
    ],
)
def test_explanation_fits_the_page_and_answers(model, topology, batch, seq):
    text = planned(model, topology, batch, seq).explain()
    assert all(len(line) <= 88 for line in text.splitlines())
    for part in (
        "Choice",
        "<- bound",
        "reserve",
        "Runner-up",
        "why it lost",
        "rejected",
    ):
        assert part in text


@given(st.sampled_from(["cpu:12", "2*h100:8", "tpu7x:2x2x4", "v5p:4x4x12"]))
def test_every_mesh_covers_all_devices(name):
    topology = parse_topology(name)
    meshes = enumerate_meshes(topology, Pins())
    assert all(mesh.num_devices == topology.num_devices for mesh in meshes)
    assert len(set(map(str, meshes))) == len(meshes)


@given(st.sampled_from([8, 16, 32]), st.sampled_from([16, 64, 128]))
def test_fingerprint_is_the_decision(batch, seq):
    assert planned(batch=batch, seq=seq).fingerprint == (
        planned(batch=batch, seq=seq).fingerprint
    )
