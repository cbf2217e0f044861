"""Examine a run's checkpoints: what they hold, and whether it is what was written."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from llmos_jax.checkpoint.find import Found, locate
from llmos_jax.checkpoint.seal import num_bytes
from llmos_jax.errors import CheckpointError


def inspect(name: str) -> dict[str, Any]:
    """What RUN, RUN/checkpoints or RUN/checkpoints/STEP holds, as plain figures.

    Every file of the step that is named (else of every step that is kept) is read and
    held against its checksum: `steps` says of each what is wrong with it, and `damaged`
    names it.

    Raises:
        CheckpointError: nothing there, or no committed checkpoint yet.
    """
    found = locate(name)
    kept = found.store.steps()
    names_a_step = Path(name).expanduser().absolute() == found.store.path(found.step)
    wanted = [found.step] if names_a_step else kept
    steps = [_verdict(found, step) for step in wanted]
    return {
        "checkpoint": str(found.store.path(found.step)),
        "steps_kept": kept,
        **_description(found),
        "steps": steps,
        "damaged": [one["step"] for one in steps if one["faults"]],
        "set_aside": sorted(
            path.name for path in found.store.folder.glob("*.damaged*")
        ),
    }


def _verdict(found: Found, step: int) -> dict[str, Any]:
    store = found.store
    return {
        "step": step,
        "sealed": store.is_sealed(step),
        "bytes": num_bytes(store.path(step)),
        "faults": store.faults(step),
    }


def _description(found: Found) -> dict[str, Any]:
    """What the checkpoint says of itself, as far as it can be read."""
    store, step = found
    figures: dict[str, Any] = {"bytes": num_bytes(store.path(step))}
    try:
        manifest = store.manifest(step)
        figures |= {
            "model": manifest.model.name,
            "step": manifest.step,
            "mesh": {axis: n for axis, n in manifest.mesh.items() if n > 1},
            "plan_fingerprint": manifest.plan_fingerprint,
            "data": manifest.data,
            "metrics": manifest.metrics,
            "made_by": manifest.made_by,
        }
        params = store.arrays(step, "params")
        figures["params"] = sum(one.size for one in params.values())
        figures["dtypes"] = dict(Counter(one.dtype for one in params.values()))
        figures["arrays"] = {
            path: [one.dtype, list(one.shape)] for path, one in params.items()
        }
        if (store.path(step) / "optimizer").is_dir():
            figures["optimizer_arrays"] = len(store.arrays(step, "optimizer"))
    except CheckpointError:  # its faults are told by name
        pass
    return figures
