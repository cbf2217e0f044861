"""Turn a layout and a way into an Estimate: seconds per resource, and what they add to.

    compute  products and attention: forward, backward, and what is recomputed
    hbm      traffic between the products, of what is saved, and of the optimizer
    ici      weights, gradients, blocks of activations, inside a slice
    dcn      gradients between slices
    host     saved tensors that wait in host memory

Compute and memory traffic take turns; a share of each kind of traffic over links hides
behind them (fitted.py), host traffic as far as there is work. A pipeline of P stages
waits (P - 1) / M more. The more slices, the longer the slowest host is waited for.

Known lies:
- XLA sums data-parallel gradients once per microbatch, but for a pipeline's.
- A share hides whatever else competes for the same links, and however small it is.
- Prefill costs the whole head; nothing is batched over time.
- Calibrated on steps that experts had tuned, flags and kernels included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from llmos_jax.ir.plan import Candidate, Estimate, Way, saved_tensors
from llmos_jax.ir.topology import Topology
from llmos_jax.ir.workload import Workload
from llmos_jax.planner.collectives import Links
from llmos_jax.planner.compute import Work, hbm_rate, work_of
from llmos_jax.planner.decode import decode_s
from llmos_jax.planner.domain import domain_of
from llmos_jax.planner.fitted import FITTED, Fitted
from llmos_jax.planner.layout import Layout, dtype_bytes
from llmos_jax.planner.memory import Memory
from llmos_jax.planner.sizes import Sizes, model_flops
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


def _pass_s(
    facts: _Facts,
    layout: Layout,
    way: Way,
    topology: Topology,
    workload: Workload,
    fitted: Fitted,
) -> tuple[dict[str, float], float]:
    """Seconds each resource is busy, and those of the step: training or prefill."""
    work, traffic, parts = facts.work, facts.traffic, way.microbatches
    is_train = workload.phase == "train"
    saved = _saved(way.remat)
    turns = parts + layout.mesh.stage - 1
    is_head_twice = way.loss_tiles > 1 and way.loss_over == "vocab"
    compute_s = turns * work.compute_s(saved, is_train, is_head_twice)
    hbm_s = turns * work.traffic_s(saved, way.remat == "none", is_train)
    weights_s, crossing_s, host_s = traffic.weights, 0.0, 0.0
    blocks_s = traffic.blocks + traffic.exchanged
    permuted_s = traffic.permuted
    if is_train:
        hbm_s += _update_s(layout, way, topology, workload)
        # A pipeline adds gradients up where they are; see Known lies for the others.
        sums = 1 if layout.mesh.stage > 1 else parts
        weights_s = 3 * traffic.weights + traffic.sums * sums / parts
        crossing_s = traffic.crossing * sums
        blocks_s = traffic.blocks * (2 if "out" in saved else 2.5)
        blocks_s += traffic.exchanged * (2 if "ffn_up" in saved else 2.5)
        permuted_s = 2 * traffic.permuted
        host_s = parts * sum(traffic.offloaded[name] for name in way.offload)
    weights_s *= parts
    blocks_s = blocks_s * parts + permuted_s * turns
    busy_s = compute_s + hbm_s
    hidden_s = (
        fitted.hidden_weights * min(weights_s, busy_s)
        + fitted.hidden_parts * min(blocks_s, busy_s)
        + fitted.hidden_crossing * min(crossing_s, busy_s)
    )
    step_s = busy_s + weights_s + blocks_s + crossing_s - min(hidden_s, busy_s)
    step_s += max(0.0, host_s - busy_s) + facts.layers_s * turns
    seconds = {
        "compute": compute_s,
        "hbm": hbm_s,
        "ici": weights_s + blocks_s,
        "dcn": crossing_s,
        "host": host_s,
    }
    return seconds, step_s * (1 + fitted.jitter * math.log2(topology.slices))


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
