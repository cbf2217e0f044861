"""Find the checkpoint a person means: a run folder, its checkpoints/, or one step."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from llmos_jax.checkpoint.store import CheckpointStore
from llmos_jax.errors import CheckpointError


class Found(NamedTuple):
    """An open store and the step that was meant."""

    store: CheckpointStore
    step: int


def find_checkpoint(name: str) -> Found:
    """Open RUN, RUN/checkpoints or RUN/checkpoints/STEP; the latest step by default.

    Raises:
        CheckpointError: nothing there, or no committed checkpoint yet.
    """
    path = Path(name).expanduser()
    if not path.exists():
        raise CheckpointError(
            f"{name} does not exist. Give a run folder (as in `run.dir`) or a "
            "checkpoint in it; `python -m llmos_jax.train` makes one."
        )
    if path.name.isdigit() and (path / "manifest").is_dir():
        return Found(CheckpointStore(path.parent, read_only=True), int(path.name))
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if not folder.is_dir():
        raise CheckpointError(f"{name} is a file, not a run folder or a checkpoint.")
    store = CheckpointStore(folder, read_only=True)
    steps = store.steps()
    if not steps:
        raise CheckpointError(
            f"{name} holds no finished checkpoint. Let the run reach "
            "`checkpoint.every` steps, or name another folder."
        )
    return Found(store, steps[-1])
