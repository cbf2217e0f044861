"""Turn a machine and pins into meshes, and a mesh into ways to run the step on it.

Every axis may be pinned to anything. What is tried where nothing is pinned, and why:

- data, fsdp, tensor: always, in every size. Experts' own choices are nearly all pure
  FSDP (of 66 configurations in MaxText's benchmarks/, 54 are, and 6 split a layer).
- stage: across slices, where it replaces sums of gradients over DCN; MaxText's guide
  (docs/guides/optimization/sharding.md) advises it only there, for small batches.
- context: where there are fewer sequences than devices, so that fsdp cannot have them
  all, or where a sequence is long.
- expert: where there are experts.
- stage and context anywhere, when nothing else fits.

A mesh has at most one of these three unasked, for there is no published row with two;
`data` then only joins the slices: within one, `fsdp` does the same with less memory. On
stages every schedule is tried, a few rounds, and a few multiples of the stages as
microbatches: more of them make the bubble smaller and gather weights more often. On
contexts both exchanges are tried.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from llmos_jax.ir.plan import (
    EXCHANGES,
    SCHEDULES,
    MeshShape,
    Pins,
    Way,
    saved_tensors,
)
from llmos_jax.ir.rules import Rules
from llmos_jax.ir.topology import Topology
from llmos_jax.ir.workload import Workload
from llmos_jax.planner.compute import BLOCK
from llmos_jax.planner.sizes import Sizes

SEARCHED = ("data", "fsdp", "tensor")
"""Axes of which every size is tried."""

LONG = 32768
"""Tokens of a sequence from which on it may be worth splitting. A judgement: published
rows with `context` have 131072, all at 8192 and below have none."""

MOST_STAGES = 16
"""Tried when nothing else fits. A judgement: 16 stages idle a third of the time even
with 32 microbatches."""

MOST_ROUNDS = 8
"""Most rounds of a circular schedule that are tried. A judgement: each round sends as
many activations as a whole `gpipe`."""

MOST_TURNS = 16
"""Most microbatches per stage that are tried: bubbles are below 6 % then."""

POLICIES: dict[str, tuple[tuple[str, ...], ...]] = {
    "none": ((),),
    "dots": ((),),
    "attention": ((),),
    "full": ((), ("layer_input",)),
}
"""Remat policies that are tried, from most saved to least, each with what may wait in
host memory meanwhile. MaxText's hand-tuned configurations offload the layer's input
first (benchmarks/maxtext_trillium_model_configs.py). More can be pinned: with queries,
keys, values and context too, llama3_8b on v6e:2x4, 24 x 8192, was estimated at 24.2 GiB
and needed 32.3 by the compiler's word (`plan --verify compile`)."""

ALIASES = {"minimal": "dots", "nothing": "full", "everything": "none"}
"""Names that MaxText and AXLearn give to the same policies."""

HEAD_BYTES = 2**30
"""Float32 gradient of one device's head that may exist whole while the loss is cut by
tokens; beyond, it is cut by the vocabulary, which makes the logits twice: 2 D V more
FLOPs a token beside the step's 6 N. A judgement."""

TILE_BYTES = 512 * 2**20
"""Float32 logits of one device that may exist at one time; beyond, the loss is tiled.
A judgement: small beside 16 GiB, large enough that each tile is a full-sized matmul."""


def remat_named(name: str) -> str:
    """Return our name of a policy that other systems call otherwise."""
    return ALIASES.get(name, name)


Sparse = Mapping[str, tuple[int, ...]]
"""Mesh axis that is not in SEARCHED -> sizes above 1 that are tried."""


def usual_axes(
    sizes: Sizes, topology: Topology, workload: Workload, rules: Rules
) -> Sparse:
    """Return what is tried beside SEARCHED on any question; see the module's list."""
    if workload.phase != "train":
        return {}
    found: dict[str, tuple[int, ...]] = {}
    slices, devices = topology.slices, topology.num_devices
    if "stage" in rules.weights.get("layers", ()):
        found["stage"] = _common(slices, sizes.layers)
    if workload.global_batch < devices or workload.seq_len >= LONG:
        found["context"] = _contexts(devices, workload, rules)
    if sizes.experts and "expert" in rules.weights.get("experts", ()):
        found["expert"] = _common(devices, sizes.experts)
    return found


def last_axes(
    sizes: Sizes, topology: Topology, workload: Workload, rules: Rules
) -> Sparse:
    """Return what is tried when nothing else fits."""
    if workload.phase != "train":
        return {}
    found = {"context": _contexts(topology.num_devices, workload, rules)}
    if "stage" in rules.weights.get("layers", ()):
        stages = _common(topology.num_devices, sizes.layers)
        found["stage"] = tuple(size for size in stages if size <= MOST_STAGES)
    return found


def _contexts(devices: int, workload: Workload, rules: Rules) -> tuple[int, ...]:
    """Ways to cut a sequence into pieces that attention's blocks still fill."""
    if "context" not in rules.activations.get("seq", ()):
        return ()
    ways = _common(devices, workload.seq_len // 2) if workload.seq_len % 2 == 0 else ()
    return tuple(size for size in ways if workload.seq_len // size >= BLOCK)


def _common(one: int, other: int) -> tuple[int, ...]:
    """Divisors of both, above 1."""
    return tuple(_divisors(math.gcd(one, other))[1:])


def enumerate_meshes(
    topology: Topology, pins: Pins, sparse: Sparse | None = None
) -> list[MeshShape]:
    """Return every mesh over all devices that agrees with the pins: in every size along
    SEARCHED, and along at most one axis of `sparse` beside."""
    pinned = pins.mesh or {}
    fixed = {axis: n for axis, n in pinned.items() if axis not in SEARCHED}
    tried = [(axis, ways) for axis, ways in (sparse or {}).items() if axis not in fixed]
    wider = [{**fixed, axis: size} for axis, ways in tried for size in ways]
    meshes = list(_filled(topology.num_devices, MeshShape(**fixed)))
    for sizes in wider:
        mesh = MeshShape(**sizes)
        joined = topology.slices // math.gcd(mesh.stage, topology.slices)
        data = pinned.get("data", joined)
        filled = _filled(topology.num_devices, mesh)
        meshes += [mesh for mesh in filled if mesh.data == data]
    return [
        mesh
        for mesh in meshes
        if all(mesh.sizes[axis] == size for axis, size in pinned.items())
    ]


def _filled(num_devices: int, fixed: MeshShape) -> Iterator[MeshShape]:
    """The mesh with all devices that are left along SEARCHED, in every way."""
    if num_devices % fixed.num_devices:
        return
    devices = num_devices // fixed.num_devices
    for tensor in _divisors(devices):
        for ways in _divisors(devices // tensor):
            data = devices // ways // tensor
            yield replace(fixed, data=data, fsdp=ways, tensor=tensor)


def ways_of(
    mesh: MeshShape,
    layers: int,
    share: int,
    logit_bytes: float,
    head_bytes: float,
    topology: Topology,
    workload: Workload,
    pins: Pins,
) -> Iterator[list[Way]]:
    """Yield the ways to run on `mesh`, in groups that differ in microbatches alone.

    Within a group the first is the fastest and the last takes the least memory. In a
    pipeline no order is known: each way is a group.

    Args:
        mesh: a mesh of all devices.
        layers: of the model, or patterns of layers: what a pipeline may cut between.
        share: sequences of the batch that each replica has.
        logit_bytes: float32 logits of one device for one sequence.
        head_bytes: the head of one device, gathered, in float32.
        topology: a CPU has no other memory to offload to.
        workload: only training has something to save or to cut.
        pins: decisions already made.
    """
    if workload.phase != "train":
        yield [Way(mesh=mesh)]
        return
    counts = microbatch_counts(mesh.stage, share, pins)
    for (remat, offload), (schedule, rounds), exchange in itertools.product(
        _policies(topology, pins, mesh.stage),
        _schedules(mesh.stage, layers, pins),
        _exchanges(mesh.context, pins),
    ):
        # Where all microbatches have left the pipeline before the loss, it is one.
        is_one_loss = mesh.stage > 1 and schedule != "1f1b"
        group = [
            Way(
                mesh=mesh,
                remat=remat,
                offload=offload,
                microbatches=count,
                loss_tiles=pins.loss_tiles
                or _tiles(share / (1 if is_one_loss else count) * logit_bytes),
                loss_over="tokens" if head_bytes <= HEAD_BYTES else "vocab",
                state_dtype=pins.state_dtype or "float32",
                gradient_dtype=pins.gradient_dtype or "float32",
                schedule=schedule,
                rounds=rounds,
                context_exchange=exchange,
            )
            for count in counts
        ]
        yield from [group] if mesh.stage == 1 else ([way] for way in group)


def microbatch_counts(stages: int, share: int, pins: Pins) -> list[int]:
    """Microbatches to try: a pipeline needs a multiple of its stages."""
    if pins.microbatches:
        return [pins.microbatches] if pins.microbatches % stages == 0 else []
    most = share if stages == 1 else min(share, MOST_TURNS * stages)
    powers = (stages << power for power in range(most.bit_length()))
    return [count for count in powers if count <= most and share % count == 0]


def _schedules(stages: int, layers: int, pins: Pins) -> list[tuple[str, int]]:
    """(schedule, rounds) pairs to try."""
    if stages == 1:
        return [("gpipe", 1)]
    found = [(name, 1) for name in SCHEDULES if name != "circular"]
    chunks = _divisors(layers // stages)
    rounds = [part for part in chunks if 1 < part <= MOST_ROUNDS] or chunks[1:2]
    found += [("circular", count) for count in rounds]
    if pins.schedule is None:
        return found
    if pins.rounds is not None:
        return [(pins.schedule, pins.rounds)]
    # One layer a stage has one round only.
    named = [pair for pair in found if pair[0] == pins.schedule]
    return named or [(pins.schedule, 1)]


def _exchanges(contexts: int, pins: Pins) -> tuple[str, ...]:
    if contexts == 1:
        return ("ring",)
    return (pins.context_exchange,) if pins.context_exchange else EXCHANGES


def _policies(
    topology: Topology, pins: Pins, stages: int
) -> list[tuple[str, tuple[str, ...]]]:
    """(remat, offload) pairs to try.

    A pipeline offloads nothing: libtpu 0.0.42 refuses its program ("The async-start
    expects the shape of operand 0 to match", llama3_8b, v5e:4x4, stage=4 fsdp=4).
    """
    if pins.remat is not None:
        remat = remat_named(pins.remat)
        tried = {remat: POLICIES.get(remat, ((),))}
    else:
        tried = POLICIES
    can_offload = topology.chip.vendor != "cpu" and stages == 1
    if pins.offload is not None:
        if pins.offload and stages > 1:
            return []
        return [(name, pins.offload) for name in tried if _saves(name, pins.offload)]
    return [
        (name, offload)
        for name, choices in tried.items()
        for offload in choices
        if not offload or can_offload
    ]


def _saves(remat: str, offload: tuple[str, ...]) -> bool:
    return set(offload) <= saved_tensors(remat)


def _tiles(logit_bytes: float) -> int:
    """The power of two that cuts this device's logits to at most TILE_BYTES."""
    return 1 << max(0, math.ceil(math.log2(max(1.0, logit_bytes / TILE_BYTES))))


def _divisors(number: int) -> list[int]:
    low = [small for small in range(1, math.isqrt(number) + 1) if number % small == 0]
    return sorted({*low, *(number // small for small in low)})
