"""Save and restore runs by path, with Orbax, onto any mesh."""

from llmos_jax.checkpoint.find import Found, find_checkpoint
from llmos_jax.checkpoint.manifest import (
    Manifest,
    check_same_model,
    check_same_replicas,
)
from llmos_jax.checkpoint.opened import (
    OpenedCheckpoint,
    inspect,
    new_folder,
    open_checkpoint,
    save_model,
)
from llmos_jax.checkpoint.store import CheckpointStore, require_space

__all__ = [
    "CheckpointStore",
    "Found",
    "Manifest",
    "OpenedCheckpoint",
    "check_same_model",
    "check_same_replicas",
    "find_checkpoint",
    "inspect",
    "new_folder",
    "open_checkpoint",
    "require_space",
    "save_model",
]
