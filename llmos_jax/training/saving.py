"""Save while training: a save that fails costs a warning, the last one the run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import jax

from llmos_jax.checkpoint import CheckpointStore, Mirror
from llmos_jax.errors import CheckpointError, ConfigError, did_you_mean
from llmos_jax.units import format_seconds

VALIDATION_FIGURES = ("val_loss", "val_bits_per_byte", "val_error")
"""What an evaluation on the way adds to a step's figures."""


class Saver:
    """What has come of the saves of a run."""

    def __init__(
        self,
        store: CheckpointStore,
        say: Callable[[str], None],
        grace_s: float,
        mirror: Mirror | None = None,
    ):
        """Args:
        store: where to.
        say: writes a line.
        grace_s: seconds that a machine gives between its notice and its end.
        mirror: sends what was saved to an object store; its errors end the run.
        """
        self._mirror = mirror
        self._store, self._say, self._grace_s = store, say, grace_s
        self._reached: int | None = None
        self._step: int | None = None
        self._problem: CheckpointError | None = None

    def save(self, step: int, start: Callable[[], None]) -> None:
        """Start a save of `step`; what became of the one before is said first.

        Raises:
            CheckpointError: it failed at once, and other processes wait for this one.
        """
        self._settle()
        self._step, self._problem = step, None
        try:
            start()
        except CheckpointError as problem:
            self._failed(problem)

    def look(self, step: int) -> None:
        """Note that the run is at `step`; say what became of the last save, once that
        is known. Costs next to nothing at every step."""
        self._reached = step
        if self._step is not None and not self._store.is_saving:
            self._settle()

    def finish(self) -> None:
        """Wait for the last save.

        Raises:
            CheckpointError: it failed.
        """
        self._store.wait()
        if self._problem is not None:
            raise self._problem
        self._tell_unsealed()
        self._send()
        if self._mirror is not None:
            self._mirror.wait()

    def lost(self) -> str | None:
        """What is lost if the process ends now; None: nothing. Any thread may ask."""
        last = last_whole(self._store.folder)
        if self._mirror is not None:
            last = self._mirror.latest
        if self._reached is None or last == self._reached:
            return None
        kept = "there is no checkpoint yet"
        if last is not None:
            kept = f"the last whole checkpoint is step {last}"
        took = self._store.save_s
        typical = "" if took is None else f" A save takes {format_seconds(took)} here."
        return (
            f"SIGTERM: step {self._reached} was not saved in time (checkpoint.grace_s "
            f"= {self._grace_s:g}); {kept}, and a run on the same folder goes on from "
            f"there.{typical}"
        )

    def _settle(self) -> None:
        try:
            self._store.wait()
        except CheckpointError as problem:
            self._failed(problem)
        self._tell_unsealed()
        self._send()
        self._step = None

    def _send(self) -> None:
        step = self._step
        if self._mirror is None or step is None or not self._store.is_committed(step):
            return
        self._mirror.push(step)

    def _failed(self, problem: CheckpointError) -> None:
        if jax.process_count() > 1:  # the others wait for this one
            raise problem
        self._problem = problem
        self._say(
            f"warning: step {self._step} is not saved, training goes on: {problem}"
        )

    def _tell_unsealed(self) -> None:
        while self._store.unsealed:
            self._say(f"warning: {self._store.unsealed.pop(0)}")


def last_whole(folder: Path) -> int | None:
    """The latest committed step; asks the disk alone, so that any thread may."""
    names = (path.name for path in folder.glob("*"))
    return max((int(name) for name in names if name.isdigit()), default=None)


def check_best(best: str | None, eval_every: int, patience: int | None = None) -> None:
    """Refuse to rank checkpoints by what no step will have.

    Raises:
        ConfigError: with the key to set.
    """
    if patience is not None and (patience < 1 or not eval_every):
        raise ConfigError(
            f"train.patience = {patience} counts evaluations, at least 1, on the way; "
            f"train.eval_every = {eval_every}. Set both, and checkpoint.every to "
            "train.eval_every."
        )
    if best in VALIDATION_FIGURES and not eval_every:
        raise ConfigError(
            f"checkpoint.best = {best}, and train.eval_every = 0: nothing is evaluated "
            "on the way. Set train.eval_every, to a divisor of checkpoint.every best."
        )


def missing_best(best: str | None, known: Iterable[str]) -> str | None:
    """A warning where checkpoints are ranked by a figure that is not recorded."""
    names = {*known}
    if best is None or best in names or best in VALIDATION_FIGURES:
        return None
    return (
        f"warning: checkpoint.best = {best} is no figure of this run, so none is kept "
        f"for it.{did_you_mean(best, [*names, *VALIDATION_FIGURES])}"
    )
