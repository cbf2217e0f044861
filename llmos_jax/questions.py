"""Questions about plans: which slice, what if, what differs, does it still stand.

One function per way to use `plan` that compares, each from the words of the command
line to an artefact or a page; `driver` makes the plans that they ask about.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmos_jax import driver, hardware, planner, resolve, rules
from llmos_jax.config import (
    RunConfig,
    load_config,
    load_prices,
    override_config,
    to_toml,
)
from llmos_jax.errors import ConfigError, LlmosError, NoFeasiblePlan
from llmos_jax.ir import Front, Plan, PlanLock, facts_of, facts_of_summary, lock_of
from llmos_jax.telemetry import page_of_front, page_of_plan, versions


def frontier(
    config: RunConfig,
    chips: Sequence[str],
    *,
    max_chips: int,
    max_slices: int = 1,
    prices: str | None = None,
    on_progress: Callable[[str], None] = lambda text: None,
) -> Front:
    """Config + kinds of chips -> the slices that no other beats, one plan on each."""
    from llmos_jax import models

    if config.batch.global_ is None:
        raise ConfigError(
            "--topology any compares slices on one global batch, and batch.per_device "
            "means another batch on every slice. Set it: --set batch.global=256."
        )
    spec = resolve.spec_of(config)
    machines = [
        machine
        for name in chips
        for machine in hardware.legal_topologies(name, max_chips, max_slices)
    ]
    if not machines:
        raise ConfigError(
            f"no slice of {', '.join(chips)} has {max_chips} chips or fewer."
        )
    cost = load_prices(prices)
    for name in cost.usd_per_chip_hour:
        hardware.chip(name)
    # Refused where one kind of chip does not go with it; else one model for all.
    spec = [resolve.served(spec, config, machine) for machine in machines][0]
    workload = resolve.resolve_workload(config, spec, machines[0])
    return planner.frontier(
        models.param_table(spec),
        machines,
        workload,
        rules.load_rules(config.rules or spec.rules, workload.phase),
        resolve.pins_of(config),
        cost,
        on_progress,
    )


def what_if(
    config: RunConfig, changes: Sequence[str], verify: str = "estimate"
) -> planner.Difference:
    """Config + `key=value` changes -> what differs between its plan and theirs."""
    changed = override_config(config, changes)
    sides = (
        planner.Side(label=label, fingerprint=found.fingerprint, facts=facts_of(found))
        for label, found in (
            ("as asked", driver.plan(config, verify)),
            (f"with {' '.join(changes)}", driver.plan(changed, verify)),
        )
    )
    return planner.compare(*sides)


def diff(one: str, other: str) -> planner.Difference:
    """Two plan.json, locks, run folders or configs -> what differs."""
    return planner.compare(_side_of(one), _side_of(other))


def lock(config: RunConfig, chosen: Plan) -> PlanLock:
    """A config and its plan -> the lock that `check` reads."""
    return lock_of(chosen, config.to_json(), versions())


def check(name: str, verify: str | None = None) -> planner.Recheck:
    """A lock -> what moved since, by a fresh plan at its fidelity (or at `verify`).

    Raises:
        ConfigError: no file, or no lock.
        LlmosError: what was locked fits nowhere now.
    """
    document = _read_json(Path(name).expanduser())
    if "decision" not in document:
        raise ConfigError(f"{name} is no lock; `plan ... --lock {name}` makes one.")
    kept = PlanLock.from_json(document)
    try:
        fresh = driver.plan(RunConfig.from_json(kept.config), verify or kept.fidelity)
    except NoFeasiblePlan as problem:
        raise LlmosError(f"{name} no longer fits: {problem}") from None
    return planner.recheck(name, kept, fresh, versions())


def plan_page(config: RunConfig, chosen: Plan) -> str:
    """A config and its plan -> one page of HTML, with what lies around the choice."""
    around = planner.neighbours(chosen, resolve.pins_of(config))
    return page_of_plan(
        chosen,
        budget_bytes=planner.budget(chosen.topology),
        neighbours=[(item, planner.neighbour_way(chosen, item)) for item in around],
        why_lost=planner.why_runner_up_lost(chosen),
        resources=planner.RESOURCES,
        reasons=planner.count_reasons(chosen.rejected),
        config_toml=to_toml(config),
        versions=versions(),
    )


def front_page(front: Front) -> str:
    """A front -> one page of HTML."""
    return page_of_front(front)


def _side_of(name: str) -> planner.Side:
    """A plan.json, a lock, a run folder or a config, to be compared."""
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "plan.json"
        if not path.is_file():
            raise ConfigError(f"{name} holds no plan.json; it is no run folder.")
    if path.suffix == ".toml" or not path.is_file():
        if path.suffix in (".json", ".lock"):
            raise ConfigError(f"{name} does not exist.")
        chosen = driver.plan(load_config(name).config)
        return planner.Side(
            label=name, fingerprint=chosen.fingerprint, facts=facts_of(chosen)
        )
    document = _read_json(path)
    if "decision" in document:
        kept = PlanLock.from_json(document)
        return planner.Side(label=name, fingerprint=kept.decision, facts=kept.facts)
    try:
        facts = facts_of_summary(document)
    except ConfigError as problem:
        raise ConfigError(f"{name}: {problem}") from None
    if "artefact" in document:
        with contextlib.suppress(ConfigError):  # of another release: the rest will do
            facts = facts_of(Plan.from_json(document["artefact"]))
    return planner.Side(
        label=name, fingerprint=str(document.get("fingerprint", "")), facts=facts
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise ConfigError(f"{path} cannot be read: {problem.strerror}.") from None
    except ValueError:
        raise ConfigError(f"{path} is not JSON: no plan.json and no lock.") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path} holds no JSON object: no plan.json and no lock.")
    return document
