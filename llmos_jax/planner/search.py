"""Turn (model, topology, workload, rules) into a Plan: a straight list of passes.

Every pass takes candidates and returns survivors and casualties, and each casualty
keeps its reason with numbers. A mesh that cannot be split is one candidate; one that
can is as many as there are ways to run on it (remat x microbatches x schedules). A
reason begins with its kind and a colon, so that reasons can be counted. When nothing
fits, the passes run once more over meshes that are rarely worth it (candidates.py).
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

from llmos_jax.config import load_model
from llmos_jax.errors import RuleError
from llmos_jax.hardware import parse_topology
from llmos_jax.ir.params import ParamTable
from llmos_jax.ir.plan import Candidate, MeshShape, Pins, Plan, Rejected, Way
from llmos_jax.ir.rules import Rules
from llmos_jax.ir.topology import Topology
from llmos_jax.ir.workload import Workload
from llmos_jax.planner.candidates import (
    enumerate_meshes,
    last_axes,
    microbatch_counts,
    usual_axes,
    ways_of,
)
from llmos_jax.planner.collectives import links_of
from llmos_jax.planner.cost import estimate
from llmos_jax.planner.domain import MARGIN
from llmos_jax.planner.layout import Layout, lay_out
from llmos_jax.planner.memory import Memory, budget, memory_of
from llmos_jax.planner.pins import check_layers, check_pins
from llmos_jax.planner.question import Job, Refuted, Sized, Tried, kept_bytes
from llmos_jax.planner.refusal import no_plan
from llmos_jax.planner.sizes import sizes_of
from llmos_jax.rules import check_rules, load_rules
from llmos_jax.rules.resolve import nearest_divisors, nearest_text
from llmos_jax.units import format_bytes, format_seconds


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

    asked = (job.sizes, job.topology, job.workload, job.rules)
    meshes = enumerate_meshes(job.topology, job.pins, usual_axes(*asked))
    tried = _try(meshes, job)
    if _may_fit_otherwise(tried, job):
        rare = enumerate_meshes(job.topology, job.pins, last_axes(*asked))
        seen = set(meshes)
        tried = _try([mesh for mesh in rare if mesh not in seen], job).then(tried)
    count = len(tried.rejected) + len(tried.costed)
    if not tried.costed:
        raise no_plan(job, count, tried)
    ranked = sorted(tried.costed, key=lambda item: _rank(item, job))

    best = ranked[0]
    specs = next(item.specs for item in tried.layouts if item.mesh == best.mesh)
    return Plan(
        params=job.table,
        topology=job.topology,
        workload=job.workload,
        rules=job.rules,
        chosen=best,
        specs=specs,
        runner_up=_runner_up(ranked),
        others=tuple(ranked[:MOST_KEPT]),
        rejected=tried.rejected,
        candidates=count,
        search_s=time.perf_counter() - started,
    )


def _try(meshes: list[MeshShape], job: Job) -> Tried:
    """Run the passes. Each line is one: what is left, and what was lost with its
    reason."""
    meshes, uneven = _keep_divisible(meshes, job)
    layouts, unsplit = _resolve(meshes, job)
    sized, uncut = _expand(layouts, job)
    fitting, too_big = _keep_fitting(sized, job)
    costed, too_slow = _keep_in_time([_cost(item, job) for item in fitting], job)
    return Tried(
        layouts=layouts,
        sized=sized,
        costed=costed,
        rejected=(*uneven, *unsplit, *uncut, *too_big, *too_slow),
        too_slow=too_slow,
    )


def _may_fit_otherwise(tried: Tried, job: Job) -> bool:
    """Whether nothing fits, and weights and state alone are not what is too large."""
    if tried.costed or tried.too_slow:
        return False
    kept = [kept_bytes(item.memory) for group in tried.sized for item in group]
    return min(kept, default=0.0) < budget(job.topology)


def _job(
    model: object,
    topology: Topology | str,
    workload: Workload,
    rules: Rules | str,
    pins: Pins,
    refuted: tuple[Refuted, ...],
) -> Job:
    table = _table_of(model)
    machine = parse_topology(topology) if isinstance(topology, str) else topology
    grammar = load_rules(rules, workload.phase) if isinstance(rules, str) else rules
    workload.check()
    check_rules(grammar, table)
    check_pins(pins, machine, workload)
    sizes = sizes_of(table)
    check_layers(pins, sizes.layers)
    return Job(
        table=table,
        topology=machine,
        workload=workload,
        rules=grammar,
        sizes=sizes,
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
    meshes: list[MeshShape], job: Job
) -> tuple[list[MeshShape], list[Rejected]]:
    """Drop meshes with an axis that would do nothing, or that cross slices wrongly."""
    useful = set(job.rules.mesh_axes_used())
    batch = job.workload.global_batch
    kept, lost = [], []
    for mesh in meshes:
        idle = [axis for axis, n in mesh.sizes.items() if n > 1 and axis not in useful]
        if idle:
            reason = f"no rule: nothing is split over {idle[0]}={mesh.sizes[idle[0]]}"
        elif unseen := _unseen(mesh, job):
            reason = unseen
        elif _is_alone(mesh, job) and len(meshes) > 1:
            reason = "sync: one replica (data=1) has nobody to agree with"
        elif uncovered := _uncovered(mesh, job):
            reason = f"dcn: {uncovered}"
        elif batch % _batch_ways(job.rules, mesh):
            ways = _batch_ways(job.rules, mesh)
            near = " or ".join(map(str, nearest_divisors(batch, ways)))
            reason = (
                f"batch: {batch} sequences are not divisible by {ways} replicas; "
                f"nearest: {near}"
            )
        else:
            kept.append(mesh)
            continue
        lost.append(Rejected(mesh=str(mesh), reason=reason))
    return kept, lost


def _unseen(mesh: MeshShape, job: Job) -> str:
    """Why layers that see no further than a window cannot run on a mesh; empty if they
    can, or if there are none."""
    spec = job.table.spec
    if spec is None or spec.sliding_window is None:
        return ""
    if mesh.context > 1 and spec.sliding_window < job.workload.seq_len:
        return (
            f"context: layers see {spec.sliding_window} tokens, and no kernel passes "
            "part of a split sequence on; nearest: context=1"
        )
    parts = mesh.stage * (job.pins.rounds or 1)
    if mesh.stage > 1 and spec.num_layers % (parts * job.sizes.period):
        return (
            f"stage: layers repeat a pattern of {job.sizes.period}, and "
            f"{spec.num_layers} of them in {parts} parts do not; nearest: stage=1"
        )
    return ""


def _is_alone(mesh: MeshShape, job: Job) -> bool:
    """Whether replicas are to learn alone, and there is one."""
    return bool(job.workload.local_steps) and mesh.data == 1


def _uncovered(mesh: MeshShape, job: Job) -> str:
    """Why the slices are not covered by `data`, then `stage`; empty if they are."""
    slices = job.topology.slices
    if job.workload.local_steps and slices > 1 and mesh.data != slices:
        return (
            f"data={mesh.data} is not the number of slices ({slices}), each of which "
            "takes steps of its own"
        )
    left = slices // math.gcd(mesh.data, slices)
    if mesh.stage % left == 0:
        return ""
    stages = f" x stage={mesh.stage}" * (mesh.stage > 1)
    return f"data={mesh.data}{stages} does not cover whole slices ({slices})"


def _resolve(meshes: list[MeshShape], job: Job) -> tuple[list[Layout], list[Rejected]]:
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
    layouts: list[Layout], job: Job
) -> tuple[list[list[Sized]], list[Rejected]]:
    """Lay out the ways to run on each mesh, in groups that differ in microbatches
    alone; drop a pinned cut that a replica's share refuses."""
    kept: list[list[Sized]] = []
    lost = []
    for layout in layouts:
        share = job.workload.global_batch // layout.batch_ways
        if uncut := _uncut(layout.mesh, share, job):
            reason = f"batch: {share} sequences per replica {uncut}"
            lost.append(Rejected(mesh=str(layout.mesh), reason=reason))
            continue
        logits = 4.0 * job.workload.seq_len * layout.batch_ways / layout.token_ways
        logits *= job.sizes.logits / layout.width_ways["vocab"] / layout.mesh.stage
        head = 4.0 * job.sizes.embed * job.sizes.logits / layout.width_ways["vocab"]
        for group in ways_of(
            layout.mesh,
            job.sizes.layers // job.sizes.period,
            share,
            logits,
            head,
            job.topology,
            job.workload,
            job.pins,
        ):
            kept.append(
                [
                    Sized(way=way, layout=layout, memory=_memory(layout, way, job))
                    for way in (
                        replace(way, unrolled=True) if _unrolls(job) else way
                        for way in group
                    )
                ]
            )
    return kept, lost


def _uncut(mesh: MeshShape, share: int, job: Job) -> str:
    """Why a replica's sequences make no microbatches; empty if they do."""
    count = job.pins.microbatches or 1
    if share % count:
        near = " or ".join(map(str, nearest_divisors(share, count)))
        return f"are not divisible by {count} microbatches; nearest: {near}"
    counts = microbatch_counts(mesh.stage, share, job.pins)
    if job.workload.phase == "train" and not counts:
        near = nearest_text(("stage",), share, mesh.stage, False, mesh.num_devices)
        return f"do not fill stage={mesh.stage}; {near}"
    return ""


def _memory(layout: Layout, way: Way, job: Job) -> Memory:
    """The memory stack, grown by what the compiler taught."""
    memory = memory_of(layout, way, job.sizes, job.topology, job.workload)
    for item in job.refuted:
        if item.way == way:
            return {**memory, "refuted": item.needed_bytes - sum(memory.values())}
    growth = job.growth(way)
    if growth > 1:
        passing = sum(memory.values()) - kept_bytes(memory)
        memory["learnt"] = (growth - 1) * passing
    return memory


def _keep_fitting(
    groups: list[list[Sized]], job: Job
) -> tuple[list[Sized], list[Rejected]]:
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
    costed: list[Candidate], job: Job
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
        for item in sorted(costed, key=lambda item: -item.predicted.step_s)
        if item.predicted.step_s > goal
    ]
    return kept, lost


MOST_KEPT = 100
"""Fitting candidates that a plan carries along, for its figures."""


def _cost(item: Sized, job: Job) -> Candidate:
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


def _unrolls(job: Job) -> bool:
    on_one_cpu = job.topology.chip.vendor == "cpu" and job.topology.num_devices == 1
    return on_one_cpu and job.sizes.layers <= UNROLL_LAYERS


_SPLITS = ("stage", "context", "expert", "tensor")
"""Axes that split more than the batch and the weights."""


def _rank(candidate: Candidate, job: Job) -> tuple[float, int, int, int, float]:
    """Fastest first; what differs by less than the model can tell, simplest first.

    In training an axis of _SPLITS that nobody asked for must win by MARGIN.
    """
    way, pinned = candidate.way, job.pins.mesh or {}
    splits = {axis: way.mesh.sizes[axis] for axis in _SPLITS}
    unasked = [axis for axis, n in splits.items() if n > 1 and axis not in pinned]
    is_train = job.workload.phase == "train"
    step_s = candidate.predicted.step_s * (1 + MARGIN * len(unasked) * is_train)
    return (
        float(f"{step_s:.3g}"),
        math.prod(splits.values()) * (1 + len(way.offload)),
        way.microbatches,
        way.rounds,
        candidate.predicted.peak_hbm_bytes,
    )


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
