"""Turn a layout and a way into an Estimate: seconds per resource, and what they add to.

    compute  products and attention: forward, backward, and what is recomputed
    hbm      traffic between the products, of what is saved, and of the optimizer
    ici      weights, gradients, blocks of activations, keys, stages, inside a slice
    dcn      gradients and stages between slices
    host     saved tensors that wait in host memory

Compute and memory traffic take turns; a share of each kind of traffic over links hides
behind them (fitted.py), host traffic as far as there is work. The more slices, the
longer the slowest host is waited for.

A pipeline of P stages, M microbatches and R rounds takes M + (P - 1) / R turns of a
whole stage, idle ones too: layers, their traffic and the weights gathered for them
count so often. What goes from stage to stage is waited for, forward and back. `1f1b`
makes each stage's forward pass twice, and gathers for it once more.

Keys passed around a ring of C hide behind the attention to the keys that are there: a
hop costs what it takes beyond 1 / C of the attention, and its latency. Gathered keys
are waited for.

Known lies:
- XLA sums data-parallel gradients once per microbatch, but for a pipeline's.
- A share hides whatever else competes for the same links, and however small it is.
- Published steps that split a layer summed its outputs: the share that hides is fitted
  to that, not to gathers and scatters along the tokens.
- Between two agreements of replicas nothing is sent: what an agreement takes is spread
  over its steps.
- Prefill costs the whole head; nothing is batched over time.
- Calibrated on steps that experts had tuned, flags and kernels included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from llmos_jax.ir.facts import ticks_of
from llmos_jax.ir.plan import Candidate, Estimate, Way, saved_tensors
from llmos_jax.ir.topology import Topology
from llmos_jax.ir.workload import Workload
from llmos_jax.planner.collectives import Links
from llmos_jax.planner.compute import ATTENTION_BACKWARD, Work, hbm_rate, work_of
from llmos_jax.planner.decode import decode_s
from llmos_jax.planner.domain import domain_of
from llmos_jax.planner.fitted import FITTED, Fitted
from llmos_jax.planner.layout import Layout
from llmos_jax.planner.memory import Memory
from llmos_jax.planner.sizes import Sizes, model_flops
from llmos_jax.planner.stored import dtype_bytes
from llmos_jax.planner.traffic import Traffic, traffic_of

LAYER_S = 5e-5
"""Starting the kernels of one layer, there and back. A judgement: no row is so small
that it would tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    """What all ways on one mesh with as many microbatches have in common."""

    work: Work
    traffic: Traffic
    layers_s: float
    flops: float
    error: float | None
    domain: str


def estimate(
    layout: Layout,
    way: Way,
    memory: Memory,
    links: Links,
    sizes: Sizes,
    topology: Topology,
    workload: Workload,
    fitted: Fitted = FITTED,
) -> Candidate:
    """Return the way with what it is predicted to cost."""
    parts = way.microbatches
    facts = _facts_of(layout, links, sizes, topology, workload, parts, fitted)
    if workload.phase == "decode":
        seconds, step_s = decode_s(layout, links, sizes, topology, workload)
    else:
        seconds, step_s = _pass_s(facts, layout, way, topology, workload, fitted)
    per_chip = facts.flops / step_s / topology.chips
    peak = topology.peak_flops_per_s(workload.compute_dtype)
    return Candidate(
        way=way,
        predicted=Estimate(
            step_s=step_s,
            peak_hbm_bytes=sum(memory.values()),
            tflops_per_s_per_chip=per_chip / 1e12,
            mfu=per_chip / (peak * topology.chip.devices_per_chip),
            tokens_per_s=workload.tokens / step_s,
            bound_by=max(seconds, key=seconds.__getitem__),
            seconds=seconds,
            memory=memory,
            error=facts.error,
            domain=facts.domain,
            placement=links.placement,
        ),
    )


@lru_cache(maxsize=512)
def _facts_of(
    layout: Layout,
    links: Links,
    sizes: Sizes,
    topology: Topology,
    workload: Workload,
    parts: int,
    fitted: Fitted,
) -> _Facts:
    error, domain = domain_of(sizes, layout.mesh, topology, workload, parts)
    return _Facts(
        work=work_of(layout, sizes, topology, workload, parts, fitted),
        traffic=traffic_of(layout, links, sizes, topology, workload, parts),
        layers_s=LAYER_S * sizes.layers / layout.mesh.stage,
        flops=model_flops(sizes, workload),
        error=error,
        domain=domain,
    )


class _Sent(NamedTuple):
    """Seconds of a step's traffic over links, by how it hides."""

    weights: float
    blocks: float
    crossing: float
    keys: float
    keys_waited: float
    """Of `keys`, what attention does not hide."""
    stages: float
    """Waited for, as is what follows."""
    agreed: float
    agreed_crossing: float


def _pass_s(
    facts: _Facts,
    layout: Layout,
    way: Way,
    topology: Topology,
    workload: Workload,
    fitted: Fitted,
) -> tuple[dict[str, float], float]:
    """Seconds each resource is busy, and those of the step: training or prefill."""
    work, parts = facts.work, way.microbatches
    is_train = workload.phase == "train"
    saved = _saved(way.remat)
    turns = ticks_of(way) / way.rounds
    twice = _is_stage_twice(way, workload)
    is_head_twice = way.loss_tiles > 1 and way.loss_over == "vocab"
    compute_s = turns * work.layers_s(saved, is_train, twice)
    compute_s += parts * work.head_s(is_train, is_head_twice)
    hbm_s = turns * work.between_s(saved, way.remat == "none", is_train, twice)
    host_s = 0.0
    if is_train:
        hbm_s += parts * work.loss + _update_s(layout, way, topology, workload)
        host_s = parts * sum(facts.traffic.offloaded[name] for name in way.offload)
    sent = _sent(facts, layout, way, workload, saved)
    busy_s = compute_s + hbm_s
    hidden_s = (
        fitted.hidden_weights * min(sent.weights, busy_s)
        + fitted.hidden_parts * min(sent.blocks, busy_s)
        + fitted.hidden_crossing * min(sent.crossing, busy_s)
    )
    step_s = busy_s + sent.weights + sent.blocks + sent.crossing
    step_s -= min(hidden_s, busy_s)
    step_s += sent.keys_waited + sent.stages + sent.agreed + sent.agreed_crossing
    step_s += max(0.0, host_s - busy_s) + facts.layers_s * turns
    is_far = facts.traffic.stages.over == "dcn"
    seconds = {
        "compute": compute_s,
        "hbm": hbm_s,
        "ici": sent.weights + sent.blocks + sent.keys + sent.agreed,
        "dcn": sent.crossing + sent.agreed_crossing,
        "host": host_s,
    }
    seconds["dcn" if is_far else "ici"] += sent.stages
    return seconds, step_s * (1 + fitted.jitter * math.log2(topology.slices))


def _sent(
    facts: _Facts, layout: Layout, way: Way, workload: Workload, saved: frozenset[str]
) -> _Sent:
    """What a step sends: all its turns and microbatches."""
    traffic, parts, P = facts.traffic, way.microbatches, layout.mesh.stage
    ticks, turns = ticks_of(way), ticks_of(way) / way.rounds
    keys, keys_waited = _keys_s(facts, layout, way, workload, saved)
    stages = ticks * traffic.stages.sent
    if workload.phase != "train":
        return _Sent(
            weights=turns * traffic.weights,
            blocks=turns * (traffic.blocks + traffic.exchanged),
            crossing=0.0,
            keys=turns * keys,
            keys_waited=turns * keys_waited,
            stages=stages,
            agreed=0.0,
            agreed_crossing=0.0,
        )
    twice = _is_stage_twice(way, workload)
    # A pipeline adds gradients up where they are; see Known lies for the others.
    sums = 1 if P > 1 else parts
    blocks = traffic.blocks * (2 + _gathered_again(layout, way, saved) + twice)
    # Rows go to their experts again, and back for the router's gradient.
    blocks += traffic.exchanged * ((2 if way.remat == "none" else 3) + twice)
    shared = parts if twice else ticks
    stages = 2 * stages + 2 * shared * traffic.stages.shared + traffic.stages.staged
    stages += traffic.stages.moved * (way.schedule == "circular")
    return _Sent(
        weights=(3 + twice) * turns * traffic.weights + sums * traffic.sums,
        blocks=turns * blocks,
        crossing=sums * traffic.crossing,
        keys=turns * keys,
        keys_waited=turns * keys_waited,
        stages=stages,
        agreed=traffic.agreed,
        agreed_crossing=traffic.agreed_crossing,
    )


def _gathered_again(layout: Layout, way: Way, saved: frozenset[str]) -> float:
    """Of the two gathers and two scatters of a layer's forward pass, the share that its
    backward pass does again: sums, where nothing splits the tokens between blocks."""
    if layout.residual_ways == 1:
        return 0.0 if "out" in saved else 0.5
    return 0.5 * (way.remat != "none") + 0.25 * ("out" not in saved)


def _keys_s(
    facts: _Facts, layout: Layout, way: Way, workload: Workload, saved: frozenset[str]
) -> tuple[float, float]:
    """Seconds of one microbatch to exchange keys and values, and what of them is waited
    for: forward, once more where attention is remade, and back."""
    keys, C = facts.traffic.keys, layout.mesh.context
    is_train = workload.phase == "train"
    twice = _is_stage_twice(way, workload)
    remade = is_train * ("context" not in saved)
    if way.context_exchange == "gather":
        # A backward pass needs them gathered, whether or not attention is remade.
        whole = (1 + is_train + twice) * keys.gathered + is_train * keys.scattered
        return whole, whole
    forward = 1 + remade + twice
    back = keys.hop + keys.hop_back
    busy = (C - 1) * (forward * keys.hop + is_train * back)
    busy += is_train * keys.hop_back  # gradients end where their keys are
    piece = facts.work.forward["context"] / C
    waited = forward * max(0.0, keys.hop - piece)
    waited += is_train * max(0.0, back - ATTENTION_BACKWARD * piece)
    waited = (C - 1) * waited + is_train * keys.hop_back
    return busy, waited + (forward + is_train) * keys.latency


def _is_stage_twice(way: Way, workload: Workload) -> bool:
    is_pipeline = way.mesh.stage > 1 and workload.phase == "train"
    return is_pipeline and way.schedule == "1f1b"


@lru_cache(maxsize=256)
def _saved(remat: str) -> frozenset[str]:
    """What a policy saves; products that are no tensor by name count as dots."""
    saved = saved_tensors(remat)
    return saved | {"other"} if remat in ("none", "dots") else saved


def _update_s(
    layout: Layout, way: Way, topology: Topology, workload: Workload
) -> float:
    """Parameters, state and gradients are read; parameters and state are written."""
    state = workload.optimizer_moments * dtype_bytes(way.state_dtype)
    each = 3 * dtype_bytes(workload.param_dtype) + 2 * state
    return layout.sharded * each / hbm_rate(topology)
