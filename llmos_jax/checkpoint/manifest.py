"""Manifest: what a checkpoint is, in a page of JSON beside its arrays.

With the tokenizer stored next to it, a checkpoint needs no config to be read,
continued, evaluated or to speak.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llmos_jax.errors import PlanMismatch
from llmos_jax.ir import Artefact, ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest(Artefact):
    """Step, model, plan, data position and figures of one checkpoint."""

    step: int
    model: ModelSpec
    plan_fingerprint: str
    mesh: dict[str, int]
    data: dict[str, Any]
    """Position in the training data, as `TrainBatches.get_state` gave it."""
    metrics: dict[str, float] = field(default_factory=dict)
    made_by: dict[str, str] = field(default_factory=dict)
    local_replicas: int = 0
    """Replicas that learn alone, whose own parameters are here too; 0: there are none
    (sync.strategy)."""


_NAMES_ONLY = {"name", "source", "max_seq_len"}


def check_same_model(manifest: Manifest, spec: ModelSpec, where: str) -> None:
    """Refuse a checkpoint whose arrays or mathematics differ from `spec`.

    Raises:
        PlanMismatch: naming every field that differs.
    """
    saved, wanted = manifest.model.to_json(), spec.to_json()
    differing = [
        f"{key} {saved[key]} against {wanted[key]}"
        for key in wanted
        if key not in _NAMES_ONLY and saved[key] != wanted[key]
    ]
    if differing:
        raise PlanMismatch(
            f"{where} holds model {manifest.model.name}, and the config asks for "
            f"{spec.name}: {', '.join(differing)}. "
            "Name the same model, or another folder with --set run.dir=..."
        )


def check_same_replicas(manifest: Manifest, wanted: int, where: str) -> None:
    """Refuse a checkpoint whose replicas learn alone, if `wanted` many do not.

    Raises:
        PlanMismatch: naming sync.strategy and what to set.
    """
    saved = manifest.local_replicas
    if saved == wanted:
        return
    same = f"local and plan.mesh.data={saved}" if saved else "every_step"
    raise PlanMismatch(
        f"{where} was trained with {_strategy(saved)}, and the config asks for "
        f"{_strategy(wanted)}. Set sync.strategy={same} to go on, or start afresh in "
        "another folder with --set run.dir=..."
    )


def _strategy(replicas: int) -> str:
    alone = f"local over {replicas} replicas" if replicas else "every_step"
    return f"sync.strategy = {alone}"
