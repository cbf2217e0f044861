"""Turn a Plan into a page of text: the choice, what bounds it, and what it beat.

Plain text, at most 88 columns.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmos_jax.ir.plan import Candidate, Plan, Rejected
from llmos_jax.planner.memory import budget
from llmos_jax.units import format_bytes, format_seconds, format_si

WIDTH = 88
_BAR = 24
_RESOURCES = {
    "compute": "matmuls",
    "hbm": "memory traffic",
    "ici": "inside a slice",
    "dcn": "between slices",
}


def explain(plan: Plan) -> str:
    """Return the plan as an aligned table."""
    sections = [
        _head(plan),
        _choice(plan),
        _times(plan),
        _memory(plan),
        _runner_up(plan),
        _rejected(plan),
    ]
    lines = "\n\n".join("\n".join(section) for section in sections if section)
    return "\n".join(_clip(line) for line in lines.splitlines())


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
        _clip(f"{len(details):>{width}} {kind}: {_short(details[-1])}", WIDTH - 2)
        for kind, details in sorted(kinds.items(), key=lambda item: -len(item[1]))
    ]


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
        _row("model", f"{plan.params.name}, {size} parameters, rules {_rules(plan)}"),
        _row("machine", machine),
        _row(
            "workload",
            f"{work.phase}, {work.global_batch} x {work.seq_len} tokens, "
            f"{work.compute_dtype} compute, {work.param_dtype} weights",
        ),
    ]


def _rules(plan: Plan) -> str:
    return plan.rules.source or plan.rules.family


def _choice(plan: Plan) -> list[str]:
    found = plan.predicted
    peak = plan.topology.peak_flops_per_s(plan.workload.compute_dtype)
    peak *= plan.topology.chip.devices_per_chip
    lines = [
        "Choice",
        _row("mesh", str(plan.mesh)),
        _row("remat", f"{plan.remat} ({_REMAT_MEANING[plan.remat]})"),
        _row("microbatches", str(plan.microbatches)),
        _row("layers", "written out" if plan.chosen.unrolled else "one loop (scan)"),
        _row(
            "predicted",
            f"{format_seconds(found.step_s)} a step, "
            f"{format_si(found.tokens_per_s)} tokens/s, "
            f"{format_si(found.tflops_per_s_per_chip * 1e12, 'FLOP/s')} per chip",
        ),
        _row("MFU", f"{found.mfu:.1%} of {format_si(peak, 'FLOP/s')}"),
    ]
    if plan.topology.chip.vendor == "cpu":
        lines.append(
            _row("note", "cpu figures are nominal: they rank, they are no speed")
        )
    return lines


_REMAT_MEANING = {
    "none": "everything saved",
    "dots": "matmuls saved, the rest recomputed",
    "full": "layer inputs saved, the rest recomputed",
}


def _times(plan: Plan) -> list[str]:
    seconds, step_s = plan.predicted.seconds, plan.predicted.step_s
    lines = ["Time by resource (they overlap)"]
    for name, busy_s in seconds.items():
        share = busy_s / step_s if step_s else 0.0
        bound = "  <- bound" if name == plan.predicted.bound_by else ""
        bar = _bar(share)
        lines.append(
            f"  {name:<12} {format_seconds(busy_s):>9}  {share:>5.0%}  {bar}"
            f"  {_RESOURCES.get(name, name)}{bound}"
        )
    return lines


def _memory(plan: Plan) -> list[str]:
    whole = plan.topology.hbm_bytes_per_device
    peak = plan.predicted.peak_hbm_bytes
    reserve = whole - budget(plan.topology)
    stack = {name: size for name, size in plan.predicted.memory.items() if size}
    rows = {**stack, "peak": peak, "reserve": reserve, "free": whole - peak - reserve}
    lines = ["Memory of one device at its fullest"]
    for name, size in rows.items():
        mark = _bar(size / whole) if name != "peak" else f"of {format_bytes(whole)}"
        figures = f"{format_bytes(size):>9}  {size / whole:>5.1%}"
        lines.append(f"  {name:<16} {figures}  {mark}".rstrip())
    return lines


def _runner_up(plan: Plan) -> list[str]:
    other = plan.runner_up
    if other is None:
        return []
    found = other.predicted
    way = f"{other.mesh}, remat {other.remat}, microbatches {other.microbatches}"
    figures = (
        f"{format_seconds(found.step_s)} a step, MFU {found.mfu:.1%}, "
        f"{format_bytes(found.peak_hbm_bytes)}"
    )
    return [
        "Runner-up",
        _row("way", way),
        _row("predicted", figures),
        _lost(plan, other),
    ]


def _lost(plan: Plan, other: Candidate) -> str:
    mine, theirs = plan.predicted, other.predicted
    slower_s = theirs.step_s - mine.step_s
    if slower_s <= 0.005 * mine.step_s:  # ranking compares three significant digits
        return _row("why it lost", "a tie in time; the choice is the simpler mesh")
    growth = {
        name: theirs.seconds[name] - mine.seconds.get(name, 0.0)
        for name in theirs.seconds
    }
    worst = max(growth, key=lambda name: growth[name])
    return _row(
        "why it lost",
        f"{slower_s / mine.step_s:.1%} slower: {worst} takes "
        f"{format_seconds(theirs.seconds[worst])}, not "
        f"{format_seconds(mine.seconds.get(worst, 0.0))}",
    )


def _rejected(plan: Plan) -> list[str]:
    lost = len(plan.rejected)
    plural = "" if plan.candidates == 1 else "s"
    head = f"{plan.candidates} candidate{plural} in {format_seconds(plan.search_s)}"
    if not lost:
        return [f"{head}; none rejected"]
    return [
        f"{head}; {lost} rejected, for example",
        *(f"  {line}" for line in count_reasons(plan.rejected)),
    ]


def _row(name: str, value: str) -> str:
    return f"  {name:<12} {value}"


def _bar(share: float) -> str:
    return ("#" * min(_BAR, round(share * _BAR))).ljust(_BAR)


def _clip(line: str, width: int = WIDTH) -> str:
    line = line.rstrip()
    return line if len(line) <= width else line[: width - 3] + "..."
