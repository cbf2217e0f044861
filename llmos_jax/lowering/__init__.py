"""Turn a Plan into Programs: mesh, shardings, jit, compile."""

from llmos_jax.lowering.arrays import fetch, global_array, local_rows
from llmos_jax.lowering.devices import (
    is_first_process,
    is_only_process,
    join_processes,
    keep_compiled_programs,
    local_topology,
    measure_matmul_flops_per_s,
)
from llmos_jax.lowering.inspect import inspect
from llmos_jax.lowering.mesh import device_mesh
from llmos_jax.lowering.program import Program, abstract, lower
from llmos_jax.lowering.shardings import (
    activation_spec,
    annotator,
    batch_sharding,
    like_params,
    named,
    param_shardings,
    replicated,
)

__all__ = [
    "Program",
    "abstract",
    "activation_spec",
    "annotator",
    "batch_sharding",
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
    "named",
    "param_shardings",
    "replicated",
]
