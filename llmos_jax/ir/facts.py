"""Facts: what a plan was asked, chose and predicts, as flat data that two plans share.

Five sections, each `name -> value`: inputs, choice, specs, predicted, compiled. A lock
keeps them; a diff compares them. They also come from the JSON of `plan --json` alone,
which says less (no specs, no dtypes).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmos_jax.errors import ConfigError
from llmos_jax.ir.plan import MeshShape, Plan, Way

Facts = dict[str, dict[str, Any]]

SECTIONS = ("inputs", "choice", "specs", "predicted", "compiled")


def facts_of(plan: Plan) -> Facts:
    """Flatten a whole plan."""
    facts = facts_of_summary(plan.summary())
    work = plan.workload
    facts["inputs"] |= {
        "weights table": plan.params.fingerprint,
        "rules": plan.rules.source or plan.rules.family,
        "rules say": plan.rules.fingerprint,
        "phase": work.phase,
        "compute dtype": work.compute_dtype,
        "weights dtype": work.param_dtype,
        "optimizer moments": work.optimizer_moments,
        "local steps": work.local_steps,
    }
    facts["specs"] = {path: _spec(spec) for path, spec in plan.specs.items()}
    return facts


def facts_of_summary(summary: Mapping[str, Any]) -> Facts:
    """Flatten the JSON of `plan --json`.

    Raises:
        ConfigError: an object that is no plan.
    """
    try:
        return _facts(summary)
    except (KeyError, TypeError, AttributeError) as problem:
        raise ConfigError(f"this is no plan: {problem} is missing or wrong.") from None


def _facts(summary: Mapping[str, Any]) -> Facts:
    model, machine, batch = summary["model"], summary["topology"], summary["batch"]
    found = dict(summary["predicted"])
    found.pop("domain", None)
    placement = found.pop("placement", {})
    seconds, memory = found.pop("seconds"), found.pop("memory", {})
    return {
        "inputs": {
            "model": model["name"],
            "parameters": model["params"],
            "topology": machine["name"],
            "memory of a device, bytes": machine["hbm_bytes_per_device"],
            "batch.global": batch["global"],
            "batch.seq_len": batch["seq_len"],
        },
        "choice": {
            "mesh": str(MeshShape(**summary["mesh"])),
            "remat": summary["remat"],
            "offload": "+".join(summary["offload"]) or "nothing",
            "microbatches": batch["microbatches"],
            **_way(summary.get("way", {}), summary["mesh"]),
        },
        "specs": {},
        "predicted": {
            **{key: value for key, value in found.items() if value is not None},
            **{f"{name}, s": value for name, value in seconds.items()},
            **{f"{name}, bytes": value for name, value in memory.items()},
            **{f"{axis} lies on": links for axis, links in placement.items()},
        },
        "compiled": _compiled(summary.get("compiled")),
    }


_ONLY_WITH = {"schedule": "stage", "rounds": "stage", "context_exchange": "context"}
"""Decisions that mean nothing where this mesh axis is 1."""


def _way(way: Mapping[str, Any], mesh: Mapping[str, int]) -> dict[str, Any]:
    """What was decided beside the mesh, as far as it means anything on it."""
    return {
        key: _plain(value)
        for key, value in way.items()
        if mesh.get(_ONLY_WITH.get(key, ""), 2) > 1
    }


def _compiled(compiled: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the compiler said, but for how long it took."""
    if compiled is None:
        return {}
    kept = ("fidelity", "peak_hbm_bytes", "argument_bytes", "temp_bytes")
    facts = {key: compiled[key] for key in kept if key in compiled}
    for kind, mark in (("collectives", ""), ("unplanned_collectives", "UNPLANNED ")):
        for row in compiled.get(kind, []):
            link = f" ({row['link'].upper()})" if row.get("link") else ""
            name = f"{mark}{row['op']} over {axes_text(row['axes'])}{link}"
            for what in ("count", "bytes"):
                key = f"{name}, {what}"
                facts[key] = facts.get(key, 0) + row[what]
    if compiled.get("hlo_fingerprint"):
        facts["hlo_fingerprint"] = compiled["hlo_fingerprint"]
    return facts


def ticks_of(way: Way) -> int:
    """Turns that every stage takes in the forward pass of one step, idle ones too.

    A turn is one microbatch through one chunk of layers: a stage's, or where each stage
    has several (`rounds`), one of them. P stages, M microbatches, R rounds: R M + P - 1
    (arXiv 2104.04473, section 2.2).
    """
    return way.rounds * way.microbatches + way.mesh.stage - 1


def bubble_of(way: Way) -> float:
    """The share of a pipeline's turns in which a stage has nothing to do."""
    return (way.mesh.stage - 1) / ticks_of(way)


def loss_parts(way: Way) -> int:
    """Microbatches that a pipeline makes the loss of at one time: all of them, or with
    `1f1b` one."""
    return way.microbatches if way.mesh.stage > 1 and way.schedule != "1f1b" else 1


def schedule_text(way: Way) -> str:
    """A pipeline's schedule in words: `circular, 2 rounds, bubble 16%`."""
    rounds = f", {way.rounds} rounds" if way.rounds > 1 else ""
    return f"{way.schedule}{rounds}, bubble {bubble_of(way):.0%}"


def exchange_text(way: Way) -> str:
    """How the keys and values of a split sequence travel, in words."""
    return {
        "ring": "ring (passed on block by block, behind the attention)",
        "gather": "gather (whole before the attention)",
    }[way.context_exchange]


def axes_text(axes: object) -> str:
    """Mesh axes of a collective as text: `fsdp+tensor`."""
    if isinstance(axes, str):
        return axes
    return "+".join(map(str, axes)) if isinstance(axes, list | tuple) else str(axes)


def _spec(spec: tuple[str | tuple[str, ...] | None, ...]) -> str:
    entries = ("+".join(e) if isinstance(e, tuple) else e or "-" for e in spec)
    return " ".join(entries)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return " ".join(f"{key}={item}" for key, item in value.items()) or "none"
    return value
