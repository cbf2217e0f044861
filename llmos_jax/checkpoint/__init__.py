"""Save and restore runs by path, with Orbax, onto any mesh."""

from llmos_jax.checkpoint.examine import inspect
from llmos_jax.checkpoint.explain import damaged
from llmos_jax.checkpoint.find import (
    Found,
    checkpoint_folder,
    find_checkpoint,
)
from llmos_jax.checkpoint.manifest import (
    Manifest,
    check_same_model,
    check_same_replicas,
)
from llmos_jax.checkpoint.opened import (
    OpenedCheckpoint,
    new_folder,
    open_checkpoint,
    save_model,
)
from llmos_jax.checkpoint.remote import Mirror, bring
from llmos_jax.checkpoint.retention import Retention, require_space
from llmos_jax.checkpoint.seal import seal
from llmos_jax.checkpoint.store import CheckpointStore

__all__ = [
    "CheckpointStore",
    "Found",
    "Manifest",
    "Mirror",
    "OpenedCheckpoint",
    "Retention",
    "bring",
    "check_same_model",
    "check_same_replicas",
    "checkpoint_folder",
    "damaged",
    "find_checkpoint",
    "inspect",
    "new_folder",
    "open_checkpoint",
    "require_space",
    "save_model",
    "seal",
]
