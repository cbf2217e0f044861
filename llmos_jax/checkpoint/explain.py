"""Turn what Orbax, TensorStore and the disk say into one line."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from llmos_jax.errors import CheckpointError, LlmosError


def damaged(path: Path, found: list[str]) -> CheckpointError:
    """The error for a checkpoint with these faults."""
    more = f" ({len(found) - 1} more)" if len(found) > 1 else ""
    return CheckpointError(
        f"checkpoint {path} cannot be read: {found[0]}{more}. Name an earlier step of "
        f"the same run; `python -m llmos_jax.doctor {path.parent}` says which is whole."
    )


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn whatever Orbax and TensorStore raise into one line."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as problem:
        text = str(problem)
        if isinstance(problem, LlmosError):
            reason = text.rstrip(".")
        elif getattr(problem, "errno", None) == errno.ENOSPC or "No space left" in text:
            reason = "the disk is full"
        elif isinstance(problem, OSError) and problem.strerror:
            reason = problem.strerror
        else:
            first = (text.splitlines() or [""])[0][:300]
            reason = f"{type(problem).__name__}: {first}"
        raise CheckpointError(
            f"{what}: {reason}. Checkpoints committed earlier are untouched."
        ) from problem
