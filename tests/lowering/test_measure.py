"""What the machine here reaches takes the place of what data sheets promise."""

from __future__ import annotations

import json
from dataclasses import replace

import jax
import pytest

from llmos_jax import planner, resolve
from llmos_jax.hardware import parse_topology
from llmos_jax.ir import Workload
from llmos_jax.lowering import local_topology, measured_topology
from llmos_jax.lowering.measure import Measured, measure, with_efficiencies

V5E = parse_topology("v5e:2x4")
SHARES = {"matmul_efficiency": 0.5, "hbm_efficiency": 0.25, "link_efficiency": 0.75}
GATHERED = 2**28


def measured(link=SHARES["link_efficiency"]):
    """Half of v5e's 197 TFLOP/s, a quarter of its 820 GB/s, its links at `link`.

    Over 2x4, lines of 2 and 4, a gather of V bytes takes 7/8 V / (2 x 45 GB/s).
    """
    gather_s = GATHERED * 7 / 8 / (2 * 4.5e10) / link if link else None
    return Measured(
        matmul_flops_per_s=0.5 * 1.97e14,
        hbm_bytes_per_s=0.25 * 8.2e11,
        gather_s=gather_s,
        gather_bytes=GATHERED,
    )


def test_shares_of_the_data_sheet_are_those_worked_by_hand():
    assert measured().efficiencies(V5E) == pytest.approx(SHARES)


def test_a_machine_faster_than_its_data_sheet_is_taken_at_its_data_sheet():
    found = replace(measured(), matmul_flops_per_s=3e14).efficiencies(V5E)
    assert found["matmul_efficiency"] == 1.0


def test_one_device_keeps_the_links_of_its_data_sheet():
    found = with_efficiencies(V5E, measured(link=None))
    assert found.chip.link_efficiency == V5E.chip.link_efficiency
    assert found.chip.matmul_efficiency == pytest.approx(0.5)


def test_the_topology_keeps_its_name_and_says_what_was_measured():
    found = with_efficiencies(V5E, measured())
    assert (found.name, found.shape) == (V5E.name, V5E.shape)
    assert found.chip.is_measured and "measured on this machine" in found.chip.source


def test_a_plan_for_a_measured_machine_says_so_and_is_slower_by_it(tiny):
    def planned(topology):
        work = Workload(phase="train", global_batch=64, seq_len=128)
        return planner.plan(tiny, topology, work, "llama")

    sheet, here = planned(V5E), planned(with_efficiencies(V5E, measured()))
    assert "measured on this machine" in here.predicted.domain
    assert "measured on this machine" in " ".join(here.explain().split())
    assert "measured" not in sheet.predicted.domain
    assert here.predicted.step_s > sheet.predicted.step_s


class Counting:
    """Measures v5e as above, and counts how often."""

    def __init__(self):
        self.times = 0

    def __call__(self):
        self.times += 1
        return measured()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMOS_CACHE", str(tmp_path))
    return tmp_path


def test_a_machine_is_measured_once_for_each_kind_and_number_of_devices(cache):
    counting = Counting()
    first, second = (measured_topology(V5E, counting) for _ in range(2))
    assert first == second and counting.times == 1
    measured_topology(parse_topology("v5e:2x2"), counting)
    assert counting.times == 2
    assert len(list((cache / "measured").glob("v5e-*.json"))) == 2


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"older": 1}'])
def test_a_damaged_cache_is_measured_afresh_and_written_over(cache, damage):
    counting = Counting()
    measured_topology(V5E, counting)
    (path,) = (cache / "measured").iterdir()
    kept = path.read_text()
    path.write_text(damage)
    assert measured_topology(V5E, counting).chip.matmul_efficiency == 0.5
    assert counting.times == 2 and path.read_text() == kept
    assert json.loads(kept)["gather_bytes"] == GATHERED


def test_a_cache_that_cannot_be_written_is_said_and_not_missed(cache, capsys):
    (cache / "measured").write_text("a file where a folder belongs")
    assert measured_topology(V5E, Counting()).chip.is_measured
    assert "cannot be written" in capsys.readouterr().err


def test_simulated_devices_stay_nominal(cache):
    counting = Counting()
    here = local_topology()
    assert measured_topology(here, counting) == here
    assert counting.times == 0
    assert resolve.resolve_topology(None) == here


def test_what_was_named_is_not_measured(cache):
    assert resolve.resolve_topology("v5e:2x4") == V5E


def test_the_devices_of_this_process_are_measured():
    """Functional only: eight simulated devices share this machine's cores."""
    found = measure(jax.devices())
    assert found.matmul_flops_per_s > 1e8
    assert found.hbm_bytes_per_s > 1e7
    assert found.gather_s > 0
    shares = found.efficiencies(parse_topology("cpu:8"))
    assert set(shares) == set(SHARES)
    assert all(0 < share <= 1 for share in shares.values())


def test_one_device_has_nothing_to_gather_from():
    assert measure(jax.devices()[:1]).gather_s is None
