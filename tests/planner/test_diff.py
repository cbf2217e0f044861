"""Two plans side by side, and a lock that is checked again."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from llama_table import table_of

from llmos_jax.errors import ConfigError
from llmos_jax.ir import (
    Pins,
    Plan,
    PlanLock,
    Workload,
    facts_of,
    facts_of_summary,
    lock_of,
)
from llmos_jax.planner import (
    Side,
    compare,
    explain_difference,
    explain_recheck,
    plan,
    recheck,
)

VERSIONS = {"jax": "0.10.2", "libtpu": "0.0.42"}
COMPILED = {
    "fidelity": "probe",
    "peak_hbm_bytes": 20e9,
    "argument_bytes": 6e9,
    "temp_bytes": 14e9,
    "compile_s": 12.0,
    "jax": "0.10.2",
    "libtpu": "0.0.42",
    "collectives": [
        {"op": "all-gather", "axes": ["fsdp"], "link": "ici", "count": 96, "bytes": 5.0}
    ],
    "unplanned_collectives": [],
    "hlo_fingerprint": "abc",
}
STRANGE = {
    "op": "all-to-all", "axes": ["fsdp"], "link": "ici", "count": 2, "bytes": 9.0,
    "why": "no rule asks for it",
}  # fmt: skip


def planned(topology="v6e:4x4", batch=64, pins=None) -> Plan:
    work = Workload(global_batch=batch, seq_len=2048)
    return plan(table_of("llama3_8b"), topology, work, "llama", pins)


def side(found: Plan, label: str = "x") -> Side:
    return Side(label=label, fingerprint=found.fingerprint, facts=facts_of(found))


def slower(found: Plan, factor: float) -> Plan:
    estimate = replace(found.predicted, step_s=found.predicted.step_s * factor)
    return replace(found, chosen=replace(found.chosen, predicted=estimate))


def checked(then: Plan, now: Plan, versions=VERSIONS):
    kept = lock_of(then, {"model": "llama3_8b"}, VERSIONS)
    return recheck("plan.lock", kept, now, versions)


def test_a_plan_does_not_differ_from_itself():
    found = compare(side(planned()), side(planned()))
    assert found.same_decision and not any(found.changed.values())
    assert "Nothing differs." in explain_difference(found)


def test_inputs_choice_and_predictions_are_told_apart():
    found = compare(side(planned()), side(planned(batch=128, pins=Pins(remat="full"))))
    assert found.changed["inputs"] == {"batch.global": (64, 128)}
    assert "step_s" in found.changed["predicted"]
    assert not found.same_decision
    assert found.summary()["inputs"]["batch.global"] == {"a": 64, "b": 128, "ratio": 2}


def test_another_mesh_names_the_parameters_it_splits_otherwise():
    pins = Pins(mesh={"tensor": 4})
    found = compare(side(planned()), side(planned(pins=pins)))
    assert "mesh" in found.changed["choice"]
    assert "layers.attention.q" in found.changed["specs"]
    text = explain_difference(found)
    assert "more parameters" in text
    assert all(len(line) <= 88 for line in text.splitlines())


def test_wide_values_stand_one_below_the_other():
    one, other = side(planned()), side(planned(batch=128))
    one.facts["choice"]["offload"] = "layer_input query key value context out " * 2
    text = explain_difference(compare(one, other))
    assert "  A  layer_input" in text
    assert all(len(line) <= 88 for line in text.splitlines())


def test_the_json_of_plan_says_less_but_nothing_else():
    found = planned()
    summary = json.loads(json.dumps(found.summary()))
    brief = Side(
        label="x", fingerprint=found.fingerprint, facts=facts_of_summary(summary)
    )
    assert not any(compare(side(found), brief).changed.values())
    assert not any(compare(brief, side(found)).changed.values())


def test_the_contract_alone_is_enough():
    summary = json.loads(json.dumps(planned().summary()))
    for key in ("memory", "error", "domain", "placement"):
        summary["predicted"].pop(key)
    del summary["way"]
    assert facts_of_summary(summary)["choice"]["mesh"]


def test_what_is_no_plan_is_refused():
    with pytest.raises(ConfigError, match="no plan: 'model'"):
        facts_of_summary({})


def test_a_lock_survives_json():
    kept = lock_of(planned(), {"model": "llama3_8b"}, VERSIONS)
    again = PlanLock.from_json(json.loads(json.dumps(kept.to_json())))
    assert again == kept and again.config["topology"] == "v6e:4x4"


def test_a_lock_stands_while_nothing_moves():
    found = checked(planned(), planned())
    assert found.stands and found.fidelity == "estimate"
    text = explain_recheck(found)
    assert "Stands: plan.lock" in text and "the same: jax 0.10.2" in text


def test_a_lock_tells_which_version_moved():
    found = checked(planned(), planned(), {**VERSIONS, "jax": "0.11.0"})
    assert found.stands
    assert "jax 0.10.2 -> 0.11.0" in explain_recheck(found)


def test_a_lock_falls_when_the_decision_changes():
    found = checked(planned(), planned(pins=Pins(mesh={"tensor": 4})))
    assert not found.stands
    assert "the decision changed: mesh" in found.problems[0]
    assert "No longer stands: plan.lock" in explain_recheck(found)


def test_a_key_that_only_one_release_knows_is_no_decision():
    now = planned()
    kept = lock_of(now, {}, VERSIONS)
    del kept.facts["choice"]["loss_tiles"]
    older = replace(kept, decision="another form")
    assert recheck("plan.lock", older, now, VERSIONS).stands


@pytest.mark.parametrize(("factor", "stands"), [(1.04, True), (1.06, False)])
def test_a_lock_lets_little_growth_pass(factor, stands):
    found = checked(planned(), slower(planned(), factor))
    assert found.stands is stands
    assert stands or "predicted step time grew 6.0%" in found.problems[0]


def test_getting_faster_is_no_problem():
    assert checked(planned(), slower(planned(), 0.5)).stands


def compiled(**changes) -> Plan:
    return planned().with_compiled({**COMPILED, **changes})


def test_a_lock_compares_what_the_compiler_said():
    found = checked(compiled(), compiled(peak_hbm_bytes=20.5e9, hlo_fingerprint="abd"))
    assert found.stands and found.fidelity == "probe"
    assert found.difference.changed["compiled"] == {
        "peak_hbm_bytes": (20e9, 20.5e9),
        "hlo_fingerprint": ("abc", "abd"),
    }
    assert "+2.5%" in explain_recheck(found)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"peak_hbm_bytes": 22e9}, "compiled peak memory grew 10.0%"),
        ({"peak_hbm_bytes": 40e9}, "needs 37.3 GiB > 31.2 GiB"),
        (
            {"unplanned_collectives": [STRANGE]},
            "new collective: UNPLANNED all-to-all over fsdp (ICI)",
        ),
    ],
)
def test_a_lock_falls_by_what_the_compiler_says(changes, problem):
    found = checked(compiled(), compiled(**changes))
    assert any(problem in text for text in found.problems)
    assert found.summary()["ok"] is False


def test_collectives_of_one_kind_are_added_up():
    row = COMPILED["collectives"][0]
    far = {**row, "link": "dcn"}
    facts = facts_of(compiled(collectives=[row, row, far]))["compiled"]
    assert facts["all-gather over fsdp (ICI), count"] == 2 * row["count"]
    assert facts["all-gather over fsdp (DCN), bytes"] == row["bytes"]


def test_another_fidelity_is_not_compared():
    found = checked(compiled(), planned())
    assert found.fidelity == "estimate"
    assert found.difference.changed["compiled"] == {}
