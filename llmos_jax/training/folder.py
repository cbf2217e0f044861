"""The run folder: what a run was asked, what was decided, what it has done so far."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import jax
import numpy as np

from llmos_jax.checkpoint import (
    CheckpointStore,
    Mirror,
    Retention,
    check_same_model,
    check_same_replicas,
    checkpoint_folder,
)
from llmos_jax.config import RunConfig, to_toml
from llmos_jax.errors import CheckpointError, ConfigError, LlmosError, StoreError
from llmos_jax.ir import ModelSpec
from llmos_jax.lowering import is_first_process
from llmos_jax.stores import is_remote
from llmos_jax.telemetry import log
from llmos_jax.training.hold import Hold
from llmos_jax.training.saving import last_whole
from llmos_jax.training.watch import StopSignal


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFolder:
    """Paths of one run and its open checkpoint store, held against other runs.

    Use it in a `with`: while entered, SIGTERM ends the run in time.
    """

    path: Path
    store: CheckpointStore
    resume_step: int
    """The latest good step; 0 for a new run."""
    stop: StopSignal
    say: Callable[[str], None]
    """Writes a line, in the first process."""
    holds: ExitStack
    mirror: Mirror | None = None
    """Of an object store, in the first process."""

    def __enter__(self) -> RunFolder:
        """Take signals."""
        self.stop.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finish what is being saved, and let go of the folder."""
        try:
            self.store.close()
            if self.mirror is not None and isinstance(error, LlmosError):
                with contextlib.suppress(StoreError):  # the run's own error is said
                    self.mirror.wait()
        except CheckpointError:
            if error is None:
                raise
        finally:
            self.stop.__exit__(kind, error, trace)
            self.holds.close()

    @property
    def report_path(self) -> Path:
        """Where the figures of the finished run lie."""
        return self.path / "report.json"

    def finished_report(self, steps: int) -> dict[str, Any] | None:
        """The report of a run that has already done `steps`, or all that it would gain
        by, if it wrote one."""
        if not self.resume_step or not self.report_path.is_file():
            return None
        report: dict[str, Any] = json.loads(self.report_path.read_text())
        if report.get("stopped_by") == "settled":
            steps = min(steps, self.resume_step)
        done = min(self.resume_step, report.get("steps", 0))
        return report if done >= steps else None

    def record(self, config: RunConfig, document: dict[str, Any]) -> None:
        """Write config.toml (as asked, fully expanded) and plan.json.

        Raises:
            ConfigError: the folder cannot be written.
        """
        with _writable(self.path):
            (self.path / "config.toml").write_text(to_toml(config), encoding="utf-8")
            (self.path / "plan.json").write_text(json.dumps(document, indent=1) + "\n")

    def check_model(self, spec: ModelSpec) -> None:
        """Refuse, before anything is written, to go on from another model's run.

        Raises:
            PlanMismatch: naming the fields that differ.
        """
        if self.resume_step:
            manifest = self.store.manifest(self.resume_step)
            check_same_model(manifest, spec, str(self.store.folder))

    def check_replicas(self, wanted: int) -> None:
        """The same for a run whose replicas learn alone, if `wanted` many do not.

        Raises:
            PlanMismatch: naming sync.strategy.
        """
        if self.resume_step:
            manifest = self.store.manifest(self.resume_step)
            check_same_replicas(manifest, wanted, str(self.store.folder))

    def last_saved(self) -> str:
        """A sentence that names the last good checkpoint, once it is whole on disk."""
        with contextlib.suppress(CheckpointError):  # an older one is named then
            self.store.wait()
        steps = self.store.steps()
        if not steps:
            return "No checkpoint had been saved yet."
        return f"The last good checkpoint is {self.store.folder / str(steps[-1])}."


def open_folder(config: RunConfig) -> RunFolder:
    """Make or reopen `run.dir`, for this run alone, and find where to go on.

    Raises:
        ConfigError: the folder cannot be made, or another run holds it.
        CheckpointError: its checkpoints cannot be opened; the latest is damaged.
    """
    path = Path(config.run.dir).expanduser()
    is_first = is_first_process()
    say = partial(log, enabled=is_first)
    with ExitStack() as holds:
        with _writable(path):
            path.mkdir(parents=True, exist_ok=True)
            where = checkpoint_folder(path, config.checkpoint.dir)
            where.mkdir(parents=True, exist_ok=True)
            for folder in [path] + [where] * (config.checkpoint.dir is not None):
                if is_first:
                    holds.callback(Hold(folder, say).release)
        mirror = _mirror(config, where, say)
        store = CheckpointStore(where, retention=retention_of(config))
        resume_step = _resume_step(store, config.checkpoint.on_damage, say)
        stop = StopSignal(
            enabled=jax.process_count() == 1,
            grace_s=config.checkpoint.grace_s,
            nothing_lost=lambda: _nothing_lost(path, where),
        )
        return RunFolder(
            path=path,
            store=store,
            resume_step=resume_step,
            stop=stop,
            say=say,
            holds=holds.pop_all(),
            mirror=mirror,
        )


def retention_of(config: RunConfig) -> Retention:
    """Which checkpoints a config keeps."""
    asked = config.checkpoint
    return Retention(
        keep=asked.keep, keep_every=asked.keep_every, best=ranked_by(config)
    )


def ranked_by(config: RunConfig) -> str | None:
    """The figure by which checkpoints are ranked, the lowest first; None: they are
    not."""
    waits = config.train.patience is not None
    return config.checkpoint.best or ("val_loss" if waits else None)


def _mirror(
    config: RunConfig, where: Path, say: Callable[[str], None]
) -> Mirror | None:
    """Open the object store of `checkpoint.dir`, by the first process for all; what is
    newer there than here is fetched.

    Raises:
        CheckpointError: the newest checkpoint is damaged there.
        StoreError: the store cannot be used.
    """
    url = config.checkpoint.dir
    if url is None or not is_remote(url):
        return None
    mirror = None
    if is_first_process():
        mirror = Mirror(url, where, retention=retention_of(config), say=say)
        mirror.catch_up()
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("checkpoints fetched")
    return mirror


def _resume_step(
    store: CheckpointStore,
    on_damage: Literal["refuse", "previous"],
    say: Callable[[str], None],
) -> int:
    """The step to go on from, the same for all processes: the first one looks.

    Raises:
        CheckpointError: the latest checkpoint is damaged, and the config does not
            allow an earlier one; or none is whole.
    """
    step = _good_step(store, on_damage, say) if is_first_process() else 0
    if jax.process_count() == 1:
        return step
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(step)))


def _good_step(
    store: CheckpointStore,
    on_damage: Literal["refuse", "previous"],
    say: Callable[[str], None],
) -> int:
    steps = store.steps()
    bad: list[tuple[int, str]] = []
    for step in reversed(steps):
        found = store.faults(step)
        if not found:
            _set_aside(store, bad, step, say)
            return step
        bad.append((step, found[0]))
        if on_damage == "refuse":
            break
    if not bad:
        return 0
    step, fault = bad[0]
    if len(bad) == len(steps) > 0 and (on_damage == "previous" or len(steps) == 1):
        remedy = "No other is whole: start anew with --set run.dir=..."
    else:
        remedy = (
            "Set checkpoint.on_damage=previous to go on from the newest whole one, or "
            "delete that folder."
        )
    raise CheckpointError(
        f"checkpoint {store.path(step)} is damaged: {fault.rstrip('.')}. {remedy}"
    )


def _set_aside(
    store: CheckpointStore,
    bad: list[tuple[int, str]],
    good: int,
    say: Callable[[str], None],
) -> None:
    for step, fault in bad:
        aside = store.set_aside(step)
        say(
            f"warning: checkpoint {step} is damaged ({fault.rstrip('.')}); it is set "
            f"aside as {aside}, and the run goes on from step {good}."
        )


def _nothing_lost(path: Path, checkpoints: Path) -> str:
    last = last_whole(checkpoints)
    if last is None:
        return f"Nothing had been trained yet; run again on {path} to begin."
    return f"Everything up to step {last} is saved; run again on {path} to go on."


@contextlib.contextmanager
def _writable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        raise ConfigError(
            f"run.dir = {path} cannot be written: {problem.strerror}. "
            "Choose another folder with --set run.dir=..."
        ) from None
