"""Batches travel to the mesh and back unchanged; other devices' plans are refused."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmos_jax.config import load_config
from llmos_jax.driver import plan as plan_of
from llmos_jax.errors import ConfigError, LowerError
from llmos_jax.lowering import (
    batch_sharding,
    device_mesh,
    fetch,
    global_array,
    join_processes,
    local_rows,
    local_topology,
)


@pytest.fixture(scope="module")
def mesh():
    devices = np.array(jax.devices()).reshape(4, 2)
    return Mesh(devices, ("data", "tensor"))


def plan_for(topology, *pins):
    sets = ["model=tiny", f"topology={topology}", "batch.seq_len=32", "batch.global=16"]
    return plan_of(load_config(None, [*sets, *pins]).config)


@pytest.mark.parametrize("spec", [("data",), (("data", "tensor"),), (), (None, "data")])
def test_a_batch_comes_back_from_the_mesh_as_it_was(mesh, spec):
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    batch = np.arange(16 * 8, dtype=np.int32).reshape(16, 8)
    rows = local_rows(sharding, batch.shape)
    placed = global_array(batch[rows], rows, sharding, 16)
    assert placed.sharding == sharding
    np.testing.assert_array_equal(np.asarray(placed), batch)


class HalfHere:
    """A sharding of which only the devices of `rows` are this process's own."""

    def __init__(self, sharding, num_devices):
        self._sharding, self._num = sharding, num_devices

    def addressable_devices_indices_map(self, shape):
        whole = self._sharding.devices_indices_map(shape)
        return dict(list(whole.items())[: self._num])


def test_local_rows_are_those_of_this_process_alone(mesh):
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    assert local_rows(HalfHere(sharding, 4), (16, 8)) == list(range(8))
    assert local_rows(sharding, (16, 8)) == list(range(16))


def test_a_plan_for_other_devices_is_refused():
    with pytest.raises(LowerError, match=r"4 devices \(cpu:4.*8 are here"):
        device_mesh(plan_for("cpu:4"))


def test_rows_of_the_batch_follow_data_and_fsdp():
    pins = [f"plan.mesh.{axis}=2" for axis in ("data", "fsdp", "tensor")]
    chosen = plan_for("cpu:8", *pins)
    sharding = batch_sharding(chosen, device_mesh(chosen))
    shapes = sharding.shard_shape((16, 32))
    assert shapes == (4, 32)


def test_fetch_reads_a_replicated_value(mesh):
    value = jax.device_put(np.float32(3), NamedSharding(mesh, PartitionSpec()))
    assert fetch(value) == np.float32(3)


def test_the_local_topology_is_the_eight_devices_of_the_tests():
    assert (local_topology().name, local_topology().num_devices) == ("cpu:8", 8)


def test_a_process_count_that_is_no_number_is_one_error(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(ConfigError, match="JAX_NUM_PROCESSES = 'two'"):
        join_processes()
