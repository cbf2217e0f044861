"""What a search is asked, and what its passes have found: plain data between them."""

from __future__ import annotations

from dataclasses import dataclass

from llmos_jax.ir.params import ParamTable
from llmos_jax.ir.plan import Candidate, Pins, Rejected, Way
from llmos_jax.ir.rules import Rules
from llmos_jax.ir.topology import Topology
from llmos_jax.ir.workload import Workload
from llmos_jax.planner.layout import Layout
from llmos_jax.planner.memory import Memory
from llmos_jax.planner.sizes import Sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuted:
    """A way that the compiler turned down."""

    way: Way
    needed_bytes: float
    memory: Memory
    """What was estimated."""

    @property
    def growth(self) -> float:
        """Needed over estimated, at least 1, of what is not kept between steps."""
        kept = kept_bytes(self.memory)
        estimated = sum(self.memory.values()) - kept
        return max(1.0, (self.needed_bytes - kept) / max(1.0, estimated))


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The four inputs, and the sizes read off the first."""

    table: ParamTable
    topology: Topology
    workload: Workload
    rules: Rules
    sizes: Sizes
    pins: Pins
    refuted: tuple[Refuted, ...] = ()
    """What the compiler said to earlier choices."""

    def growth(self, way: Way) -> float:
        """How much more than estimated the compiler needed, at worst, for ways that
        save and offload the same."""
        return max(
            (
                item.growth
                for item in self.refuted
                if (item.way.remat, item.way.offload) == (way.remat, way.offload)
            ),
            default=1.0,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sized:
    """A way with its layout and its memory stack."""

    way: Way
    layout: Layout
    memory: Memory

    @property
    def peak_bytes(self) -> float:
        return sum(self.memory.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """What became of some meshes."""

    layouts: list[Layout]
    sized: list[list[Sized]]
    costed: list[Candidate]
    rejected: tuple[Rejected, ...]
    too_slow: list[Rejected]

    def then(self, other: Tried) -> Tried:
        """Both together, the other's last."""
        return Tried(
            layouts=self.layouts + other.layouts,
            sized=self.sized + other.sized,
            costed=self.costed + other.costed,
            rejected=self.rejected + other.rejected,
            too_slow=self.too_slow + other.too_slow,
        )


def kept_bytes(memory: Memory) -> float:
    """Weights and optimizer state, whose size is beyond doubt."""
    return memory.get("params", 0.0) + memory.get("optimizer", 0.0)
