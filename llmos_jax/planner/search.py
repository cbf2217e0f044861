"""Turn (model, topology, workload, rules) into a Plan: a straight list of passes.

Every pass takes candidates and returns survivors and casualties, and each casualty
keeps its reason with numbers. A mesh that cannot be split is one candidate; one that
can is as many as there are ways to run on it (remat x microbatches). A reason begins
with its kind and a colon, so that reasons can be counted.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from llmos_jax.config import load_model
from llmos_jax.errors import NoFeasiblePlan, RuleError
from llmos_jax.hardware import parse_topology
from llmos_jax.ir.params import ParamTable
from llmos_jax.ir.plan import Candidate, MeshShape, Pins, Plan, Rejected, Way
from llmos_jax.ir.rules import Rules
from llmos_jax.ir.topology import Topology
from llmos_jax.ir.workload import Workload
from llmos_jax.planner.candidates import check_pins, enumerate_meshes, ways_of
from llmos_jax.planner.collectives import links_of
from llmos_jax.planner.cost import estimate
from llmos_jax.planner.explain import count_reasons
from llmos_jax.planner.layout import Layout, lay_out
from llmos_jax.planner.memory import Memory, budget, memory_of
from llmos_jax.planner.sizes import Sizes, sizes_of
from llmos_jax.rules import check_rules, load_rules
from llmos_jax.units import format_bytes, format_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuted:
    """A way that the compiler turned down."""

    way: Way
    needed_bytes: float
    memory: Memory
    """What was estimated."""

    @property
    def growth(self) -> float:
        """Needed over estimated, at least 1, of what is not kept between steps."""
        kept = _kept_bytes(self.memory)
        estimated = sum(self.memory.values()) - kept
        return max(1.0, (self.needed_bytes - kept) / max(1.0, estimated))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """The four inputs, and the sizes read off the first."""

    table: ParamTable
    topology: Topology
    workload: Workload
    rules: Rules
    sizes: Sizes
    pins: Pins
    refuted: tuple[Refuted, ...] = ()
    """What the compiler said to earlier choices."""

    def growth(self, way: Way) -> float:
        """How much more than estimated the compiler needed, at worst, for ways that
        save and offload the same."""
        return max(
            (
                item.growth
                for item in self.refuted
                if (item.way.remat, item.way.offload) == (way.remat, way.offload)
            ),
            default=1.0,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sized:
    """A way with its layout and its memory stack."""

    way: Way
    layout: Layout
    memory: Memory

    @property
    def peak_bytes(self) -> float:
        return sum(self.memory.values())


def plan(
    model: object,
    topology: Topology | str,
    workload: Workload,
    rules: Rules | str,
    pins: Pins | None = None,
    *,
    refuted: tuple[Refuted, ...] = (),
) -> Plan:
    """Return the fastest predicted way to run `workload`; no device is touched.

    Args:
        model: A ParamTable; or a ModelSpec, a model's name or a Flax NNX module, which
            needs jax to be looked through.
        topology: A Topology or its name.
        workload: What one step is.
        rules: Rules or their name; by name they are read for the workload's phase.
        pins: Decisions already made.
        refuted: Ways the compiler turned down. They are not chosen again, and memory
            is taken to be as much larger than estimated as theirs was.

    Raises:
        NoFeasiblePlan: every candidate was rejected; it carries the reasons.
        PlanError: pins that contradict the machine or each other.
        ConfigError, RuleError: an input that cannot be used.
    """
    started = time.perf_counter()
    job = _job(model, topology, workload, rules, pins or Pins(), refuted)

    # Each line is one pass: what is left, and what was lost with its reason.
    meshes = enumerate_meshes(job.topology, job.pins)
    meshes, uneven = _keep_divisible(meshes, job)
    layouts, unsplit = _resolve(meshes, job)
    sized, uncut = _expand(layouts, job)
    fitting, too_big = _keep_fitting(sized, job)
    costed, too_slow = _keep_in_time([_cost(item, job) for item in fitting], job)
    rejected = (*uneven, *unsplit, *uncut, *too_big, *too_slow)
    count = len(rejected) + len(costed)
    if not costed:
        raise _no_plan(job, count, rejected, sized, too_slow)
    ranked = sorted(costed, key=_rank)

    best = ranked[0]
    specs = next(item.specs for item in layouts if item.mesh == best.mesh)
    return Plan(
        params=job.table,
        topology=job.topology,
        workload=job.workload,
        rules=job.rules,
        chosen=best,
        specs=specs,
        runner_up=_runner_up(ranked),
        others=tuple(ranked[:MOST_KEPT]),
        rejected=rejected,
        candidates=count,
        search_s=time.perf_counter() - started,
    )


def _job(
    model: object,
    topology: Topology | str,
    workload: Workload,
    rules: Rules | str,
    pins: Pins,
    refuted: tuple[Refuted, ...],
) -> _Job:
    table = _table_of(model)
    machine = parse_topology(topology) if isinstance(topology, str) else topology
    grammar = load_rules(rules, workload.phase) if isinstance(rules, str) else rules
    workload.check()
    check_rules(grammar, table)
    check_pins(pins, machine, workload)
    return _Job(
        table=table,
        topology=machine,
        workload=workload,
        rules=grammar,
        sizes=sizes_of(table),
        pins=pins,
        refuted=refuted,
    )


def _table_of(model: object) -> ParamTable:
    if isinstance(model, ParamTable):
        return model
    named = load_model(model) if isinstance(model, str) else model
    # The one look upward: a user's module needs jax to be read, a table does not.
    from llmos_jax.models import param_table

    table: ParamTable = param_table(named)  # type: ignore[arg-type, unused-ignore]
    return table


def _keep_divisible(
    meshes: list[MeshShape], job: _Job
) -> tuple[list[MeshShape], list[Rejected]]:
    """Drop meshes with an axis that would do nothing, or that cross slices wrongly."""
    useful = set(job.rules.mesh_axes_used())
    slices, batch = job.topology.slices, job.workload.global_batch
    kept, lost = [], []
    for mesh in meshes:
        idle = [axis for axis, n in mesh.sizes.items() if n > 1 and axis not in useful]
        if idle:
            reason = f"no rule: nothing is split over {idle[0]}={mesh.sizes[idle[0]]}"
        elif mesh.data % slices:
            reason = f"dcn: data={mesh.data} does not cover whole slices ({slices})"
        elif batch % _batch_ways(job.rules, mesh):
            ways = _batch_ways(job.rules, mesh)
            reason = f"batch: {batch} sequences are not divisible by {ways} replicas"
        else:
            kept.append(mesh)
            continue
        lost.append(Rejected(mesh=str(mesh), reason=reason))
    return kept, lost


def _resolve(meshes: list[MeshShape], job: _Job) -> tuple[list[Layout], list[Rejected]]:
    """Apply the rules; drop meshes on which a weight or an activation does not
    divide."""
    kept, lost = [], []
    for mesh in meshes:
        try:
            layout = lay_out(job.table, job.rules, job.sizes, job.workload, mesh)
        except RuleError as problem:
            lost.append(Rejected(mesh=str(mesh), reason=f"not divisible: {problem}"))
        else:
            kept.append(layout)
    return kept, lost


def _expand(
    layouts: list[Layout], job: _Job
) -> tuple[list[list[_Sized]], list[Rejected]]:
    """Lay out the ways to run on each mesh, in groups that differ in microbatches
    alone; drop a pinned cut that a replica's share refuses."""
    kept: list[list[_Sized]] = []
    lost = []
    for layout in layouts:
        share = job.workload.global_batch // layout.batch_ways
        count = job.pins.microbatches or 1
        if share % count:
            reason = (
                f"batch: {share} sequences per replica are not divisible by "
                f"{count} microbatches"
            )
            lost.append(Rejected(mesh=str(layout.mesh), reason=reason))
            continue
        logits = 4.0 * job.workload.seq_len * layout.batch_ways / layout.token_ways
        logits *= job.sizes.vocab / layout.width_ways["vocab"]
        head = 4.0 * job.sizes.embed * job.sizes.vocab / layout.width_ways["vocab"]
        for group in ways_of(
            layout.mesh, share, logits, head, job.topology, job.workload, job.pins
        ):
            kept.append(
                [
                    _Sized(way=way, layout=layout, memory=_memory(layout, way, job))
                    for way in (
                        replace(way, unrolled=True) if _unrolls(job) else way
                        for way in group
                    )
                ]
            )
    return kept, lost


def _memory(layout: Layout, way: Way, job: _Job) -> Memory:
    """The memory stack, grown by what the compiler taught."""
    memory = memory_of(layout, way, job.sizes, job.topology, job.workload)
    for item in job.refuted:
        if item.way == way:
            return {**memory, "refuted": item.needed_bytes - sum(memory.values())}
    growth = job.growth(way)
    if growth > 1:
        passing = sum(memory.values()) - _kept_bytes(memory)
        memory["learnt"] = (growth - 1) * passing
    return memory


def _kept_bytes(memory: Memory) -> float:
    """Weights and optimizer state, whose size is beyond doubt."""
    return memory.get("params", 0.0) + memory.get("optimizer", 0.0)


def _keep_fitting(
    groups: list[list[_Sized]], job: _Job
) -> tuple[list[_Sized], list[Rejected]]:
    """Drop what needs more memory than a device may use; the nearest miss comes last.

    More microbatches are never faster, so of each group the first that fits is kept.
    """
    limit = budget(job.topology)
    kept, over = [], []
    for group in groups:
        found = next((item for item in group if item.peak_bytes <= limit), None)
        if found is None:
            over.append(group[-1])
        else:
            kept.append(found)
            over.extend(group[: group.index(found)])
    lost = []
    for item in sorted(over, key=lambda item: item.peak_bytes, reverse=True):
        who = "compiler: needs" if "refuted" in item.memory else "memory: needs"
        reason = (
            f"{who} {format_bytes(item.peak_bytes)} > {format_bytes(limit)} "
            f"({_said(item.way)})"
        )
        lost.append(Rejected(mesh=str(item.way.mesh), reason=reason))
    return kept, lost


def _said(way: Way) -> str:
    """A way without its mesh."""
    return str(way).removeprefix(f"{way.mesh}, ")


def _keep_in_time(
    costed: list[Candidate], job: _Job
) -> tuple[list[Candidate], list[Rejected]]:
    """Drop what misses the latency goal."""
    goal = job.workload.max_step_s
    if goal is None:
        return costed, []
    kept = [item for item in costed if item.predicted.step_s <= goal]
    lost = [
        Rejected(
            mesh=str(item.mesh),
            reason=f"latency: takes {format_seconds(item.predicted.step_s)} > "
            f"{format_seconds(goal)}",
        )
        for item in sorted(costed, key=_rank, reverse=True)
        if item.predicted.step_s > goal
    ]
    return kept, lost


MOST_KEPT = 100
"""Fitting candidates that a plan carries along, for its figures."""


def _cost(item: _Sized, job: _Job) -> Candidate:
    return estimate(
        item.layout,
        item.way,
        item.memory,
        links_of(job.topology, item.way.mesh),
        job.sizes,
        job.topology,
        job.workload,
    )


UNROLL_LAYERS = 16
"""On one CPU device, layers up to this many are written out: a loop copies what it
keeps for the backward pass. Measured once by hand on bench_29m, `train_step` with
`unroll` off and on: 630 and 750 tokens/s. The bound on depth is a judgement: compile
time grows with every layer written out."""


def _unrolls(job: _Job) -> bool:
    on_one_cpu = job.topology.chip.vendor == "cpu" and job.topology.num_devices == 1
    return on_one_cpu and job.sizes.layers <= UNROLL_LAYERS


def _rank(candidate: Candidate) -> tuple[float, int, int, float]:
    """Fastest first; what differs by less than the model can tell, simplest first."""
    step_s = float(f"{candidate.predicted.step_s:.3g}")
    way = candidate.way
    simple = way.mesh.tensor * (1 + len(way.offload))
    return step_s, simple, way.microbatches, candidate.predicted.peak_hbm_bytes


def _runner_up(ranked: list[Candidate]) -> Candidate | None:
    """The best on another mesh, which teaches more than the same mesh cut otherwise."""
    others = [item for item in ranked[1:] if item.mesh != ranked[0].mesh]
    rest = others or ranked[1:]
    return rest[0] if rest else None


def _batch_ways(rules: Rules, mesh: MeshShape) -> int:
    ways = 1
    for axis in rules.activations["batch"]:
        ways *= mesh.sizes[axis]
    return ways


def _no_plan(
    job: _Job,
    count: int,
    rejected: tuple[Rejected, ...],
    groups: list[list[_Sized]],
    too_slow: list[Rejected],
) -> NoFeasiblePlan:
    sized = [item for group in groups for item in group]
    work, machine = job.workload, job.topology
    lines = [
        f"no plan for {job.table.name} on {machine.name} ({work.phase}, "
        f"{work.global_batch} x {work.seq_len} tokens): "
        f"{count} candidates, all rejected.",
        *(f"  {line}" for line in count_reasons(rejected)),
    ]
    if too_slow:
        lines.append(
            f"  What would make it fit: a latency goal above the {too_slow[-1].reason}"
            ", a smaller batch, or more chips."
        )
    elif sized:
        lines.extend(_nearest_miss(job, min(sized, key=lambda item: item.peak_bytes)))
    else:
        lines.append(_remedy_for_batch(job))
    pairs = tuple((item.mesh, item.reason) for item in rejected)
    return NoFeasiblePlan("\n".join(lines), pairs)


def _nearest_miss(job: _Job, nearest: _Sized) -> list[str]:
    limit = budget(job.topology)
    kept = sum(nearest.memory.get(key, 0.0) for key in ("params", "optimizer"))
    # Weights and state shrink with the machine; what is left must fit beside them.
    chips = job.topology.chips * nearest.peak_bytes / limit
    lines = [
        f"  Nearest: {nearest.way}: needs {format_bytes(nearest.peak_bytes)} of "
        f"{format_bytes(limit)} ({format_bytes(kept)} of it weights and optimizer)."
    ]
    remedies = [f"about {chips:.0f} chips of this kind (now {job.topology.chips})"]
    if kept < limit:
        remedies.append(
            f"a batch.global below {job.workload.global_batch}, or a shorter"
        )
        remedies[-1] += f" batch.seq_len than {job.workload.seq_len}"
    if job.pins != Pins():
        remedies.append("fewer plan.* pins")
    return [*lines, f"  What would make it fit: {'; or '.join(remedies)}."]


def _remedy_for_batch(job: _Job) -> str:
    slices, devices = job.topology.slices, job.topology.num_devices
    hint = f" and {slices} slices need a batch divisible by {slices}" * (slices > 1)
    return (
        f"  What would make it fit: a batch.global that is a multiple of {devices} "
        f"(now {job.workload.global_batch}){hint}; or fewer plan.* pins."
    )
