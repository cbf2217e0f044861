"""Turn one job and many slices into a Front: the slices that no other beats.

Each slice gets the fastest plan on it, in closed form, for the same global batch. Time
and cost are compared to three digits, as plans are ranked; headroom in tenths of the
memory, so that a slice does not stand on the front for one percent more room.

Known lies: a price is per chip-hour and the same on slices of every size; waiting for
capacity, start-up and checkpoints cost nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from llmos_jax.errors import ConfigError, NoFeasiblePlan, PlanError
from llmos_jax.ir.front import Front, Prices, Slice
from llmos_jax.ir.params import ParamTable
from llmos_jax.ir.plan import REMATS, Candidate, Pins
from llmos_jax.ir.rules import Rules
from llmos_jax.ir.topology import Topology
from llmos_jax.ir.workload import Workload
from llmos_jax.planner.search import plan
from llmos_jax.planner.sensitivity import why_not
from llmos_jax.planner.text import clip, clipped, columns
from llmos_jax.units import format_seconds, format_si


def frontier(
    table: ParamTable,
    machines: Sequence[Topology],
    workload: Workload,
    rules: Rules,
    pins: Pins,
    prices: Prices,
    on_progress: Callable[[str], None] = lambda text: None,
) -> Front:
    """Plan the job on every machine and keep the unbeaten ones.

    Raises:
        NoFeasiblePlan: nothing works on any of them.
    """
    started = time.perf_counter()
    found: list[Slice] = []
    refused: dict[str, str] = {}
    for index, machine in enumerate(machines, start=1):
        on_progress(f"planning {index} of {len(machines)}: {machine.name}")
        try:
            best = plan(table, machine, workload, rules, pins).chosen
        except (ConfigError, PlanError) as problem:
            refused[machine.name] = why_not(problem)
        else:
            found.append(_slice(machine, best, prices))
    if not found:
        raise _nothing_works(table, machines, workload, refused)
    ordered = sorted(found, key=lambda item: item.best.predicted.step_s)
    unbeaten: list[Slice] = []
    for one in ordered:
        tied = any(_ties(two, one) for two in unbeaten)
        if not tied and not any(_beats(two, one) for two in ordered):
            unbeaten.append(one)
    return Front(
        model=table.name,
        num_params=table.num_params,
        workload=workload,
        front=tuple(unbeaten),
        beaten=tuple(item for item in ordered if item not in unbeaten),
        infeasible=refused,
        prices=prices,
        search_s=time.perf_counter() - started,
    )


def explain_front(front: Front) -> str:
    """Return the front as a table, and what was left out."""
    work = front.workload
    tried = len(front.front) + len(front.beaten) + len(front.infeasible)
    size = format_si(front.num_params).replace("G", "B")
    lines = [
        f"Front of {front.model} ({size} parameters), {work.phase} "
        f"{work.global_batch} x {work.seq_len} tokens",
        f"  {tried} slices in {format_seconds(front.search_s)}: {len(front.front)} on "
        f"the front, {len(front.beaten)} beaten, {len(front.infeasible)} with no plan",
        "",
        *_table(front),
        "",
        f"  cost: {front.prices.source}",
        "  headroom: memory left free on each device; a slice is on the front when no",
        "  other is as good in time, cost and headroom (in tenths) and better in one",
    ]
    if front.unpriced:
        lines.append(f"  no price, so no cost: {', '.join(front.unpriced)}")
    if front.infeasible:
        lines += ["", "No plan, for example", *_examples(front)]
    return clipped("\n".join(lines))


def dollars(usd: float | None) -> str:
    """0.00123 -> '0.0012'; 12.345 -> '12.35'; None -> '-'."""
    if usd is None:
        return "-"
    return f"{usd:,.2f}" if usd >= 1 else f"{usd:.4f}" if usd < 0.1 else f"{usd:.3f}"


def _table(front: Front) -> list[str]:
    head = ("slice", "step", "$/M tokens", "$/hour", "free", "MFU", "mesh, remat")
    cells = [head]
    for item in front.front:
        way, found = item.best.way, item.best.predicted
        remat = way.remat if way.remat in REMATS else "some saved"
        offload = ", offload" if way.offload else ""
        cells.append(
            (
                item.topology,
                format_seconds(found.step_s),
                dollars(item.usd_per_million_tokens),
                dollars(item.usd_per_hour),
                f"{item.headroom:.0%}",
                f"{found.mfu:.0%}",
                f"{way.mesh}, {remat}{offload}",
            )
        )
    return columns(cells, "lrrrrrl")


def _examples(front: Front) -> list[str]:
    """The largest slice of each chip that has no plan."""
    last: dict[str, str] = {}
    for name, why in front.infeasible.items():
        chip = name.rpartition("*")[2].partition(":")[0]
        last[chip] = f"  {name:<14} {why}"
    return [clip(line) for line in last.values()]


def _slice(machine: Topology, best: Candidate, prices: Prices) -> Slice:
    price = prices.usd_per_chip_hour.get(machine.chip.name)
    return Slice(
        topology=machine.name,
        chip=machine.chip.name,
        chips=machine.chips,
        slices=machine.slices,
        hbm_bytes_per_device=machine.hbm_bytes_per_device,
        best=best,
        usd_per_hour=None if price is None else price * machine.chips,
    )


def _beats(one: Slice, two: Slice) -> bool:
    """Whether `one` is as good as `two` in everything and better in something."""
    costs = _costs(one, two)
    if costs is None:
        return False
    pairs = [
        (_three(one.best.predicted.step_s), _three(two.best.predicted.step_s)),
        costs,
        (-int(10 * one.headroom), -int(10 * two.headroom)),
    ]
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def _ties(one: Slice, two: Slice) -> bool:
    """Whether two shapes of as many chips come to the same."""
    if (one.chip, one.chips) != (two.chip, two.chips):
        return False
    return not _beats(one, two) and not _beats(two, one)


def _costs(one: Slice, two: Slice) -> tuple[float, float] | None:
    """Both costs in one unit; None where no price makes them comparable."""
    if one.chip == two.chip:
        hours = one.chip_hours_per_million_tokens, two.chip_hours_per_million_tokens
        return _three(hours[0]), _three(hours[1])
    first, second = one.usd_per_million_tokens, two.usd_per_million_tokens
    if first is None or second is None:
        return None
    return _three(first), _three(second)


def _three(value: float) -> float:
    return float(f"{value:.3g}")


def _nothing_works(
    table: ParamTable,
    machines: Sequence[Topology],
    workload: Workload,
    refused: dict[str, str],
) -> NoFeasiblePlan:
    largest = max(machines, key=lambda machine: machine.chips).name
    return NoFeasiblePlan(
        f"no plan for {table.name} ({workload.phase}, {workload.global_batch} x "
        f"{workload.seq_len} tokens) on any of {len(machines)} slices. The largest, "
        f"{largest}: {refused[largest]}.\n"
        "  What would help: a larger --max-chips, other --chips, a smaller "
        "batch.global or batch.seq_len, fewer plan.* pins.",
        tuple(refused.items()),
    )
