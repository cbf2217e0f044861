"""Open a checkpoint for use: its model, its tokenizer, and its parameters on demand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llmos_jax.checkpoint.find import Found, find_checkpoint
from llmos_jax.checkpoint.store import CheckpointStore
from llmos_jax.data import Tokenizer
from llmos_jax.errors import CheckpointError, ConfigError
from llmos_jax.models import Params, Skeleton, skeleton


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedCheckpoint:
    """A checkpoint that says what it is; arrays are read when asked for."""

    store: CheckpointStore
    step: int
    skeleton: Skeleton
    tokenizer: Tokenizer

    @property
    def config_path(self) -> Path | None:
        """The config of the run it belongs to, if it still lies in its run folder."""
        path = self.store.folder.parent / "config.toml"
        return path if path.is_file() else None

    def params(self, shardings: dict[str, Any] | None = None) -> Params:
        """Read the parameters onto `shardings` (by path), or onto the first device."""
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        wanted = {
            row.path: jax.ShapeDtypeStruct(
                row.shape,
                row.dtype,
                sharding=here if shardings is None else shardings[row.path],
            )
            for row in self.skeleton.table.rows
        }
        params: Params = self.store.restore(self.step, params=wanted)["params"]
        return params

    def prompt_ids(self, prompt: str) -> np.ndarray:
        """Token ids of a prompt; an empty one begins a new document."""
        ids = self.tokenizer.encode(prompt)
        return ids if ids.size else np.array([self.tokenizer.eos_id], np.uint32)


def open_checkpoint(name: str) -> OpenedCheckpoint:
    """Open RUN, RUN/checkpoints or RUN/checkpoints/STEP.

    Raises:
        CheckpointError: nothing there, or damaged.
    """
    found = find_checkpoint(name)
    manifest = found.store.manifest(found.step)
    return OpenedCheckpoint(
        store=found.store,
        step=found.step,
        skeleton=skeleton(manifest.model),
        tokenizer=_tokenizer(found),
    )


def _tokenizer(found: Found) -> Tokenizer:
    try:
        return Tokenizer.from_json(found.store.tokenizer_json(found.step))
    except ConfigError as problem:
        raise CheckpointError(
            f"checkpoint {found.store.folder / str(found.step)} cannot be read: its "
            f"tokenizer is {problem} Name an earlier step of the same run."
        ) from None


def inspect(name: str) -> dict[str, Any]:
    """What a run folder or checkpoint holds, as plain figures."""
    opened = open_checkpoint(name)
    manifest = opened.store.manifest(opened.step)
    folder = opened.store.folder / str(opened.step)
    return {
        "checkpoint": str(folder),
        "steps_kept": opened.store.steps(),
        "model": manifest.model.name,
        "params": opened.skeleton.table.num_params,
        "mesh": {axis: size for axis, size in manifest.mesh.items() if size > 1},
        "plan_fingerprint": manifest.plan_fingerprint,
        "bytes": sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()),
        **manifest.metrics,
        "made_by": manifest.made_by,
    }
