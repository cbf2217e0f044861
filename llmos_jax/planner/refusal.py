"""Turn a search that found nothing into an error: what was tried, and what would do.

What is wrong with the pins alone comes first: no plan around them helps.
"""

from __future__ import annotations

from llmos_jax.errors import NoFeasiblePlan, RuleError
from llmos_jax.ir.plan import MeshShape, Pins
from llmos_jax.planner.explain import count_reasons
from llmos_jax.planner.layout import lay_out
from llmos_jax.planner.memory import budget
from llmos_jax.planner.question import Job, Sized, Tried, kept_bytes
from llmos_jax.units import format_bytes


def no_plan(
    job: Job,
    count: int,
    tried: Tried,
) -> NoFeasiblePlan:
    """Return the error of a search that found nothing.

    Args:
        job: what was asked.
        count: candidates that were tried.
        tried: what became of them.
    """
    sized = [item for group in tried.sized for item in group]
    wrong = _wrong_pins(job)
    work, machine = job.workload, job.topology
    rejected, too_slow = tried.rejected, tried.too_slow
    lines = [
        f"no plan for {job.table.name} on {machine.name} ({work.phase}, "
        f"{work.global_batch} x {work.seq_len} tokens): "
        f"{count} candidates, all rejected.",
        *(f"  {line}" for line in wrong),
        *(f"  {line}" for line in count_reasons(rejected)),
    ]
    if too_slow:
        lines.append(
            f"  What would make it fit: a latency goal above the {too_slow[-1].reason}"
            ", a smaller batch, or more chips."
        )
    elif sized:
        lines.extend(_nearest_miss(job, min(sized, key=lambda item: item.peak_bytes)))
    elif wrong and not any(item.reason.startswith("batch:") for item in rejected):
        lines.append(
            "  What would make it fit: sizes that divide, as said first; or fewer "
            "plan.* pins."
        )
    else:
        lines.append(_remedy_for_batch(job))
    pairs = tuple((item.mesh, item.reason) for item in rejected)
    return NoFeasiblePlan("\n".join(lines), pairs)


def _wrong_pins(job: Job) -> list[str]:
    """Pins that divide nothing whatever is planned around them: each alone, or if each
    may be, all together."""
    pinned = {axis: n for axis, n in (job.pins.mesh or {}).items() if n > 1}
    alone = [{axis: n} for axis, n in pinned.items()]
    for some in (alone, [pinned]):
        found = [
            f"plan.mesh: {why}" for mesh in some if (why := _why_not_split(mesh, job))
        ]
        if found:
            return found
    return []


def _why_not_split(mesh: dict[str, int], job: Job) -> str:
    shape = MeshShape(**mesh)
    try:
        lay_out(job.table, job.rules, job.sizes, job.workload, shape)
    except RuleError as problem:
        return str(problem)
    return ""


def _nearest_miss(job: Job, nearest: Sized) -> list[str]:
    limit = budget(job.topology)
    kept = kept_bytes(nearest.memory)
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


def _remedy_for_batch(job: Job) -> str:
    slices, devices = job.topology.slices, job.topology.num_devices
    hint = f" and {slices} slices need a batch divisible by {slices}" * (slices > 1)
    return (
        f"  What would make it fit: a batch.global that is a multiple of {devices} "
        f"(now {job.workload.global_batch}){hint}; or fewer plan.* pins."
    )
