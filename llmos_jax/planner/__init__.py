"""Turn a model, a machine, a workload and rules into a Plan; no device is touched."""

from llmos_jax.planner.diff import Difference, Side, compare, explain_difference
from llmos_jax.planner.explain import (
    RESOURCES,
    count_reasons,
    explain,
    neighbour_way,
    why_runner_up_lost,
)
from llmos_jax.planner.explain_params import explain_params
from llmos_jax.planner.frontier import explain_front, frontier
from llmos_jax.planner.memory import budget
from llmos_jax.planner.question import Refuted
from llmos_jax.planner.recheck import Recheck, explain_recheck, recheck
from llmos_jax.planner.search import plan
from llmos_jax.planner.sensitivity import neighbours
from llmos_jax.planner.sizes import model_flops, sizes_of

__all__ = [
    "RESOURCES",
    "Difference",
    "Recheck",
    "Refuted",
    "Side",
    "budget",
    "compare",
    "count_reasons",
    "explain",
    "explain_difference",
    "explain_front",
    "explain_params",
    "explain_recheck",
    "frontier",
    "model_flops",
    "neighbour_way",
    "neighbours",
    "plan",
    "recheck",
    "sizes_of",
    "why_runner_up_lost",
]
