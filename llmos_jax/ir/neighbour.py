"""Neighbour: the best plan one step away from the chosen one, or why there is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmos_jax.ir.plan import Candidate


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbour:
    """One change of what was asked or chosen, and what it would do."""

    change: str
    """What is changed, in words: `batch x2 (256)`, `remat full`, `v5p:4x4x8`."""
    best: Candidate | None = None
    """The fastest way with that change; None where nothing works."""
    reason: str = ""
    """Why nothing works."""

    def summary(self) -> dict[str, Any]:
        """Plain data for a script."""
        if self.best is None:
            return {"change": self.change, "reason": self.reason}
        found = self.best.predicted
        return {
            "change": self.change,
            "way": str(self.best.way),
            "step_s": found.step_s,
            "tokens_per_s": found.tokens_per_s,
            "peak_hbm_bytes": found.peak_hbm_bytes,
        }
