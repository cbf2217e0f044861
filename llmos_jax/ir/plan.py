"""Plan: what the planner decided, what it predicts, and what it turned down.

The JSON form is the contract that scripts read (`plan --json`, plan.json): its keys are
fixed. `explain` lives in the planner, which knows why; the Plan itself is plain data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from llmos_jax.errors import ConfigError, did_you_mean
from llmos_jax.ir.artefact import Artefact, fingerprint_of
from llmos_jax.ir.params import ParamTable
from llmos_jax.ir.rules import MESH_AXES, Rules, Spec
from llmos_jax.ir.topology import Topology
from llmos_jax.ir.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshShape:
    """Sizes of the six mesh axes."""

    data: int = 1
    stage: int = 1
    fsdp: int = 1
    context: int = 1
    expert: int = 1
    tensor: int = 1

    @property
    def sizes(self) -> dict[str, int]:
        """Axis name -> size, in mesh order."""
        return {axis: getattr(self, axis) for axis in MESH_AXES}

    @property
    def num_devices(self) -> int:
        """Devices the mesh covers."""
        return math.prod(self.sizes.values())

    def __str__(self) -> str:
        used = [f"{axis}={size}" for axis, size in self.sizes.items() if size > 1]
        return " ".join(used) or "one device"


TENSORS = (
    "layer_input",
    "query",
    "key",
    "value",
    "context",
    "out",
    "ffn_gate",
    "ffn_up",
    "ffn_out",
)
"""Tensors of a layer that a backward pass may find saved, in the order they are made.
`query`, `key`, `value`, `out`, `ffn_gate`, `ffn_up`, `ffn_out` are what products with
weights give; `context` is what attention gives, with its log-sums."""

SCHEDULES = ("gpipe", "1f1b", "circular")
"""Orders in which pipeline stages take microbatches (lowering: training/pipeline.py).

- gpipe: all forward, then all backward (arXiv 1811.06965).
- 1f1b: backward as soon as it can be; at most 2 stages - 1 microbatches wait, whatever
  their number, and each stage's forward pass runs again for them (arXiv 2006.09503).
- circular: gpipe over `rounds` smaller chunks of layers per stage (arXiv 2104.04473,
  section 2.2), which divides the bubble by them.
"""

EXCHANGES = ("ring", "gather")
"""How the devices of a split sequence see each other's keys and values: passed around a
ring, block by block; or gathered first."""

REMATS: dict[str, frozenset[str]] = {
    "none": frozenset(TENSORS),
    "dots": frozenset(TENSORS) - {"context"},
    "attention": frozenset({"layer_input", "query", "key", "value", "context"}),
    "full": frozenset({"layer_input"}),
}
"""Named policies and what they save; `none` also saves what lies between."""


def saved_tensors(remat: str) -> frozenset[str]:
    """Return the tensors a policy saves: a name in REMATS, or a list with commas.

    Raises:
        ConfigError: a policy or a tensor that is not known.
    """
    if remat in REMATS:
        return REMATS[remat]
    names = [name.strip() for name in remat.split(",") if name.strip()]
    for name in names:
        if name not in TENSORS:
            raise ConfigError(
                f"plan.remat: {name!r} is no policy and no tensor of a layer."
                f"{did_you_mean(name, [*REMATS, *TENSORS])}"
            )
    return frozenset(names) | {"layer_input"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to run the step: everything the planner decides beside the specs.

    The defaults are the plainest way, on one device. What changes the numbers that a
    run computes (`state_dtype`, `gradient_dtype`) leaves float32 only when pinned.
    """

    mesh: MeshShape = MeshShape()
    microbatches: int = 1
    """Parts the global batch is cut into, one after another."""
    remat: str = "none"
    """What a backward pass finds saved: a name in REMATS, or tensors' names joined by
    commas."""
    offload: tuple[str, ...] = ()
    """Saved tensors, by name, that wait for the backward pass in host memory."""
    loss_tiles: int = 1
    """Parts that logits are made in, so that they are never whole."""
    loss_over: str = "tokens"
    """What the parts cut: `tokens`, with the head's gradient whole meanwhile; or
    `vocab`, with neither the head nor its gradient ever whole, and logits made
    twice."""
    state_dtype: str = "float32"
    """Of the optimizer's moments."""
    gradient_dtype: str = "float32"
    """Of gradients while they are summed over microbatches."""
    unrolled: bool = False
    """Whether the layers are written out instead of scanned."""
    schedule: str = "gpipe"
    """In which order pipeline stages take microbatches: one of SCHEDULES."""
    rounds: int = 1
    """Times each microbatch passes every stage: chunks of layers per stage. More than
    one only for `circular`."""
    context_exchange: str = "ring"
    """How keys and values of a split sequence travel: one of EXCHANGES."""

    def __str__(self) -> str:
        said = [str(self.mesh), f"remat={self.remat}"]
        if self.offload:
            said.append(f"offload={'+'.join(self.offload)}")
        said.append(f"microbatches={self.microbatches}")
        if self.mesh.stage > 1:
            said.append(f"schedule={self.schedule}")
            if self.rounds > 1:
                said.append(f"rounds={self.rounds}")
        if self.mesh.context > 1:
            said.append(f"context_exchange={self.context_exchange}")
        for name in ("state_dtype", "gradient_dtype"):
            if getattr(self, name) != "float32":
                said.append(f"{name}={getattr(self, name)}")
        return ", ".join(said)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What one candidate is predicted to cost, per JAX device and per step."""

    step_s: float
    peak_hbm_bytes: float
    tflops_per_s_per_chip: float
    mfu: float
    tokens_per_s: float
    bound_by: str
    seconds: dict[str, float]
    """Seconds each resource is busy: compute, hbm, ici, dcn, host."""
    memory: dict[str, float]
    """Bytes of each layer of the memory stack: params, optimizer, gradients, ..."""
    error: float | None = None
    """Relative error of `step_s` that nine of ten comparable published rows stay
    within; None outside the domain."""
    domain: str = ""
    """What supports the time: rows it was fitted to, or why nothing does."""
    placement: dict[str, str] = field(default_factory=dict)
    """Mesh axis -> the physical links that carry it, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to run the step, costed."""

    way: Way
    predicted: Estimate

    @property
    def mesh(self) -> MeshShape:
        """The mesh of the way."""
        return self.way.mesh

    @property
    def microbatches(self) -> int:
        """The microbatches of the way."""
        return self.way.microbatches

    @property
    def remat(self) -> str:
        """The rematerialisation policy of the way."""
        return self.way.remat


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """One way that was turned down, and why."""

    mesh: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pins:
    """Decisions the user made; the planner decides the rest."""

    mesh: dict[str, int] | None = None
    remat: str | None = None
    microbatches: int | None = None
    offload: tuple[str, ...] | None = None
    loss_tiles: int | None = None
    state_dtype: str | None = None
    gradient_dtype: str | None = None
    schedule: str | None = None
    rounds: int | None = None
    context_exchange: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(Artefact):
    """The chosen candidate with everything needed to lower it and to question it."""

    params: ParamTable
    topology: Topology
    workload: Workload
    rules: Rules
    chosen: Candidate
    specs: dict[str, Spec]
    """Parameter path -> how it is split."""
    runner_up: Candidate | None = None
    others: tuple[Candidate, ...] = ()
    """The fastest way of each mesh, remat and offload that fits, fastest first."""
    rejected: tuple[Rejected, ...] = ()
    candidates: int = 1
    search_s: float = 0.0
    compiled: dict[str, Any] | None = None

    @property
    def mesh(self) -> MeshShape:
        """The chosen mesh."""
        return self.chosen.mesh

    @property
    def way(self) -> Way:
        """The chosen way to run the step."""
        return self.chosen.way

    @property
    def offload(self) -> tuple[str, ...]:
        """Saved tensors that wait in host memory."""
        return self.chosen.way.offload

    @property
    def predicted(self) -> Estimate:
        """What the chosen candidate is predicted to cost."""
        return self.chosen.predicted

    @property
    def remat(self) -> str:
        """The rematerialisation policy, by name."""
        return self.chosen.remat

    @property
    def microbatches(self) -> int:
        """Parts the global batch is cut into, one after another."""
        return self.chosen.microbatches

    def partition_spec(self, path: str) -> Spec:
        """How parameter `path` is split; `jax.P(*spec)` makes it a PartitionSpec."""
        if path not in self.specs:
            raise ConfigError(
                f"the plan has no parameter {path!r}.{did_you_mean(path, self.specs)}"
            )
        return self.specs[path]

    @property
    def fingerprint(self) -> str:
        """Identity of the DECISION: inputs, mesh, microbatches, remat, offload, specs.

        Search time, rejected candidates and predictions do not count: a better cost
        model that decides the same gives the same fingerprint.
        """
        return fingerprint_of(
            {
                "params": self.params.fingerprint,
                "topology": self.topology.name,
                "workload": self.workload.to_json(),
                "rules": self.rules.fingerprint,
                "way": msgspec.to_builtins(self.way),
                "specs": {path: list(spec) for path, spec in self.specs.items()},
            }
        )

    def with_compiled(self, compiled: dict[str, Any]) -> Plan:
        """Return the same plan with what the compiler answered."""
        return replace(self, compiled=compiled)

    def explain(self) -> str:
        """Return the plan as the printed table.

        The planner holds the words; it registers them here so that this floor needs
        nothing from above.
        """
        from llmos_jax.planner.explain import explain  # the noun answers by its verb

        return explain(self)

    def summary(self) -> dict[str, Any]:
        """Return the contract's JSON: the keys that `plan --json` promises."""
        estimate = self.predicted
        devices = self.topology.num_devices
        return {
            "model": {
                "name": self.params.name,
                "params": self.params.num_params,
                "active_params": self.params.active_params,
            },
            "topology": {
                "name": self.topology.name,
                "chip": self.topology.chip.name,
                "devices": devices,
                "slices": self.topology.slices,
                "hbm_bytes_per_device": self.topology.hbm_bytes_per_device,
            },
            "mesh": self.mesh.sizes,
            "batch": {
                "global": self.workload.global_batch,
                "per_device": self.workload.global_batch / devices,
                "microbatches": self.microbatches,
                "seq_len": self.workload.seq_len,
            },
            "remat": self.remat,
            "offload": list(self.offload),
            "predicted": {
                "step_s": estimate.step_s,
                "peak_hbm_bytes": estimate.peak_hbm_bytes,
                "tflops_per_s_per_chip": estimate.tflops_per_s_per_chip,
                "mfu": estimate.mfu,
                "tokens_per_s": estimate.tokens_per_s,
                "bound_by": estimate.bound_by,
                "seconds": estimate.seconds,
                "memory": estimate.memory,
                "error": estimate.error,
                "domain": estimate.domain,
                "placement": estimate.placement,
            },
            "way": {
                "loss_tiles": self.way.loss_tiles,
                "loss_over": self.way.loss_over,
                "state_dtype": self.way.state_dtype,
                "gradient_dtype": self.way.gradient_dtype,
                "unrolled": self.way.unrolled,
                "schedule": self.way.schedule,
                "rounds": self.way.rounds,
                "context_exchange": self.way.context_exchange,
            },
            "compiled": self.compiled,
            "runner_up": _candidate_json(self.runner_up),
            "rejected": [
                {"mesh": item.mesh, "reason": item.reason} for item in self.rejected
            ],
            "candidates": self.candidates,
            "search_s": self.search_s,
            "fingerprint": self.fingerprint,
        }


def _candidate_json(candidate: Candidate | None) -> dict[str, Any] | None:
    if candidate is None:
        return None
    return {
        "mesh": candidate.mesh.sizes,
        "microbatches": candidate.microbatches,
        "remat": candidate.remat,
        "offload": list(candidate.way.offload),
        "step_s": candidate.predicted.step_s,
        "peak_hbm_bytes": candidate.predicted.peak_hbm_bytes,
        "mfu": candidate.predicted.mfu,
        "bound_by": candidate.predicted.bound_by,
    }
