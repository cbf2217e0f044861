"""The nouns: frozen artefacts that one stage makes and another reads.

Read them in the order of the flow: ModelSpec and ParamTable, Topology, Workload, Rules,
then the Plan that joins them.
"""

from llmos_jax.ir.artefact import Artefact, fingerprint_of
from llmos_jax.ir.model import ModelSpec, RopeScaling
from llmos_jax.ir.params import ParamRow, ParamTable
from llmos_jax.ir.plan import Candidate, Estimate, MeshShape, Pins, Plan, Rejected
from llmos_jax.ir.report import ReportRow
from llmos_jax.ir.rules import MESH_AXES, Rules, Spec
from llmos_jax.ir.topology import Chip, Topology
from llmos_jax.ir.workload import Phase, Workload

__all__ = [
    "MESH_AXES",
    "Artefact",
    "Candidate",
    "Chip",
    "Estimate",
    "MeshShape",
    "ModelSpec",
    "ParamRow",
    "ParamTable",
    "Phase",
    "Pins",
    "Plan",
    "Rejected",
    "ReportRow",
    "RopeScaling",
    "Rules",
    "Spec",
    "Topology",
    "Workload",
    "fingerprint_of",
]
