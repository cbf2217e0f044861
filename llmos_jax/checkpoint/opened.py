"""Open a checkpoint for use: its model, its tokenizer, and its parameters on demand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from llmos_jax.checkpoint.find import Found, find_checkpoint
from llmos_jax.checkpoint.manifest import Manifest
from llmos_jax.checkpoint.retention import require_space
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

    def params(
        self, shardings: dict[str, Any] | None = None, *, dtype: str | None = None
    ) -> Params:
        """Read parameters onto `shardings` (by path; only those), or all of them onto
        the first device; in `dtype`, or as they are stored."""
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        stored = self.store.param_dtypes(self.step) if dtype is None else {}
        wanted = {
            row.path: jax.ShapeDtypeStruct(
                row.shape,
                stored.get(row.path, row.dtype) if dtype is None else dtype,
                sharding=here if shardings is None else shardings[row.path],
            )
            for row in self.skeleton.table.rows
            if shardings is None or row.path in shardings
        }
        params: Params = self.store.restore(self.step, params=wanted)["params"]
        return params


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


def save_model(
    folder: str,
    skeleton: Skeleton,
    params: Params,
    tokenizer: Tokenizer,
    made_by: dict[str, str],
) -> None:
    """Write a model that no run of ours trained as a checkpoint of step 0.

    Args:
        folder: to be made; it may exist if it is empty.
        skeleton: the model.
        params: by path, in the dtypes to be stored.
        tokenizer: goes along.
        made_by: program -> version, and what it was made from.

    Raises:
        ConfigError: the folder is in use.
        CheckpointError: it cannot be written; no space, for example.
    """
    path = new_folder(folder)
    require_space(_nearest(path), params)
    store = CheckpointStore(path / "checkpoints")
    manifest = Manifest(
        step=0,
        model=skeleton.spec,
        plan_fingerprint="",
        mesh={},
        data={},
        made_by=made_by,
    )
    store.save(manifest, params, None, tokenizer.to_json())
    store.close()


def new_folder(folder: str) -> Path:
    """Return the path of a folder that a model may be written to.

    Raises:
        ConfigError: it is in use.
    """
    path = Path(folder).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(
            f"{path} exists and is not empty; a model is written to a new folder."
        )
    return path


def _nearest(path: Path) -> Path:
    """The folder that is there already."""
    return next(one for one in (path, *path.absolute().parents) if one.is_dir())


def _tokenizer(found: Found) -> Tokenizer:
    try:
        return Tokenizer.from_json(found.store.tokenizer_json(found.step))
    except ConfigError as problem:
        raise CheckpointError(
            f"checkpoint {found.store.folder / str(found.step)} cannot be read: its "
            f"tokenizer is {problem} Name an earlier step of the same run."
        ) from None
