"""Rules: how a family of models MAY be split, logical axis by logical axis.

`rules.load_rules` reads one from sharding_rules/, `rules.resolve` applies it to a mesh.
configs say what to run; sharding_rules say what may be split; a Plan says what was
chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmos_jax.ir.artefact import Artefact, fingerprint_of

MESH_AXES = ("data", "stage", "fsdp", "context", "expert", "tensor")
"""The six mesh axes, always in this order."""

Spec = tuple[str | tuple[str, ...] | None, ...]
"""One entry per array dimension: the mesh axes that split it, or None. It has the
form of a jax PartitionSpec without needing jax: `jax.P(*spec)`."""


def mesh_axes_in(spec: Spec) -> tuple[str, ...]:
    """All mesh axes that a Spec names, in its order."""
    return tuple(
        axis
        for entry in spec
        for axis in ((entry,) if isinstance(entry, str) else entry or ())
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules(Artefact):
    """Each logical axis with the mesh axes that split it, major first."""

    family: str
    weights: dict[str, tuple[str, ...]]
    activations: dict[str, tuple[str, ...]]
    uneven: Literal["error", "replicate"] = "error"
    """What to do with a dimension the chosen axes do not divide."""
    repeat: tuple[str, ...] = ()
    """Logical axes of which several devices may hold the same part, where their mesh
    axes have more devices than they have parts: 8 heads over tensor=16."""
    source: str = ""

    @property
    def fingerprint(self) -> str:
        """Identity of what the rules SAY: the file they came from does not count."""
        plain = self.to_json()
        del plain["source"]
        return fingerprint_of(plain)

    def mesh_axes_used(self) -> tuple[str, ...]:
        """Mesh axes that at least one rule names, in mesh order."""
        named = {
            axis
            for section in (self.weights, self.activations)
            for axes in section.values()
            for axis in axes
        }
        return tuple(axis for axis in MESH_AXES if axis in named)
