"""Turn a Plan into Programs: mesh, shardings, jit, compile."""

from llmos_jax.lowering.arrays import fetch, global_array, local_rows, placed
from llmos_jax.lowering.audit import Unplanned, audit
from llmos_jax.lowering.collectives import Collective, collectives_of
from llmos_jax.lowering.collectives import table as collective_table
from llmos_jax.lowering.count import Count, count
from llmos_jax.lowering.devices import (
    cpu_name,
    is_first_process,
    is_only_process,
    join_processes,
    keep_compiled_programs,
    local_topology,
    measure_matmul_flops_per_s,
)
from llmos_jax.lowering.inspect import inspect
from llmos_jax.lowering.lengths import ByLength
from llmos_jax.lowering.measure import measured_topology
from llmos_jax.lowering.mesh import device_mesh
from llmos_jax.lowering.peers import shared_fate
from llmos_jax.lowering.program import Program, abstract, lower
from llmos_jax.lowering.shardings import (
    MeshSharder,
    activation_spec,
    batch_sharding,
    like_params,
    named,
    param_shardings,
    replicated,
)
from llmos_jax.lowering.topologies import compile_devices, quiet
from llmos_jax.lowering.verify import compile_plan, probe_plan

__all__ = [
    "ByLength",
    "Collective",
    "Count",
    "MeshSharder",
    "Unplanned",
    "audit",
    "collective_table",
    "collectives_of",
    "count",
    "cpu_name",
    "Program",
    "abstract",
    "activation_spec",
    "batch_sharding",
    "compile_devices",
    "compile_plan",
    "device_mesh",
    "fetch",
    "global_array",
    "is_first_process",
    "inspect",
    "is_only_process",
    "join_processes",
    "keep_compiled_programs",
    "like_params",
    "local_rows",
    "local_topology",
    "lower",
    "measure_matmul_flops_per_s",
    "measured_topology",
    "named",
    "param_shardings",
    "placed",
    "probe_plan",
    "quiet",
    "replicated",
    "shared_fate",
]
