"""A Bundle: all that serving a model needs, in one folder that checks itself."""

from llmos_jax.bundle.arrays import StoredArrays, write_arrays
from llmos_jax.bundle.machine import (
    Machine,
    OpenedMachine,
    find_machine,
    write_machine,
)
from llmos_jax.bundle.manifest import (
    MACHINES,
    PORTABLE,
    Bundle,
    FileFacts,
    PortableProgram,
)
from llmos_jax.bundle.opened import (
    OpenedBundle,
    inspect,
    is_bundle,
    open_bundle,
    write_bundle,
)

__all__ = [
    "MACHINES",
    "PORTABLE",
    "Bundle",
    "FileFacts",
    "Machine",
    "OpenedBundle",
    "OpenedMachine",
    "PortableProgram",
    "StoredArrays",
    "find_machine",
    "inspect",
    "is_bundle",
    "open_bundle",
    "write_arrays",
    "write_bundle",
    "write_machine",
]
