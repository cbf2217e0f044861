"""What one step in each direction would do, and the page that says so."""

from __future__ import annotations

from dataclasses import replace

import pytest
from llama_table import spec_of, table_of

from llmos_jax.ir import REMATS, TENSORS, Neighbour, Pins, Plan, Workload
from llmos_jax.planner import explain, neighbours, plan
from llmos_jax.planner.sensitivity import _next_remats

COMPILED = {
    "fidelity": "probe",
    "peak_hbm_bytes": 30e9,
    "argument_bytes": 6e9,
    "temp_bytes": 24e9,
    "compile_s": 12.0,
    "jax": "0.10.2",
    "libtpu": "0.0.42",
    "collectives": [
        {"op": "all-gather", "axes": ["fsdp"], "link": "ici", "count": 96,
         "bytes": 5e10},
    ],
    "unplanned_collectives": [
        {"op": "collective-permute", "axes": ["fsdp"], "link": "dcn", "count": 32,
         "bytes": 2e9, "why": "a norm is resharded in every layer"},
    ],
    "hlo_fingerprint": "abc",
}  # fmt: skip


def planned(topology="v6e:4x4", pins=None, batch=64, **work) -> Plan:
    workload = Workload(global_batch=batch, seq_len=4096, **work)
    return plan(table_of("llama3_8b"), topology, workload, "llama", pins)


def by_change(found: tuple[Neighbour, ...]) -> dict[str, Neighbour]:
    return {item.change: item for item in found}


def test_batch_and_slice_go_one_step_down_and_up():
    found = by_change(neighbours(planned()))
    assert {"batch x2 (128)", "batch /2 (32)", "v6e:2x4", "v6e:4x8"} <= found.keys()
    larger = found["v6e:4x8"]
    assert larger.best is not None and larger.best.mesh.num_devices == 32


def test_remat_keeps_the_mesh():
    chosen = planned()
    steps = [item for item in neighbours(chosen) if item.change.startswith("remat")]
    assert steps
    for item in steps:
        assert item.best is None or item.best.mesh == chosen.mesh
        assert item.best is None or f"remat {item.best.remat}" == item.change


@pytest.mark.parametrize("remat", REMATS)
def test_next_remats_save_more_and_fewer(remat):
    sizes = [len(REMATS[name]) for name in _next_remats(remat)]
    assert len(sizes) in (1, 2) and len(REMATS[remat]) not in sizes


def test_a_list_of_tensors_has_named_neighbours():
    assert _next_remats("query,key") == ["attention", "full"]


def test_what_does_not_fit_says_why():
    half = table_of(replace(spec_of("llama3_8b"), num_layers=16))
    work = Workload(global_batch=8, seq_len=1024)
    smaller = by_change(neighbours(plan(half, "v6e:2x2", work, "llama")))["v6e:1x1"]
    assert smaller.best is None
    assert smaller.reason.startswith("does not fit: needs") and ">" in smaller.reason


def test_pins_are_kept_by_the_neighbours():
    pins = Pins(mesh={"tensor": 2}, microbatches=2)
    for item in neighbours(planned(pins=pins), pins):
        if item.best is not None:
            assert item.best.mesh.tensor == 2 and item.best.microbatches == 2


def test_several_slices_keep_their_number_while_their_size_can_change():
    changes = by_change(neighbours(planned("2*v6e:16x16", batch=1024)))
    assert "2*v6e:8x16" in changes and "4*v6e:16x16" in changes


def test_this_host_has_no_other_size_and_serving_has_no_remat():
    found = neighbours(planned(topology="v5e:4x4", batch=16, phase="decode"))
    assert not any(item.change.startswith("remat") for item in found)
    tiny = plan(
        table_of("tiny"), "cpu:8", Workload(global_batch=8, seq_len=64), "llama"
    )
    assert not any("cpu" in item.change for item in neighbours(tiny))


def test_an_odd_batch_has_no_half():
    changes = by_change(neighbours(planned("v5p:1x1x1", batch=1, phase="decode")))
    assert {change.partition(" (")[0] for change in changes} == {
        "batch x2", "v5p:2x1x1",
    }  # fmt: skip


@pytest.mark.parametrize("compiled", [None, COMPILED], ids=["estimate", "compiled"])
@pytest.mark.parametrize("topology", ["v6e:4x4", "2*v6e:8x8", "v5p:4x4x4"])
def test_the_page_fits_88_columns(topology, compiled):
    text = explain(replace(planned(topology, batch=128), compiled=compiled))
    assert all(len(line) <= 88 for line in text.splitlines())
    assert not any(line != line.rstrip() for line in text.splitlines())
    for part in ("Choice", "One step away", "batch x2", "<- bound", "Links that carry"):
        assert part in text


def test_the_compiler_stands_beside_the_estimate():
    text = explain(replace(planned(), compiled=COMPILED))
    assert "The compiler (probe) says" in text
    assert "arguments         5.59 GiB" in text
    assert "free 3.31 GiB" in text


def test_too_large_a_program_is_shouted():
    too_large = {**COMPILED, "peak_hbm_bytes": 40e9}
    assert "DOES NOT FIT, by" in explain(replace(planned(), compiled=too_large))


def test_unplanned_collectives_are_shouted_with_their_reason():
    text = explain(replace(planned(), compiled=COMPILED))
    lines = [line for line in text.splitlines() if "collective-permute" in line]
    assert "DCN" in lines[0] and lines[0].endswith("<- UNPLANNED")
    assert "a norm is resharded in every layer" in text
    assert "all-gather" in text and "46.6 GiB" in text


def test_a_program_without_collectives_says_so():
    alone = {**COMPILED, "collectives": [], "unplanned_collectives": []}
    assert "Collectives: none" in explain(replace(planned(), compiled=alone))


def test_the_error_band_and_its_domain_are_said():
    chosen = planned()
    known = replace(chosen.predicted, error=0.2, domain="12 dense rows on v6e")
    text = explain(replace(chosen, chosen=replace(chosen.chosen, predicted=known)))
    assert "within 20% (12 dense rows on v6e)" in text
    strange = replace(chosen.predicted, error=None, domain="no row has experts")
    text = explain(replace(chosen, chosen=replace(chosen.chosen, predicted=strange)))
    assert "not known: no row has experts" in text


def test_a_list_of_saved_tensors_is_read_out_on_the_page():
    chosen = planned()
    way = replace(chosen.way, remat=",".join(TENSORS))
    text = explain(replace(chosen, chosen=replace(chosen.chosen, way=way)))
    assert "layer_input, query, key" in text and "the rest recomputed" in text
    assert all(len(line) <= 88 for line in text.splitlines())


def test_what_changes_the_numbers_is_said():
    chosen = planned()
    way = replace(chosen.way, state_dtype="bfloat16", offload=("layer_input",))
    text = explain(replace(chosen, chosen=replace(chosen.chosen, way=way)))
    assert "bfloat16, which changes the numbers of the run" in text
    assert "layer_input wait in host memory" in text


def test_a_program_that_cannot_be_printed_is_not_called_silent():
    unread = {**COMPILED, "audited": False, "collectives": []}
    unread["unplanned_collectives"] = []
    text = explain(replace(planned(), compiled=unread))
    assert "Collectives: not read" in text and "none in the" not in text
