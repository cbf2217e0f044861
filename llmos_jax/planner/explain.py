"""Turn a Plan into a page of text: the choice, what bounds it, and what it beat.

Plain text, at most 88 columns. The last table plans the neighbours of the choice, which
costs as many searches as it has rows.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from llmos_jax.ir.facts import axes_text, exchange_text, schedule_text
from llmos_jax.ir.lock import fidelity_of
from llmos_jax.ir.neighbour import Neighbour
from llmos_jax.ir.plan import REMATS, Pins, Plan, Rejected
from llmos_jax.ir.workload import Workload
from llmos_jax.planner.domain import MARGIN
from llmos_jax.planner.memory import budget
from llmos_jax.planner.stored import quantization_of
from llmos_jax.planner.text import (
    WIDTH,
    bar,
    change_text,
    clip,
    clipped,
    columns,
    row,
    rows,
)
from llmos_jax.units import format_bytes, format_seconds, format_si

RESOURCES = {
    "compute": "matmuls",
    "hbm": "memory traffic",
    "ici": "inside a slice",
    "dcn": "between slices",
    "host": "to and from host memory",
}
"""What keeps each resource busy, in words."""
_REMAT_MEANING = {
    "none": "everything saved",
    "dots": "matmuls saved, the rest recomputed",
    "attention": "attention saved, the rest recomputed",
    "full": "layer inputs saved, the rest recomputed",
}


def explain(plan: Plan, pins: Pins | None = None) -> str:
    """Return the plan as aligned tables.

    Args:
        plan: what to explain.
        pins: what the plan was asked with; its neighbours keep to them.
    """
    # The search counts its reasons with this file, so the way back waits.
    from llmos_jax.planner.sensitivity import neighbours

    started = time.perf_counter()
    around = neighbours(plan, pins)
    around_s = time.perf_counter() - started
    sections = [
        _head(plan),
        _choice(plan),
        _times(plan),
        _links(plan),
        _memory(plan),
        _collectives(plan),
        _runner_up(plan),
        _neighbours(plan, around),
        _rejected(plan, around_s),
    ]
    return clipped("\n\n".join("\n".join(section) for section in sections if section))


def count_reasons(rejected: Sequence[Rejected]) -> list[str]:
    """Return one line per kind of reason, most frequent first, each with an example.

    The example is the last of its kind; the search lists what needs least memory last.
    """
    kinds: dict[str, list[str]] = {}
    for item in rejected:
        kind, _, detail = item.reason.partition(": ")
        kinds.setdefault(kind, []).append(detail or kind)
    width = len(str(len(rejected)))
    return [
        clip(f"{len(details):>{width}} {kind}: {_short(details[-1])}", WIDTH - 2)
        for kind, details in sorted(kinds.items(), key=lambda item: -len(item[1]))
    ]


def why_runner_up_lost(plan: Plan) -> str:
    """Why the runner-up lost, in one line; empty without one."""
    if plan.runner_up is None:
        return ""
    mine, theirs = plan.predicted, plan.runner_up.predicted
    slower_s = theirs.step_s - mine.step_s
    if slower_s < -0.005 * mine.step_s:
        return (
            f"{-slower_s / mine.step_s:.1%} faster, but splits more: that must win by "
            f"{MARGIN:.0%}"
        )
    if slower_s <= 0.005 * mine.step_s:  # ranking compares three significant digits
        return "a tie in time; the choice is the simpler way"
    growth = {
        name: theirs.seconds[name] - mine.seconds.get(name, 0.0)
        for name in theirs.seconds
    }
    worst = max(growth, key=lambda name: growth[name])
    return (
        f"{slower_s / mine.step_s:.1%} slower: {worst} takes "
        f"{format_seconds(theirs.seconds[worst])}, not "
        f"{format_seconds(mine.seconds.get(worst, 0.0))}"
    )


def _short(detail: str) -> str:
    """Without the array and the rule's line, which the full reason has."""
    return detail.split(" (")[0] if "divisible by" in detail else detail


def _head(plan: Plan) -> list[str]:
    work = plan.workload
    chips = plan.topology.chips
    devices = plan.topology.num_devices
    machine = f"{plan.topology.name} ({chips} chip{'' if chips == 1 else 's'}"
    machine += f", {devices} devices)" if devices != chips else ")"
    size = format_si(plan.params.num_params).replace(
        "G", "B"
    )  # billions, as people say
    return [
        f"Plan {plan.fingerprint}",
        row("model", f"{plan.params.name}, {size} parameters, rules {_rules(plan)}"),
        row("machine", machine),
        row(
            "workload",
            f"{work.phase}, {work.global_batch} x {work.seq_len} tokens, "
            f"{work.compute_dtype} compute, {work.param_dtype} weights",
        ),
        *_served(plan),
        *_agreement(work),
    ]


def _served(plan: Plan) -> list[str]:
    """In what a step that serves multiplies, and what it keeps."""
    if plan.workload.phase == "train":
        return []
    how = quantization_of(plan.params)
    few_bits = how is not None and how.activations != "none"
    tokens = how.activations if how and few_bits else plan.workload.compute_dtype
    keys = f"keys and values kept as {plan.workload.kv_dtype}"
    return [row("products", f"tokens multiplied as {tokens}; {keys}")]


def _agreement(work: Workload) -> list[str]:
    if not work.local_steps:
        return []
    return [row("replicas", f"agree on parameters once in {work.local_steps} steps")]


def _rules(plan: Plan) -> str:
    return plan.rules.source or plan.rules.family


def _choice(plan: Plan) -> list[str]:
    found, way = plan.predicted, plan.way
    peak = plan.topology.peak_flops_per_s(plan.workload.compute_dtype)
    peak *= plan.topology.chip.devices_per_chip
    lines = [
        "Choice",
        row("mesh", str(plan.mesh)),
        *rows("remat", _remat(plan.remat)),
    ]
    if way.offload:
        lines += rows("offload", f"{', '.join(way.offload)} wait in host memory")
    lines.append(row("microbatches", str(plan.microbatches)))
    if plan.mesh.stage > 1:
        lines += rows("schedule", schedule_text(way))
    if plan.mesh.context > 1:
        lines += rows("keys", exchange_text(way))
    if way.loss_tiles > 1:
        lines.append(row("loss", f"in {way.loss_tiles} tiles of the {way.loss_over}"))
    for name, what in (("state_dtype", "optimizer"), ("gradient_dtype", "gradients")):
        if getattr(way, name) != "float32":
            changed = f"{getattr(way, name)}, which changes the numbers of the run"
            lines.append(row(what, changed))
    lines.append(row("layers", "written out" if way.unrolled else "one loop (scan)"))
    lines += [
        row(
            "predicted",
            f"{format_seconds(found.step_s)} a step, "
            f"{format_si(found.tokens_per_s)} tokens/s, "
            f"{format_si(found.tflops_per_s_per_chip * 1e12, 'FLOP/s')} per chip",
        ),
        row("MFU", f"{found.mfu:.1%} of {format_si(peak, 'FLOP/s')}"),
        *_trust(plan),
    ]
    return lines


def _remat(remat: str) -> str:
    if remat in _REMAT_MEANING:
        return f"{remat} ({_REMAT_MEANING[remat]})"
    return f"{remat.replace(',', ', ')} saved, the rest recomputed"


def _trust(plan: Plan) -> list[str]:
    """How far the time may be off, and what supports it."""
    found = plan.predicted
    if plan.topology.chip.vendor == "cpu":
        return rows("note", "cpu figures are nominal: they rank, they are no speed")
    if found.error is not None:
        return rows("error", f"within {found.error:.0%} ({found.domain})")
    return rows("error", f"not known: {found.domain}") if found.domain else []


def _times(plan: Plan) -> list[str]:
    seconds, step_s = plan.predicted.seconds, plan.predicted.step_s
    lines = ["Time by resource (they overlap)"]
    for name, busy_s in seconds.items():
        share = busy_s / step_s if step_s else 0.0
        bound = "  <- bound" if name == plan.predicted.bound_by else ""
        lines.append(
            f"  {name:<12} {format_seconds(busy_s):>9}  {share:>5.0%}  {bar(share)}"
            f"  {RESOURCES.get(name, name)}{bound}"
        )
    return lines


def _links(plan: Plan) -> list[str]:
    placed = plan.predicted.placement
    used = {axis: n for axis, n in plan.mesh.sizes.items() if n > 1 and axis in placed}
    if not used:
        return []
    lines = [rows(f"{axis}={n}", placed[axis]) for axis, n in used.items()]
    return [
        "Links that carry each mesh axis",
        *(line for part in lines for line in part),
    ]


def _memory(plan: Plan) -> list[str]:
    whole = plan.topology.hbm_bytes_per_device
    peak = plan.predicted.peak_hbm_bytes
    reserve = whole - budget(plan.topology)
    stack = {name: size for name, size in plan.predicted.memory.items() if size}
    table = {**stack, "peak": peak, "reserve": reserve, "free": whole - peak - reserve}
    lines = ["Memory of one device at its fullest"]
    for name, size in table.items():
        mark = bar(size / whole) if name != "peak" else f"of {format_bytes(whole)}"
        figures = f"{format_bytes(size):>9}  {size / whole:>5.1%}"
        lines.append(f"  {name:<16} {figures}  {mark}".rstrip())
    return [*lines, *_compiler_memory(plan, whole)]


def _compiler_memory(plan: Plan, whole: float) -> list[str]:
    """What the compiler says beside what was estimated."""
    if plan.compiled is None:
        return []
    found, stack = plan.compiled, plan.predicted.memory
    held = sum(stack.get(name, 0.0) for name in ("params", "optimizer", "KV cache"))
    peak = plan.predicted.peak_hbm_bytes
    pairs = (
        ("arguments", "argument_bytes", held),
        ("temporaries", "temp_bytes", peak - held),
        ("peak", "peak_hbm_bytes", peak),
    )
    lines = [f"  The compiler ({fidelity_of(plan)}) says, beside the estimate:"]
    for name, key, estimate in pairs:
        size = float(found[key])
        verdict = (
            "" if key != "peak_hbm_bytes" else f"free {format_bytes(whole - size)}"
        )
        if key == "peak_hbm_bytes" and size > whole:
            verdict = f"DOES NOT FIT, by {format_bytes(size - whole)}"
        lines.append(
            f"  {name:<16} {format_bytes(size):>9}  {size / whole:>5.1%}  estimate "
            f"{format_bytes(estimate)}, {change_text(size, estimate)}"
            + (f"; {verdict}" if verdict else "")
        )
    return lines


def _collectives(plan: Plan) -> list[str]:
    if plan.compiled is None:
        return []
    planned = plan.compiled.get("collectives", [])
    strange = plan.compiled.get("unplanned_collectives", [])
    if not plan.compiled.get("audited", True):
        return ["Collectives: not read; this jaxlib cannot print the compiled step"]
    if not planned and not strange:
        return ["Collectives: none in the compiled step"]
    head = ("collective", "over", "link", "count", "bytes a step", "")
    cells = [head, *(_collective(item, "") for item in planned)]
    cells += [_collective(item, "<- UNPLANNED") for item in strange]
    lines = ["Collectives of the compiled step", *columns(cells, "lllrrl")]
    for item in strange:
        lines += rows("UNPLANNED", f"{item['op']}: {item['why']}")
    return lines


def _collective(item: Mapping[str, Any], mark: str) -> tuple[str, ...]:
    return (
        str(item["op"]),
        axes_text(item["axes"]),
        str(item.get("link", "")).upper(),
        f"{item['count']:,}",
        format_bytes(item["bytes"]),
        mark,
    )


def _runner_up(plan: Plan) -> list[str]:
    other = plan.runner_up
    if other is None:
        return []
    found, way = other.predicted, other.way
    said = f"{other.mesh}, remat {other.remat}, microbatches {other.microbatches}"
    if other.mesh.stage > 1:
        said += f", {schedule_text(way)}"
    if other.mesh.context > 1:
        said += f", keys by {way.context_exchange}"
    if way.offload:
        said += f", offload {'+'.join(way.offload)}"
    figures = (
        f"{format_seconds(found.step_s)} a step, MFU {found.mfu:.1%}, "
        f"{format_bytes(found.peak_hbm_bytes)}"
    )
    return [
        "Runner-up",
        *rows("way", said),
        row("predicted", figures),
        row("why it lost", why_runner_up_lost(plan)),
    ]


def _neighbours(plan: Plan, around: Sequence[Neighbour]) -> list[str]:
    if not around:
        return []
    width = max(len(item.change) for item in around)
    head = f"  {'':<{width}}  {'step':>9}  {'tokens/s':>8}  {'memory':>9}  way"
    return [
        "One step away",
        head.rstrip(),
        *(f"  {item.change:<{width}}  {_outcome(plan, item)}" for item in around),
    ]


def _outcome(plan: Plan, item: Neighbour) -> str:
    if item.best is None:
        return item.reason
    found = item.best.predicted
    return (
        f"{format_seconds(found.step_s):>9}  {format_si(found.tokens_per_s):>8}  "
        f"{format_bytes(found.peak_hbm_bytes):>9}  {neighbour_way(plan, item)}"
    )


def neighbour_way(plan: Plan, item: Neighbour) -> str:
    """What a neighbour's way has that the chosen one has not."""
    if item.best is None:
        return ""
    mine, theirs = plan.way, item.best.way
    said = [str(theirs.mesh)] if theirs.mesh != mine.mesh else []
    if theirs.remat != mine.remat and f"remat {theirs.remat}" != item.change:
        said.append(f"remat {_brief(theirs.remat)}")
    if theirs.microbatches != mine.microbatches:
        said.append(f"microbatches {theirs.microbatches}")
    if theirs.mesh.stage > 1 and (theirs.schedule, theirs.rounds) != (
        mine.schedule,
        mine.rounds,
    ):
        said.append(schedule_text(theirs))
    if theirs.mesh.context > 1 and theirs.context_exchange != mine.context_exchange:
        said.append(f"keys by {theirs.context_exchange}")
    if theirs.offload != mine.offload:
        said.append(f"offload {'+'.join(theirs.offload) or 'nothing'}")
    return ", ".join(said) or "same way"


def _brief(remat: str) -> str:
    return remat if remat in REMATS else f"{len(remat.split(','))} tensors saved"


def _rejected(plan: Plan, around_s: float) -> list[str]:
    lost = len(plan.rejected)
    plural = "" if plan.candidates == 1 else "s"
    head = f"{plan.candidates} candidate{plural} in {format_seconds(plan.search_s)}"
    if plan.search_s + around_s > 1:
        head += f" (one step away: {format_seconds(around_s)} more)"
    if not lost:
        return [f"{head}; none rejected"]
    return [
        f"{head}; {lost} rejected, for example",
        *(f"  {line}" for line in count_reasons(plan.rejected)),
    ]
