"""Turn a lock and a fresh plan into what moved, and whether the recipe still stands.

It stands while the same is decided for the same inputs, the compiled (or predicted)
peak fits the device, nothing is exchanged that was not planned, and neither peak nor
predicted step time grew by more than the tolerance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmos_jax.ir.facts import facts_of
from llmos_jax.ir.lock import PlanLock, fidelity_of
from llmos_jax.ir.plan import Plan
from llmos_jax.planner.diff import Difference, Side, compare, explain_difference
from llmos_jax.planner.text import clipped, row
from llmos_jax.units import format_bytes

TOLERANCE = 0.05
"""Growth of peak memory or step time that a lock lets pass. Our choice: the reserve of
memory.py, which is what keeps a grown program from failing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recheck:
    """A lock, checked."""

    lock: str
    fidelity: str
    versions: dict[str, tuple[str, str]]
    """Package -> (then, now), all of them."""
    difference: Difference
    peak_bytes: float
    whole_bytes: float
    problems: tuple[str, ...]

    @property
    def stands(self) -> bool:
        """Whether the recipe may be used as it was."""
        return not self.problems

    def summary(self) -> dict[str, Any]:
        """The JSON of `plan --check`."""
        return {
            "lock": self.lock,
            "ok": self.stands,
            "fidelity": self.fidelity,
            "versions": {
                name: {"then": then, "now": now}
                for name, (then, now) in self.versions.items()
            },
            "fits": self.peak_bytes <= self.whole_bytes,
            "peak_hbm_bytes": self.peak_bytes,
            "hbm_bytes_per_device": self.whole_bytes,
            "tolerance": TOLERANCE,
            "problems": list(self.problems),
            "moved": self.difference.summary(),
        }


def recheck(name: str, lock: PlanLock, plan: Plan, versions: dict[str, str]) -> Recheck:
    """Compare a lock with the plan that its config gives now.

    The lock's compiled figures are set beside new ones of the same fidelity only: a
    probe and an estimate say different things about one program.
    """
    fidelity = fidelity_of(plan)
    then = Side(label=f"then ({name})", fingerprint=lock.decision, facts=lock.facts)
    facts = facts_of(plan)
    if fidelity != lock.fidelity:
        facts = {**facts, "compiled": {}}
    now = Side(label="now", fingerprint=plan.fingerprint, facts=facts)
    difference = compare(then, now)
    both = sorted({*lock.versions, *versions})
    return Recheck(
        lock=name,
        fidelity=fidelity,
        versions={
            key: (lock.versions.get(key, "-"), versions.get(key, "-")) for key in both
        },
        difference=difference,
        peak_bytes=_peak(plan),
        whole_bytes=plan.topology.hbm_bytes_per_device,
        problems=tuple(_problems(difference, plan)),
    )


def explain_recheck(found: Recheck) -> str:
    """Return the verdict, the versions, and what moved."""
    bumped = [
        f"{name} {then} -> {now}"
        for name, (then, now) in found.versions.items()
        if then != now
    ]
    same = [
        f"{name} {now}" for name, (then, now) in found.versions.items() if then == now
    ]
    versions = "; ".join(bumped) if bumped else f"the same: {', '.join(same)}"
    decision = "CHANGED" if _decided(found.difference) else "the same"
    peak, whole = format_bytes(found.peak_bytes), format_bytes(found.whole_bytes)
    fits = f"{peak} of {whole}, {1 - found.peak_bytes / found.whole_bytes:.1%} free"
    lines = [
        f"{'Stands' if found.stands else 'No longer stands'}: {found.lock}",
        row("versions", versions),
        row("decision", decision),
        row("memory", f"{fits} ({found.fidelity})"),
        *(row("problem", problem) for problem in found.problems),
        "",
        explain_difference(found.difference),
    ]
    return clipped("\n".join(lines))


def _problems(difference: Difference, plan: Plan) -> list[str]:
    problems = []
    moved = difference.changed
    decided = _decided(difference)
    if decided:
        problems.append(f"the decision changed: {', '.join(decided[:6])}")
    peak, whole = _peak(plan), plan.topology.hbm_bytes_per_device
    if peak > whole:
        problems.append(f"needs {format_bytes(peak)} > {format_bytes(whole)}")
    for section, name, said in (
        ("predicted", "step_s", "predicted step time"),
        ("predicted", "peak_hbm_bytes", "predicted peak memory"),
        ("compiled", "peak_hbm_bytes", "compiled peak memory"),
    ):
        then, now = moved[section].get(name, (None, None))
        if then and now and now / then - 1 > TOLERANCE:
            problems.append(
                f"{said} grew {now / then - 1:.1%}; a lock lets {TOLERANCE:.0%} pass"
            )
    new = {
        name.removesuffix(", count")
        for name, (then, _) in moved["compiled"].items()
        if name.startswith("UNPLANNED") and then is None and name.endswith("count")
    }
    problems += [f"new collective: {name}" for name in sorted(new)]
    return problems


def _decided(difference: Difference) -> list[str]:
    """What was decided, or asked, otherwise than now.

    A key that one release has and the other has not is no decision: it says as much as
    its default did.
    """
    if difference.same_decision:
        return []
    return [
        f"how {name} is split" if section == "specs" else name
        for section in ("inputs", "choice", "specs")
        for name, (then, now) in difference.changed[section].items()
        if then is not None and now is not None
    ]


def _peak(plan: Plan) -> float:
    if plan.compiled is None:
        return plan.predicted.peak_hbm_bytes
    return float(plan.compiled["peak_hbm_bytes"])
