"""Turn a Plan into its neighbours: what one step in each direction would do.

Half and twice the batch, and the next slice down and up, are planned anew; the next
remat down and up keeps the mesh, so that it shows what remat alone does. Each is one
closed-form search, so this is asked for when a person reads, never for `--json`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from llmos_jax.errors import ConfigError, NoFeasiblePlan, PlanError
from llmos_jax.hardware import next_slices
from llmos_jax.ir.neighbour import Neighbour
from llmos_jax.ir.plan import REMATS, Pins, Plan, saved_tensors
from llmos_jax.ir.topology import Topology
from llmos_jax.ir.workload import Workload
from llmos_jax.planner.search import plan as search


def neighbours(plan: Plan, pins: Pins | None = None) -> tuple[Neighbour, ...]:
    """Return the plans one step away, under the pins that the plan was made with."""
    asked = pins or Pins()
    return (
        *_batches(plan, asked),
        *_remats(plan, asked),
        *_slices(plan, asked),
    )


def _batches(plan: Plan, pins: Pins) -> Iterator[Neighbour]:
    batch = plan.workload.global_batch
    for factor, wanted in (("x2", 2 * batch), ("/2", batch // 2)):
        if wanted and (factor == "x2" or batch % 2 == 0):
            work = replace(plan.workload, global_batch=wanted)
            yield _try(f"batch {factor} ({wanted})", plan, pins, work, plan.topology)


def _remats(plan: Plan, pins: Pins) -> Iterator[Neighbour]:
    if plan.workload.phase != "train":
        return
    mesh = {axis: size for axis, size in plan.mesh.sizes.items() if size > 1}
    for remat in _next_remats(plan.remat):
        pinned = replace(pins, mesh={**(pins.mesh or {}), **mesh}, remat=remat)
        yield _try(f"remat {remat}", plan, pinned, plan.workload, plan.topology)


def _next_remats(remat: str) -> list[str]:
    """The named policies that save the next more, and the next fewer, tensors."""
    here = len(saved_tensors(remat))
    more = [name for name, saved in REMATS.items() if len(saved) > here]
    fewer = [name for name, saved in REMATS.items() if len(saved) < here]
    by_size = sorted(REMATS, key=lambda name: len(REMATS[name]))
    return [
        *[name for name in by_size if name in more][:1],
        *[name for name in by_size if name in fewer][-1:],
    ]


def _slices(plan: Plan, pins: Pins) -> Iterator[Neighbour]:
    if plan.topology.chip.vendor == "cpu":
        return  # this host is what it is
    for machine in next_slices(plan.topology):
        if machine is not None:
            yield _try(machine.name, plan, pins, plan.workload, machine)


def _try(
    change: str, plan: Plan, pins: Pins, work: Workload, machine: Topology
) -> Neighbour:
    try:
        found = search(plan.params, machine, work, plan.rules, pins)
    except (ConfigError, PlanError) as problem:
        return Neighbour(change=change, reason=why_not(problem))
    return Neighbour(change=change, best=found.chosen)


_TELLING = ("memory", "batch", "not divisible", "dcn")
"""Kinds of reasons, from the nearest to a plan to the farthest."""


def why_not(problem: ConfigError | PlanError) -> str:
    """The reason in a few words: the nearest miss where memory was the matter."""
    if not isinstance(problem, NoFeasiblePlan) or not problem.rejected:
        return str(problem).partition("\n")[0]
    kinds = {why.partition(": ")[0]: why for _, why in problem.rejected}
    nearest = next((kind for kind in _TELLING if kind in kinds), next(iter(kinds)))
    why = kinds[nearest].partition(" (")[0]
    return why.replace("memory:", "does not fit:")
