"""Retention: which checkpoints of a run are kept, and the room they take."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    EveryNSteps,
    LatestN,
    PolicyCheckpointInfo,
    PreservationContext,
    PreservationPolicy,
)

from llmos_jax.errors import CheckpointError
from llmos_jax.units import format_bytes

Figures = Callable[[int], dict[str, float]]
"""A step -> what was recorded of it."""


class _Lowest:
    """Keeps the checkpoint with the lowest figure.

    Orbax's BestN reads figures from files of its own in every checkpoint, and opens no
    folder in which one of them is damaged; ours are in the manifest already.
    """

    def __init__(self, name: str, figures: Figures):
        self._name, self._figures = name, figures

    def should_preserve(
        self,
        checkpoints: Sequence[PolicyCheckpointInfo],
        *,
        context: PreservationContext,
    ) -> Sequence[bool]:
        """Which to keep: one, or none where no step has the figure."""
        ranks = [self._figures(one.step).get(self._name) for one in checkpoints]
        lowest = min((x for x in ranks if x is not None), default=None)
        first = None if lowest is None else ranks.index(lowest)
        return [index == first for index in range(len(ranks))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """A checkpoint stays while one of these wants it."""

    keep: int | None = None
    """The latest so many; None: all."""
    keep_every: int | None = None
    """Those at multiples of so many steps."""
    best: str | None = None
    """The one in which this figure was lowest."""

    def policy(self, figures: Figures) -> PreservationPolicy:
        """The same in Orbax's words; `figures` of a step says how good it is."""
        policies: list[PreservationPolicy] = [LatestN(self.keep)]
        if self.keep_every is not None:
            policies.append(EveryNSteps(self.keep_every))
        if self.best is not None:
            policies.append(_Lowest(self.best, figures))
        return AnyPreservationPolicy(policies)

    def copies(self, steps: int, every: int) -> int:
        """Checkpoints that lie there at once, at most, when `steps` are done and one is
        saved `every` so many; the one being written among them."""
        kept = (self.keep or 0) + (self.best is not None)
        if self.keep_every is not None:
            kept += steps // math.lcm(every, self.keep_every)
        return kept + 1

    def __str__(self) -> str:
        """What is kept, in the words of a config."""
        asked = {
            "checkpoint.keep": self.keep,
            "checkpoint.keep_every": self.keep_every,
            "checkpoint.best": self.best,
        }
        return ", ".join(f"{k} = {v}" for k, v in asked.items() if v is not None)


def require_space(
    folder: Path,
    state: Any,
    retention: Retention | None = None,
    *,
    steps: int = 0,
    every: int = 1,
) -> None:
    """Refuse to start where the checkpoints of this process will not fit.

    Args:
        folder: where they will lie; what it holds already counts as free, but of a
            model alone (`retention` is None).
        state: arrays, or their shapes.
        retention: what is kept beside the checkpoint being written.
        steps: of the whole run.
        every: steps from one checkpoint to the next.

    Raises:
        CheckpointError: with the bytes needed and free.
    """
    copies = 1 if retention is None else retention.copies(steps, every)
    leaves = jax.tree.leaves(state)
    needed = copies * sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    held = 0
    if retention is not None:
        held = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free
    if free + held < needed:
        kept = "" if retention is None else f"{retention}, and "
        raise CheckpointError(
            f"no disk space for checkpoints in {folder}: {format_bytes(needed)} wanted "
            f"({copies} of {format_bytes(needed // copies)}: {kept}one being written), "
            f"{format_bytes(free + held)} available. Free some, choose another "
            "run.dir, or keep fewer."
        )
