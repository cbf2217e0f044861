"""The run folder: what a run was asked, what was decided, what it has done so far."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmos_jax.checkpoint import CheckpointStore
from llmos_jax.config import RunConfig, to_toml
from llmos_jax.errors import ConfigError


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

    def last_saved(self) -> str:
        """A sentence that names the last good checkpoint."""
        steps = self.store.steps()
        if not steps:
            return "No checkpoint had been saved yet."
        return f"The last good checkpoint is {self.store.folder / str(steps[-1])}."


def open_folder(
    config: RunConfig, document: dict[str, Any], *, is_first: bool
) -> RunFolder:
    """Make or reopen `run.dir`; the first process writes config.toml and plan.json.

    Args:
        config: as asked, fully expanded.
        document: the plan.json of the run.
        is_first: whether this process writes.

    Raises:
        ConfigError: the folder cannot be made or written.
        CheckpointError: its checkpoints cannot be opened.
    """
    path = Path(config.run.dir).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        if is_first:
            (path / "config.toml").write_text(to_toml(config), encoding="utf-8")
            (path / "plan.json").write_text(json.dumps(document, indent=1) + "\n")
    except OSError as problem:
        raise ConfigError(
            f"run.dir = {path} cannot be written: {problem.strerror}. "
            "Choose another folder with --set run.dir=..."
        ) from None
    store = CheckpointStore(path / "checkpoints", keep=config.checkpoint.keep)
    steps = store.steps()
    return RunFolder(path=path, store=store, resume_step=steps[-1] if steps else 0)
