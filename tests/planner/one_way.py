"""One way to run a step, priced with constants that one can do by hand."""

from __future__ import annotations

from llama_table import spec_of, table_of

from llmos_jax.hardware import parse_topology
from llmos_jax.ir import Candidate, MeshShape, ParamTable, Way, Workload
from llmos_jax.models import param_table
from llmos_jax.planner.collectives import links_of
from llmos_jax.planner.cost import estimate
from llmos_jax.planner.fitted import Fitted
from llmos_jax.planner.layout import Layout, lay_out
from llmos_jax.planner.memory import memory_of
from llmos_jax.planner.sizes import sizes_of
from llmos_jax.rules import load_rules

IDEAL = Fitted(
    operands=0,
    elementwise=0,
    kept=0,
    attention=1,
    grouped=1,
    quantized=1,
    hidden_weights=0,
    hidden_parts=0,
    hidden_crossing=0,
    jitter=0,
)
"""Everything at the chip's share of peak, nothing hidden."""


def table_and_rules(model: str, phase: str = "train"):
    """The rows of a model, with experts or without, and its family's rules."""
    spec = spec_of(model)
    table: ParamTable = param_table(spec) if spec.num_experts else table_of(spec)
    return table, load_rules(spec.family, phase)


def laid_out(model: str, mesh: dict[str, int], work: Workload) -> Layout:
    """What one device holds."""
    table, rules = table_and_rules(model, work.phase)
    return lay_out(table, rules, sizes_of(table), work, MeshShape(**mesh))


def by_hand(
    model: str, topology: str, mesh: dict[str, int], work: Workload, **way
) -> Candidate:
    """The way with its estimate and memory stack."""
    table, _ = table_and_rules(model, work.phase)
    machine, sizes = parse_topology(topology), sizes_of(table)
    layout = laid_out(model, mesh, work)
    way = Way(mesh=layout.mesh, **way)
    memory = memory_of(layout, way, sizes, machine, work)
    links = links_of(machine, layout.mesh)
    return estimate(layout, way, memory, links, sizes, machine, work, IDEAL)
