"""Front: one job on many slices, and the slices that no other beats.

A slice is beaten when another is no worse in step time, in cost and in headroom, and
better in one of them. Slices of chips with no price have no cost: they are compared
with slices of their own chip, where any price gives the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmos_jax.ir.plan import Candidate
from llmos_jax.ir.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """What an hour of one chip costs, and who says so."""

    usd_per_chip_hour: dict[str, float]
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """One machine with the fastest plan on it."""

    topology: str
    chip: str
    chips: int
    slices: int
    hbm_bytes_per_device: float
    best: Candidate
    usd_per_hour: float | None = None
    """Of all its chips; None where the chip has no price."""

    @property
    def headroom(self) -> float:
        """Share of a device's memory that the plan leaves free."""
        return 1 - self.best.predicted.peak_hbm_bytes / self.hbm_bytes_per_device

    @property
    def chip_hours_per_million_tokens(self) -> float:
        """Chip-hours that a million tokens take."""
        return self.chips / 3600 * 1e6 / self.best.predicted.tokens_per_s

    @property
    def usd_per_million_tokens(self) -> float | None:
        """What a million tokens cost."""
        if self.usd_per_hour is None:
            return None
        return self.usd_per_hour / 3600 * 1e6 / self.best.predicted.tokens_per_s

    def summary(self) -> dict[str, Any]:
        """Plain data for a script."""
        way, found = self.best.way, self.best.predicted
        return {
            "topology": self.topology,
            "chip": self.chip,
            "chips": self.chips,
            "slices": self.slices,
            "step_s": found.step_s,
            "tokens_per_s": found.tokens_per_s,
            "usd_per_hour": self.usd_per_hour,
            "usd_per_million_tokens": self.usd_per_million_tokens,
            "chip_hours_per_million_tokens": self.chip_hours_per_million_tokens,
            "headroom": self.headroom,
            "peak_hbm_bytes": found.peak_hbm_bytes,
            "mfu": found.mfu,
            "bound_by": found.bound_by,
            "error": found.error,
            "domain": found.domain,
            "mesh": way.mesh.sizes,
            "remat": way.remat,
            "offload": list(way.offload),
            "microbatches": way.microbatches,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Front:
    """Every slice that was tried: unbeaten, beaten, or without a plan."""

    model: str
    num_params: int
    workload: Workload
    front: tuple[Slice, ...]
    """Unbeaten slices, fastest step first."""
    beaten: tuple[Slice, ...]
    infeasible: dict[str, str]
    """Slice -> why nothing works on it."""
    prices: Prices
    search_s: float

    @property
    def unpriced(self) -> tuple[str, ...]:
        """Chips that were planned and have no price."""
        known = self.prices.usd_per_chip_hour
        tried = {item.chip for item in (*self.front, *self.beaten)}
        return tuple(sorted(tried - known.keys()))

    def summary(self) -> dict[str, Any]:
        """The JSON of `plan --topology any --json`."""
        return {
            "model": {"name": self.model, "params": self.num_params},
            "batch": {
                "global": self.workload.global_batch,
                "seq_len": self.workload.seq_len,
            },
            "front": [item.summary() for item in self.front],
            "dominated": len(self.beaten),
            "infeasible": len(self.infeasible),
            "dominated_slices": [item.summary() for item in self.beaten],
            "infeasible_slices": self.infeasible,
            "prices": {
                "usd_per_chip_hour": self.prices.usd_per_chip_hour,
                "source": self.prices.source,
                "missing": list(self.unpriced),
            },
            "search_s": self.search_s,
        }
