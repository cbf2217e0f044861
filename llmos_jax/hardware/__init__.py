"""Turn the name of a machine, or what JAX reports of one, into a Topology."""

from llmos_jax.hardware.chips import CHIPS, chip
from llmos_jax.hardware.slices import parse_topology, topology_of_devices

__all__ = ["CHIPS", "chip", "parse_topology", "topology_of_devices"]
