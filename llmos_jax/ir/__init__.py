"""The nouns: frozen artefacts that one stage makes and another reads.

Read them in the order of the flow: ModelSpec and ParamTable, Topology, Workload, Rules,
then the Plan that joins them.
"""

from llmos_jax.ir.artefact import Artefact, fingerprint_of
from llmos_jax.ir.facts import SECTIONS, Facts, axes_text, facts_of, facts_of_summary
from llmos_jax.ir.front import Front, Prices, Slice
from llmos_jax.ir.lock import PlanLock, fidelity_of, lock_of
from llmos_jax.ir.model import (
    CLASSIFIERS,
    LORA_TARGETS,
    Classes,
    Lora,
    ModelSpec,
    Quantization,
    RopeScaling,
)
from llmos_jax.ir.neighbour import Neighbour
from llmos_jax.ir.params import ParamRow, ParamTable
from llmos_jax.ir.plan import (
    EXCHANGES,
    REMATS,
    SCHEDULES,
    TENSORS,
    Candidate,
    Estimate,
    MeshShape,
    Pins,
    Plan,
    Rejected,
    Way,
    saved_tensors,
)
from llmos_jax.ir.report import ReportRow
from llmos_jax.ir.rules import MESH_AXES, Rules, Spec, mesh_axes_in
from llmos_jax.ir.topology import Chip, Topology
from llmos_jax.ir.workload import Phase, Workload

__all__ = [
    "CLASSIFIERS",
    "EXCHANGES",
    "LORA_TARGETS",
    "MESH_AXES",
    "REMATS",
    "SCHEDULES",
    "SECTIONS",
    "TENSORS",
    "Artefact",
    "Candidate",
    "Chip",
    "Classes",
    "Estimate",
    "Facts",
    "Front",
    "Lora",
    "MeshShape",
    "ModelSpec",
    "Neighbour",
    "ParamRow",
    "ParamTable",
    "Phase",
    "Pins",
    "Plan",
    "PlanLock",
    "Prices",
    "Quantization",
    "Rejected",
    "ReportRow",
    "RopeScaling",
    "Rules",
    "Slice",
    "Spec",
    "Topology",
    "Way",
    "Workload",
    "axes_text",
    "facts_of",
    "facts_of_summary",
    "fidelity_of",
    "fingerprint_of",
    "lock_of",
    "mesh_axes_in",
    "saved_tensors",
]
