"""Devices to compile for: those that are simulated, described, or not to be had."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import replace

import pytest

from llmos_jax.errors import LowerError
from llmos_jax.hardware import parse_topology
from llmos_jax.lowering import compile_devices, quiet


def refused(topology):
    """The one line that says why there are no devices."""
    with pytest.raises(LowerError) as problem:
        compile_devices(topology)
    text = str(problem.value)
    assert "\n" not in text and topology.name in text
    return text


def test_a_gpu_is_compiled_for_only_where_one_is():
    text = refused(parse_topology("h100:8"))
    assert "XLA compiles for h100 only where one is" in text
    assert "--verify estimate" in text


def test_without_libtpu_the_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    text = refused(parse_topology("v5e:2x2"))
    assert "pip install 'llmos_jax[aot]'" in text and "--verify estimate" in text


def test_simulated_devices_are_the_first_of_this_process():
    devices = compile_devices(parse_topology("cpu:4"))
    assert [device.id for device in devices] == [0, 1, 2, 3]


def test_too_few_simulated_devices_name_the_flag_that_makes_them():
    text = refused(parse_topology("cpu:16"))
    assert "needs 16 simulated devices and this process has 8" in text
    assert "XLA_FLAGS=--xla_force_host_platform_device_count=16" in text


@pytest.fixture
def libtpu():
    return pytest.importorskip("libtpu")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("v4:2x2x1", "TPU v4"),
        ("v4:1x1x1", "TPU v4"),
        ("v5e:1x1", "TPU v5 lite"),
        ("v5p:2x1x1", "TPU v5"),
        ("tpu7x:1x1x1", "TPU7x"),
        ("v5e:2x4", "TPU v5 lite"),
        ("v5p:2x2x2", "TPU v5"),
        ("v6e:2x2", "TPU v6 lite"),
        ("tpu7x:2x2x1", "TPU7x"),
        ("2*v6e:2x2", "TPU v6 lite"),
    ],
)
def test_libtpu_describes_as_many_devices_as_are_planned_for(libtpu, name, kind):
    topology = parse_topology(name)
    devices = compile_devices(topology)
    assert len(devices) == topology.num_devices
    assert {device.device_kind for device in devices} == {kind}
    found = {getattr(device, "slice_index", 0) for device in devices}
    assert len(found) == topology.slices


def test_a_slice_that_libtpu_does_not_know_is_one_line(libtpu, capfd):
    odd = replace(parse_topology("v5e:2x4"), name="v5e:3x5", shape=(3, 5))
    assert "libtpu knows no v5e:3x5" in refused(odd)
    assert capfd.readouterr().err == "", "what C++ says is kept away"


def test_another_number_of_devices_than_planned_is_refused(libtpu):
    found = parse_topology("v5e:2x4")
    doubled = replace(found, chip=replace(found.chip, devices_per_chip=2))
    assert "as 8 devices where 16 were planned for" in refused(doubled)


def test_quiet_hides_what_c_writes_and_lets_python_speak(capfd):
    with quiet():
        os.write(2, b"from C++\n")
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"


def test_quiet_gives_stderr_back_after_an_error():
    before = sys.stderr
    with pytest.raises(ZeroDivisionError), quiet():
        raise ZeroDivisionError
    assert sys.stderr is before
