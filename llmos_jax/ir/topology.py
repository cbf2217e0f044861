"""Topology: the chips of a machine and the links between them.

`hardware.parse_topology` makes it from a name such as `v5p:4x4x8` or `2*v6e:16x16`; the
planner reads it. A *device* is what JAX calls one: a v5p chip is one device, a tpu7x
chip two. A *slice* is a set of chips joined by ICI (or NVLink); slices meet over DCN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from llmos_jax.ir.artefact import Artefact

Vendor = Literal["tpu", "gpu", "cpu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """Facts of one kind of chip, per CHIP, with where each came from."""

    name: str
    vendor: Vendor
    devices_per_chip: int
    peak_flops_per_s: dict[str, float]
    hbm_bytes: float
    hbm_bytes_per_s: float
    link_bytes_per_s: float
    """One way over one ICI link (TPU), or the whole egress of one GPU over NVLink."""
    torus_dims: int
    """3 or 2 for a TPU torus; 0 where every chip reaches every other at full rate."""
    dcn_bytes_per_s: float
    """Per chip, to other slices or hosts."""
    matmul_efficiency: float
    """Share of peak that large matmuls reach in practice."""
    hbm_efficiency: float
    link_efficiency: float
    source: str
    matmul_tile: int = 128
    """Side of the matrix unit: attention over narrower heads leaves a part idle."""
    host_bytes_per_s: float = 1.5e10
    """Per chip, to host memory and back."""
    is_measured: bool = False
    """Whether the efficiencies were measured on the machine that is planned for."""

    def __hash__(self) -> int:
        """Lets what was derived from a chip be remembered; equality sees all fields."""
        return hash(self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology(Artefact):
    """`slices` equal slices, each `shape` chips."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1
    wraps: tuple[bool, ...] = ()
    """Which physical axes close into a ring."""

    @property
    def chips(self) -> int:
        """All chips."""
        return self.slices * math.prod(self.shape)

    @property
    def num_devices(self) -> int:
        """All JAX devices."""
        return self.chips * self.chip.devices_per_chip

    @property
    def devices_per_slice(self) -> int:
        """JAX devices of one slice."""
        return self.num_devices // self.slices

    @property
    def hbm_bytes_per_device(self) -> float:
        """Memory that one JAX device may use."""
        return self.chip.hbm_bytes / self.chip.devices_per_chip

    def peak_flops_per_s(self, dtype: str) -> float:
        """Peak of one JAX device for matmuls in `dtype`, or the nearest kind it has."""
        peaks = self.chip.peak_flops_per_s
        peak = peaks.get(dtype, peaks.get("bfloat16", min(peaks.values())))
        return peak / self.chip.devices_per_chip
