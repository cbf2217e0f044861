"""Turn the name of a machine, or what JAX reports of one, into a Topology."""

from llmos_jax.hardware.chips import CHIPS, chip
from llmos_jax.hardware.slices import (
    legal_topologies,
    next_slices,
    parse_topology,
    topology_of_devices,
)

__all__ = [
    "CHIPS",
    "chip",
    "legal_topologies",
    "next_slices",
    "parse_topology",
    "topology_of_devices",
]
