"""Find the checkpoint a person means: a run folder, its checkpoints/, or one step."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import NamedTuple

from llmos_jax.checkpoint.remote import bring
from llmos_jax.checkpoint.seal import SEAL
from llmos_jax.checkpoint.store import CheckpointStore
from llmos_jax.errors import CheckpointError
from llmos_jax.stores import is_remote

_MARKS = ("manifest", "params", SEAL)
"""Of which a checkpoint has one, however damaged it is."""


class Found(NamedTuple):
    """An open store and the step that was meant."""

    store: CheckpointStore
    step: int


def checkpoint_folder(run: Path, elsewhere: str | None) -> Path:
    """Where the checkpoints of a run lie: in it, or in the folder that `checkpoint.dir`
    names. An object store mirrors those in the run.

    Raises:
        CheckpointError: `checkpoint.dir` names what this release cannot write to.
    """
    if elsewhere is None or is_remote(elsewhere):
        return run / "checkpoints"
    if "://" in elsewhere:
        raise CheckpointError(
            f"checkpoint.dir = {elsewhere}: checkpoints are written to local folders, "
            "s3:// and gs://. Name one of these."
        )
    return Path(elsewhere).expanduser()


def checkpoints_of(path: Path) -> Path:
    """The folder of checkpoints that `path` means: of a run that lies there, by what
    its config.toml says; else itself."""
    if (path / "checkpoints").is_dir():
        return path / "checkpoints"
    try:
        config = tomllib.loads((path / "config.toml").read_text(encoding="utf-8"))
        elsewhere = config["checkpoint"]["dir"]
    except (OSError, ValueError, KeyError, TypeError):
        return path
    return checkpoint_folder(path, str(elsewhere))


def find_checkpoint(name: str) -> Found:
    """Open RUN, RUN/checkpoints or RUN/checkpoints/STEP; the latest step by default, or
    the best one of a run with `train.patience`.

    Raises:
        CheckpointError: nothing there, no committed checkpoint yet, or one whose files
            are missing or not of the sizes that were written.
    """
    found = locate(name)
    found.store.check_sizes(found.step)
    return found


def locate(name: str) -> Found:
    """The same, whatever state the checkpoint is in.

    Raises:
        CheckpointError: nothing there, or no committed checkpoint yet.
    """
    path = bring(name) if is_remote(name) else Path(name).expanduser()
    if not path.exists():
        raise CheckpointError(
            f"{name} does not exist. Give a run folder (as in `run.dir`) or a "
            "checkpoint in it; `python -m llmos_jax.train` makes one."
        )
    if path.name.isdigit() and any((path / one).exists() for one in _MARKS):
        return Found(CheckpointStore(path.parent, read_only=True), int(path.name))
    folder = checkpoints_of(path)
    if not folder.is_dir():
        raise CheckpointError(f"{name} is a file, not a run folder or a checkpoint.")
    store = CheckpointStore(folder, read_only=True)
    steps = store.steps()
    if not steps:
        raise CheckpointError(
            f"{name} holds no finished checkpoint. Let the run reach "
            "`checkpoint.every` steps, or name another folder."
        )
    best = store.best(_best_of(path), steps) if path != folder else None
    return Found(store, steps[-1] if best is None else best)


def _best_of(run: Path) -> str | None:
    """The figure by which the model of a run is chosen; None: it is the latest."""
    try:
        config = tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))
        if config["train"].get("patience") is None:
            return None
        return str(config["checkpoint"].get("best") or "val_loss")
    except (OSError, ValueError, KeyError, TypeError):
        return None
