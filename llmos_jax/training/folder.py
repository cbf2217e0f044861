"""The run folder: what a run was asked, what was decided, what it has done so far."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmos_jax.checkpoint import (
    CheckpointStore,
    check_same_model,
    check_same_replicas,
)
from llmos_jax.config import RunConfig, to_toml
from llmos_jax.errors import ConfigError
from llmos_jax.ir import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFolder:
    """Paths of one run and its open checkpoint store."""

    path: Path
    store: CheckpointStore
    resume_step: int
    """The latest committed step; 0 for a new run."""

    @property
    def report_path(self) -> Path:
        """Where the figures of the finished run lie."""
        return self.path / "report.json"

    def finished_report(self, steps: int) -> dict[str, Any] | None:
        """The report of a run that has already done `steps`, if it wrote one."""
        if self.resume_step < steps or not self.report_path.is_file():
            return None
        report: dict[str, Any] = json.loads(self.report_path.read_text())
        return report if report.get("steps", 0) >= steps else None

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
        self.store.wait()
        steps = self.store.steps()
        if not steps:
            return "No checkpoint had been saved yet."
        return f"The last good checkpoint is {self.store.folder / str(steps[-1])}."


def open_folder(config: RunConfig) -> RunFolder:
    """Make or reopen `run.dir`.

    Raises:
        ConfigError: the folder cannot be made.
        CheckpointError: its checkpoints cannot be opened.
    """
    path = Path(config.run.dir).expanduser()
    with _writable(path):
        path.mkdir(parents=True, exist_ok=True)
    store = CheckpointStore(path / "checkpoints", keep=config.checkpoint.keep)
    steps = store.steps()
    return RunFolder(path=path, store=store, resume_step=steps[-1] if steps else 0)


@contextlib.contextmanager
def _writable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        raise ConfigError(
            f"run.dir = {path} cannot be written: {problem.strerror}. "
            "Choose another folder with --set run.dir=..."
        ) from None
