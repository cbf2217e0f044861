"""Turn a model, a machine, a workload and rules into a Plan; no device is touched."""

from llmos_jax.planner.explain import explain
from llmos_jax.planner.explain_params import explain_params
from llmos_jax.planner.search import plan
from llmos_jax.planner.sizes import model_flops, sizes_of

__all__ = ["explain", "explain_params", "model_flops", "plan", "sizes_of"]
