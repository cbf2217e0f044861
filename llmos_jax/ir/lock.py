"""PlanLock: a plan that can be checked again after jax, libtpu or this house changed.

It keeps what was asked (the whole config), which versions answered, and what they said:
the decision, the predictions, and the compiler's figures where it was asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmos_jax.ir.artefact import Artefact
from llmos_jax.ir.facts import Facts, facts_of
from llmos_jax.ir.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanLock(Artefact):
    """plan.lock."""

    config: dict[str, Any]
    """The expanded config, with the topology that was planned for."""
    versions: dict[str, str]
    decision: str
    """The plan's fingerprint."""
    fidelity: str = "estimate"
    facts: Facts
    hbm_bytes_per_device: float


def lock_of(plan: Plan, config: dict[str, Any], versions: dict[str, str]) -> PlanLock:
    """Lock a plan that was made from `config`."""
    return PlanLock(
        config={**config, "topology": plan.topology.name},
        versions=versions,
        decision=plan.fingerprint,
        fidelity=fidelity_of(plan),
        facts=facts_of(plan),
        hbm_bytes_per_device=plan.topology.hbm_bytes_per_device,
    )


def fidelity_of(plan: Plan) -> str:
    """How the plan was proved: estimate, probe or compile."""
    if plan.compiled is None:
        return "estimate"
    return str(plan.compiled.get("fidelity", "compile"))
