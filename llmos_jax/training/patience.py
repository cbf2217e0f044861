"""When to stop a run that learns no more: no evaluation of late was the best."""

from __future__ import annotations

from pathlib import Path

from llmos_jax.telemetry import read_metrics


class Patience:
    """Counts evaluations since the lowest figure; goes on where a stopped run was."""

    def __init__(self, name: str, limit: int, folder: Path, resume_step: int):
        """Read what was evaluated before.

        Args:
            name: of the figure that should fall.
            limit: evaluations in a row without a lower one.
            folder: the run's, with metrics.jsonl.
            resume_step: rows after it are of no account.
        """
        self._name, self._limit = name, limit
        self._lowest, self._since = float("inf"), 0
        for row in read_metrics(folder / "metrics.jsonl"):
            if row["step"] <= resume_step and row.get(name) is not None:
                self.told(row)

    def told(self, figures: dict[str, float]) -> bool:
        """Take the figures of an evaluation; return whether it is enough."""
        value = figures.get(self._name)
        if value is None:
            return False
        self._since = 0 if value < self._lowest else self._since + 1
        self._lowest = min(self._lowest, value)
        return self._since >= self._limit
