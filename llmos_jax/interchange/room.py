"""Make sure of a place before a model is written there, and explain what goes wrong."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from llmos_jax.errors import CheckpointError, ConfigError
from llmos_jax.units import format_bytes


def require_room(path: Path, wanted: int) -> None:
    """Refuse a place that is in use, or a disk with less than `wanted` bytes free.

    Raises:
        ConfigError: a file is there, or a folder that is not empty.
        CheckpointError: with the bytes wanted and available.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        what = "and is not empty; a model is written to a new folder."
        raise ConfigError(
            f"{path} exists {what}"
            if path.is_dir()
            else f"{path} exists; a model is written to a new file."
        )
    parent = next(one for one in path.absolute().parents if one.exists())
    free = shutil.disk_usage(parent).free
    if free < wanted:
        raise CheckpointError(
            f"no disk space for {path}: {format_bytes(wanted)} wanted, "
            f"{format_bytes(free)} available."
        )


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what the system says while a place is written into one line."""
    try:
        yield
    except OSError as problem:
        raise CheckpointError(
            f"{path} cannot be written: {problem.strerror}. Nothing is left of it."
        ) from None
